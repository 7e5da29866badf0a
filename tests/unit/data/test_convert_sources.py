"""Every kind of source becomes shards that a dataset opens, and a source that cannot be read is a typed error."""

import builtins
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mimo_gemma4.data.convert.__main__ import main
from mimo_gemma4.data.convert.rows import cut_evenly
from mimo_gemma4.data.convert.sources import open_sources
from mimo_gemma4.data.sample import BadSampleError
from mimo_gemma4.errors import DataError
from tests.shard_maker import SoundProcessor, TileProcessor, open_dataset, png, text_of, wav

COUNT = 10


def answers(out: Path, split: str = "train") -> list[str]:
    """The last message of every sample, as a dataset reads them."""
    dataset = open_dataset(f"{out}/{split}-*.tar", TileProcessor(), SoundProcessor())
    for index in range(len(dataset)):
        dataset.encode(index)
    return [text_of(dataset.messages(index)[-1]) for index in range(len(dataset))]


def llava(number: int) -> dict:
    value = "What?" if number % 3 == 0 else "<image>\nWhat é?"
    record = {"id": f"a/{number}", "conversations": [{"from": "human", "value": value}]}
    record["conversations"].append({"from": "gpt", "value": f"answer {number}"})
    return record if number % 3 == 0 else record | {"image": f"{number}.png"}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(png(8, 16, number))
    return folder


RECORDS = [llava(number) for number in range(COUNT)]
JSON_FILES = {
    "list.json": json.dumps(RECORDS).encode(),
    "pretty.json": b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=2, ensure_ascii=False).encode() + b"\n",
    "lines.jsonl": "\r\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS).encode(),
    "lines.json": "\n\n".join(json.dumps(record) for record in RECORDS).encode() + b"\n",
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_lists_and_lines(tmp_path, pictures, name):
    (tmp_path / name).write_bytes(JSON_FILES[name])
    arguments = [str(tmp_path / name), "--media", str(pictures), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--shard-samples", "4"]) == 0
    assert answers(tmp_path / "out") == [f"answer {number}" for number in range(COUNT)]
    assert len(list((tmp_path / "out").glob("train-*.tar"))) == 3
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["samples"] == {"train": COUNT, "valid": 0} and report["media"] == {"image": 6}
    assert report["dropped"] == [] and len(report["shards"]["train"]) == 3


def vqa_table(first: int, count: int) -> pa.Table:
    numbers = range(first, first + count)
    return pa.table(
        {
            "image": [{"bytes": png(8, 8, number), "path": f"{number}.png"} for number in numbers],
            "question": ["What?"] * count,
            "answer": [f"answer {number}" for number in numbers],
        }
    )


def write_arrow(path: Path, table: pa.Table, *, rows: int = 3, stream: bool = True) -> None:
    """As `save_to_disk` and the hub's cache write it: a stream of record batches."""
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def save_to_disk(folder: Path, first: int, count: int) -> None:
    """The files of a saved data set, and one that an earlier, larger version of it has left."""
    folder.mkdir(parents=True)
    half = count // 2
    write_arrow(folder / "data-00000-of-00002.arrow", vqa_table(first, half))
    write_arrow(folder / "data-00001-of-00002.arrow", vqa_table(first + half, count - half))
    write_arrow(folder / "data-00002-of-00003.arrow", vqa_table(100, 1))
    write_arrow(folder / "cache-0123456789abcdef.arrow", vqa_table(200, 2))
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def convert(source: Path, out: Path, *options: str) -> int:
    return main([str(source), "--out", str(out), "--workers", "1", "--shard-samples", "4", *options])


def test_parquet_files_in_pieces_across_row_groups_and_files(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(vqa_table(0, 7), tmp_path / "data" / "train-00000-of-00002.parquet", row_group_size=3)
    pq.write_table(vqa_table(7, 3), tmp_path / "data" / "train-00001-of-00002.parquet", row_group_size=2)
    pq.write_table(vqa_table(50, 2), tmp_path / "data" / "test-00000-of-00001.parquet")
    assert convert(tmp_path, tmp_path / "out", "--split", "train") == 0
    assert answers(tmp_path / "out") == [f"answer {number}" for number in range(COUNT)]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "file"])
def test_arrow_files(tmp_path, stream):
    write_arrow(tmp_path / "set-train.arrow", vqa_table(0, COUNT), stream=stream)
    assert convert(tmp_path / "set-train.arrow", tmp_path / "out") == 0
    assert answers(tmp_path / "out") == [f"answer {number}" for number in range(COUNT)]


def test_a_saved_data_set_with_splits(tmp_path, capsys):
    save_to_disk(tmp_path / "saved" / "train", 0, 6)
    save_to_disk(tmp_path / "saved" / "test", 20, 2)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert convert(tmp_path / "saved", tmp_path / "out") == 2
    assert "holds the splits test, train; choose one with --split" in capsys.readouterr().err
    assert convert(tmp_path / "saved", tmp_path / "out", "--split", "train") == 0
    assert answers(tmp_path / "out") == [f"answer {number}" for number in range(6)]
    assert convert(tmp_path / "saved" / "test", tmp_path / "test") == 0
    assert answers(tmp_path / "test") == ["answer 20", "answer 21"]


def test_chats_and_captions_in_tables(tmp_path, pictures):
    part = pa.struct({"type": pa.string(), "text": pa.string()})
    message = pa.struct({"role": pa.string(), "content": pa.list_(part)})
    chat = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "answer 0"}]},
    ]
    columns = {"images": [[{"bytes": png(8, 8, 1), "path": None}]], "messages": pa.array([chat], pa.list_(message))}
    pq.write_table(pa.table(columns), tmp_path / "chat.parquet")
    pq.write_table(pa.table({"image": ["1.png"], "caption": ["answer 1"]}), tmp_path / "caption.parquet")
    pq.write_table(pa.table({"wav": [wav(300)], "said": ["answer 2"]}), tmp_path / "sound.parquet")
    sources = [str(tmp_path / f"{name}.parquet") for name in ("chat", "caption", "sound")]
    assert main([*sources, "--out", f"{tmp_path}/out", "--workers", "1", "--media", str(pictures)]) == 0
    assert answers(tmp_path / "out") == ["answer 0", "answer 1"]
    assert convert(tmp_path / "sound.parquet", tmp_path / "sounds", "--column", "caption=said", "--prompt", "Hm?") == 0
    assert answers(tmp_path / "sounds") == ["answer 2"]


def test_a_folder_of_media_beside_texts(tmp_path, pictures, capsys):
    (pictures / "deep").mkdir()
    for number in range(3):
        (pictures / f"{number}.txt").write_text(f"answer {number}")
    (pictures / "deep" / "4.v2.PNG").write_bytes(png(8, 8, 4))
    (pictures / "deep" / "4.v2.json").write_text('{"question": "?", "answer": "answer 4", "image": "elsewhere.png"}')
    (pictures / "deep" / "5.wav").write_bytes(wav(300))
    (pictures / "deep" / "5.txt").write_bytes(b"\xff")
    (pictures / "deep" / "6.png").write_bytes(png(8, 8, 4))
    (pictures / "deep" / "6.json").write_text("[1]")
    (pictures / "README.txt").write_text("about this folder")
    (pictures / "notes.md").write_text("skipped")
    (pictures / ".hidden.png").write_bytes(b"")
    assert convert(pictures, tmp_path / "out") == 0
    assert answers(tmp_path / "out") == ["answer 0", "answer 1", "answer 2", "answer 4"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dropped = {row["key"]: (row["fault"], row["reason"]) for row in report["dropped"]}
    assert dropped["README"] == ("members", "no image or sound lies beside README.txt")
    assert dropped["9"] == ("members", "no .txt or .json lies beside 9.png")
    assert dropped["deep/5"][0] == "json" and "not UTF-8 text" in dropped["deep/5"][1]
    assert dropped["deep/6"][0] == "json" and "must be an object" in dropped["deep/6"][1]
    assert len(dropped) == 1 + 7 + 2 and report["dropped_by_fault"] == {"members": 8, "json": 2}
    printed = capsys.readouterr().out
    assert "14 rows: 4 samples, 4 image; 10 dropped" in printed and "no .txt or .json lies beside 3.png" in printed


def test_lines_and_cells_that_cannot_be_read_are_dropped_alone(tmp_path, capsys):
    good = json.dumps({"question": "q", "answer": "a"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{{broken\n[1]\n{good}\n")
    text = pa.StringArray.from_buffers(3, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffb"))
    write_arrow(tmp_path / "b.arrow", pa.table({"question": ["q"] * 3, "answer": text}))
    parts = open_sources([tmp_path / "a.jsonl", tmp_path / "b.arrow"])
    rows = {name: row for part in parts for name, row in part}
    faults = {name: str(row) for name, row in rows.items() if isinstance(row, BadSampleError)}
    assert faults.keys() == {"a.jsonl:2", "a.jsonl:3", "b.arrow:2"} and len(rows) == 7
    assert "cannot be read" in faults["a.jsonl:2"] and "must be an object" in faults["a.jsonl:3"]
    assert "'utf-8' codec" in faults["b.arrow:2"]


def test_sources_are_cut_into_runs_of_equal_length(tmp_path):
    for name, count in (("a", 5), ("b", 0), ("c", 1), ("d", 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"id": {number}}}\n' for number in range(count)))
    parts = open_sources([tmp_path / f"{name}.jsonl" for name in "abcd"])
    names = [[name for rows in run for name, _ in rows] for run in cut_evenly(parts, 4)]
    assert [len(run) for run in names] == [4, 4, 1]
    assert names[1] == ["a.jsonl:5 id=4", "c.jsonl:1 id=0", "d.jsonl:1 id=0", "d.jsonl:2 id=1"]


UNREADABLE = {
    "none.json": (None, "does not exist"),
    "a.csv": (b"a,b", "none of .json, .jsonl, .parquet, .arrow"),
    "object.json": (b'{\n "data": []}', "one JSON value; it must be a list"),
    "cut.json": (b'[{"a": 1}, {"b": ', "not a complete JSON file"),
    "odd.json": (b'[{"a": 1} {"b": 2}]', "not a complete JSON file: expected"),
    "empty.json": (b"[ ]", "no record in"),
    "cut.parquet": (b"PAR1 and no more", "cannot be read"),
    "cut.arrow": (b"ARROW1 and no more", "cannot be read"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_source_that_cannot_be_read_is_a_data_error(tmp_path, name, capsys):
    content, reason = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert convert(tmp_path / name, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and name in error
    assert not (tmp_path / "out").exists()


def test_a_folder_without_the_split_or_state_is_a_data_error(tmp_path):
    save_to_disk(tmp_path / "set" / "train", 0, 2)
    with pytest.raises(DataError, match="--split dev: no file in .* is called so"):
        open_sources([tmp_path / "set"], "dev")
    (tmp_path / "set" / "train" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="state.json does not list"):
        open_sources([tmp_path / "set"])
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="--split train: .* holds no parquet or arrow file"):
        open_sources([tmp_path / "photos"], "train")
    with pytest.raises(DataError, match="no record in"):
        open_sources([tmp_path / "photos"])


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    pq.write_table(vqa_table(0, 1), tmp_path / "a.parquet")
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="needs pyarrow: uv sync --extra parquet"):
        open_sources([tmp_path / "a.parquet"])
