"""Reads the messages of a chat: roles, texts, media, tool calls, thoughts, and marks of what is not to be learned."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimo_gemma4.data.convert.columns import Cells
from mimo_gemma4.data.messages import LOSS_KEYS
from mimo_gemma4.data.sample import BadSampleError

PLACED_TYPES = ("image", "audio")
"""Media types that messages may place; frames of a video are images."""

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool",
    "tool_response": "tool", "function_response": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
_MARKER = re.compile(r"(\n*<(?:image|audio|video)>\n*)")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class MediaReference:
    """A media file named by a row."""

    media_type: str
    source: str | bytes
    """Its path, its `data:` URL or its content."""


@dataclass(frozen=True)
class MediaPlace:
    """Place of a media file in a turn; without reference and index, the next file of the row's column belongs there."""

    media_type: str
    reference: MediaReference | None = None
    index: int | None = None
    """Number of the file in the row's column, from 0."""
    marker: str | None = None
    """The text that it was read from, with the line breaks around; None for a typed part."""


Parts = list[str | MediaPlace]


@dataclass
class Turn:
    """A message: its role, its text and places for media, and its other keys in the form of a sample's JSON."""

    role: str
    parts: Parts
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text as the row wrote it, markers included."""
        return "".join(part if isinstance(part, str) else part.marker or "" for part in self.parts)


def read_message(message: Any, column: str, cells: Cells) -> list[Turn]:
    """The turn of a message, or both turns of a question and its answer; none for an empty system message.

    Raises `BadSampleError` for a message that cannot be read.
    """
    if isinstance(message, Sequence) and not isinstance(message, str) and len(message) == 2:  # `history`: [[q, a], …]
        message = dict(zip(("user", "assistant"), message, strict=True))
    if not isinstance(message, Mapping):
        raise BadSampleError("chat", f"a message is {message!r:.100}; it must be an object")
    left = {k: v for k, v in message.items() if v is not None and f"{column}.{k}" not in cells.ignored}
    if left.keys() >= {"user", "assistant"}:
        pair = [Turn(role, split_markers(_sentence(left.pop(role), role))) for role in ("user", "assistant")]
        cells.note_keys(column, left)
        return pair
    name = _pop(left, "role", "from")
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadSampleError("chat", f"the role of a message is {name!r:.100}; known: {', '.join(_ROLES)}")
    content = _pop(left, "content", "value")
    if role == "call":
        turn = Turn("assistant", [], {"tool_calls": read_calls(content)})
    else:
        turn = Turn(role, [], _pop_keys(left, role))
        turn.parts = _read_content(content, turn, cells)
    if not _is_learned(left) and turn.role == "assistant":
        turn.keys["loss"] = False
    if turn.role == "assistant":
        left = {key: value for key, value in left.items() if key not in LOSS_KEYS}
    else:  # it is never learned, so only a mark that it should be is not followed
        left = {key: value for key, value in left.items() if key not in LOSS_KEYS or value}
    cells.note_keys(column, left)
    return [turn] if turn.role != "system" or any(not isinstance(p, str) or p.strip() for p in turn.parts) else []


def read_calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, from a list of them, from one, or from their JSON text. Raises `BadSampleError`."""
    value = read_json(value, "tool_calls")
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, Sequence) or not calls or not all(isinstance(call, Mapping) for call in calls):
        raise BadSampleError("chat", f"tool_calls is {value!r:.100}; it must be a list of calls")
    return [wrap_function(call, "arguments") for call in calls]


def wrap_function(item: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A call or the description of a tool, {"type": "function", "function": {…}}, from this or from its inner part.

    `what`: the key beside `name` in the inner part. Raises `BadSampleError`.
    """
    if isinstance(item.get("function"), Mapping):
        item = {"type": "function", **item}
    elif isinstance(item.get("name"), str):
        outer = {key: item[key] for key in ("id",) if key in item}
        function = {key: value for key, value in item.items() if key not in ("type", "id")}
        item = {**outer, "type": "function", "function": function}
    else:
        raise BadSampleError("chat", f"a function has no name: {item!r:.100}; it must have name and {what}")
    if not isinstance(item["function"].get("name"), str):
        raise BadSampleError("chat", f"a function has no name: {item!r:.100}")
    return dict(item)


def read_json(value: Any, what: str) -> Any:
    """The value of JSON text; other values as they are. Raises `BadSampleError`."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("chat", f"{what} is {value!r:.100}, which is not JSON: {error}") from error


def split_markers(text: str) -> Parts:
    """Split text at LLaVA's `<image>` and similar markers."""
    pieces = _MARKER.split(text)  # text, marker, text, …
    parts: Parts = [
        MediaPlace(piece.strip("\n<>"), marker=piece) if number % 2 else piece for number, piece in enumerate(pieces)
    ]
    return [part for part in parts if part != ""]


def references(media_type: str, value: Any, cells: Cells) -> Iterator[MediaReference]:
    """The media of a cell: paths, contents, Hugging Face's {"bytes", "path"}, or a list of them."""
    if value is None or value == "":
        return
    if isinstance(value, str | bytes):
        yield MediaReference(media_type, value)
    elif isinstance(value, Mapping):
        left = {**value}
        named = [left.pop(key, None) for key in ("bytes", "path", "url")]
        source = next((source for source in named if source is not None), None)
        if not isinstance(source, str | bytes):
            raise BadSampleError("members", f"its {media_type} has neither bytes nor a path, only {sorted(value)}")
        cells.note_keys(media_type, left)
        yield MediaReference(media_type, source)
    elif isinstance(value, Sequence):
        for element in value:
            yield from references(media_type, element, cells)
    else:
        raise BadSampleError("members", f"its {media_type} is {value!r:.100}; it must be a path or bytes")


def _pop(left: dict[str, Any], *keys: str) -> Any:
    """Remove and return the value of the first key that is there."""
    return next((left.pop(key) for key in keys if key in left), None)


def _pop_keys(left: dict[str, Any], role: str) -> dict[str, Any]:
    """Remove the keys that a message of this role may have besides, and return them as a sample has them."""
    keys: dict[str, Any] = {}
    if role == "assistant":
        calls, call = left.pop("tool_calls", None), left.pop("function_call", None)
        found = (read_calls(calls) if calls else []) + (read_calls(call) if call else [])
        if found:
            keys["tool_calls"] = found
        if responses := left.pop("tool_responses", None):
            keys["tool_responses"] = responses
        thought = _pop(left, *_THOUGHTS)
        if not isinstance(thought, str | None):
            raise BadSampleError("chat", f"the thought of a message is {thought!r:.100}; it must be text")
        if thought:
            keys["reasoning_content"] = thought
    for key in ("name", *(("tool_call_id",) if role == "tool" else ())):
        if isinstance(left.get(key), str) and left[key]:
            keys[key] = left.pop(key)
    return keys


def _is_learned(left: Mapping[str, Any]) -> bool:
    """Whether a message is to be learned, by its marks. Raises `BadSampleError` for a mark that is neither 0 nor 1."""
    for key in LOSS_KEYS:
        if left.get(key) not in (None, 0, 1):  # equal to False and True, too
            raise BadSampleError("chat", f"{key} of a message is {left[key]!r:.100}; it is learned (1) or not (0)")
    return all(left.get(key) is None or bool(left[key]) for key in LOSS_KEYS)


def _read_content(content: Any, turn: Turn, cells: Cells) -> Parts:
    role, speaks = turn.role, turn.keys.keys() & {"tool_calls", "tool_responses", "reasoning_content"}
    parts: Parts
    if isinstance(content, str):
        parts = [content] if role == "tool" else split_markers(content)
    elif role == "tool" and not _is_typed(content):
        parts = ["" if content is None else json.dumps(content, ensure_ascii=False)]
    elif isinstance(content, Sequence):
        parts = [piece for part in content for piece in _read_part(part, cells)]
    elif content is None and speaks:
        return []
    else:
        raise BadSampleError("chat", f"a message of {role} has no content: {content!r:.100}")
    if role in ("system", "tool") or any(isinstance(part, MediaPlace) or part.strip() for part in parts):
        return parts
    if speaks:
        return []
    raise BadSampleError("chat", f"a message of {role} is empty")


def _is_typed(content: Any) -> bool:
    return (
        isinstance(content, Sequence)
        and bool(content)
        and all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content)
    )


def _read_part(part: Any, cells: Cells) -> Parts:
    """Text or media of a typed part; `image_url` is an image in OpenAI's form, `index` a number in the column."""
    left = {k: v for k, v in part.items() if f"content.{k}" not in cells.ignored} if isinstance(part, Mapping) else {}
    kind = left.pop("type", None)
    if kind == "text" and isinstance(left.get("text"), str):
        text = left.pop("text")
        cells.note_keys("content", left)
        return [text] if text else []
    media_type = "image" if kind == "image_url" else str(kind)
    if media_type not in PLACED_TYPES:
        raise BadSampleError("chat", f"content of type {kind!r:.100} is not supported: {part!r:.100}")
    value = next((left.pop(key) for key in (str(kind), "bytes", "path", "url") if left.get(key) is not None), None)
    named = list(references(media_type, value, cells))
    index = left.pop("index", None)
    if index is not None and (named or type(index) is not int or index < 0):
        raise BadSampleError("chat", f"index of an {media_type} is {index!r:.100}; it must number a file of the row")
    cells.note_keys("content", left)
    return [MediaPlace(media_type, reference) for reference in named] or [MediaPlace(media_type, index=index)]


def _sentence(value: Any, role: str) -> str:
    if isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadSampleError("chat", f"its {role} is {value!r:.100}; it must be text")
    return value.strip()
