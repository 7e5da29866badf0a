"""The index finds every fault of a shard and reports it with shard, key and counts."""

import io
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mimo_gemma4.data.index import ShardIndex, main
from mimo_gemma4.data.sample import read_header
from mimo_gemma4.data.shards import expand_shards
from mimo_gemma4.data.token_index import TokenIndex
from mimo_gemma4.errors import DataError
from tests.shard_maker import (
    SoundProcessor,
    TileProcessor,
    byte_encoder,
    chat,
    jpeg,
    mixed_shard,
    open_dataset,
    png,
    wav,
    write_shard,
)

GOOD = {"good.json": chat("q", "a", "image"), "good.0.png": png(16, 16, 1)}
FAULTS = {
    "wrong json": ({"bad.json": b"{not json"}, "JSON cannot be read"),
    "json of another form": ({"bad.json": b'{"text": "hello"}'}, "messages"),
    "message without role": ({"bad.json": b'{"messages": [{"content": "x"}]}'}, "no role"),
    "no json": ({"bad.0.png": png(8, 8, 1)}, "no .json member"),
    "missing media": ({"bad.json": chat("q", "a", "image", "image"), "bad.0.png": png(8, 8, 1)}, "2 image.*hold 1 im"),
    "surplus media": ({"bad.json": chat("q", "a"), "bad.0.png": png(8, 8, 1)}, "0 image.*hold 1 image"),
    "media of another type": ({"bad.json": chat("q", "a", "image"), "bad.0.wav": wav(200)}, "1 image.*hold.*1 audio"),
    "not an image": ({"bad.json": chat("q", "a", "image"), "bad.0.jpg": b"no jpeg"}, "0.jpg: not a readable"),
    "sound cut short": (
        {"bad.json": chat("q", "a", "audio"), "bad.0.wav": wav(900)[:500]},
        "1844 bytes, more than its 500",
    ),
    "empty sound": ({"bad.json": chat("q", "a", "audio"), "bad.0.wav": wav(0)}, "promises 0 samples"),
    "not a sound": ({"bad.json": chat("q", "a", "audio"), "bad.0.flac": b"no flac file"}, "0.flac: not a readable"),
    "unknown content": ({"bad.json": chat("q", "a", "smell")}, "'smell' is not supported"),
    "placeholder in the text": ({"bad.json": chat("<|image|>", "a")}, "1 placeholder tokens"),
    "no soft tokens": ({"bad.json": chat("q", "a", "image"), "bad.0.png": png(4, 4, 1)}, "4 pixels are too few"),
    "no answer": ({"bad.json": b'{"messages": [{"role": "user", "content": "x"}]}'}, "no answer"),
}


class StrictTiles(TileProcessor):
    """Has no number of soft tokens for an image without a whole tile."""

    def soft_tokens(self, header):
        if header.width < 8:
            raise ValueError(f"{header.width} pixels are too few")
        return super().soft_tokens(header)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_sample_fails_or_is_left_out_as_asked(tmp_path, caplog, fault):
    members, reason = FAULTS[fault]
    shard = write_shard(tmp_path / "a.tar", {**members, **GOOD})
    processors = (StrictTiles(), SoundProcessor())
    with pytest.raises(DataError, match=f"{shard}: __key__ 'bad': .*{reason}"):
        open_dataset(shard, *processors)
    dataset = open_dataset(shard, *processors, on_bad_sample="skip")
    assert [dataset.key(index) for index in range(len(dataset))] == ["good"]
    assert f"{shard}: __key__ 'bad'" in caplog.text and "1 of 2 samples" in caplog.text
    assert (dataset.unusable[0].fault == "soft_tokens") == (fault == "no soft tokens")


def test_a_missing_shard_an_empty_glob_and_a_repeated_shard_are_data_errors(tmp_path):
    write_shard(tmp_path / "a-0.tar", GOOD)
    for shards, message in (
        (f"{tmp_path}/a-{{0..2}}.tar", r"2 of 3 files do not exist, the first is .*a-1\.tar"),
        (f"{tmp_path}/b-*.tar", "matches no file"),
        ([], "names no file"),
        (f"{tmp_path}/a-{{0..2.tar", "unbalanced braces"),
        ([f"{tmp_path}/a-0.tar", f"{tmp_path}/a-*.tar"], "more than once"),
    ):
        with pytest.raises(DataError, match=message):
            expand_shards(shards)


@pytest.mark.parametrize("content", [b"", b"garbage" * 200], ids=["zero bytes", "no tar"])
def test_a_broken_shard_is_reported_or_left_out(tmp_path, content):
    shard = tmp_path / "broken.tar"
    shard.write_bytes(content)
    good = write_shard(tmp_path / "good.tar", GOOD)
    with pytest.raises(DataError, match=r"broken\.tar: not a complete uncompressed tar"):
        open_dataset([shard, good])
    assert len(open_dataset([shard, good], on_bad_sample="skip")) == 1


def test_a_shard_cut_in_the_middle_keeps_its_whole_samples(tmp_path):
    whole = mixed_shard(tmp_path / "whole.tar", 0, 12).read_bytes()
    shard = tmp_path / "cut.tar"
    shard.write_bytes(whole[: whole.index(b"s7.0.png") + 520])  # into the data of that member
    index = ShardIndex.build(str(shard))
    assert index.keys.tolist() == [f"s{number}".encode() for number in range(7)]
    assert "not a complete" in str(index.bad_reasons[-1])


def test_too_many_bad_samples_are_an_error_even_when_skipping(tmp_path):
    bad = {f"bad{number}.json": b"?" for number in range(3)}
    shard = write_shard(tmp_path / "a.tar", {**GOOD, **bad})
    with pytest.raises(DataError, match="3 of 4 samples.*max_bad_fraction=0.5"):
        open_dataset(shard, on_bad_sample="skip", max_bad_fraction=0.5)
    assert len(open_dataset(shard, on_bad_sample="skip", max_bad_fraction=0.75)) == 1


def test_long_samples_name_their_length_and_the_key_to_change(tmp_path):
    shard = write_shard(tmp_path / "a.tar", {**GOOD, "long.json": chat("q" * 300, "a")})
    with pytest.raises(DataError, match="'long': 3[0-9][0-9] tokens, more than data.seq_length=256"):
        open_dataset(shard)
    dataset = open_dataset(shard, on_bad_sample="skip")
    assert len(dataset) == 1 and len(dataset.too_long) == 1 and not dataset.unusable


def test_media_without_a_module_in_the_layout_are_an_error_under_any_policy(tmp_path):
    shard = write_shard(tmp_path / "a.tar", {**GOOD, "b.json": chat("q", "a", "audio"), "b.0.wav": wav(400)})
    with pytest.raises(DataError, match="holds audio files, but the modules of `layout` encode image"):
        open_dataset(shard, TileProcessor(), on_bad_sample="skip")


def test_media_are_matched_in_message_order_numbered_together_or_apart(tmp_path):
    mixed = chat("q", "a", "image", "audio", "image")
    shard = write_shard(
        tmp_path / "a.tar",
        {
            **{"x.json": mixed, "x.2.png": png(24, 8, 1), "x.0.png": png(8, 8, 1), "x.1.wav": wav(500)},
            **{"y/y.json": mixed, "y/y.1.png": png(24, 8, 1), "y/y.0.jpg": jpeg(8, 8), "y/y.0.wav": wav(500)},
            **{"z.json": chat("q", "a", "image"), "z.png": png(16, 8, 1), "z.txt": b"ignored"},
        },
    )
    dataset = open_dataset(shard, TileProcessor(), SoundProcessor())
    assert [dataset.key(index) for index in range(3)] == ["x", "y/y", "z"]
    assert [[item.soft_tokens for item in dataset.media(index)] for index in range(3)] == [[1, 5, 3], [1, 5, 3], [2]]
    assert [item.modality for item in dataset.media(0)] == ["vision", "audio", "vision"]


def test_header_is_the_size_of_the_upright_image(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    shard = write_shard(tmp_path / "a.tar", {"a.json": chat("q", "a", "image"), "a.0.jpg": jpeg(32, 8, exif=exif)})
    header = ShardIndex.build(str(shard)).header(0)
    assert (header.width, header.height) == (8, 32)


def test_sidecars_are_read_back_and_follow_the_shard(tmp_path, monkeypatch):
    shard = mixed_shard(tmp_path / "a.tar", 0, 9)
    first = open_dataset(shard)
    monkeypatch.setattr(ShardIndex, "build", None)  # reading the shard again would fail
    monkeypatch.setattr(TokenIndex, "build", None)
    again = open_dataset(shard)
    assert again.fingerprint == first.fingerprint and again.media(4) == first.media(4)
    assert [again.key(index) for index in range(9)] == [first.key(index) for index in range(9)]
    monkeypatch.undo()
    mixed_shard(shard, 0, 10)
    os.utime(shard, ns=(1, 1))
    assert len(open_dataset(shard)) == 10


def test_another_processor_or_template_is_indexed_anew(tmp_path):
    class Doubled(TileProcessor):
        def soft_tokens(self, header):
            return 2 * super().soft_tokens(header)

    shard = mixed_shard(tmp_path / "a.tar", 1, 1)
    once, twice = (open_dataset(shard, processor).media(0)[0].soft_tokens for processor in (TileProcessor(), Doubled()))
    assert twice == 2 * once
    assert byte_encoder().fingerprint != byte_encoder(Doubled()).fingerprint


def test_an_unwritable_folder_uses_the_cache_and_a_damaged_sidecar_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    shard = mixed_shard(tmp_path / "data" / "a.tar", 0, 4)
    beside = tmp_path / "data" / "a.tar.index.npz"
    beside.mkdir()  # as root may write anywhere, a folder in the way stands for a read-only one
    ShardIndex.open(str(shard))
    [cached] = (tmp_path / "cache").rglob("*.npz")
    cached.write_bytes(b"damaged")
    assert len(ShardIndex.open(str(shard))) == 4
    with np.load(cached, allow_pickle=False) as file:
        assert len(file["keys"]) == 4
    assert not list(tmp_path.rglob(".a.tar*")), "no partial files stay"


def test_the_command_reports_counts_and_faults(tmp_path, capsys):
    shard = write_shard(tmp_path / "a.tar", {**GOOD, "bad.json": b"?"})
    assert main([str(shard)]) == 1
    output = capsys.readouterr().out
    assert "1 samples, 1 image, 0 audio, 0 video frames, 1 unusable" in output and "__key__ 'bad'" in output
    assert main([str(tmp_path / "none.tar")]) == 2
    assert main([str(write_shard(tmp_path / "b.tar", GOOD))]) == 0


def shard_of_chats(path, first, count):
    return write_shard(path, {f"{number:03d}.json": chat("q", "a") for number in range(first, first + count)})


def member_offsets(shard):
    with tarfile.open(shard) as tar:
        return [member.offset for member in tar]


def one_bit(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def damages():
    """Changes of a shard of twenty chats at its member 10, which begins at byte `at`."""
    return {
        "cut at a border": lambda data, at: data[:at],
        "cut in a header": lambda data, at: data[: at + 200],
        "cut in a document": lambda data, at: data[: at + 520],
        "cut in the end": lambda data, at: data[:at] + bytes(512),
        "a bit of the name": lambda data, at: one_bit(data, at + 2),
        "a bit of the size": lambda data, at: one_bit(data, at + 130),
        "a bit of the checksum": lambda data, at: one_bit(data, at + 150),
        "zeros for a header": lambda data, at: data[:at] + bytes(512) + data[at + 512 :],
        "garbage behind the end": lambda data, at: data + b"garbage" * 300,
    }


@pytest.mark.parametrize("damage", damages())
def test_a_shard_that_is_not_whole_is_named(tmp_path, damage):
    """GNU tar stops without an error at the first, second and fourth of these; a loader must not."""
    shard = shard_of_chats(tmp_path / "a.tar", 0, 20)
    at = member_offsets(shard)[10]
    shard.write_bytes(damages()[damage](shard.read_bytes(), at))
    index = ShardIndex.build(str(shard))
    assert index.bad_faults.tolist() == ["tar"] and len(index) < 20
    assert len(index) >= 9, "samples before the damage are used"
    with pytest.raises(DataError, match="not a complete uncompressed tar"):
        open_dataset(shard)


@pytest.mark.parametrize("padding", [0, 512, 300 * 512])
def test_shards_joined_by_cat_are_read_whole(tmp_path, padding):
    first, second = shard_of_chats(tmp_path / "a.tar", 0, 20), shard_of_chats(tmp_path / "b.tar", 20, 20)
    joined = tmp_path / "c.tar"
    joined.write_bytes(first.read_bytes() + bytes(padding) + second.read_bytes() + bytes(10_240))
    index = ShardIndex.build(str(joined))
    assert [key.decode() for key in index.keys] == [f"{number:03d}" for number in range(40)]
    data = joined.read_bytes()
    for offset, size in zip(index.json_offset, index.json_size, strict=True):
        assert data[offset : offset + size] == chat("q", "a")


def test_an_error_of_the_disk_is_no_fault_of_a_sample(tmp_path, monkeypatch):
    """Documents, images and sounds: libsndfile hides errors of the file that it reads from."""
    shard = write_shard(
        tmp_path / "a.tar",
        {**GOOD, "b.json": chat("q", "a", "audio"), "b.0.wav": wav(900)},
    )

    class Failing(io.BytesIO):
        reads, fails_at = 0, 0

        def read(self, count=-1):
            Failing.reads += 1
            if Failing.reads == Failing.fails_at:
                raise OSError(5, "Input/output error")
            return super().read(count)

    monkeypatch.setattr("mimo_gemma4.data.index.open_shard", lambda shard: Failing(Path(shard).read_bytes()))
    assert len(ShardIndex.build(str(shard))) == 2
    for number in range(1, Failing.reads + 1):
        Failing.reads, Failing.fails_at = 0, number
        with pytest.raises(DataError, match="cannot be read: .*Input/output error") as raised:
            ShardIndex.build(str(shard))
        assert type(raised.value) is DataError


def riff(sizes, samples=400):
    """A WAV file whose header gives `sizes(file size)` for the size of the file."""
    data = wav(samples)
    return data[:4] + struct.pack("<I", sizes(len(data))) + data[8:]


@pytest.mark.parametrize("sizes", [lambda n: n - 8, lambda n: n, lambda n: n - 7, lambda n: 0, lambda n: 2**32 - 1])
def test_the_size_of_the_file_in_a_wav_header_does_not_matter(sizes):
    data = riff(sizes)
    assert read_header("audio", "wav", io.BytesIO(data), 0, len(data)).samples == 400


def test_a_stale_and_a_damaged_index_are_named_and_rebuilt(tmp_path, caplog):
    shard = shard_of_chats(tmp_path / "a.tar", 0, 3)
    ShardIndex.open(str(shard))
    assert not caplog.records
    shard_of_chats(shard, 0, 4)
    assert len(ShardIndex.open(str(shard))) == 4 and "a.tar.index.npz belongs to another version" in caplog.text
    (tmp_path / "a.tar.index.npz").write_bytes(b"?")
    assert len(ShardIndex.open(str(shard))) == 4 and "a.tar.index.npz is damaged" in caplog.text


def test_a_shard_that_changes_while_it_is_indexed_leaves_no_index(tmp_path, monkeypatch):
    shard = shard_of_chats(tmp_path / "a.tar", 0, 3)
    built = ShardIndex.build

    def build(path):
        index = built(path)
        shard_of_chats(shard, 5, 9)
        return index

    monkeypatch.setattr(ShardIndex, "build", build)
    with pytest.raises(DataError, match="changed while it was indexed"):
        ShardIndex.open(str(shard))
    assert not list(tmp_path.glob("*.npz"))
