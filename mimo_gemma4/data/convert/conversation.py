"""Turns a row with any of the usual columns into messages and the media that they name.

| kind | columns |
|---|---|
| chat | `messages`, `conversations`: `role`/`content` or `from`/`value`; `texts`: pairs of `user`/`assistant` |
| question | `question` and `answer` |
| caption | `caption` |

beside `image` and `audio`. `COLUMNS` lists the other names of these columns in data sets.
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
"""Names of the columns by meaning; the first one with a value in the row counts. `file` is an image or a sound by its
suffix, as in the `metadata.jsonl` of a Hugging Face image or audio folder."""

DEFAULT_PROMPTS: Mapping[str, str] = {"image": "Describe the image.", "audio": "Transcribe the audio."}

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
_MARKER = re.compile(r"\n*<(image|audio|video)>\n*")


@dataclass(frozen=True)
class MediaReference:
    """A media file named by a row."""

    media_type: str
    source: str | bytes
    """Its path, its `data:` URL or its content."""


@dataclass(frozen=True)
class Conversation:
    """Messages in the form of a sample's JSON, and their media in message order."""

    messages: list[dict[str, Any]]
    media: list[MediaReference]


@dataclass(frozen=True)
class _MediaPlace:
    """Place of a media file in a turn; without `reference`, the next file of the row's column belongs there."""

    media_type: str
    reference: MediaReference | None = None


_Turn = tuple[str, list[str | _MediaPlace]]


@dataclass(frozen=True)
class ConversationReader:
    """Reads rows of any kind."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of columns by meaning (`COLUMNS`), read instead of the usual ones."""
    prompt: str | None = None
    """The user's message before a caption; None: `DEFAULT_PROMPTS` for the type of the row's media."""

    def __post_init__(self) -> None:
        """Raise `DataError` for an unknown meaning."""
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
                raise BadSampleError("members", f"{reference.source!r:.200} has no suffix of an image or sound")
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
    """The turn of a message, or both turns of a {"user", "assistant"} pair; none for an empty system message."""
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
    if any(isinstance(part, _MediaPlace) or part.strip() for part in parts):
        return [(role, parts)]
    if role == "system":
        return []
    raise BadSampleError("chat", f"a message of {role} is empty")


def _read_part(part: Any) -> list[str | _MediaPlace]:
    """Text or media of a typed part; `image_url` is an image in OpenAI's form."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return [part["text"]] if part["text"] else []
    media_type = "image" if kind == "image_url" else str(kind)
    if media_type not in DEFAULT_PROMPTS:
        raise BadSampleError("chat", f"content of type {kind!r:.100} is not supported: {part!r:.100}")
    value = next((part[key] for key in (str(kind), "bytes", "path", "url") if part.get(key) is not None), None)
    references = list(_references(media_type, value))
    return [_MediaPlace(media_type, reference) for reference in references] or [_MediaPlace(media_type)]


def _split(text: str) -> list[str | _MediaPlace]:
    """Split text at LLaVA's `<image>` and similar markers, and drop the line breaks around them."""
    pieces = _MARKER.split(text)  # text, type of a marker, text, …
    parts = [_MediaPlace(piece) if number % 2 else piece for number, piece in enumerate(pieces)]
    return [part for part in parts if part != ""]


def _text(value: Any, column: str) -> str:
    """The text of a cell; of several texts the most frequent one, or the first of these."""
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
    """Put a file at every place for media; media of a type without places come first in the user's first message."""
    shown = {part.media_type for _, parts in turns for part in parts if isinstance(part, _MediaPlace)}
    unplaced: list[str | _MediaPlace] = [
        _MediaPlace(medium.media_type) for medium in media if medium.media_type not in shown
    ]
    if unplaced:
        first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
        if first is None:
            raise BadSampleError("chat", "it has media, but no message of the user to put them in")
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
