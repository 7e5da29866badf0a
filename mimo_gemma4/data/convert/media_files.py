"""Loads the media of a row: finds the extension from the content, and decodes every file once as a test."""

import base64
import binascii
import io
import os
from pathlib import Path

from PIL import Image

from mimo_gemma4.data.convert.turns import MediaReference
from mimo_gemma4.data.sample import BadSampleError, Fault, media_fault, media_type_of, read_header

_SIGNATURES = (
    ("jpg", 0, b"\xff\xd8\xff"),
    ("png", 0, b"\x89PNG\r\n\x1a\n"),
    ("gif", 0, b"GIF8"),
    ("bmp", 0, b"BM"),
    ("webp", 8, b"WEBP"),
    ("wav", 8, b"WAVE"),
    ("flac", 0, b"fLaC"),
)
"""(Extension, offset, bytes): a file of the format has these bytes at that offset."""
_BLOCK = 2**16
"""Number of samples of a sound that are decoded at a time."""


def load(reference: MediaReference, folder: Path) -> tuple[str, bytes]:
    """Extension and content of a media file, checked by decoding it. Raises `BadSampleError`.

    Paths are relative to `folder`. Absolute paths and paths with `..` must lead into it too, so that the data cannot
    bring other files of the machine into a shard.
    """
    data = reference.source if isinstance(reference.source, bytes) else _fetch(reference.source, folder)
    extension = next((name for name, at, bytes_ in _SIGNATURES if data.startswith(bytes_, at)), None)
    if extension is None or media_type_of(extension) != reference.media_type:
        known = ", ".join(name for name, _, _ in _SIGNATURES if media_type_of(name) == reference.media_type)
        raise BadSampleError(
            _fault(reference), f"{_describe(reference)} begins with {data[:12]!r}; it must be one of {known}"
        )
    try:
        read_header(reference.media_type, extension, io.BytesIO(data), 0, len(data))
        _decode(reference.media_type, data)
    except BadSampleError as error:
        raise BadSampleError(error.fault, f"{_describe(reference)}: {error}") from error
    return extension, data


def media_path(reference: MediaReference, folder: Path) -> str | None:
    """Absolute path of the file that a row names; None if it holds the content itself, or for a URL."""
    source = reference.source
    if isinstance(source, bytes) or source.startswith("data:") or "://" in source or "\0" in source:
        return None
    return os.path.normpath(os.path.join(os.path.abspath(folder), source))


def _fetch(source: str, folder: Path) -> bytes:
    if source.startswith("data:"):
        try:
            return base64.b64decode(source.partition(",")[2], validate=True)
        except (ValueError, binascii.Error) as error:
            raise BadSampleError("members", f"{source[:50]!r}… is not encoded in base64: {error}") from error
    if "://" in source:
        raise BadSampleError("members", f"{source!r:.200} is a URL; download it and give its path")
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, source))
    if not path.startswith(root.rstrip(os.sep) + os.sep):
        raise BadSampleError("members", f"{source!r:.200} lies outside of {root}; choose another folder with --media")
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise BadSampleError(
            "members", f"{source!r:.200} cannot be read: {getattr(error, 'strerror', error)}"
        ) from error


def _decode(media_type: str, data: bytes) -> None:
    """Decode a whole file. Raises `BadSampleError`."""
    try:
        if media_type == "image":
            with Image.open(io.BytesIO(data)) as image:
                image.draft(
                    "RGB", (image.width // 8, image.height // 8)
                )  # JPEG: reads all bytes at a fraction of the work
                image.load()
        else:
            _decode_sound(data)
    except BadSampleError:
        raise
    except Exception as error:  # Pillow and libsndfile raise a dozen exception types for damaged files
        raise BadSampleError(media_fault(media_type, error), f"it cannot be decoded: {error}") from error


def _decode_sound(data: bytes) -> None:
    import soundfile

    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        count = sum(len(block) for block in sound.blocks(_BLOCK, dtype="int16"))
        if count != sound.frames:
            raise BadSampleError("audio", f"it holds {count} of the {sound.frames} samples that its header promises")


def _fault(reference: MediaReference) -> Fault:
    return "image" if reference.media_type == "image" else "audio"


def _describe(reference: MediaReference) -> str:
    if isinstance(reference.source, bytes):
        return f"its {reference.media_type} of {len(reference.source)} bytes"
    return f"{reference.source[:200]!r}"
