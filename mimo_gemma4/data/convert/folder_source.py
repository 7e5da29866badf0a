"""Rows of a folder of images and sounds, each beside a `.txt` or `.json` file of the same name."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from mimo_gemma4.data.convert.json_source import parse_row
from mimo_gemma4.data.convert.rows import Row
from mimo_gemma4.data.convert.stamps import stamp_of_file
from mimo_gemma4.data.sample import BadSampleError, media_type_of

_TEXT_SUFFIXES = (".json", ".txt")


@dataclass(frozen=True)
class FolderRows:
    """Files below a folder; those that differ only in the suffix are one row."""

    folder: Path
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    """Path without suffix, relative to the folder, and the suffixes there, both sorted."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Find the files; hidden files and those that are neither media nor text are skipped."""
        found: dict[str, list[str]] = {}
        for parent, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for file in files:
                stem, suffix = os.path.splitext(file)
                kind = suffix.lower()
                if not file.startswith(".") and (kind in _TEXT_SUFFIXES or media_type_of(kind[1:])):
                    found.setdefault(os.path.relpath(os.path.join(parent, stem), folder), []).append(suffix)
        return cls(folder, tuple((stem, tuple(sorted(found[stem]))) for stem in sorted(found)))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.groups)

    def cut(self, start: int, stop: int) -> Self:
        """Rows `start` … `stop` - 1."""
        return replace(self, groups=self.groups[start:stop])

    @property
    def version(self) -> str:
        """Path of the folder and a hash of the names, sizes and modification times in it."""
        names = [stem + suffix for stem, suffixes in self.groups for suffix in suffixes]
        stamps = [(name, stamp_of_file(os.path.join(self.folder, name))) for name in names]
        return f"{os.path.abspath(self.folder)} {hashlib.sha256(repr(stamps).encode()).hexdigest()}"

    def __iter__(self) -> Iterator[tuple[str, Row | BadSampleError]]:
        """(Path without suffix, row) of every row: the content of its `.json`, `caption` from its `.txt`, its media."""
        for stem, suffixes in self.groups:
            try:
                yield stem, self._row(stem, suffixes)
            except BadSampleError as error:
                yield stem, error

    def _row(self, stem: str, suffixes: tuple[str, ...]) -> Row:
        by_kind: dict[str, list[str]] = {}
        for suffix in suffixes:
            kind = suffix.lower() if suffix.lower() in _TEXT_SUFFIXES else media_type_of(suffix.lower()[1:])
            by_kind.setdefault(str(kind), []).append(stem + suffix)
        documents, captions = by_kind.pop(".json", []), by_kind.pop(".txt", [])
        if not by_kind:
            raise BadSampleError("members", f"no image or sound lies beside {stem}{suffixes[0]}")
        if not documents and not captions:
            raise BadSampleError("members", f"no .txt or .json lies beside {stem}{suffixes[0]}")
        row: dict[str, Any] = {}
        if captions:
            row["caption"] = self._text(captions[0])
        if documents:
            document = parse_row(self._read(documents[0]))
            if isinstance(document, BadSampleError):
                raise document
            row.update(document)
        return {**row, **by_kind}

    def _text(self, name: str) -> str:
        try:
            return self._read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSampleError("json", f"{name} is not UTF-8 text: {error}") from error

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise BadSampleError("members", f"{name} cannot be read: {error}") from error
