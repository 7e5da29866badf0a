"""The bytes of converted shards depend on source and options alone: not on workers, nor on being killed."""

import json
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mimo_gemma4.data.convert import conversion as conversion_module
from mimo_gemma4.data.convert.conversion import Conversion
from mimo_gemma4.data.convert.report import Report
from mimo_gemma4.data.convert.sources import open_sources
from mimo_gemma4.errors import DataError
from tests.shard_maker import TileProcessor, open_dataset, png

COUNT = 20


def write_source(folder: Path) -> Path:
    """Two questions about each picture; part 1 of 5 has no usable row at all, and a third of the others' are not."""
    records = []
    for number in range(COUNT):
        picture = f"{number // 2}.png"
        (folder / picture).write_bytes(png(8, 8 + 8 * (number // 2 % 5), number // 2))
        usable = number % 3 != 1 and number // 4 != 1
        records.append({"image": picture if usable else "none.png", "question": "?", "answer": f"answer {number}"})
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def conversion(tmp_path) -> Conversion:
    source = tmp_path / "source"
    source.mkdir()
    sources = open_sources([write_source(source)])
    return Conversion(sources, tmp_path / "whole", source, shard_samples=4, valid_fraction=0.3)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_row_is_in_one_split_or_dropped(conversion):
    report = conversion.run()
    assert not (conversion.output / ".partial").exists()
    datasets = [open_dataset(f"{conversion.output}/{split}-*.tar", TileProcessor()) for split in ("train", "valid")]
    keys = [[int(dataset.key(index)) for index in range(len(dataset))] for dataset in datasets]
    assert [len(split) for split in keys] == list(report.samples.values()) and all(split for split in keys)
    dropped = [int(row.key.removeprefix("records.json:")) - 1 for row in report.dropped]
    assert sorted([*keys[0], *keys[1], *dropped]) == list(range(COUNT))
    assert keys == [sorted(split) for split in keys] and dropped == sorted(dropped)
    pictures = [{number // 2 for number in split} for split in keys]
    assert not pictures[0] & pictures[1], "both questions about a picture are on the same side"
    assert report.shards["train"] == [f"train-{number:06d}.tar" for number in range(4)], "part 1 leaves no gap"
    assert report.shards["valid"] == [f"valid-{number:06d}.tar" for number in range(len(report.shards["valid"]))]
    assert Report.from_json((conversion.output / "report.json").read_text()) == report


def test_a_sample_names_its_row(conversion):
    conversion.run()
    with tarfile.open(conversion.output / "train-000000.tar") as tar:
        names = tar.getnames()
        document = json.load(tar.extractfile(names[1]))
    assert names[:2] == ["000000000.0.png", "000000000.json"] and document["source"] == "records.json:1"


def kill_at(conversion: Conversion, name: str, call: int) -> int:
    """Run a conversion in a process that is killed before call number `call` of a function of `os` or `shutil`."""

    def run() -> None:
        module = conversion_module.shutil if name == "rmtree" else os
        real, calls = getattr(module, name), iter(range(call))

        def counted(*arguments: object, **options: object) -> object:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(module, name, counted)
        conversion.run()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode or 0


def test_a_killed_conversion_continues_to_the_same_bytes(conversion, tmp_path):
    conversion.run()
    expected = files(conversion.output)
    for call in range(100):
        killed = replace(conversion, output=tmp_path / f"killed-{call}")
        code = kill_at(killed, "replace", call)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed.run()
        assert files(killed.output) == expected, call
    assert call > 15, "plan, tars and results of 5 parts, names, report: each replaces a file"
    killed = replace(conversion, output=tmp_path / "end")
    assert kill_at(killed, "rmtree", 0) == -signal.SIGKILL and (killed.output / ".partial").exists()
    killed.run()
    assert files(killed.output) == expected


def test_a_finished_conversion_is_not_repeated(conversion, monkeypatch):
    report = conversion.run()
    monkeypatch.setattr(conversion_module, "_convert", None)
    assert conversion.run() == report


def test_another_conversion_does_not_mix_with_one_that_is_there(conversion, tmp_path):
    assert kill_at(conversion, "replace", 9) == -signal.SIGKILL
    with pytest.raises(DataError, match="holds a conversion with other shard_samples: 4, now 6"):
        replace(conversion, shard_samples=6).run()
    conversion.run()
    with pytest.raises(DataError, match="other valid_fraction: 0.3, now 0.0; choose a new folder"):
        replace(conversion, valid_fraction=0.0).run()
    os.utime(tmp_path / "source" / "records.json", ns=(1, 1))
    with pytest.raises(DataError, match="other sources"):
        conversion.run()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.tar").touch()
    with pytest.raises(DataError, match="mine already holds shards; choose a new folder"):
        replace(conversion, output=tmp_path / "mine").run()


@dataclass(frozen=True)
class DeadlyRows:
    """Rows of a source whose reading kills the process until a file appears."""

    rows: object
    cure: Path

    def __len__(self) -> int:
        return len(self.rows)

    def cut(self, start: int, stop: int) -> "DeadlyRows":
        return replace(self, rows=self.rows.cut(start, stop))

    @property
    def version(self) -> str:
        return self.rows.version

    def __iter__(self) -> Iterator:
        for name, row in self.rows:
            if name.endswith(":13") and not self.cure.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            yield name, row


def test_three_workers_write_what_one_does_even_if_one_of_them_dies(conversion, tmp_path):
    conversion.run(workers=1)
    deadly = [DeadlyRows(rows, tmp_path / "cure") for rows in conversion.sources]
    several = replace(conversion, sources=deadly, output=tmp_path / "several")
    with pytest.raises(DataError, match="killed.*the same command continues from here, with --workers below 3"):
        several.run(workers=3)
    assert not (several.output / "report.json").exists()
    (tmp_path / "cure").touch()
    several.run(workers=3)
    assert files(several.output) == files(conversion.output)
