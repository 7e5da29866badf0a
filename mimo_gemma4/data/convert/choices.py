"""Multiple choice: the options as lines under the question, and the answer as the line of the right one."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_gemma4.data.sample import BadSampleError

_LABELLED = re.compile(r"\(?([A-Za-z]|\d{1,2})[.):]\s*(?=\S)")


@dataclass(frozen=True)
class Choices:
    """The options of a question."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]

    @classmethod
    def read(cls, value: Any) -> Choices:
        """Options from a list of texts, {label: text}, {"label": […], "text": […]}, or either as text.

        Texts that begin with their own labels ("A. grass") keep these; others are labelled A, B, … Raises
        `BadSampleError`.
        """
        if isinstance(value, str):
            value = _literal(value)
        labels: Sequence[Any] | None = None
        if isinstance(value, Mapping):
            columns = (value.get("label", value.get("labels")), value.get("text", value.get("texts")))
            if all(isinstance(column, Sequence) and not isinstance(column, str) for column in columns):
                labels, value = columns
            else:
                labels, value = list(value), list(value.values())
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) < 2:
            raise BadSampleError("chat", f"its choices are {value!r:.100}; there must be two or more")
        texts = [_choice_text(text) for text in value]
        if labels is None:
            found = [_LABELLED.match(text) for text in texts]
            own = [match.group(1) if match else "" for match in found]
            if own in (_letters(len(own)), [str(number + 1) for number in range(len(own))]):
                texts = [text[match.end() :] for text, match in zip(texts, found, strict=True) if match]
                labels = own
            else:
                labels = _letters(len(texts))
        if len(labels) != len(texts) or len(set(map(str, labels))) != len(texts):
            raise BadSampleError("chat", f"its choices have labels {list(labels)!r:.100}, but there are {len(texts)}")
        return cls(tuple(str(label).strip() for label in labels), tuple(texts))

    def written(self) -> str:
        """One line per option."""
        return "\n".join(self._line(number) for number in range(len(self.texts)))

    def answer(self, value: Any) -> str:
        """The line of the right option; one line per option where there are several.

        `value` is a text or label of an option, or its number from 0. Raises `BadSampleError` where it is none, or
        where it may be two.
        """
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            if not value:
                raise BadSampleError("chat", "its answer is an empty list; it must name one of its choices")
            return "\n".join(self._line(number) for number in sorted({self._number(one) for one in value}))
        return self._line(self._number(value))

    def _line(self, number: int) -> str:
        return f"{self.labels[number]}. {self.texts[number]}"

    def _number(self, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        said = value.strip() if isinstance(value, str) else str(value)
        found = {number for number, text in enumerate(self.texts) if text == said}
        if match := re.fullmatch(r"\(?(\w{1,2})[.):]*", said):
            found |= {number for number, label in enumerate(self.labels) if label.casefold() == match[1].casefold()}
        if not found and (match := _LABELLED.match(said)):  # "B. blood"
            found = {
                n for n, text in enumerate(self.texts) if (self.labels[n], text) == (match[1], said[match.end() :])
            }
        counted = type(value) is int and 0 <= value < len(self.texts)
        if counted and not all(label.isdecimal() for label in self.labels):
            found.add(int(value))
        if len(found) == 1:
            return found.pop()
        problem = "may be each of" if found else "is none of"
        hint = "" if found or not said.isdecimal() else ", and text that is a number may count from 0 or 1"
        raise BadSampleError("chat", f"its answer {value!r:.100} {problem} its choices: {self.written()!r:.200}{hint}")


def _letters(count: int) -> list[str]:
    if count > len(string.ascii_uppercase):
        raise BadSampleError("chat", f"it has {count} choices; at most {len(string.ascii_uppercase)} can be labelled")
    return list(string.ascii_uppercase[:count])


def _literal(text: str) -> Any:
    """The list or object that text holds, as JSON or as Python prints it; the text itself if none."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _choice_text(value: Any) -> str:
    if isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadSampleError("chat", f"one of its choices is {value!r:.100}; it must be text")
    return value.strip()
