"""Turns a row with any of the usual columns into messages and the media that they name.

| kind | columns |
|---|---|
| chat | `messages`, `conversations`: `role`/`content` or `from`/`value`; `texts`: pairs of `user`/`assistant` |
| question | `question` and `answer`, with `context` and `choices` |
| caption | `caption` |

beside `system`, `history`, `tools`, `image` and `audio`. `COLUMNS` lists the other names of these columns in data sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimo_gemma4.data.convert.choices import Choices
from mimo_gemma4.data.convert.columns import CHOICE_LETTERS, COLUMNS, Cells, is_empty
from mimo_gemma4.data.convert.placement import place
from mimo_gemma4.data.convert.rows import Row
from mimo_gemma4.data.convert.turns import (
    MediaReference,
    Turn,
    read_json,
    read_message,
    references,
    split_markers,
    wrap_function,
)
from mimo_gemma4.data.messages import MESSAGE_KEYS
from mimo_gemma4.data.sample import BadSampleError, media_type_of
from mimo_gemma4.errors import DataError

DEFAULT_PROMPTS: Mapping[str, str] = {"image": "Describe the image.", "audio": "Transcribe the audio."}


@dataclass(frozen=True)
class RowConversation:
    """Messages and tools in the form of a sample's JSON, and their media in message order."""

    messages: list[dict[str, Any]]
    media: list[MediaReference]
    tools: list[dict[str, Any]] | None = None
    """Descriptions of the functions that the assistant may call."""
    unused: tuple[str, ...] = ()
    """What the row says besides: columns, and parts of columns such as `messages.name`."""


@dataclass(frozen=True)
class ConversationReader:
    """Reads rows of any kind."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of columns by meaning (`COLUMNS`), read instead of the usual ones."""
    prompt: str | None = None
    """The user's message before a caption; None: `DEFAULT_PROMPTS` for the type of the row's media."""
    ignored: frozenset[str] = frozenset()
    """Columns, and parts of columns such as `messages.name`, that are read as if they were not there."""

    def __post_init__(self) -> None:
        """Raise `DataError` for an unknown meaning."""
        if unknown := sorted(set(self.columns) - set(COLUMNS)):
            raise DataError(
                f"--column {unknown[0]}={self.columns[unknown[0]]}: known meanings are {', '.join(COLUMNS)}"
            )

    @property
    def ignored_columns(self) -> list[str]:
        """The ignored names that would be read otherwise; the others change no sample. Sorted."""
        read = {name for names in COLUMNS.values() for name in names} | set(self.columns.values()) | {*CHOICE_LETTERS}
        inside = MESSAGE_KEYS | {"from", "value", "function_call", "thinking", "index", "user", "assistant"}
        return sorted(
            name for name in self.ignored if name in read or name.rpartition(".")[2] in inside or name.startswith("<")
        )

    def read(self, row: Row) -> RowConversation:
        """The conversation of a row. Raises `BadSampleError` with fault `json`, `members` or `chat`."""
        cells = Cells(row, self.columns, self.ignored)
        if any(row.get(name) and name not in self.ignored for name in ("video", "videos")):
            raise BadSampleError("members", "it has a video; give its frames as images")
        media = _media(cells)
        placed = place(_with_system(self._turns(cells, media), cells), media, cells)
        return RowConversation(placed.messages, placed.media, _tools(cells), tuple(cells.unused()))

    def _turns(self, cells: Cells, media: Sequence[MediaReference]) -> list[Turn]:
        column, messages = cells.named("messages")
        if isinstance(messages, str) and messages.lstrip().startswith("["):
            messages = read_json(messages, column)
        if isinstance(messages, Sequence) and not isinstance(messages, str) and messages:
            return _history(cells) + [turn for message in messages for turn in read_message(message, column, cells)]
        if not is_empty(messages):
            cells.note(column)
        column, question = cells.named("question")
        if question is not None:
            return [*_history(cells), *_question(_text(question, "question", column, cells), cells)]
        column, caption = cells.named("caption")
        if caption is not None:
            shown = media[0].media_type if media else "image"
            prompt = DEFAULT_PROMPTS[shown] if self.prompt is None else self.prompt
            if not media:
                raise BadSampleError("members", "it has a caption, but no image or sound")
            answer = _text(caption, "caption", column, cells)
            return [Turn("user", [prompt] if prompt else []), Turn("assistant", [answer])]
        raise BadSampleError(
            "json",
            f"none of its columns {cells.all_names()} is known as a chat, question or caption; name one with --column",
        )


def _media(cells: Cells) -> list[MediaReference]:
    media = [ref for kind in ("image", "audio") for ref in references(kind, cells.find(kind), cells)]
    for reference in references("", cells.find("file"), cells) if not media else ():
        media_type = media_type_of(str(reference.source).rpartition(".")[2].lower())
        if media_type is None:
            raise BadSampleError("members", f"{reference.source!r:.200} has no suffix of an image or sound")
        media.append(MediaReference(media_type, reference.source))
    return media


def _with_system(turns: list[Turn], cells: Cells) -> list[Turn]:
    """The turns, behind a message of the column `system`."""
    column, system = cells.named("system")
    if is_empty(system) or (isinstance(system, str) and not system.strip()):
        return turns
    if not isinstance(system, str):
        raise BadSampleError("chat", f"its {column} is {system!r:.100}; it must be text")
    own = next((turn.text for turn in turns if turn.role == "system"), None)
    if own is None:
        return [Turn("system", [system.strip()]), *turns]
    if own.strip() != system.strip():
        raise BadSampleError(
            "chat", f"its {column} is {system!r:.100}, and a message of system is {own!r:.100}; --ignore {column}"
        )
    return turns


def _history(cells: Cells) -> list[Turn]:
    """Earlier turns: [question, answer] pairs or messages."""
    column, history = cells.named("history")
    if is_empty(history):
        return []
    history = read_json(history, column)
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise BadSampleError("chat", f"its {column} is {history!r:.100}; it must be a list of turns")
    return [turn for message in history for turn in read_message(message, column, cells)]


def _question(question: str, cells: Cells) -> list[Turn]:
    """A question with what belongs to it, and its answer."""
    lines = [question]
    column, context = cells.named("context")
    if not is_empty(context):
        lines.append(_text(context, "context", column, cells))
    value = cells.find("choices")
    letters = cells.take(CHOICE_LETTERS) if is_empty(value) else []
    if len(letters) > 1:
        value = letters
    column, answer = cells.named("answer")
    if is_empty(value):
        return [
            Turn("user", split_markers("\n".join(lines))),
            Turn("assistant", [_text(answer, "answer", column, cells)]),
        ]
    choices = Choices.read(value)
    said = choices.answer(cells.find("choice") if answer is None else answer)
    return [Turn("user", split_markers("\n".join([*lines, choices.written()]))), Turn("assistant", [said])]


def _tools(cells: Cells) -> list[dict[str, Any]] | None:
    column, tools = cells.named("tools")
    if is_empty(tools) or is_empty(tools := read_json(tools, column)):
        return None
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadSampleError("chat", f"its {column} is {tools!r:.100}; it must be a list of functions")
    return [wrap_function(tool, "parameters") for tool in tools]


def _text(value: Any, meaning: str, column: str, cells: Cells) -> str:
    """The text of a cell; of several texts the most frequent one, or the first of these."""
    if isinstance(value, Mapping):
        left = dict(value)
        key = next((key for key in ("answer", "text", "caption") if left.get(key) is not None), None)
        value = left.pop(key) if key else None
        cells.note_keys(column, left)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        texts = [_text(element, meaning, column, cells) for element in value]
        if len(set(texts)) > 1:
            cells.note(f"{column}.others")
        value = Counter(texts).most_common(1)[0][0] if texts else None
    if isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadSampleError("chat", f"its {meaning} is {value!r:.100}; it must be text")
    return value.strip()
