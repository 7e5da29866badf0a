"""From rows to samples that are known to train, and the tar files that a part of a source becomes."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Self

from webdataset import TarWriter

from mimo_gemma4.atomic import replace_file
from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.convert.conversation import ConversationReader
from mimo_gemma4.data.convert.media_files import load
from mimo_gemma4.data.convert.rows import Row, Rows
from mimo_gemma4.data.sample import BadSampleError, media_types, parse_messages
from mimo_gemma4.data.tokenizer import byte_media_tokens, byte_tokenizer
from mimo_gemma4.errors import DataError

SPLITS = ("train", "valid")

_LONGEST_NAME = 400
_SPLIT_BYTES = 7


@dataclass(frozen=True)
class Dropped:
    """A row that became no sample."""

    key: str
    """What its source calls it."""
    fault: str
    """As `sample.Fault` has it."""
    reason: str


@dataclass(frozen=True)
class PartResult:
    """What became of the rows of a part."""

    samples: Mapping[str, int]
    """By split."""
    media: Mapping[str, int]
    """Files in both splits, by type."""
    dropped: list[Dropped] = field(default_factory=list)

    def to_json(self) -> str:
        """All fields as one object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        fields = json.loads(text)
        return cls(fields["samples"], fields["media"], [Dropped(**dropped) for dropped in fields["dropped"]])


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a source, which one process turns into a tar per split."""

    number: int
    first_row: int
    """Number of its first row in the whole source; it makes the keys."""
    rows: tuple[Rows, ...]
    reader: ConversationReader
    media_folder: Path
    valid_fraction: float
    folder: Path
    """Where its files are written."""

    def tar(self, split: str) -> Path:
        """Its samples of a split; the file is absent if it has none."""
        return self.folder / f"{self.number:06d}.{split}.tar"

    @property
    def result(self) -> Path:
        """Its `PartResult`; the file is written last, so that where it is, the tars are whole."""
        return self.folder / f"{self.number:06d}.json"

    def convert(self) -> None:
        """Write tars and result. What is written depends on rows and options alone."""
        samples, media, dropped = Counter[str](), Counter[str](), list[Dropped]()
        partial = {split: self.tar(split).with_suffix(".partial") for split in SPLITS}
        with ExitStack() as stack:
            writers = {}
            for split, path in partial.items():
                file = stack.enter_context(path.open("wb"))
                writers[split] = stack.enter_context(TarWriter(file, encoder=False, mtime=0))
            for number, (name, row) in enumerate((item for rows in self.rows for item in rows), self.first_row):
                try:
                    sample = make_sample(name, row, self.reader, self.media_folder)
                except BadSampleError as error:
                    dropped.append(Dropped(_printable(name), error.fault, str(error)))
                    continue
                split = "valid" if _is_valid(sample, self.valid_fraction) else "train"
                writers[split].write({"__key__": f"{number:09d}", **sample})
                samples[split] += 1
                media.update(media_types(parse_messages(sample["json"])))
        for split, path in partial.items():
            if samples[split]:
                os.replace(path, self.tar(split))
            else:
                path.unlink()
        result = PartResult({split: samples[split] for split in SPLITS}, dict(media), dropped)
        replace_file(self.result, result.to_json())


def make_sample(name: str, row: Row | BadSampleError, reader: ConversationReader, folder: Path) -> dict[str, bytes]:
    """Members of a sample by field: its media as `0.jpg`, `1.wav`, …, and its JSON. Raises `BadSampleError`."""
    if isinstance(row, BadSampleError):
        raise row
    conversation = reader.read(row)
    members = {}
    for number, reference in enumerate(conversation.media):
        extension, data = load(reference, folder)
        members[f"{number}.{extension}"] = data
    document = {"messages": conversation.messages, "source": _printable(name)}
    members["json"] = json.dumps(document, ensure_ascii=False).encode(errors="surrogatepass")
    messages = parse_messages(members["json"])
    try:
        _built_in_encoder().encode(messages, [1] * len(media_types(messages)))
    except BadSampleError:
        raise
    except DataError as error:
        raise BadSampleError("chat", str(error)) from error
    return members


@cache
def _built_in_encoder() -> ConversationEncoder:
    """The encoder of models without a tokenizer: its template has the turns and placeholders of Gemma 4's own."""
    return ConversationEncoder(byte_tokenizer(), (), byte_media_tokens())


def _is_valid(sample: Mapping[str, bytes], fraction: float) -> bool:
    """Whether a sample is held out: by a hash of its first file, so that no image is in both splits' first place."""
    first = min(sample)  # `0.jpg` where there are media, else `json`
    digest = hashlib.blake2b(sample[first], digest_size=_SPLIT_BYTES).digest()
    return int.from_bytes(digest) < fraction * 256**_SPLIT_BYTES


def _printable(name: str) -> str:
    """The name of a row, whatever is in it, as text that can be encoded."""
    return name[:_LONGEST_NAME].encode(errors="backslashreplace").decode()
