"""Reads slices of tensors out of a Hugging Face directory of safetensors files."""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open

from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.weights import Index


class HuggingFaceSource:
    """Tensors by name from `model.safetensors`, or from the files that `model.safetensors.index.json` lists."""

    def __init__(self, path: str | Path):
        """Find which file holds which tensor. Raises `CheckpointError` where the directory holds no weights."""
        self.path = Path(path)
        listing = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        if listing.is_file():
            self._files: dict[str, str] = json.loads(listing.read_text(encoding="utf-8"))["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as tensors:
                self._files = dict.fromkeys(tensors.keys(), single.name)
        else:
            raise CheckpointError(
                f"hf_path {self.path} holds neither {listing.name} nor {single.name}: point it to a directory with "
                "config.json and safetensors weights"
            )

    def unread(self, names: set[str]) -> dict[str, int]:
        """How many of the directory's tensors are not among `names`, by the first two parts of their names."""
        return dict(Counter(".".join(name.split(".")[:2]) for name in sorted(set(self._files) - names)))

    def read(self, name: str, index: Index, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The slice `index` of tensor `name`, reading no more than that; None where the directory lacks the tensor.

        Raises `CheckpointError` where the tensor's shape is not `shape`.
        """
        if name not in self._files:
            return None
        with safe_open(self.path / self._files[name], framework="pt") as tensors:
            stored = tensors.get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise CheckpointError(
                    f"{name} in {self.path} has shape {list(stored.get_shape())}, but its config.json asks for "
                    f"{list(shape)}"
                )
            return stored[index] if shape else tensors.get_tensor(name)
