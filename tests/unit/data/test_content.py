"""Other contents are noticed: any document, any size of a media file, and changes in the sampled blocks."""

import os

import pytest

from mimo_gemma4.data.content import SAMPLED_BYTES, SAMPLED_FILES
from mimo_gemma4.errors import DataError
from tests.shard_maker import SoundProcessor, chat, open_dataset, wav, write_shard


def sounds(path, count, changed=None, at=0, longer=None):
    """Samples with a sound of 6,044 bytes each. `changed`: the sample with another byte `at` of its sound."""
    members = {}
    for number in range(count):
        data = bytearray(wav(3000 + (number == longer)))
        if number == changed:
            data[at] ^= 1
        members |= {f"s{number}.json": chat("?", f"answer {number}", "audio"), f"s{number}.0.wav": bytes(data)}
    return write_shard(path, members)


def hashes(path):
    (content,) = open_dataset(path, SoundProcessor()).contents
    return [(shard.documents, shard.media) for shard in content.shards]


MIDDLE = 3022
"""The middle of a file; the block around it ends 2,048 bytes before and after."""


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        ({}, False),
        ({"changed": 0, "at": MIDDLE}, True),
        ({"changed": 5, "at": MIDDLE + SAMPLED_BYTES // 2 - 1}, True),
        ({"changed": 5, "at": MIDDLE + SAMPLED_BYTES // 2}, False),  # beyond the block: what docs/concepts.md admits
        ({"longer": 5}, True),
    ],
)
def test_media_are_compared_by_size_and_by_a_block_from_the_middle(tmp_path, change, noticed):
    before = hashes(sounds(tmp_path / "a.tar", 6))
    after = hashes(sounds(tmp_path / "a.tar", 6, **change))
    assert (before != after) == noticed


def test_of_many_media_all_sizes_and_the_blocks_of_some_are_compared(tmp_path):
    """Twice as many files as are sampled: the first and the last are, of two neighbours at most one is not."""
    count = 2 * SAMPLED_FILES
    before = hashes(sounds(tmp_path / "a.tar", count))
    for change in ({"longer": 1}, {"changed": 0, "at": MIDDLE}, {"changed": count - 1, "at": MIDDLE}):
        assert hashes(sounds(tmp_path / "a.tar", count, **change)) != before
    missed = [hashes(sounds(tmp_path / "a.tar", count, changed=n, at=MIDDLE)) == before for n in (100, 101)]
    assert sorted(missed) == [False, True]


def test_a_document_replaced_behind_size_and_time_is_noticed_when_it_is_read(tmp_path):
    """Such a shard's index counts as fresh, and the tokens of both documents are equally many."""
    path = write_shard(tmp_path / "a.tar", {"a.json": chat("q", "one"), "b.json": chat("q", "two")})
    times = os.stat(path)
    open_dataset(path, SoundProcessor())
    write_shard(path, {"a.json": chat("q", "one"), "b.json": chat("q", "six")})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    dataset = open_dataset(path, SoundProcessor())
    dataset.encode(0)
    with pytest.raises(DataError, match=r"a\.tar: __key__ 'b': its \.json member is not the one that was indexed"):
        dataset.encode(1)
