"""From a row to messages and the media that they name, whichever of the usual columns the row has.

| kind | columns |
|---|---|
| chat | `messages`, `conversations`: `role`/`content` or `from`/`value`; `texts`: pairs of `user`/`assistant` |
| question | `question` and `answer` |
| caption | `caption` |

beside `image` and `audio`. Each of them has other names that data sets use (`COLUMNS`).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimo_gemma4.data.convert.rows import Row
from mimo_gemma4.data.sample import BadSampleError, media_type_of
from mimo_gemma4.errors import DataError

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "texts", "dialog", "dialogue"),
    "question": ("question", "query", "prompt"),
    "answer": ("answer", "multiple_choice_answer", "answers", "label", "response"),
    "caption": ("caption", "captions", "text", "transcription", "transcript", "sentence"),
    "image": ("image", "images", "img", "jpg", "jpeg", "png", "webp", "image_path", "image_file"),
    "audio": ("audio", "audios", "sound", "wav", "flac", "audio_path", "audio_file"),
    "file": ("file_name", "file"),
}
"""What a column means, and the names it may have, of which the first that a row fills counts. `file` is an image or a
sound as its suffix tells, as in the `metadata.jsonl` of a Hugging Face image or audio folder."""

DEFAULT_PROMPTS: Mapping[str, str] = {"image": "Describe the image.", "audio": "Transcribe the audio."}

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
_MARKER = re.compile(r"\n*<(image|audio|video)>\n*")


@dataclass(frozen=True)
class MediaReference:
    """A media file as a row names it."""

    media_type: str
    source: str | bytes
    """Its path or `data:` URL, or its content."""


@dataclass(frozen=True)
class Conversation:
    """Messages of our chat form, and the media in the order in which they name them."""

    messages: list[dict[str, Any]]
    media: list[MediaReference]


@dataclass(frozen=True)
class _Slot:
    """Where a turn shows a media file; `reference` is None if it is the next of the row's column."""

    media_type: str
    reference: MediaReference | None = None


_Turn = tuple[str, list[str | _Slot]]


@dataclass(frozen=True)
class ConversationReader:
    """Reads rows of any kind."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of columns, by their meaning in `COLUMNS`, that are to be read instead of the usual ones."""
    prompt: str | None = None
    """What the user says before a caption; None: that of `DEFAULT_PROMPTS` for the row's media."""

    def __post_init__(self) -> None:
        """Raise `DataError` for a meaning that does not exist."""
        if unknown := sorted(set(self.columns) - set(COLUMNS)):
            raise DataError(
                f"--column {unknown[0]}={self.columns[unknown[0]]}: known meanings are {', '.join(COLUMNS)}"
            )

    def read(self, row: Row) -> Conversation:
        """The conversation of a row. Raises `BadSampleError` with fault `json`, `members` or `chat`."""
        if row.get("video") or row.get("videos"):
            raise BadSampleError("members", "it has a video; give its frames as images")
        media = self._media(row)
        return _place(self._turns(row, media), media)

    def _find(self, row: Row, meaning: str) -> Any:
        names = (self.columns[meaning],) if meaning in self.columns else COLUMNS[meaning]
        return next((row[name] for name in names if row.get(name) is not None), None)

    def _media(self, row: Row) -> list[MediaReference]:
        media = [ref for kind in ("image", "audio") for ref in _references(kind, self._find(row, kind))]
        for reference in _references("", self._find(row, "file")) if not media else ():
            media_type = media_type_of(str(reference.source).rpartition(".")[2].lower())
            if media_type is None:
                raise BadSampleError("members", f"{reference.source!r:.200} is named like no image or sound")
            media.append(MediaReference(media_type, reference.source))
        return media

    def _turns(self, row: Row, media: Sequence[MediaReference]) -> list[_Turn]:
        turns, question, caption = (self._find(row, meaning) for meaning in ("messages", "question", "caption"))
        if isinstance(turns, Sequence) and not isinstance(turns, str) and turns:
            return [turn for message in turns for turn in _read_turn(message)]
        if question is not None:
            answer = _text(self._find(row, "answer"), "answer")
            return [("user", _split(_text(question, "question"))), ("assistant", [answer])]
        if caption is not None:
            shown = media[0].media_type if media else "image"
            prompt = DEFAULT_PROMPTS[shown] if self.prompt is None else self.prompt
            if not media:
                raise BadSampleError("members", "it has a caption, but no image or sound")
            return [("user", [prompt] if prompt else []), ("assistant", [_text(caption, "caption")])]
        raise BadSampleError(
            "json", f"none of its columns {sorted(row)} is known as a chat, question or caption; name one with --column"
        )


def _references(media_type: str, value: Any) -> Iterator[MediaReference]:
    """The media of a column: paths, contents, Hugging Face's {"bytes", "path"}, or a list of them."""
    if value is None or value == "":
        return
    if isinstance(value, str | bytes):
        yield MediaReference(media_type, value)
    elif isinstance(value, Mapping):
        named = (value.get(key) for key in ("bytes", "path", "url"))
        source = next((source for source in named if source is not None), None)
        if not isinstance(source, str | bytes):
            raise BadSampleError("members", f"its {media_type} has neither bytes nor a path, only {sorted(value)}")
        yield MediaReference(media_type, source)
    elif isinstance(value, Sequence):
        for element in value:
            yield from _references(media_type, element)
    else:
        raise BadSampleError("members", f"its {media_type} is {value!r:.100}; it must be a path or bytes")


def _read_turn(message: Any) -> list[_Turn]:
    """One message, or the two of a {"user", "assistant"} pair; an empty system message is none."""
    if not isinstance(message, Mapping):
        raise BadSampleError("chat", f"a message is {message!r:.100}; it must be an object")
    if message.keys() >= {"user", "assistant"}:
        return [(role, _split(_text(message[role], role))) for role in ("user", "assistant")]
    name = next((message[key] for key in ("role", "from") if message.get(key) is not None), None)
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadSampleError("chat", f"the role of a message is {name!r:.100}; known: {', '.join(_ROLES)}")
    content = next((message[key] for key in ("content", "value") if message.get(key) is not None), None)
    if isinstance(content, str):
        parts = _split(content)
    elif isinstance(content, Sequence):
        parts = [piece for part in content for piece in _read_part(part)]
    else:
        raise BadSampleError("chat", f"a message of {role} has no content: {content!r:.100}")
    if any(isinstance(part, _Slot) or part.strip() for part in parts):
        return [(role, parts)]
    if role == "system":
        return []
    raise BadSampleError("chat", f"a message of {role} is empty")


def _read_part(part: Any) -> list[str | _Slot]:
    """A part of typed content; `image_url` is how OpenAI's form writes an image."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return [part["text"]] if part["text"] else []
    media_type = "image" if kind == "image_url" else str(kind)
    if media_type not in DEFAULT_PROMPTS:
        raise BadSampleError("chat", f"content of type {kind!r:.100} is not taken: {part!r:.100}")
    value = next((part[key] for key in (str(kind), "bytes", "path", "url") if part.get(key) is not None), None)
    references = list(_references(media_type, value))
    return [_Slot(media_type, reference) for reference in references] or [_Slot(media_type)]


def _split(text: str) -> list[str | _Slot]:
    """Text with LLaVA's `<image>` and the like taken out, line breaks around them included."""
    pieces = _MARKER.split(text)  # text, type of a marker, text, …
    parts = [_Slot(piece) if number % 2 else piece for number, piece in enumerate(pieces)]
    return [part for part in parts if part != ""]


def _text(value: Any, column: str) -> str:
    """The text of a cell; of several answers the most frequent one, of several captions the first."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("answer", "text", "caption") if value.get(key) is not None), None)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        texts = [_text(element, column) for element in value]
        value = Counter(texts).most_common(1)[0][0] if texts else None
    if isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadSampleError("chat", f"its {column} is {value!r:.100}; it must be text")
    return value.strip()


def _place(turns: list[_Turn], media: Sequence[MediaReference]) -> Conversation:
    """Give every slot its file; media of a type that no turn shows are put before the first thing the user says."""
    shown = {part.media_type for _, parts in turns for part in parts if isinstance(part, _Slot)}
    unplaced: list[str | _Slot] = [_Slot(medium.media_type) for medium in media if medium.media_type not in shown]
    if unplaced:
        first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
        if first is None:
            raise BadSampleError("chat", "it has media, but no message of the user that could show them")
        turns[first] = ("user", unplaced + turns[first][1])
    queues = {kind: iter([m for m in media if m.media_type == kind]) for kind in ("image", "audio", "video")}
    placed: list[MediaReference] = []
    messages = []
    for role, parts in turns:
        content = []
        for part in parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            reference = part.reference or next(queues[part.media_type], None)
            if reference is None:
                raise BadSampleError("members", f"its messages name more {part.media_type} files than it has")
            placed.append(reference)
            content.append({"type": part.media_type})
        messages.append({"role": role, "content": content})
    for kind, queue in queues.items():
        if left := len(list(queue)):
            raise BadSampleError("members", f"it has {left} {kind} files more than its messages name")
    return Conversation(messages, placed)
