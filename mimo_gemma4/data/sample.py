"""Content of one sample: its messages, the media types they name, and the headers of media files."""

import io
import json
import struct
from typing import IO, Any, BinaryIO, Literal, cast

import soundfile
from PIL import Image

from mimo_gemma4.data.messages import LOSS_KEYS, Conversation, unknown_keys
from mimo_gemma4.errors import DataError
from mimo_gemma4.media import MediaHeader

MEDIA_TYPES = ("image", "audio", "video")
"""Types of chat content that stand for media files: an image or a sound is one file, a video one file per frame."""

_TYPE_OF_EXTENSION = {
    "jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "bmp": "image", "gif": "image",
    "wav": "audio", "flac": "audio",
}  # fmt: skip
_EXIF_ORIENTATION = 0x0112
_EXIF_QUARTER_TURNS = (5, 6, 7, 8)
_UNKNOWN_LENGTH = 2**32 - 1
"""Length in the header of a WAV file that was written to a pipe."""
_UNKNOWN_FRAMES = 2**63 - 1
"""libsndfile's number of frames for a FLAC file whose header has none."""

_MOST_FRAMES = 100_000
"""Most frames of a video: more than a day at one frame per second."""
_LONGEST_REASON = 500

Fault = Literal["tar", "json", "members", "image", "audio", "bomb", "soft_tokens", "chat", "length"]
"""What is wrong with a bad sample, as counted in the records of a run.

- `tar`: its shard breaks off or is no tar file
- `json`: its document cannot be used
- `members`: its files are not the ones that its messages name
- `image` (also a video's frame), `audio`: a file of that type is damaged
- `bomb`: an image would unpack to far more pixels than any photograph has
- `soft_tokens`: a media file has no valid number of soft tokens
- `chat`: its conversation cannot be rendered
- `length`: it has more tokens than `data.seq_length`
"""


class BadSampleError(DataError):
    """One sample cannot be used; `fault` says why. Other samples are not affected."""

    def __init__(self, fault: Fault, reason: str) -> None:
        """`reason`: what is wrong, without shard and key; cut to 500 characters."""
        super().__init__(reason[:_LONGEST_REASON])
        self.fault: Fault = fault


def parse_messages(data: bytes) -> Conversation:
    """The messages of a sample's JSON, `{"messages": [{"role", "content"}, …], "tools": […]?}`.

    `content` is a string, null or typed parts. Raises `BadSampleError`.
    """
    try:
        document = json.loads(data)
        _require_utf8(data, document)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("json", f"its JSON cannot be read: {error}") from error
    messages = document.get("messages") if isinstance(document, dict) else None
    if not isinstance(messages, list) or not messages:
        raise BadSampleError("json", 'its JSON is not {"messages": [...]} with at least one message')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadSampleError("json", f"message {number} has no role: {message!r:.200}")
        _check_message(message, number)
    tools = document.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadSampleError("json", f"tools is no list of descriptions: {tools!r:.200}")
    return Conversation(messages, tools, unknown_keys(document))


def _check_message(message: dict[str, Any], number: int) -> None:
    """Raise `BadSampleError` for a value of another form than its key has. A message that says nothing is none."""
    content = message.setdefault("content", None)
    speaks = any(message.get(key) for key in ("tool_calls", "tool_responses", "reasoning_content", "reasoning"))
    if content is None and not speaks:
        raise BadSampleError("json", f"the content of message {number} is neither text nor typed parts: None")
    if content is not None and not isinstance(content, str):
        if not isinstance(content, list) or not all(_is_part(part) for part in content):
            raise BadSampleError(
                "json", f"the content of message {number} is neither text nor typed parts: {content!r:.200}"
            )
    for key in ("tool_calls", "tool_responses"):
        value = message.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise BadSampleError("json", f"{key} of message {number} is no list of objects: {value!r:.200}")
    for key in ("reasoning_content", "reasoning"):
        if not isinstance(message.get(key), str | None):
            raise BadSampleError("json", f"{key} of message {number} is no text: {message[key]!r:.200}")
    for key in LOSS_KEYS:
        if message.get(key) not in (None, 0, 1):  # equal to False and True, too
            raise BadSampleError(
                "json", f"{key} of message {number} is {message[key]!r:.200}; a message is learned (1) or not (0)"
            )


def _require_utf8(data: bytes, document: Any) -> None:
    """Raise `ValueError` for half of a surrogate pair, which JSON allows but no tokenizer can read."""
    if b"\\u" in data or b"\xed" in data:
        json.dumps(document, ensure_ascii=False).encode()


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    if part["type"] == "video":
        frames, fps = part.get("frames"), part.get("fps")
        countable = type(frames) is int and 0 < frames <= _MOST_FRAMES
        return countable and isinstance(fps, int | float) and 0.001 <= fps <= 1000
    return part["type"] != "text" or isinstance(part.get("text"), str)


def media_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of the messages that stand for media, in order. Raises `BadSampleError` for an unknown content type."""
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    media = [part for part in parts if part["type"] != "text"]
    unknown = sorted({part["type"] for part in media} - set(MEDIA_TYPES))
    if unknown:
        raise BadSampleError(
            "json", f"content type {unknown[0]!r} is not supported; known: text, {', '.join(MEDIA_TYPES)}"
        )
    return media


def media_types(messages: list[dict[str, Any]]) -> list[str]:
    """Types of the media files that the messages name, in order; a video of n frames is n files.

    Raises `BadSampleError` for an unknown content type.
    """
    return [part["type"] for part in media_parts(messages) for _ in range(file_count(part))]


def file_count(part: dict[str, Any]) -> int:
    """Number of files of a media part."""
    return int(part["frames"]) if part["type"] == "video" else 1


def media_type_of(extension: str) -> str | None:
    """Type of a media file by its last extension, in lower case; None for other files."""
    return _TYPE_OF_EXTENSION.get(extension)


def read_header(media_type: str, extension: str, file: BinaryIO, offset: int, size: int) -> MediaHeader:
    """Header of a media file, which is `size` bytes at `offset` of `file`.

    Raises `BadSampleError` for a damaged file, and `DataError` where `file` cannot be read, which is no fault of it.
    """
    raw = _Window(file, offset, size)
    window = cast(IO[bytes], raw)
    try:
        header = _image_header(window) if media_type in ("image", "video") else _sound_header(window, size)
        raw.require_read()
        return header
    except Exception as error:  # Pillow raises a dozen exception types for damaged files, even SyntaxError
        raw.require_read()
        raise BadSampleError(media_fault(media_type, error), f"not a readable .{extension} file: {error}") from error


def media_fault(media_type: str, error: BaseException) -> Fault:
    """The fault of a media file whose header or content raised `error` when it was read."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Image.DecompressionBombError):
            return "bomb"
        cause = cause.__cause__
    return "audio" if media_type == "audio" else "image"


def _image_header(file: IO[bytes]) -> MediaHeader:
    with Image.open(file) as image:
        width, height = image.size
        # `getexif` decodes the whole file if the header has no EXIF data.
        if "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION) in _EXIF_QUARTER_TURNS:
            width, height = height, width
    return MediaHeader(width=width, height=height)


def _sound_header(file: IO[bytes], size: int) -> MediaHeader:
    if file.read(4) == b"RIFF":
        _require_whole_wave(file, size)
    file.seek(0)
    information = soundfile.info(file)
    if not 0 < information.frames < _UNKNOWN_FRAMES:
        raise ValueError(f"its header promises {information.frames} samples")
    return MediaHeader(samples=information.frames, sample_rate=information.samplerate)


def _require_whole_wave(file: IO[bytes], size: int) -> None:
    """Raise `ValueError` if a WAV file ends within its samples, of which libsndfile would accept the rest.

    The size of the `data` chunk counts, not that of the file in its header, which many writers get wrong.
    """
    position = 12
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            if length != _UNKNOWN_LENGTH and position + 8 + length > size:
                raise ValueError(f"its header promises {position + 8 + length} bytes, more than its {size}")
            return
        position += 8 + length + length % 2
    raise ValueError("it breaks off before its samples")


class _Window(io.RawIOBase):
    """A byte range of an open file as a file of its own, to read a header without the rest."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0
        self._failure: OSError | DataError | None = None

    def require_read(self) -> None:
        """Raise `DataError` if the file could not be read: libsndfile and Pillow hide errors of the file they read."""
        if isinstance(self._failure, DataError):
            raise self._failure
        if self._failure is not None:
            raise DataError(f"its file cannot be read: {self._failure}") from self._failure

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + position < 0:
            raise ValueError(f"seek to {base + position}")
        self._position = base + position
        return self._position

    def readinto(self, buffer: Any) -> int:
        left = max(0, self._size - self._position)
        try:
            self._file.seek(self._offset + self._position)
            data = self._file.read(min(len(buffer), left))
        except (OSError, DataError) as error:
            self._failure = error
            self._size = 0  # for `require_read`; until then, the file is at its end
            return 0
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
