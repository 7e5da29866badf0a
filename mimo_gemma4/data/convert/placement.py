"""Puts media at their places in the turns, and tells markers of media from text about tags of the same name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mimo_gemma4.data.convert.columns import Cells
from mimo_gemma4.data.convert.turns import MediaPlace, MediaReference, Parts, Turn
from mimo_gemma4.data.sample import BadSampleError

_MARKERS_ALONE = re.compile(r"(?:\s*<(?:image|audio|video)>)+\s*")
_KINDS = ("image", "audio", "video")


@dataclass(frozen=True)
class PlacedTurns:
    """Messages in the form of a sample's JSON, and their media in message order."""

    messages: list[dict[str, Any]]
    media: list[MediaReference]


def place(turns: list[Turn], media: Sequence[MediaReference], cells: Cells) -> PlacedTurns:
    """Put a file at every place for media; media of a type without places come first in the user's first message.

    Raises `BadSampleError` where places and files do not match.
    """
    files = {kind: [medium for medium in media if medium.media_type == kind] for kind in _KINDS}
    for kind in _KINDS:
        _settle_markers(turns, kind, len(files[kind]), cells)
    shown = {part.media_type for turn in turns for part in turn.parts if isinstance(part, MediaPlace)}
    unplaced: Parts = [MediaPlace(medium.media_type) for medium in media if medium.media_type not in shown]
    if unplaced:
        first = next((turn for turn in turns if turn.role == "user"), None)
        if first is None:
            raise BadSampleError("chat", "it has media, but no message of the user to put them in")
        first.parts = unplaced + first.parts
    queue = _Queue(files, turns)
    messages = [_message(turn, queue) for turn in turns]
    queue.require_empty()
    return PlacedTurns(messages, queue.placed)


class _Queue:
    """The row's files by type: those that no index names go to the places without index, in order."""

    def __init__(self, files: dict[str, list[MediaReference]], turns: Sequence[Turn]) -> None:
        self._files = files
        places = [part for turn in turns for part in turn.parts if isinstance(part, MediaPlace)]
        named = {(part.media_type, part.index) for part in places if part.index is not None}
        self._left = {
            kind: [file for number, file in enumerate(files[kind]) if (kind, number) not in named] for kind in _KINDS
        }
        self.placed: list[MediaReference] = []

    def put(self, part: MediaPlace) -> None:
        """Put a file at a place. Raises `BadSampleError` where there is none."""
        kind = part.media_type
        if part.reference is not None:
            self.placed.append(part.reference)
        elif part.index is not None:
            if part.index >= len(self._files[kind]):
                raise BadSampleError(
                    "members",
                    f"its messages name {kind} {part.index}, but it has {len(self._files[kind])} ({kind} 0 …)",
                )
            self.placed.append(self._files[kind][part.index])
        elif self._left[kind]:
            self.placed.append(self._left[kind].pop(0))
        else:
            hint = f"; if <{kind}> is text, --ignore '<{kind}>'" if part.marker else ""
            raise BadSampleError("members", f"its messages name more {kind} files than it has{hint}")

    def require_empty(self) -> None:
        """Raise `BadSampleError` where files are left."""
        for kind, left in self._left.items():
            if left:
                raise BadSampleError("members", f"it has {len(left)} {kind} files more than its messages name")


def _settle_markers(turns: Sequence[Turn], kind: str, count: int, cells: Cells) -> None:
    """Turn markers into text where the row shows that they are no places for its `count` files of a type.

    Without files all are text, except markers that fill the first or last line of a user's message: these name files
    that are lost. With files, those of the other messages are text if the user's markers fit the files already.
    """
    places = [
        (turn.role, part)
        for turn in turns
        for part in turn.parts
        if isinstance(part, MediaPlace) and part.media_type == kind
    ]
    free = count - sum(part.marker is None and part.reference is None for _, part in places)
    asked = sum(part.marker is not None and role == "user" for role, part in places)
    if all(part.marker is None for _, part in places):
        return
    if f"<{kind}>" in cells.ignored:
        _make_text(turns, kind)
    elif free <= 0:
        if not any(turn.role == "user" and _names_lost_file(turn.text, kind) for turn in turns):
            cells.note(f"<{kind}>")
            _make_text(turns, kind)
    elif asked == free < sum(part.marker is not None for _, part in places):
        cells.note(f"<{kind}>")
        _make_text([turn for turn in turns if turn.role != "user"], kind)


def _names_lost_file(text: str, kind: str) -> bool:
    """Whether the first or last line holds nothing but markers, as LLaVA writes them, and no tag is closed."""
    lines = text.strip().split("\n")
    alone = [line for line in (lines[0], lines[-1]) if _MARKERS_ALONE.fullmatch(line)]
    return any(f"<{kind}>" in line for line in alone) and f"</{kind}>" not in text


def _make_text(turns: Sequence[Turn], kind: str) -> None:
    """Replace the markers of a type by their text, joined with the text around."""
    for turn in turns:
        parts: Parts = []
        for part in turn.parts:
            if isinstance(part, MediaPlace) and part.media_type == kind and part.marker is not None:
                part = part.marker
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
        turn.parts = parts


def _message(turn: Turn, queue: _Queue) -> dict[str, Any]:
    content = []
    for part in turn.parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            queue.put(part)
            content.append({"type": part.media_type})
    if content or turn.role == "user":  # the user's message before a caption may be empty
        return {"role": turn.role, "content": content, **turn.keys}
    return {"role": turn.role, "content": None, **turn.keys}
