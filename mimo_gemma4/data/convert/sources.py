"""Finds out what kind of source a path is, and which of its files belong to the split that is asked for."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mimo_gemma4.data.convert import json_source, table_source
from mimo_gemma4.data.convert.folder_source import FolderRows
from mimo_gemma4.data.convert.json_source import JsonRows
from mimo_gemma4.data.convert.rows import Rows
from mimo_gemma4.data.convert.table_source import TableRows
from mimo_gemma4.errors import DataError

_SPLITS = {"train", "training", "valid", "validation", "val", "dev", "test"}
"""Words in the names of files that tell their split."""


def open_sources(paths: Sequence[Path], split: str | None = None) -> list[Rows]:
    """The rows of files or folders, in order. Raises `DataError`.

    A folder that holds tables at any depth is a Hugging Face data set, and any other a folder of media beside texts.
    `split`: the word that the names of a data set's files or folders must hold; needed where they hold several.
    """
    parts: list[Rows] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"the source {path} does not exist")
        parts.extend(_folder(path, split) if path.is_dir() else [_file(path)])
    if not any(len(part) for part in parts):
        raise DataError(f"no record in {', '.join(str(path) for path in paths)}")
    return parts


def _file(path: Path) -> Rows:
    if path.suffix in json_source.SUFFIXES:
        return JsonRows.open(path)
    if path.suffix in table_source.SUFFIXES:
        return TableRows.open(path)
    known = ", ".join((*json_source.SUFFIXES, *table_source.SUFFIXES))
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
