"""Weight files that are damaged, listed wrongly, or hold a head of their own end in an error that names them.

Expectations are written by hand: which copy of a tensor counts, and which words an error has.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.weights.bindings import whole
from mimo_gemma4.weights.huggingface import EMBEDDING, LANGUAGE, LISTING, SINGLE, HuggingFaceSource

NORM = f"{LANGUAGE}norm.weight"


def write(folder: Path, **files: dict[str, torch.Tensor]) -> Path:
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    return folder


def list_files(folder: Path, weight_map: object) -> Path:
    (folder / LISTING).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder: Path, name: str) -> torch.Tensor:
    source = HuggingFaceSource(folder)
    shape = source.tensors[name].entry.shape
    value = source.read(name, whole(shape), shape)
    assert value is not None and torch.equal(value, source.rows(name, 0, shape[0]))
    return value


@pytest.mark.parametrize("current", ["a", "b"])
def test_the_file_that_the_listing_names_counts(current: str, tmp_path: Path) -> None:
    """Another file holds an old copy of the tensor; transformers takes the one of the last file instead."""
    values = {"a": torch.ones(3), "b": torch.zeros(3)}
    write(tmp_path, a={NORM: values["a"], EMBEDDING: torch.ones(2, 3)}, b={NORM: values["b"], "x.b": torch.ones(1)})
    list_files(tmp_path, {NORM: f"{current}.safetensors", EMBEDDING: "a.safetensors", "x.b": "b.safetensors"})
    assert torch.equal(read(tmp_path, NORM), values[current])


def test_a_tensor_that_is_not_listed_is_read_if_one_file_holds_it(tmp_path: Path) -> None:
    write(tmp_path, a={EMBEDDING: torch.ones(2, 3)}, b={"x.b": torch.ones(1), NORM: torch.ones(3)})
    list_files(tmp_path, {EMBEDDING: "a.safetensors", "x.b": "b.safetensors"})
    assert torch.equal(read(tmp_path, NORM), torch.ones(3))
    write(tmp_path, a={EMBEDDING: torch.ones(2, 3), NORM: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=f"a.safetensors and b.safetensors both hold {NORM}"):
        HuggingFaceSource(tmp_path)


LISTINGS = {
    "no JSON": (b"{", "is damaged"),
    "empty": (b"", "is damaged"),
    "a list": (b"[]", "is damaged"),
    "no map": (b"{}", "is damaged: KeyError"),
    "a map that is a list": (b'{"weight_map": ["a"]}', "no table"),
    "an empty map": (b'{"weight_map": {}}', "no table"),
    "a number for a file": (b'{"weight_map": {"a": 3}}', "weight_map.a is 3"),
    "another folder": (b'{"weight_map": {"a": "../b.safetensors"}}', "not the name of a file beside it"),
    "no text": (b"\xff\xfe\x00", "is damaged"),
    "a missing file": (b'{"weight_map": {"a": "gone.safetensors"}}', "lacks files .* gone.safetensors"),
    "a tensor that is elsewhere": (b'{"weight_map": {"y": "a.safetensors"}}', r"1 tensors in files that lack them: y"),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_a_damaged_listing_is_named(kind: str, tmp_path: Path) -> None:
    write(tmp_path, a={NORM: torch.ones(3)})
    content, message = LISTINGS[kind]
    (tmp_path / LISTING).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceSource(tmp_path)


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + bytes(24)


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


FILES = {
    "a negative size": header(a=entry(shape=[-2])),
    "a size that is no number": header(a=entry(shape=["2"])),
    "a truth value as size": header(a=entry(shape=[True, 2])),
    "a shape that is no list": header(a=entry(shape=2)),
    "an element type that is no text": header(a=entry(dtype=["F32"])),
    "an unknown element type": header(a=entry(dtype="F31")),
    "negative offsets": header(a=entry(data_offsets=[-8, 0])),
    "three offsets": header(a=entry(data_offsets=[0, 4, 8])),
    "tensors that overlap": header(a=entry(), b=entry(data_offsets=[4, 12])),
    "a gap": header(a=entry(), b=entry(data_offsets=[12, 20])),
    "texts that are no table": header(__metadata__=["format"], a=entry()),
    "a name twice": (text := b'{"a": 1, "a": 2}') and len(text).to_bytes(8, "little") + text,
    "a huge header": (2**62).to_bytes(8, "little") + b"{}",
    "a web page": b"<!DOCTYPE html><html><body>Not Found</body></html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_named(kind: str, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(FILES[kind])
    with pytest.raises(CheckpointError, match=SINGLE):
        HuggingFaceSource(tmp_path)


@pytest.mark.parametrize("prefix", [LANGUAGE, "model.", "language_model.model."])
def test_only_a_head_that_is_the_embedding_passes(prefix: str, tmp_path: Path) -> None:
    head = "language_model.lm_head." if prefix.startswith("language_model") else "lm_head."
    embedding = torch.randn(40, 8).bfloat16()
    name = f"{prefix}embed_tokens.weight"

    def source(**heads: torch.Tensor) -> HuggingFaceSource:
        tensors = {head + end: tensor for end, tensor in heads.items()}
        return HuggingFaceSource(write(tmp_path, model={name: embedding, **tensors}))

    source().check_head()
    source(weight=embedding.clone()).check_head()
    source(weight=embedding.float()).check_head()  # equal values of another type
    assert source(weight=embedding.clone()).tensors.keys() == {EMBEDDING}
    last = embedding.clone()
    last[-1, -1] += 1
    for wrong in (last, embedding.clone().fill_(float("nan"))):
        with pytest.raises(CheckpointError, match=f"{head}weight differs from {name} in .* of rows 0 to 39"):
            source(weight=wrong).check_head()
    with pytest.raises(CheckpointError, match=r"is \[41, 8\] and .* is \[40, 8\]"):
        source(weight=torch.zeros(41, 8)).check_head()
    with pytest.raises(CheckpointError, match=r"has lm_head.bias beside the weight of the head"):
        source(weight=embedding.clone(), bias=torch.zeros(40)).check_head()
