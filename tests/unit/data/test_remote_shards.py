"""Shards at a URL are listed, indexed by a few reads, read by range and recognised, as on local disk."""

import contextlib
import io

import fsspec
import pytest

from mimo_gemma4.data.dataset import ShardDataset, Source
from mimo_gemma4.data.index import ShardIndex, main
from mimo_gemma4.data.retries import POLICY, retried
from mimo_gemma4.data.shards import expand_shards, read_range
from mimo_gemma4.errors import DataError
from tests.shard_maker import byte_encoder, chat, mixed_shard, open_dataset, png, write_shard


@pytest.fixture
def bucket(tmp_path):
    """Two shards at memory://bucket, and the same files in a folder."""
    memory = fsspec.filesystem("memory")
    for number, count in enumerate((8, 5)):
        shard = mixed_shard(tmp_path / f"a-{number}.tar", 10 * number, count)
        memory.pipe_file(f"/bucket/a-{number}.tar", shard.read_bytes())
    yield tmp_path
    with contextlib.suppress(FileNotFoundError):
        memory.rm("/bucket", recursive=True)


def contents(dataset):
    encoded = [dataset.encode(index) for index in range(len(dataset))]
    files = [read_range(m.shard, m.offset, m.size) for index in range(len(dataset)) for m in dataset.media(index)]
    return [dataset.key(index) for index in range(len(dataset))], [e.input_ids.tolist() for e in encoded], files


@pytest.mark.parametrize("name", ["memory://bucket/a-{0..1}.tar", "memory://bucket/a-*.tar", "file://{folder}/a-*.tar"])
def test_samples_of_a_url_are_those_of_the_local_files(bucket, name):
    local = open_dataset(f"{bucket}/a-*.tar")
    remote = open_dataset(name.replace("{folder}", str(bucket)))
    assert contents(remote) == contents(local) and remote.fingerprint == local.fingerprint


def test_a_remote_index_is_kept_beside_the_shard_and_follows_it(bucket, monkeypatch):
    memory = fsspec.filesystem("memory")
    url = "memory://bucket/a-0.tar"
    assert len(open_dataset(url)) == 8
    assert any(name.endswith("a-0.tar.index.npz") for name in memory.ls("/bucket", detail=False))
    with monkeypatch.context() as patch:
        patch.setattr(ShardIndex, "build", None)  # reading the shard again would fail
        assert len(open_dataset(url)) == 8
    memory.pipe_file("/bucket/a-0.tar", mixed_shard(bucket / "b.tar", 0, 9).read_bytes())
    assert len(open_dataset(url)) == 9


def test_a_remote_index_reads_headers_not_pixels(tmp_path, monkeypatch):
    picture = png(16, 16, 1) + bytes(400_000)  # Pillow stops at the end of the image
    members = {}
    for number in range(10):
        members |= {f"s{number}.json": chat("q", "a", "image"), f"s{number}.0.png": picture}
    shard = write_shard(tmp_path / "a.tar", members)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/headers/a.tar", shard.read_bytes())
    read = []
    opened = type(memory).open

    def counting(self, path, *arguments, **options):
        file = opened(self, path, *arguments, **options)
        original = file.read
        file.read = lambda size=-1: read.append(len(data := original(size))) or data
        return file

    monkeypatch.setattr(type(memory), "open", counting)
    try:
        assert len(ShardIndex.build("memory://headers/a.tar")) == 10
    finally:
        memory.rm("/headers", recursive=True)
    assert 0 < sum(read) < shard.stat().st_size / 20


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("memory://bucket/none.tar", "1 of 1 files do not exist, the first is memory:///bucket/none.tar"),
        ("memory://bucket/none-*.tar", "matches no file"),
        ("nowhere://bucket/a.tar", "nowhere"),
        (["memory://bucket/a-0.tar", "memory://bucket/a-*.tar"], "more than once"),
    ],
)
def test_what_is_wrong_with_a_url_is_a_data_error(bucket, shards, message):
    with pytest.raises(DataError, match=message):
        expand_shards(shards)


def test_the_command_indexes_urls(bucket, capsys):
    assert main(["memory://bucket/a-{0..1}.tar"]) == 0
    assert "memory:///bucket/a-1.tar: 5 samples" in capsys.readouterr().out


def test_sources_are_numbered_one_after_the_other_and_share_no_shard(bucket):
    local, remote = Source(f"{bucket}/a-0.tar", 3.0), Source("memory://bucket/a-1.tar")
    dataset = ShardDataset.open([local, remote], byte_encoder(), seq_length=256)
    assert dataset.sizes == (8, 5) and dataset.weights == (3.0, 1.0)
    assert dataset.key(8) == "s10" and dataset.shard(8) == "memory:///bucket/a-1.tar"
    with pytest.raises(DataError, match="more than once"):
        ShardDataset.open([local, Source(f"{bucket}/a-*.tar")], byte_encoder(), seq_length=256)


def test_a_source_without_usable_samples_is_named(bucket):
    empty = write_shard(bucket / "empty.tar", {"long.json": chat("q" * 300, "a")})
    with pytest.raises(DataError, match="empty.tar hold no usable sample"):
        ShardDataset.open(
            [Source(f"{bucket}/a-0.tar"), Source(empty)], byte_encoder(), seq_length=256, on_bad_sample="skip"
        )


FAULTS = {
    "error": lambda data: OSError("500, message='Internal Server Error'"),
    "refused": lambda data: PermissionError("403 Forbidden"),
    "foreign error": lambda data: RuntimeError("payload is not completed"),
    "short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
}


@pytest.fixture
def failing(bucket, monkeypatch):
    """Makes the reads `numbers` of memory files, counted from 1, give a fault. Pauses take no time."""
    memory = fsspec.filesystem("memory")
    opened = type(memory).open
    monkeypatch.setattr("mimo_gemma4.data.retries.time.sleep", lambda seconds: None)
    state = {"reads": 0, "numbers": (), "fault": FAULTS["error"]}

    def answer(data):
        state["reads"] += 1
        result = state["fault"](data) if state["reads"] in state["numbers"] else data
        if isinstance(result, Exception):
            raise result
        return result

    def failing_open(self, path, *arguments, **options):
        file = opened(self, path, *arguments, **options)
        if path.endswith(".tar"):
            file = io.BytesIO(file.getvalue())
            read = file.read
            file.read = lambda size=-1: answer(read(size))
        return file

    monkeypatch.setattr(type(memory), "open", failing_open)
    return state


@pytest.mark.parametrize("fault", FAULTS)
def test_one_failed_answer_while_indexing_costs_no_sample(failing, fault):
    whole = ShardIndex.build("memory://bucket/a-0.tar")
    reads, failing["fault"] = failing["reads"], FAULTS[fault]
    assert len(whole) == 8
    for number in range(1, reads + 1):
        failing.update(reads=0, numbers=(number,))
        index = ShardIndex.build("memory://bucket/a-0.tar")
        assert index.keys.tolist() == whole.keys.tolist() and not len(index.bad_keys), number
        assert index.media_header.tolist() == whole.media_header.tolist()


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_that_keep_failing_end_the_run_and_leave_no_index(failing, bucket, fault, monkeypatch):
    monkeypatch.setattr(POLICY, "retries", 2)
    failing.update(numbers=range(20, 10_000), fault=FAULTS[fault])
    with pytest.raises(DataError, match=r"a-0.tar cannot be read, in 3 attempts .*data.retries=2") as raised:
        open_dataset("memory://bucket/a-0.tar", on_bad_sample="skip", max_bad_fraction=1.0)
    assert type(raised.value) is DataError
    failing["numbers"] = ()
    assert len(open_dataset("memory://bucket/a-0.tar")) == 8


def test_no_attempt_begins_after_the_time_is_up(monkeypatch):
    attempts = []

    def request():
        attempts.append(1)
        raise OSError("busy")

    monkeypatch.setattr(POLICY, "seconds", 0.0)
    with pytest.raises(DataError, match="in 1 attempts .*data.retry_seconds=0.*busy"):
        retried("memory://a.tar", request)
    assert len(attempts) == 1


@pytest.mark.parametrize(("status", "absent"), [(404, True), (410, True), (403, False), (500, False), (None, False)])
def test_a_failing_server_is_not_a_missing_file(bucket, monkeypatch, status, absent):
    """fsspec raises `FileNotFoundError` for every failure of an HTTP server, with the failure as its cause."""

    def information(self, path, **options):
        cause = OSError("refused")
        cause.status = status
        raise FileNotFoundError(path) from cause

    monkeypatch.setattr("mimo_gemma4.data.retries.time.sleep", lambda seconds: None)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", information)
    with pytest.raises(DataError, match="do not exist" if absent else "cannot be read, in 6 attempts.*refused"):
        expand_shards("memory://bucket/a-0.tar")


def test_a_server_without_ranges_is_named(bucket, monkeypatch):
    memory = fsspec.filesystem("memory")
    whole = memory.cat_file("/bucket/a-0.tar")
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, start=None, end=None, **options: whole)
    with pytest.raises(DataError, match="serves no ranges"):
        read_range("memory://bucket/a-0.tar", 512, 100)
