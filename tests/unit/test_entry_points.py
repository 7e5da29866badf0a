"""A package outside the repository adds an encoder, a decoder and a kind of data source; a broken one is named."""

import json
import re
import sys
import tarfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from mimo_gemma4.cli.__main__ import main
from mimo_gemma4.data.convert.sources import open_sources
from mimo_gemma4.decoders.registry import build_decoder, build_target_processors, registered_decoders
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.registry import build_encoder, build_processor, registered_encoders
from mimo_gemma4.errors import ConfigError, DataError
from mimo_gemma4.media import MediaHeader
from tests.dist.harness import run_ranks

MODULE = '''
    import csv
    from dataclasses import dataclass, replace

    from mimo_gemma4.decoders.pixel_regression import PixelRegression
    from mimo_gemma4.encoders.base import Encoder
    from mimo_gemma4.encoders.siglip import SiglipEncoder


    class OtherEncoder(SiglipEncoder):
        architecture = "other_vision"


    class Clash(SiglipEncoder):
        """Of the architecture that it inherits."""


    class OtherDecoder(PixelRegression):
        architecture = "other_decoder"


    @dataclass(frozen=True)
    class CsvRows:
        path: str
        start: int
        stop: int

        def __len__(self):
            return self.stop - self.start

        def __iter__(self):
            with open(self.path, newline="") as file:
                for number, row in enumerate(csv.DictReader(file)):
                    if self.start <= number < self.stop:
                        yield f"line {number}", row

        def cut(self, start, stop):
            return replace(self, start=self.start + start, stop=self.start + stop)

        @property
        def version(self):
            return self.path


    def open_csv(path, split):
        if path.suffix != ".csv":
            return None
        with open(path, newline="") as file:
            return [CsvRows(str(path), 0, sum(1 for _ in csv.DictReader(file)))]


    NUMBER = 7
'''
MODEL = {
    "vision_config": dict(
        model_type="other_vision",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
}

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs distributions into a folder of their own: `install("name", group={"entry point": "what it names"})`."""
    folder = tmp_path / "site-packages"
    (folder / "other_package").mkdir(parents=True)
    (folder / "other_package" / "__init__.py").write_text("")
    (folder / "other_package" / "everything.py").write_text(textwrap.dedent(MODULE))
    (folder / "other_package" / "fails.py").write_text("raise RuntimeError('needs a licence')")
    monkeypatch.syspath_prepend(str(folder))

    def write(distribution: str, **groups: dict[str, str]) -> None:
        information = folder / f"{distribution}-2.5.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.5\n")
        lines: list[str] = []
        for group, points in groups.items():
            lines += [f"[mimo_gemma4.{group}]", *(f"{name} = {value}" for name, value in points.items())]
        (information / "entry_points.txt").write_text("\n".join(lines))

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "other_package"]:
        del sys.modules[name]


def build_both(rank: int) -> tuple[str, tuple[int, ...], str]:
    """Where the new encoder comes from, the shape of its soft tokens, and where the new decoder comes from."""
    groups = ProcessGroupCollection(tp=dist.group.WORLD)
    context = ModuleContext(groups, language_hidden=8, dtype=torch.float32, device=torch.device("cpu"))
    processor, encoder = build_processor("vision", MODEL), build_encoder("vision", MODEL, context)
    outputs = encoder(**processor.collate([processor.placeholder(MediaHeader(width=40, height=30))]))
    decoder = build_decoder("pixels", "other_decoder", None, context)
    return type(encoder).__module__, tuple(outputs.shape), type(decoder).__module__


def test_an_encoder_and_a_decoder_of_another_package_are_built(install: Install) -> None:
    install(
        "other",
        encoders={"vision": "other_package.everything:OtherEncoder"},
        decoders={"colours": "other_package.everything:OtherDecoder"},
    )
    assert registered_encoders()["vision", "other_vision"].__module__ == "other_package.everything"
    assert registered_decoders()["other_decoder"].__module__ == "other_package.everything"
    assert run_ranks(1, build_both) == [("other_package.everything", (4, 8), "other_package.everything")]
    assert build_target_processors("pixels", "other_decoder", None, []) == {}


def test_a_source_of_another_package_becomes_shards(install: Install, tmp_path: Path) -> None:
    install("other", data_sources={"csv": "other_package.everything:open_csv"})
    table = tmp_path / "chats.csv"
    table.write_text("question,answer\n" + "".join(f"What?,{number}\n" for number in range(5)))
    command = ["data", "convert", str(table), "--out", str(tmp_path / "out"), "--shard-samples", "2", "--workers", "1"]
    assert main(command) == 0
    answers = []
    for shard in sorted((tmp_path / "out").glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            samples = [json.load(tar.extractfile(member)) for member in tar]
        answers.append([sample["messages"][-1]["content"][0]["text"] for sample in samples])
    assert answers == [["0", "1"], ["2", "3"], ["4"]]
    (lines := tmp_path / "lines.jsonl").write_text(json.dumps({"question": "?", "answer": "!"}))
    assert [len(rows) for rows in open_sources([lines, table])] == [1, 5]  # built-in kinds are as before
    (tmp_path / "a.tsv").write_text("")
    with pytest.raises(DataError, match=r"a.tsv is none of .json, .jsonl, .parquet, .arrow, csv, and no folder"):
        open_sources([tmp_path / "a.tsv"])


def test_two_packages_that_open_one_source_are_named(install: Install, tmp_path: Path) -> None:
    for name in ("one", "two"):
        install(name, data_sources={name: "other_package.everything:open_csv"})
    (table := tmp_path / "chats.csv").write_text("question,answer\n")
    with pytest.raises(
        DataError, match=r"chats.csv is opened by .* of one 2.5 and .* of two 2.5; uninstall all but one"
    ):
        open_sources([table])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_package:Encoder", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_package'"),
        ("other_package.everything:NoSuchClass", "cannot be loaded: AttributeError: .*NoSuchClass"),
        ("other_package.fails:Encoder", "cannot be loaded: RuntimeError: needs a licence"),
        ("other_package.everything:NUMBER", "is not a concrete subclass of {base}"),
        ("other_package.everything:CsvRows", "is not a concrete subclass of {base}"),
        ("other_package.everything:Encoder", "is not a concrete subclass of {base}"),  # the abstract class
    ],
)
@pytest.mark.parametrize(
    ("group", "registered", "base"),
    [
        ("encoders", registered_encoders, "mimo_gemma4.encoders.base.Encoder"),
        ("decoders", registered_decoders, "mimo_gemma4.decoders.base.Decoder"),
    ],
)
def test_a_broken_entry_point_is_named(
    install: Install, group: str, registered: Callable[[], object], base: str, value: str, reason: str
) -> None:
    install("other", **{group: {"mine": value}})
    expected = rf"entry point `mine = {value}` \(mimo_gemma4.{group}\) of other 2.5 {reason.format(base=base)}"
    with pytest.raises(ConfigError, match=expected):
        registered()


@pytest.mark.parametrize("value", ["other_package.fails:open_csv", "other_package.everything:NUMBER"])
def test_a_broken_kind_of_source_ends_the_command(
    install: Install, tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    install("other", data_sources={"mine": value})
    (lines := tmp_path / "lines.jsonl").write_text(json.dumps({"question": "?", "answer": "!"}))
    assert main(["data", "convert", str(lines), "--out", str(tmp_path / "out")]) == 2
    expected = (
        rf"error: entry point `mine = {value}` \(mimo_gemma4.data_sources\) of other 2.5 (cannot be|is not a func)"
    )
    assert re.match(expected, capsys.readouterr().err)


def test_another_package_cannot_replace_an_encoder(install: Install) -> None:
    install("other", encoders={"mine": "other_package.everything:Clash"})
    with pytest.raises(ConfigError, match=r"two encoders are registered for .*siglip_vision_model.*Clash.*rename one"):
        registered_encoders()
