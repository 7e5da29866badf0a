"""Converts rows to samples, checked as training will read them, and a part of a source to tar files."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

from webdataset import TarWriter

from mimo_gemma4.atomic import replace_file
from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.convert.conversation import ConversationReader
from mimo_gemma4.data.convert.media_files import load, media_path
from mimo_gemma4.data.convert.rows import Row, Rows
from mimo_gemma4.data.convert.stamps import FileStamp, ShardStamp, stamp_of_file, stamp_of_shard
from mimo_gemma4.data.sample import BadSampleError, media_types, parse_messages
from mimo_gemma4.data.tokenizer import byte_media_tokens, byte_tokenizer
from mimo_gemma4.errors import DataError

SPLITS = ("train", "valid")

_LONGEST_NAME = 400
_SPLIT_BYTES = 7


@dataclass(frozen=True)
class Dropped:
    """A row that could not be converted."""

    key: str
    """Its name in the source."""
    fault: str
    """One of `sample.Fault`."""
    reason: str


@dataclass(frozen=True)
class PartResult:
    """Result of converting a part."""

    samples: Mapping[str, int]
    """Number of samples by split."""
    media: Mapping[str, int]
    """Number of files in both splits, by type."""
    dropped: list[Dropped] = field(default_factory=list)
    unused: Mapping[str, int] = field(default_factory=dict)
    """Number of samples by what their rows say and nothing uses."""
    files: Mapping[str, FileStamp] = field(default_factory=dict)
    """The media files that the rows name, by absolute path."""
    tars: Mapping[str, ShardStamp] = field(default_factory=dict)
    """Size and hash of the tars, by split; the tar of `valid` is joined with others later."""

    def to_json(self) -> str:
        """All fields as one object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a result that `to_json` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"dropped": [Dropped(**dropped) for dropped in fields["dropped"]]})


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a source, which one process converts to one tar per split."""

    number: int
    first_row: int
    """Number of its first row in the whole source; keys are counted from it."""
    rows: tuple[Rows, ...]
    reader: ConversationReader
    media_folder: Path
    valid_fraction: float
    folder: Path
    """Output folder of its files."""

    def tar(self, split: str) -> Path:
        """Path of the tar with its samples of a split; there is no file if it has none."""
        return self.folder / f"{self.number:06d}.{split}.tar"

    @property
    def result(self) -> Path:
        """Path of its `PartResult`. It is written last: if it exists, the tars are complete."""
        return self.folder / f"{self.number:06d}.json"

    def convert(self) -> None:
        """Write tars and result. Their content depends only on rows and options."""
        samples, media, dropped, notes = Counter[str](), Counter[str](), list[Dropped](), Notes()
        partial = {split: self.tar(split).with_suffix(".partial") for split in SPLITS}
        with ExitStack() as stack:
            writers = {}
            for split, path in partial.items():
                file = stack.enter_context(path.open("wb"))
                writers[split] = stack.enter_context(TarWriter(file, encoder=False, mtime=0))
            for number, (name, row) in enumerate((item for rows in self.rows for item in rows), self.first_row):
                try:
                    sample = make_sample(name, row, self.reader, self.media_folder, notes)
                except BadSampleError as error:
                    dropped.append(Dropped(_printable(name), error.fault, str(error)))
                    continue
                split = "valid" if _is_valid(sample, self.valid_fraction) else "train"
                writers[split].write({"__key__": f"{number:09d}", **sample})
                samples[split] += 1
                media.update(media_types(parse_messages(sample["json"])))
        tars = {}
        for split, path in partial.items():
            if samples[split]:
                tars[split] = stamp_of_shard(path)
                os.replace(path, self.tar(split))
            else:
                path.unlink()
        counts = {split: samples[split] for split in SPLITS}
        result = PartResult(counts, dict(media), dropped, dict(notes.unused), notes.files, tars)
        replace_file(self.result, result.to_json())


@dataclass
class Notes:
    """What is noted while samples are made."""

    unused: Counter[str] = field(default_factory=Counter)
    """Number of samples by what their rows say and nothing uses."""
    files: dict[str, FileStamp] = field(default_factory=dict)
    """The files that were read, or that could not be, by absolute path."""


def make_sample(
    name: str, row: Row | BadSampleError, reader: ConversationReader, folder: Path, notes: Notes | None = None
) -> dict[str, bytes]:
    """Members of a sample by name: its media as `0.jpg`, `1.wav`, …, and its `json`. Raises `BadSampleError`."""
    notes = Notes() if notes is None else notes
    if isinstance(row, BadSampleError):
        raise row
    conversation = reader.read(row)
    members = {}
    for number, reference in enumerate(conversation.media):
        if (path := media_path(reference, folder)) is not None:
            notes.files[path] = stamp_of_file(path)  # before it is read, so that a change meanwhile is noticed later
        extension, data = load(reference, folder)
        members[f"{number}.{extension}"] = data
    document: dict[str, Any] = {"messages": conversation.messages, "source": _printable(name)}
    if conversation.tools is not None:
        document["tools"] = conversation.tools
    members["json"] = json.dumps(document, ensure_ascii=False).encode(errors="surrogatepass")
    messages = parse_messages(members["json"])
    try:
        _built_in_encoder().encode(messages, [1] * len(media_types(messages)))
    except BadSampleError:
        raise
    except DataError as error:
        raise BadSampleError("chat", str(error)) from error
    notes.unused.update(conversation.unused)
    return members


@cache
def _built_in_encoder() -> ConversationEncoder:
    """The byte-level encoder, whose template has the turns and placeholders of Gemma 4's."""
    return ConversationEncoder(byte_tokenizer(), (), byte_media_tokens())


def _is_valid(sample: Mapping[str, bytes], fraction: float) -> bool:
    """Whether a sample is held out: by a hash of its first file, so that both splits share no first image."""
    first = min(sample)  # `0.jpg` if there are media, else `json`
    digest = hashlib.blake2b(sample[first], digest_size=_SPLIT_BYTES).digest()
    return int.from_bytes(digest) < fraction * float(256**_SPLIT_BYTES)


def _printable(name: str) -> str:
    """The name of a row, cut to a length, as text that can be encoded."""
    return name[:_LONGEST_NAME].encode(errors="backslashreplace").decode()
