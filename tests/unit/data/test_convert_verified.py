"""The same command verifies a finished conversion: shards, media and sources that changed are noticed."""

import os
from dataclasses import replace

import pytest

from mimo_gemma4.data.convert.conversion import Conversion
from mimo_gemma4.data.convert.finished import locked
from mimo_gemma4.data.convert.sources import open_sources
from mimo_gemma4.errors import DataError
from tests.shard_maker import png
from tests.unit.data.test_convert_resume import files, kill_at, write_source


@pytest.fixture
def conversion(tmp_path) -> Conversion:
    source = tmp_path / "source"
    source.mkdir()
    sources = open_sources([write_source(source)])
    return Conversion(sources, tmp_path / "whole", source, shard_samples=4, valid_fraction=0.3)


def damage(path, how):
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:700], "empty": b"", "one bit": b"\1" + content[1:]}[how])


@pytest.mark.parametrize("how", ["deleted", "cut", "empty", "one bit"])
def test_a_damaged_shard_is_written_again(conversion, how):
    report = conversion.run()
    expected = files(conversion.output)
    for name in [name for names in report.shards.values() for name in names]:
        damage(conversion.output / name, how)
        assert conversion.run() == report and files(conversion.output) == expected, name


def test_damage_is_mended_after_a_kill_too(conversion):
    report = conversion.run()
    expected = files(conversion.output)
    for call in range(50):
        for split in ("train", "valid"):
            (conversion.output / report.shards[split][-1]).unlink(missing_ok=True)
        if kill_at(conversion, "replace", call) == 0:
            break
        conversion.run()
        assert files(conversion.output) == expected, call
    assert call > 5


def test_a_lost_record_of_the_parts_is_written_again(conversion):
    conversion.run()
    expected = files(conversion.output)
    (conversion.output / ".converted.json.gz").write_bytes(b"?")
    conversion.run()
    assert files(conversion.output) == expected


@pytest.mark.parametrize("how", ["replaced", "deleted", "found"])
def test_changed_media_are_refused(conversion, how):
    conversion.run()
    picture = conversion.media_folder / ("none.png" if how == "found" else "0.png")
    if how == "deleted":
        picture.unlink()
    else:
        picture.write_bytes(png(24, 24, 99))
    with pytest.raises(DataError, match=f"1 media files changed after .*{picture.name}; choose a new folder"):
        conversion.run()


def test_a_changed_text_beside_a_picture_is_refused(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(8, 8, 1))
    (folder / "a.txt").write_text("one")
    Conversion(open_sources([folder]), tmp_path / "out", folder).run()
    (folder / "a.txt").write_text("two!")
    with pytest.raises(DataError, match="other sources"):
        Conversion(open_sources([folder]), tmp_path / "out", folder).run()


def test_an_interrupted_conversion_takes_media_that_changed_meanwhile(conversion, tmp_path):
    assert kill_at(conversion, "replace", 9) != 0
    for number in range(10):
        (conversion.media_folder / f"{number}.png").write_bytes(png(24, 24, 50 + number))
    conversion.run()
    again = replace(conversion, output=tmp_path / "again")
    again.run()
    assert files(conversion.output) == files(again.output)


def test_a_source_that_changes_while_it_is_read_is_noticed(conversion, monkeypatch):
    def change(*arguments):
        os.utime(conversion.media_folder / "records.json", ns=(1, 1))
        return real(*arguments)

    real = Conversion._lost
    monkeypatch.setattr(Conversion, "_lost", change)
    with pytest.raises(DataError, match="other sources"):
        conversion.run()
    assert not (conversion.output / "report.json").exists()


def test_two_conversions_do_not_write_one_folder(conversion):
    with locked(conversion.output), pytest.raises(DataError, match=f"another conversion .process {os.getpid()} on"):
        conversion.run()
    conversion.run()
