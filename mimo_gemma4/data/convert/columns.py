"""Finds a row's columns by their meaning, and notes what of the row nothing has used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mimo_gemma4.data.convert.rows import Row

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "texts", "dialog", "dialogue"),
    "question": ("question", "query", "prompt", "instruction", "input"),
    "context": ("context", "passage", "hint", "input"),
    "choices": ("choices", "options"),
    "answer": (
        "answer", "multiple_choice_answer", "answers", "label", "response", "output", "completion", "correct_answer",
    ),
    "choice": ("answerKey", "answer_key", "correct_choice_idx", "answer_idx", "answer_index"),
    "caption": ("caption", "captions", "text", "transcription", "transcript", "sentence"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "image": ("image", "images", "img", "jpg", "jpeg", "png", "webp", "image_path", "image_file"),
    "audio": ("audio", "audios", "sound", "wav", "flac", "audio_path", "audio_file"),
    "file": ("file_name", "file"),
}  # fmt: skip
"""Names of the columns by meaning; the first one with a value in the row counts. `choice` is the number or letter of
the right choice, read where there is no `answer`. `file` is an image or a sound by its suffix, as in the
`metadata.jsonl` of a Hugging Face image or audio folder."""

CHOICE_LETTERS = "ABCDEFGHIJ"
"""Columns that hold one choice each, where there is no column of all choices."""

_NAMES_OF_ROWS = frozenset({"id"})


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing: null, an empty text, list or object."""
    return value is None or (isinstance(value, str | bytes | Sequence | Mapping) and not value)


class Cells:
    """The cells of one row; every read is noted, so that `unused` names the rest."""

    def __init__(self, row: Row, names: Mapping[str, str], ignored: frozenset[str] = frozenset()) -> None:
        """`names`: columns by meaning, read instead of the usual ones; `ignored`: columns that are not there."""
        self._row = {name: value for name, value in row.items() if name not in ignored}
        self._names = names
        self._used = set(_NAMES_OF_ROWS)
        self._left: set[str] = set()
        self.ignored = ignored

    def find(self, meaning: str) -> Any:
        """The first value with a meaning that is not used yet, or None."""
        return self.named(meaning)[1]

    def named(self, meaning: str) -> tuple[str, Any]:
        """(Column, value) of the first value with a meaning that is not used yet; value None: there is none."""
        names = (self._names[meaning],) if meaning in self._names else COLUMNS[meaning]
        for name in names:
            if name not in self._used and self._row.get(name) is not None:
                self._used.add(name)
                return name, self._row[name]
        return names[0], None

    def take(self, names: Iterable[str]) -> list[Any]:
        """The values of the leading columns of `names` that have one."""
        values = []
        for name in names:
            if is_empty(self._row.get(name)):
                break
            values.append(self._row[name])
            self._used.add(name)
        return values

    def note(self, name: str) -> None:
        """Note a part of a used column that is not used itself, such as `messages.name`."""
        if name not in self.ignored:
            self._left.add(name)

    def note_keys(self, column: str, left: Mapping[str, Any]) -> None:
        """Note the keys of an object in a column that have a value and are not used."""
        for key, value in left.items():
            if not is_empty(value):
                self.note(f"{column}.{key}")

    def all_names(self) -> list[str]:
        """Names of the row's columns, sorted."""
        return sorted(self._row)

    def unused(self) -> list[str]:
        """Columns with a value that nothing has read, and noted parts of those read, sorted."""
        left = {name for name, value in self._row.items() if name not in self._used and not is_empty(value)}
        return sorted(left | self._left)
