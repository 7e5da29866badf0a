"""The index of a shard: places of all samples and headers of their media, read once and kept beside the shard.

    python -m mimo_gemma4.data.index SHARDS… [--hf-path DIR | --preset NAME]

indexes shards before a training and reports what is in them. With a model, it also counts tokens, on all cores; what an
interrupted run has counted is kept.

SHARDS are tar files, brace lists or globs, on local disk or at any fsspec URL (`s3://bucket/train-{000..127}.tar`).

A sample is a run of consecutive tar members whose names are equal up to the first dot of the base name: `<key>.json`
and its media `<key>.0.jpg`, `<key>.1.png`, `<key>.0.wav`, …, which the messages name in the order of their numbers
(images and sounds are numbered together or separately). The frames of a video are images `<key>.<video>.<frame>.jpg`.
Nothing is unpacked, and no media are decoded. Links, devices and sparse files are ignored.
"""

import argparse
import io
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import BinaryIO, Self

import numpy as np

from mimo_gemma4.data.sample import (
    MEDIA_TYPES,
    BadSampleError,
    Fault,
    media_parts,
    media_type_of,
    media_types,
    parse_messages,
    read_header,
)
from mimo_gemma4.data.shards import Shard, expand_shards, open_shard, shard_version
from mimo_gemma4.data.sidecar import load_sidecar, save_sidecar
from mimo_gemma4.errors import DataError, MimoError
from mimo_gemma4.media import MediaHeader

_LONGEST_KEY = 512
"""Most bytes of a `__key__`; all keys of a shard are in one array, as wide as the longest."""
_ZEROS_AT_ONCE = 2**16
"""Bytes read at a time behind the end of a tar archive."""
_MEDIA_FIELD = re.compile(r"(?:(?P<number>\d+)\.)?(?:(?P<frame>\d+)\.)?(?P<extension>[^.]+)")


@dataclass(frozen=True)
class ShardIndex:
    """Arrays over the samples of one shard, over their media in message order, and over the unusable samples."""

    keys: np.ndarray
    """[samples] bytes: `__key__` in UTF-8."""
    json_offset: np.ndarray
    """[samples] int64: first byte of the JSON in the shard."""
    json_size: np.ndarray
    """[samples] int64."""
    media_first: np.ndarray
    """[samples + 1] int64: sample i has the media media_first[i] … media_first[i + 1] - 1."""
    media_type: np.ndarray
    """[media] int8: place in `MEDIA_TYPES`."""
    media_offset: np.ndarray
    """[media] int64: first byte of the file in the shard."""
    media_size: np.ndarray
    """[media] int64."""
    media_header: np.ndarray
    """[media, 4] int64: the fields of `MediaHeader`."""
    bad_keys: np.ndarray
    """[bad] str: `__key__` of the unusable samples; empty if the shard itself breaks off."""
    bad_faults: np.ndarray
    """[bad] str: their faults (`sample.Fault`)."""
    bad_reasons: np.ndarray
    """[bad] str: what is wrong with them, in words."""
    shard_size: np.ndarray
    """[] int64: bytes of the shard."""

    @classmethod
    def open(cls, shard: Shard) -> Self:
        """The index of a shard, from its sidecar or by reading the shard."""
        arrays = load_sidecar(shard, "index")
        if arrays is not None and set(arrays) == {field.name for field in fields(cls)}:
            return cls(**arrays)
        version = shard_version(shard)
        index = cls.build(shard)
        if shard_version(shard) != version:
            raise DataError(f"{shard} was changed while it was indexed; start again when it is complete")
        save_sidecar(shard, "index", {field.name: getattr(index, field.name) for field in fields(cls)})
        return index

    @classmethod
    def build(cls, shard: Shard) -> Self:
        """Read a shard: tar headers, JSON and media headers. Unusable samples are recorded, not raised.

        Raises `DataError` if the shard cannot be read, which is no fault of its samples.
        """
        entries: list[_Entry] = []
        bad: list[tuple[str, Fault, str]] = []
        with open_shard(shard) as file:
            try:
                for members in _samples(_members(file)):
                    try:
                        entries.append(_read_sample(file, members))
                    except BadSampleError as error:
                        bad.append((members[0].key[:_LONGEST_KEY], error.fault, str(error)))
            except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
                bad.append(("", "tar", f"not a complete uncompressed tar file: {error}"))
            except OSError as error:
                raise DataError(f"{shard} cannot be read: {error}") from error
            size = file.seek(0, io.SEEK_END)
        if not entries and not bad:
            bad.append(("", "tar", "the shard holds no samples"))
        return cls(
            keys=np.array([entry.key.encode() for entry in entries], dtype=np.bytes_),
            json_offset=np.array([entry.json_offset for entry in entries], np.int64),
            json_size=np.array([entry.json_size for entry in entries], np.int64),
            media_first=np.cumsum([0, *(len(entry.media) for entry in entries)], dtype=np.int64),
            media_type=np.array([MEDIA_TYPES.index(m.media_type) for e in entries for m in e.media], np.int8),
            media_offset=np.array([medium.offset for entry in entries for medium in entry.media], np.int64),
            media_size=np.array([medium.size for entry in entries for medium in entry.media], np.int64),
            media_header=np.array(
                [(h.width, h.height, h.samples, h.sample_rate) for e in entries for h in e.headers], np.int64
            ).reshape(-1, 4),
            bad_keys=np.array([key for key, _, _ in bad], np.str_),
            bad_faults=np.array([fault for _, fault, _ in bad], np.str_),
            bad_reasons=np.array([reason for _, _, reason in bad], np.str_),
            shard_size=np.array(size, np.int64),
        )

    def __len__(self) -> int:
        """Number of usable samples."""
        return len(self.keys)

    def key(self, sample: int) -> str:
        """`__key__` of a sample."""
        return str(self.keys[sample].decode())

    def media_range(self, sample: int) -> range:
        """Numbers of a sample's media in the `media_*` arrays."""
        return range(int(self.media_first[sample]), int(self.media_first[sample + 1]))

    def header(self, medium: int) -> MediaHeader:
        """Header of a media file."""
        return MediaHeader(*self.media_header[medium].tolist())


@dataclass(frozen=True)
class _Member:
    key: str
    field: str
    offset: int
    size: int

    @property
    def extension(self) -> str:
        return self.field.rpartition(".")[2].lower()

    @property
    def media_type(self) -> str | None:
        match = _MEDIA_FIELD.fullmatch(self.field)
        if match and match["frame"]:
            return "video" if media_type_of(self.extension) == "image" else None
        return media_type_of(self.extension) if match else None

    @property
    def place(self) -> tuple[int, int]:
        """Number of the media item, and of the frame if it is a video."""
        match = _MEDIA_FIELD.fullmatch(self.field)
        return (int(match["number"] or 0), int(match["frame"] or 0)) if match else (0, 0)


@dataclass(frozen=True)
class _Entry:
    key: str
    json_offset: int
    json_size: int
    media: list[_Member]
    headers: list[MediaHeader]


def _members(file: BinaryIO) -> Iterator[_Member]:
    """Members of a tar file, or of several joined end to end. Raises `tarfile.TarError` where it is not whole."""
    start: int | None = 0
    while start is not None:
        file.seek(start)
        # With backslashreplace, names of any bytes become text that can be printed and encoded.
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
            for info in tar:
                folder, slash, base = info.name.rpartition("/")
                stem, dot, field = base.partition(".")
                if info.isreg() and not info.issparse() and dot and stem:
                    yield _Member(f"{folder}{slash}{stem}", field, info.offset_data, info.size)
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            start = _next_archive(file, tar.offset)


def _next_archive(file: BinaryIO, end: int) -> int | None:
    """First byte of the archive behind the one that ends at byte `end`; None at the end of the file.

    tarfile takes a damaged header and the end of the file for the end of an archive, which is two blocks of zeros.
    Raises `tarfile.ReadError` for any other.
    """
    file.seek(end)
    marker = file.read(2 * tarfile.BLOCKSIZE)
    if len(marker) < tarfile.BLOCKSIZE or (len(marker) < 2 * tarfile.BLOCKSIZE and not any(marker)):
        raise tarfile.ReadError(f"it breaks off at byte {end + len(marker)}, before the two zero blocks that end it")
    if any(marker):
        raise tarfile.ReadError(f"the header at byte {end} is damaged; samples from there on are not read")
    position = end + len(marker)
    while block := file.read(_ZEROS_AT_ONCE):
        if any(block):
            first = len(block) - len(block.lstrip(b"\0"))
            return position + first // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        position += len(block)
    return None


def _samples(members: Iterator[_Member]) -> Iterator[list[_Member]]:
    group: list[_Member] = []
    for member in members:
        if group and member.key != group[0].key:
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _read_sample(file: BinaryIO, members: list[_Member]) -> _Entry:
    if len(members[0].key.encode()) > _LONGEST_KEY:
        raise BadSampleError("members", f"its key has more than {_LONGEST_KEY} bytes")
    by_field = {member.field: member for member in members}
    if len(by_field) < len(members):
        raise BadSampleError("members", f"a member occurs twice: {sorted(member.field for member in members)}")
    if "json" not in by_field:
        raise BadSampleError("members", f"it has no .json member, only {sorted(by_field)}")
    document = by_field["json"]
    file.seek(document.offset)
    messages = parse_messages(file.read(document.size))
    types = media_types(messages)
    media = _match(types, members)
    _check_frames([part["frames"] for part in media_parts(messages) if part["type"] == "video"], media)
    headers = []
    for media_type, member in zip(types, media, strict=True):
        try:
            headers.append(read_header(media_type, member.extension, file, member.offset, member.size))
        except BadSampleError as error:
            raise BadSampleError(error.fault, f"{member.field}: {error}") from error
    return _Entry(document.key, document.offset, document.size, media, headers)


def _match(types: list[str], members: list[_Member]) -> list[_Member]:
    """Media members in the order of the messages."""
    files: dict[str, list[_Member]] = {}
    for member in sorted(members, key=lambda member: member.place):
        if member.media_type is not None:
            files.setdefault(member.media_type, []).append(member)
    named, found = Counter(types), Counter({media_type: len(group) for media_type, group in files.items()})
    if named != found:
        raise BadSampleError(
            "members",
            f"its messages name {_count(named)}, but its members {sorted(member.field for member in members)} "
            f"hold {_count(found)}",
        )
    for media_type, group in files.items():
        if len({member.place for member in group}) < len(group):
            raise BadSampleError(
                "members", f"two {media_type} members have the same number: {[member.field for member in group]}"
            )
    remaining = {media_type: iter(group) for media_type, group in files.items()}
    return [next(remaining[media_type]) for media_type in types]


def _check_frames(expected: list[int], media: list[_Member]) -> None:
    found = list(Counter(member.place[0] for member in media if member.media_type == "video").values())
    if found != expected:
        raise BadSampleError("members", f"its messages name videos of {expected} frames, but its members hold {found}")


def _count(counter: Counter[str]) -> str:
    names = {"video": "video frames"}
    return ", ".join(f"{counter[media_type]} {names.get(media_type, media_type)}" for media_type in MEDIA_TYPES)


def progress[T](items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """The items, with a progress bar on standard error if that is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description, total, console=Console(stderr=True))


def main(arguments: list[str] | None = None) -> int:
    """Index the shards of the command line. The exit code is 1 if a sample is unusable, 2 for wrong arguments."""
    options = command_parser().parse_args(arguments)
    try:
        shards = expand_shards(options.shards)
        samples, media, faults = 0, Counter[str](), Counter[str]()
        for shard in progress(shards, len(shards), "indexing"):
            index = ShardIndex.open(shard)
            counts = Counter(MEDIA_TYPES[number] for number in index.media_type)
            print(f"{shard}: {len(index)} samples, {_count(counts)}, {len(index.bad_keys)} unusable")
            for key, fault, reason in zip(index.bad_keys, index.bad_faults, index.bad_reasons, strict=True):
                print(f"  {fault}: __key__ {str(key)!r}: {reason}")
            samples, media, faults = samples + len(index), media + counts, faults + Counter(index.bad_faults.tolist())
        if options.hf_path or options.preset:
            from mimo_gemma4.data.index_tokens import index_tokens  # it needs this module

            faults += index_tokens(shards, options)
    except MimoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    by_fault = "".join(f", {count} {fault}" for fault, count in sorted(faults.items()))
    print(f"{len(shards)} shards: {samples} samples, {_count(media)}, {faults.total()} unusable{by_fault}")
    return 1 if faults else 0


def command_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m mimo_gemma4.data.index", description=__doc__.partition("\n")[0])
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, brace lists or globs; paths or URLs")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--hf-path", metavar="DIR", help="also count tokens, with the tokenizer of a model directory")
    model.add_argument("--preset", metavar="NAME", help="also count tokens, as for `model.preset`")
    parser.add_argument(
        "--thoughts", choices=("learn", "as_template"), default="learn", help="`data.thoughts` of the training"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that count tokens (default: one per core)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
