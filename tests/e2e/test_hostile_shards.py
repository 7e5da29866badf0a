"""A run on hostile shards ends well under `skip`, with every fault counted and named; `fail` stops with the key."""

import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import pytest

from mimo_gemma4.errors import DataError
from tests.dist.harness import run_ranks
from tests.e2e.training_runs import Outcome, step_records, train_on_rank, write_config
from tests.shard_maker import chat, jpeg, png, write_shard

LAYOUT = {"vision": {"ranks": 1}, "language": {"ranks": 2}}
GOOD = 20


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def image_sample(key: str, picture: bytes, extension: str = "jpg") -> dict[str, bytes]:
    return {f"{key}.json": chat("?", "yes", "image"), f"{key}.0.{extension}": picture}


CUT = jpeg(96, 48, 77)[: len(jpeg(96, 48, 77)) // 2]
"""Its header is whole, so that only decoding finds the fault."""
FAULTS: dict[str, tuple[str, dict[str, bytes]]] = {
    "wrong-json": ("json", {"wrong-json.json": b"{", "wrong-json.0.jpg": jpeg(48, 48)}),
    "deep-json": ("json", {"deep-json.json": b"[" * 200_000}),
    "surrogate": ("json", {"surrogate.json": chat("?", "no").replace(b"?", b"\\ud800")}),
    "no-image": ("members", {"no-image.json": chat("?", "no", "image")}),
    "no-json": ("members", {"no-json.0.jpg": jpeg(48, 48)}),
    "endless-name": ("members", {"endless-name" + "x" * 9000 + ".json": chat("?", "no")}),
    "no-picture": ("image", image_sample("no-picture", b"not a picture")),
    "bomb": ("bomb", image_sample("bomb", bomb(), "png")),
    "too-many-soft-tokens": (
        "length",
        {"too-many-soft-tokens.json": chat("?", "no", *["image"] * 120)}
        | {f"too-many-soft-tokens.{number}.png": png(48, 48, 9) for number in range(120)},
    ),
    "too-long": ("length", {"too-long.json": chat("?" * 400, "no")}),
    "cut-0": ("image", image_sample("cut-0", CUT)),
    "cut-1": ("image", image_sample("cut-1", CUT)),
}
HOSTILE_NAMES = ["../../../../../../tmp/escaped", "/tmp/escaped", "a\nb", "~root/x"]
"""Keys of good samples."""


def write_corpus(folder: Path) -> None:
    good: dict[str, bytes] = {}
    for number in range(GOOD):
        good |= image_sample(f"good-{number}", jpeg(96, 48, number))
    for name in HOSTILE_NAMES:
        good[f"{name}.json"] = chat("?", "no")
    write_shard(folder / "0-good.tar", good)
    write_shard(folder / "1-faults.tar", {name: data for _, part in FAULTS.values() for name, data in part.items()})
    (folder / "2-empty.tar").touch()
    whole = write_shard(folder / "3-cut.tar", image_sample("whole", jpeg(96, 48, 50)) | image_sample("half", CUT * 9))
    whole.write_bytes(whole.read_bytes()[: -len(CUT * 9) // 2 - 10_240])
    (folder / "4-garbage.tar").write_bytes(b"garbage" * 1000)
    with tarfile.open(folder / "5-links.tar", "w") as tar:
        for name, kind in (("link.0.jpg", tarfile.SYMTYPE), ("device.0.jpg", tarfile.CHRTYPE)):
            document = tarfile.TarInfo(name.replace(".0.jpg", ".json"))
            content = chat("?", "no", "image")
            document.size = len(content)
            tar.addfile(document, io.BytesIO(content))
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)


def run(folder: Path, *arguments: str) -> list[Outcome]:
    config = write_config(
        folder,
        folder / "*.tar",
        layout=LAYOUT,
        data={"on_bad_sample": "skip", "max_bad_fraction": 0.6, "packing": True},
        train={"steps": 6, "global_batch_size": 5},
    )
    return run_ranks(3, train_on_rank, [config, *arguments], timeout=90)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path)
    return tmp_path


def test_every_fault_is_skipped_counted_and_named(corpus: Path) -> None:
    before = set(Path("/tmp").glob("escaped*"))
    outcomes = run(corpus)
    assert [outcome.error for outcome in outcomes] == [None] * 3, outcomes
    records = step_records(corpus / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    # Thirty places are one pass over the 27 numbered samples (20 good ones, the names, "whole", two that are cut) and
    # three of the next: each cut one is met once or twice.
    replaced = sum((Counter(record["bad_samples"]) for record in records), Counter())
    assert set(replaced) == {"image"} and replaced["image"] >= 2
    logged = [json.loads(line) for line in (corpus / "run" / "bad_samples.jsonl").read_text().splitlines()]
    found = {(Path(record["shard"]).name, record["key"][:12]): record["fault"] for record in logged}
    expected = {("1-faults.tar", key[:12]): fault for key, (fault, _) in FAULTS.items()}
    expected |= {("5-links.tar", "link"): "members", ("5-links.tar", "device"): "members"}
    expected |= {(name, ""): "tar" for name in ("2-empty.tar", "3-cut.tar", "4-garbage.tar")}
    assert found == expected and len(logged) == len(expected)
    assert {record["key"] for record in logged if record["step"]} == {"cut-0", "cut-1"}
    assert set(Path("/tmp").glob("escaped*")) == before, "names are data, never paths"


@pytest.mark.parametrize("key", ["wrong-json", "no-image", "bomb", "too-long", "cut-0"])
def test_fail_stops_at_the_first_with_its_key(tmp_path: Path, key: str) -> None:
    members: dict[str, bytes] = {}
    for number in range(4):
        members |= image_sample(f"good-{number}", jpeg(96, 48, number))
    shard = write_shard(tmp_path / "train.tar", members | FAULTS[key][1])
    outcomes = run(tmp_path, "data.on_bad_sample=fail")
    for outcome in outcomes:
        assert outcome.error is DataError, outcome
        assert f"{shard}: __key__ '{key}'" in outcome.message and "data.on_bad_sample=skip" in outcome.message


def test_a_run_whose_data_are_mostly_bad_stops(corpus: Path) -> None:
    outcomes = run(corpus, "data.max_bad_fraction=0.1")
    for outcome in outcomes:
        assert outcome.error is DataError and "data.max_bad_fraction=0.1 allows" in outcome.message
