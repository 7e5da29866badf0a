"""A token index is the same however many processes build it, and an interrupted one continues with the next part.

Arrays are compared whole: which process encodes a sample changes no number of it.
"""

from dataclasses import fields

import numpy as np
import pytest

from mimo_gemma4.data import token_index, token_parts
from mimo_gemma4.data.index import ShardIndex
from mimo_gemma4.data.index import main as index_main
from mimo_gemma4.data.token_index import TokenIndex
from mimo_gemma4.data.token_parts import EncodingProcesses
from mimo_gemma4.errors import DataError
from tests.shard_maker import byte_encoder, chat, mixed_shard, write_shard


def same(first: TokenIndex, second: TokenIndex) -> bool:
    return all(np.array_equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(TokenIndex))


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """A shard of 10 samples, in parts of 4."""
    monkeypatch.setattr(token_parts, "SAMPLES_PER_PART", 4)
    return str(mixed_shard(tmp_path / "a.tar", 0, 10))


def test_parts_and_processes_make_the_index_of_the_whole(shard, monkeypatch, tmp_path):
    index, encoder = ShardIndex.open(shard), byte_encoder()
    name = token_index.sidecar_name(shard, index, encoder)
    small = str(mixed_shard(tmp_path / "b.tar", 20, 3))
    monkeypatch.setattr(token_parts, "SAMPLES_PER_PART", 100)
    whole = TokenIndex.build(shard, index, encoder, "x")
    monkeypatch.setattr(token_parts, "SAMPLES_PER_PART", 4)
    token_index.encode_ahead([shard, small], encoder, 2)
    assert len(list(tmp_path.glob("*.0000*.npz"))) == 4, "three parts of the one, one of the other"
    with monkeypatch.context() as patch:
        patch.setattr(token_index, "encode_part", None)  # encoding again would fail
        assert same(TokenIndex.open(shard, index, encoder), whole)
        TokenIndex.open(small, ShardIndex.open(small), encoder)
    assert not list(tmp_path.glob("*.0000*.npz")), "parts are gone once the index is whole"
    assert same(TokenIndex.load(shard, name), whole)
    token_index.encode_ahead([shard, small], encoder, 2)
    assert not list(tmp_path.glob("*.0000*.npz")), "nothing is encoded twice"


def test_an_interrupted_index_continues_with_the_next_part(shard, monkeypatch):
    index, encoder = ShardIndex.open(shard), byte_encoder()
    expected = TokenIndex.build(shard, index, encoder, "other")
    encode, done = token_parts.encode_part, []

    def interrupted(part, *arguments):
        if part.first == 8 and len(done) == 2:
            done.append(part)
            raise KeyboardInterrupt
        done.append(part)
        return encode(part, *arguments)

    monkeypatch.setattr(token_index, "encode_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TokenIndex.open(shard, index, encoder)
    assert same(TokenIndex.open(shard, index, encoder), expected)
    assert [part.first for part in done] == [0, 4, 8, 8]


def test_a_process_that_ends_is_an_error(shard):
    with EncodingProcesses(byte_encoder(), 1) as processes:
        for process in processes._processes:
            process.kill()
            process.join()
        with pytest.raises(DataError, match="has ended"):
            list(processes.encode(token_parts.parts_of(shard, 10)))


def test_the_command_counts_tokens_ahead_and_names_what_is_left_out(tmp_path, capsys):
    odd = b'{"messages": [{"role": "user", "content": "q", "mood": 1}, {"role": "assistant", "content": "abc"}]}'
    shard = write_shard(tmp_path / "a.tar", {"a.json": chat("q", "abc"), "b.json": odd})
    assert index_main([str(shard), "--preset", "gemma4_tiny", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "8 with loss" in out and "not trained on: messages.mood (1 samples)" in out
    assert list(tmp_path.glob("a.tar.tokens-*.npz"))
    assert index_main([str(shard), "--preset", "gemma4_tiny", "--workers", "0"]) == 2
    assert "--workers is 0" in capsys.readouterr().err
