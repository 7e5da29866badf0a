"""Finds out where a chat template writes what: texts are rendered between marks, which are then taken out again.

Two renderings, with and without marks, cost the same for each message, however long the conversation is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from mimo_gemma4.data.messages import Messages

Kind = Literal["c", "a", "r", "t"]
"""What an anchor holds: content, an argument of a call, a response of a tool, a thought."""

_OPEN, _MIDDLE, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"  # noncharacters, which no text holds
_MARK = re.compile(f"{_OPEN}(\\d+)([a-z]){_MIDDLE}|{_CLOSE}")


@dataclass(frozen=True)
class Anchor:
    """A text of a message, without white space at its ends, at its place in the rendering."""

    start: int
    end: int
    message: int
    kind: Kind


def marked(messages: Messages) -> Messages:
    """The messages with marks around all texts. Tools have messages of their own, which count as responses."""
    return [_marked(message, number) for number, message in enumerate(messages)]


def unmarked(rendered: str) -> tuple[str, list[Anchor]] | None:
    """The rendering without marks, and its anchors in text order; None if marks are not in pairs."""
    pieces: list[str] = []
    anchors: list[Anchor] = []
    length, position = 0, 0
    opened: tuple[int, int, Any] | None = None
    for mark in _MARK.finditer(rendered):
        pieces.append(rendered[position : mark.start()])
        length, position = length + mark.start() - position, mark.end()
        if (mark[1] is None) == (opened is None):
            return None
        if opened is None:
            opened = (length, int(mark[1]), mark[2])
        else:
            anchors.append(Anchor(opened[0], length, *opened[1:]))
            opened = None
    pieces.append(rendered[position:])
    text = "".join(pieces)
    return None if opened or _OPEN in text or _MIDDLE in text else (text, anchors)


def _marked(message: dict[str, Any], number: int) -> dict[str, Any]:
    copy = dict(message)
    kind: Kind = "r" if message["role"] == "tool" else "c"
    content = message["content"]
    if isinstance(content, str):
        copy["content"] = _mark(content, number, kind)
    else:
        copy["content"] = [
            {**part, "text": _mark(part["text"], number, kind)} if part["type"] == "text" else part for part in content
        ]
    if message.get("tool_calls"):
        copy["tool_calls"] = [_marked_call(call, number) for call in message["tool_calls"]]
    if message.get("tool_responses"):
        copy["tool_responses"] = [
            {**response, "response": _mark_all(response.get("response"), number, "r")}
            for response in message["tool_responses"]
        ]
    for key in ("reasoning_content", "reasoning"):
        if isinstance(message.get(key), str):
            copy[key] = _mark(message[key], number, "t")
    return copy


def _marked_call(call: dict[str, Any], number: int) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    return {**call, "function": {**function, "arguments": _mark_all(function.get("arguments"), number, "a")}}


def _mark_all(value: Any, number: int, kind: Kind) -> Any:
    if isinstance(value, str):
        return _mark(value, number, kind)
    if isinstance(value, dict):
        return {key: _mark_all(item, number, kind) for key, item in value.items()}
    return [_mark_all(item, number, kind) for item in value] if isinstance(value, list) else value


def _mark(text: str, number: int, kind: Kind) -> str:
    inner = text.strip()
    if not inner:
        return text
    start = text.index(inner)
    return f"{text[:start]}{_OPEN}{number}{kind}{_MIDDLE}{inner}{_CLOSE}{text[start + len(inner) :]}"
