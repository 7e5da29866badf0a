"""Reads tensors from a Hugging Face directory of safetensors files, by slices or rows, under one set of names.

The names are `Gemma4ForConditionalGeneration`'s: `model.language_model.layers.0…`, `model.vision_tower.…`. Names in
files of a text-only `Gemma4ForCausalLM` (`model.layers.0…`), of a model without its head, and in older files that
begin with `language_model.model.` are translated. `lm_head.weight` is left out: the head is the embedding, and
`check_head` refuses a directory in which the two differ.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.weights.bindings import Binding, Index
from mimo_gemma4.weights.safetensors_rows import TensorEntry, TensorFile

LISTING = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD = "lm_head.weight"
LANGUAGE = "model.language_model."
EMBEDDING = f"{LANGUAGE}embed_tokens.weight"
_PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    LANGUAGE: (("", ""),),
    "language_model.model.": (
        ("language_model.model.", LANGUAGE),
        ("language_model.lm_head.", "lm_head."),
        ("", "model."),
    ),
    "language_model.": (("lm_head.", "lm_head."), ("", "model.")),
    "model.": (("model.", LANGUAGE), ("", "")),
    "": (("lm_head.", "lm_head."), ("", LANGUAGE)),
}
"""By the files' prefix of `embed_tokens.weight`: pairs of prefixes, of which the first that fits a name is replaced."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the directory."""

    name: str
    """Its name in the files."""
    entry: TensorEntry


class HuggingFaceSource:
    """Tensors by name from `model.safetensors`, or from the files that `model.safetensors.index.json` lists."""

    def __init__(self, path: str | Path):
        """Read all headers. Raises `CheckpointError` if the directory has no weights, or not those that it lists."""
        self.path = Path(path)
        self._files = _owners(self.path)
        self._handles: dict[Path, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        """By name here, in the order of the files."""
        self._heads: dict[str, str] = {}
        """Names in the files of what belongs to a head, by name here."""
        translate = translation(self._files)
        for name, file in self._files.items():
            target = translate(name)
            if target.startswith("lm_head."):
                self._heads[target] = name
            else:
                self.tensors[target] = StoredTensor(name, file.entries[name])

    def check_head(self) -> None:
        """Raise `CheckpointError` unless the head, if the files hold one, is the embedding, value by value."""
        advice = (
            "Gemma 4's head is its embedding, and a head of its own would be lost: merge or train it again as a tied "
            "model, or delete the tensor from the files if the embedding is the right head"
        )
        if beside := sorted(self._heads.keys() - {HEAD}):
            raise CheckpointError(f"{self.path} has {', '.join(beside)} beside the weight of the head; {advice}")
        if HEAD not in self._heads or EMBEDDING not in self.tensors:
            return
        head, embedding = self._heads[HEAD], self.tensors[EMBEDDING].name
        own, tied = (self._files[name].entries[name] for name in (head, embedding))
        if own.shape != tied.shape:
            raise CheckpointError(
                f"{self.path}: {head} is {list(own.shape)} and {embedding} is {list(tied.shape)}; {advice}"
            )
        for start, stop in own.pieces():
            values, expected = (self._files[name].read(name, start, stop).float() for name in (head, embedding))
            if differ := int((values != expected).flatten(1).any(dim=1).sum()):
                raise CheckpointError(
                    f"{self.path}: {head} differs from {embedding} in {differ} of rows {start} to {stop - 1}; {advice}"
                )

    def read(self, name: str, index: Index, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The slice `index` of tensor `name`, reading no more than that; None where the directory lacks the tensor.

        Raises `CheckpointError` where the tensor's shape is not `shape`.
        """
        if name not in self.tensors:
            return None
        stored = self.tensors[name]
        if stored.entry.shape != shape:
            raise CheckpointError(f"{self.path}: {misshapen(name, stored.entry.shape, shape)}")
        return self._handle(self._files[stored.name].path).get_slice(stored.name)[index if shape else ...]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `[start, stop)` of a tensor, [stop - start, …], without mapping its file."""
        stored = self.tensors[name].name
        return self._files[stored].read(stored, start, stop)

    def _handle(self, path: Path) -> Any:
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt")
        return self._handles[path]


def check_tensors(
    origin: str,
    source: HuggingFaceSource,
    bindings: Iterable[Binding],
    unused: Set[str] | None,
    host: dist.ProcessGroup,
) -> dict[str, int]:
    """Compare the directory with the tensors that all ranks will read from it; collective.

    Args:
        origin: key and path of the directory, for messages.
        source: the directory.
        bindings: the tensors that this rank will read.
        unused: names of tensors that files may hold beside them; None: any.
        host: gloo group over all ranks.

    Returns the number of tensors that belong to no module of the layout, by the first two parts of their names. Raises
    one `CheckpointError`, on every rank, that lists all tensors that are missing, have another shape, or are named
    like a module of the layout but unknown to it.
    """
    mine = ({binding.name: binding.shape for binding in bindings}, unused)
    everyone: list[Any] = [None] * host.size()
    dist.all_gather_object(everyone, mine, group=host)
    needed: dict[str, tuple[int, ...]] = {}
    for shapes, _ in everyone:
        needed |= shapes
    stored = {name: tensor.entry.shape for name, tensor in source.tensors.items()}
    problems = [f"{name} {list(shape)} is missing" for name, shape in needed.items() if name not in stored]
    problems += [misshapen(n, stored[n], shape) for n, shape in needed.items() if n in stored and stored[n] != shape]
    unread = set(stored) - set(needed)
    if unused is not None:
        unread -= set().union(*(names for _, names in everyone))
        held = {part_of_model(name) for name in needed}
        problems += [f"{n} {list(stored[n])} is unknown" for n in sorted(unread) if part_of_model(n) in held]
    if problems:
        raise CheckpointError(
            f"{origin} does not fit its config.json ({len(problems)} tensors): " + "; ".join(problems)
        )
    return count_by_part(unread)


def misshapen(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Error message for a tensor whose shape is not the configuration's."""
    return f"{name} has shape {list(found)}, but its config.json asks for {list(wanted)}"


def part_of_model(name: str) -> str:
    """The first two parts of a tensor's name, `model.vision_tower` for example."""
    return ".".join(name.split(".")[:2])


def count_by_part(names: Iterable[str]) -> dict[str, int]:
    """Number of tensors of each part of the model among `names`."""
    return dict(sorted(Counter(part_of_model(name) for name in names).items()))


def _owners(directory: Path) -> dict[str, TensorFile]:
    """The file to read each tensor from, by its name there: the one that the listing assigns it to.

    An old copy of a tensor in another file is not read. A tensor that is not listed is read if one file holds it.
    """
    listing = directory / LISTING
    if not listing.is_file():
        file = TensorFile(_single_file(directory))
        return dict.fromkeys(file.entries, file)
    listed = _read_listing(listing)
    absent = sorted({name for name in listed.values() if not (directory / name).is_file()})
    if absent:
        raise CheckpointError(f"hf_path {directory} lacks files that its {LISTING} lists: {', '.join(absent)}")
    files = {name: TensorFile(directory / name) for name in sorted(set(listed.values()))}
    wrong = [f"{name} (not in {file})" for name, file in listed.items() if name not in files[file].entries]
    if wrong:
        raise CheckpointError(f"{listing} lists {len(wrong)} tensors in files that lack them: {', '.join(wrong)}")
    owners: dict[str, TensorFile] = {}
    for file_name, file in files.items():
        for name in file.entries:
            if name not in listed and name in owners:
                raise CheckpointError(
                    f"{directory}: {owners[name].path.name} and {file_name} both hold {name}, and {LISTING} does not "
                    "say which counts: add it there, or delete the old copy"
                )
            if listed.get(name, file_name) == file_name:
                owners[name] = file
    return owners


def _read_listing(listing: Path) -> dict[str, str]:
    """File names by tensor. Raises `CheckpointError` where the listing is damaged or leads out of its folder."""
    try:
        weight_map = json.loads(listing.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map is no table of tensors and files, or empty")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"weight_map.{name} is {file!r}, which is not the name of a file beside it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{listing} is damaged: {error!r}; fetch or save the model again") from error
    return weight_map


def _single_file(directory: Path) -> Path:
    if (directory / SINGLE).is_file():
        return directory / SINGLE
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    if pickled:
        raise CheckpointError(
            f"hf_path {directory} holds its weights as {', '.join(pickled)}; they are not read, since a pickle "
            "can run any code. Load them with transformers and write safetensors with save_pretrained"
        )
    raise CheckpointError(
        f"hf_path {directory} holds neither {LISTING} nor {SINGLE}: point it to a directory with config.json and "
        "safetensors weights"
    )


def translation(names: Collection[str], mark: str = "embed_tokens.weight") -> Callable[[str], str]:
    """The function from names in files to names here, found by the prefix of the first name that continues in `mark`.

    Without such a name, names are taken for those used here.
    """
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix + mark) for name in names)), LANGUAGE)

    def translate(name: str) -> str:
        old, new = next((old, new) for old, new in _PREFIXES[prefix] if name.startswith(old))
        return new + name.removeprefix(old)

    return translate
