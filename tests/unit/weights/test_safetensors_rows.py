"""Safetensors files read and written by rows equal those of the safetensors library; damaged ones are a typed error.

Values are compared bit for bit.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.weights import safetensors_rows
from mimo_gemma4.weights.safetensors_rows import (
    DTYPES,
    TensorEntry,
    TensorFile,
    split_into_files,
    total_bytes,
    write_tensor_file,
)

TENSORS = {
    "matrix": torch.arange(15, dtype=torch.float32).view(5, 3),
    "cube": torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4),
    "vector": torch.tensor([1, -2, 3], dtype=torch.int16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "flag": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
}
ENTRIES = {
    "matrix": TensorEntry("F32", (5, 3)),
    "cube": TensorEntry("BF16", (2, 3, 4)),
    "vector": TensorEntry("I16", (3,)),
    "scalar": TensorEntry("F64", ()),
    "flag": TensorEntry("BOOL", (3,)),
    "empty": TensorEntry("F32", (0, 4)),
}
SIZES = {"matrix": 60, "cube": 48, "vector": 6, "scalar": 8, "flag": 3, "empty": 0}
"""Bytes."""


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The tensors as the library writes them."""
    path = tmp_path / "stored.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    return path


def rows(name: str, start: int, stop: int) -> torch.Tensor:
    tensor = TENSORS[name]
    return tensor[None] if tensor.ndim == 0 else tensor[start:stop]


def write(path: Path, entries: Mapping[str, TensorEntry] = ENTRIES, **options) -> list[int]:
    """Write the tensors; the sizes that `advance` was called with."""
    advanced: list[int] = []
    options = {"metadata": {"format": "pt"}} | options
    write_tensor_file(path, entries, rows, advance=advanced.append, **options)
    return advanced


def assert_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found, expected)


# --- shapes ---


def test_sizes_of_an_entry() -> None:
    assert {name: entry.bytes for name, entry in ENTRIES.items()} == SIZES
    assert total_bytes(ENTRIES.values()) == 125
    assert (ENTRIES["cube"].rows, ENTRIES["cube"].row_bytes) == (2, 24)
    assert (ENTRIES["scalar"].rows, ENTRIES["scalar"].row_bytes) == (1, 8), "a scalar is one row"


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [
        ((5, 3), [(0, 2), (2, 4), (4, 5)]),  # 12 bytes a row, two of them within 30
        ((3, 10), [(0, 1), (1, 2), (2, 3)]),  # 40 bytes a row
        ((), [(0, 1)]),
        ((0, 4), []),
        ((4, 0), [(0, 4)]),
    ],
)
def test_pieces_cover_all_rows_once(monkeypatch: pytest.MonkeyPatch, shape: tuple, pieces: list) -> None:
    monkeypatch.setattr(safetensors_rows, "PIECE_BYTES", 30)
    assert list(TensorEntry("F32", shape).pieces()) == pieces


def test_files_are_split_before_they_grow_too_large() -> None:
    entries = {name: TensorEntry("U8", (size,)) for name, size in [("a", 4), ("b", 6), ("c", 1), ("d", 20), ("e", 10)]}
    assert split_into_files(entries, 10) == [["a", "b"], ["c"], ["d"], ["e"]]


@pytest.mark.parametrize("name", DTYPES)
def test_element_types_are_those_of_the_library(tmp_path: Path, name: str) -> None:
    save_file({"one": torch.ones(3).to(DTYPES[name])}, tmp_path / "one.safetensors")
    file = TensorFile(tmp_path / "one.safetensors")
    assert file.entries == {"one": TensorEntry(name, (3,))}
    assert_bits(file.read("one", 0, 3), torch.ones(3).to(DTYPES[name]))


# --- reading ---


def test_a_header_gives_types_shapes_and_metadata(stored: Path) -> None:
    file = TensorFile(stored)
    assert file.entries == ENTRIES
    assert file.metadata == {"format": "pt"}


@pytest.mark.parametrize("name", TENSORS)
def test_rows_in_pieces_make_the_tensor(stored: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(safetensors_rows, "PIECE_BYTES", 25)
    file = TensorFile(stored)
    pieces = [file.read(name, start, stop) for start, stop in file.entries[name].pieces()]
    whole = torch.cat(pieces) if pieces else file.read(name, 0, 0)
    assert_bits(whole.view(TENSORS[name].shape), TENSORS[name])


def test_some_rows_of_a_tensor(stored: Path) -> None:
    file = TensorFile(stored)
    assert_bits(file.read("matrix", 1, 3), TENSORS["matrix"][1:3])
    assert_bits(file.read("cube", 1, 2), TENSORS["cube"][1:])
    assert_bits(file.read("scalar", 0, 1), torch.tensor([2.5], dtype=torch.float64))


# --- writing ---


def test_what_is_written_is_read_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_rows, "PIECE_BYTES", 25)
    path, checksum = tmp_path / "written.safetensors", hashlib.sha256()
    advanced = write(path, checksum=checksum)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert_bits(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sum(advanced) == path.stat().st_size
    assert checksum.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert max(advanced[1:]) <= 25, "no more than a piece at a time, after the header"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "written.safetensors")
    file = TensorFile(tmp_path / "written.safetensors")
    assert file.entries == ENTRIES and file.metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        assert_bits(file.read(name, 0, ENTRIES[name].rows).view(tensor.shape), tensor)


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "written.safetensors"
    write(path, dict(sorted(ENTRIES.items())), metadata={})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert "__metadata__" not in header
    for name, entry in header.items():
        assert entry["data_offsets"][0] % TENSORS[name].element_size() == 0, name


def test_a_file_is_never_overwritten(stored: Path) -> None:
    before = stored.read_bytes()
    with pytest.raises(FileExistsError):
        write(stored)
    assert stored.read_bytes() == before


# --- damaged files ---


def with_header(header: object) -> bytes:
    """A file of this header and 8 bytes of data."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


def described(**changes: object) -> bytes:
    return with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


def test_an_undamaged_file_of_this_kind_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(described())
    assert_bits(TensorFile(tmp_path / "file").read("a", 0, 2), torch.zeros(2))


DAMAGED = {
    "empty file": (b"", "no readable safetensors file"),
    "shorter than a length": (b"abc", "no readable safetensors file"),
    "cut in its header": ((10**6).to_bytes(8, "little") + b"{}", "a header of 1000000 bytes in a file of 10"),
    "header is no JSON": ((4).to_bytes(8, "little") + b"{,,}", "no readable safetensors file"),
    "header is no text": ((2).to_bytes(8, "little") + b"\xff\xfe", "no readable safetensors file"),
    "header is a list": (with_header([1, 2]), "no readable safetensors file"),
    "entry is a number": (with_header({"a": 3}), "no readable safetensors file"),
    "entry without shape": (with_header({"a": {"dtype": "F32"}}), "no readable safetensors file"),
    "one offset": (described(data_offsets=[0]), "no readable safetensors file"),
    "unknown type": (described(dtype="F4"), r"holds tensors of types \['F4'\]; known: BOOL"),
    "shape and offsets differ": (described(shape=[3]), "has 8 bytes for a, not 12"),
    "cut in its data": (described(shape=[4], data_offsets=[0, 16]), "where its header announces"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_a_typed_error_that_names_it(tmp_path: Path, kind: str) -> None:
    content, message = DAMAGED[kind]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{path} .*{message}"):
        TensorFile(path)


def test_a_missing_file_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.safetensors is no readable safetensors file"):
        TensorFile(tmp_path / "none.safetensors")


@pytest.mark.parametrize("cut", [1, 60])
def test_a_file_that_is_cut_after_its_header_was_read_is_a_typed_error(stored: Path, cut: int) -> None:
    file = TensorFile(stored)
    with stored.open("r+b") as damaged:
        damaged.truncate(stored.stat().st_size - cut)
    with pytest.raises(CheckpointError, match=f"^{stored} ends inside "):
        for name, entry in file.entries.items():
            file.read(name, 0, entry.rows)
    with pytest.raises(CheckpointError, match="where its header announces"):
        TensorFile(stored)
