"""Finds out what kind of source a path is, and which of its files belong to the split that is asked for.

Another distribution adds a kind of source by an entry point of the group `mimo_gemma4.data_sources`, which names a
function as described by `SourceKind`:

    [project.entry-points."mimo_gemma4.data_sources"]
    csv = "my_package.csv_source:open_csv"
"""

import json
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Protocol

from mimo_gemma4.data.convert import json_source, table_source
from mimo_gemma4.data.convert.folder_source import FolderRows
from mimo_gemma4.data.convert.json_source import JsonRows
from mimo_gemma4.data.convert.rows import Rows
from mimo_gemma4.data.convert.table_source import TableRows
from mimo_gemma4.discovery import describe, load_entry_points
from mimo_gemma4.errors import ConfigError, DataError

GROUP = "mimo_gemma4.data_sources"
"""Group of the entry points that add kinds of sources."""

_SPLITS = {"train", "training", "valid", "validation", "val", "dev", "test"}
"""Words in file names that name a split."""


class SourceKind(Protocol):
    """A function that opens the sources of one kind."""

    def __call__(self, path: Path, split: str | None) -> Sequence[Rows] | None:
        """The rows of the file or folder at `path`, in order; None where it is of another kind.

        It is asked for every source, before the built-in kinds. `split` is the option `--split`. The rows are pickled
        and read in worker processes. Raises `DataError` for a source of its kind that cannot be read.
        """
        ...


def open_sources(paths: Sequence[Path], split: str | None = None) -> list[Rows]:
    """The rows of files or folders, in order. Raises `DataError`, and `ConfigError` for a broken entry point.

    Entry points are asked first. The built-in kinds know files by their suffix; a folder that holds tables at any depth
    is a Hugging Face data set, and any other a folder of media beside texts.
    `split`: the word that the names of a data set's files or folders must hold; needed where they hold several.
    """
    added = list(load_entry_points(GROUP))
    parts: list[Rows] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"the source {path} does not exist")
        opened = _open_added(path, split, added)
        if opened is None:
            opened = _folder(path, split) if path.is_dir() else [_file(path, [point.name for point, _ in added])]
        parts.extend(opened)
    if not any(len(part) for part in parts):
        raise DataError(f"no record in {', '.join(str(path) for path in paths)}")
    return parts


def _open_added(path: Path, split: str | None, added: Iterable[tuple[EntryPoint, SourceKind]]) -> Sequence[Rows] | None:
    """The rows from the one entry point that opens the source; None where no entry point does."""
    opened: list[tuple[EntryPoint, Sequence[Rows]]] = []
    for point, kind in added:
        if not callable(kind):
            raise ConfigError(f"{describe(point)} is not a function that opens sources, but {kind!r}")
        rows = kind(path, split)
        if rows is not None:
            opened.append((point, rows))
    if len(opened) > 1:
        names = " and ".join(describe(point) for point, _ in opened)
        raise DataError(f"the source {path} is opened by {names}; uninstall all but one")
    return opened[0][1] if opened else None


def _file(path: Path, added: Iterable[str]) -> Rows:
    """`added`: names of the entry points, for the message about an unknown kind."""
    if path.suffix in json_source.SUFFIXES:
        return JsonRows.open(path)
    if path.suffix in table_source.SUFFIXES:
        return TableRows.open(path)
    known = ", ".join((*json_source.SUFFIXES, *table_source.SUFFIXES, *added))
    raise DataError(f"the source {path} is none of {known}, and no folder")


def _folder(folder: Path, split: str | None) -> list[Rows]:
    tables = [path for path in sorted(folder.rglob("*")) if path.suffix in table_source.SUFFIXES and _is_data(path)]
    if tables:
        return [TableRows.open(path) for path in _of_split(folder, tables, split)]
    if split is not None:
        raise DataError(f"--split {split}: {folder} holds no parquet or arrow file; name the folder of the split")
    return [FolderRows.open(folder)]


def _is_data(path: Path) -> bool:
    """Whether a table is part of a data set, and not a cached result or left from an earlier `save_to_disk`."""
    if path.name.startswith("cache-"):
        return False
    state = path.parent / "state.json"
    if path.suffix != ".arrow" or not state.is_file():
        return True
    try:
        return path.name in {file["filename"] for file in json.loads(state.read_bytes())["_data_files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state} does not list the files of a data set: {error!r}") from error


def _of_split(folder: Path, tables: Iterable[Path], split: str | None) -> list[Path]:
    words = {path: set(re.split(r"[^A-Za-z0-9]+", str(path.relative_to(folder)))) for path in tables}
    if split is not None:
        chosen = [path for path in words if split in words[path]]
        if not chosen:
            raise DataError(f"--split {split}: no file in {folder} is called so; it holds {next(iter(words))}, …")
        return chosen
    splits = sorted(set().union(*words.values()) & _SPLITS)
    if len(splits) > 1:
        raise DataError(f"{folder} holds the splits {', '.join(splits)}; choose one with --split")
    return list(words)
