"""If one rank cannot read a sample, all ranks replace it or all raise; none hangs."""

import pytest
import torch.distributed as dist

from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.errors import DataError
from tests.dist.harness import run_ranks
from tests.shard_maker import byte_encoder, chat, jpeg, png, write_shard

RANKS = 3


def shard_with_one_corrupt_image(folder):
    picture = jpeg(64, 64, 1)
    members = {}
    for number in range(6):
        members[f"s{number}.json"] = chat("q", "a", "image")
        members[f"s{number}.0.jpg"] = picture[: len(picture) // 3] if number == 4 else picture
    return write_shard(folder / "a.tar", members)


def loader_of(rank, shard, on_bad_sample):
    """Rank 0 encodes; ranks 1 and 2 are language lanes: only rank 0 sees pixels."""
    dataset = ShardDataset.open(shard, byte_encoder(), seq_length=256, group=dist.group.WORLD)
    planner = StepPlanner(
        dataset, global_batch_size=6, microbatch_size=2, seed=0, language_lanes=2, encoder_lanes={"vision": 1},
        packing=True, shuffle=False,
    )  # fmt: skip
    lane = None if rank == 0 else rank - 1
    encoders = {"vision": 0} if rank == 0 else {}
    return StepLoader(
        planner, language_lane=lane, encoder_lanes=encoders, group=dist.group.WORLD, on_bad_sample=on_bad_sample
    )


def replaced(rank, shard):
    loader = loader_of(rank, shard, "skip")
    found = []
    for step in range(3):
        data = loader.load(step)
        learned = {
            sample.batch_index: int(
                (batch.labels[sample.sequence, sample.start : sample.start + sample.length] != -100).sum()
            )
            for sample in data.manifest.samples
            if sample.lane == rank - 1 and (batch := data.language[sample.microbatch]) is not None
        }
        found.append((data.manifest, loader.faults(data.manifest), learned))
    loader.close()
    return found


def test_all_ranks_replace_a_corrupt_image_that_one_of_them_finds(tmp_path):
    results = run_ranks(RANKS, replaced, shard_with_one_corrupt_image(tmp_path))
    for step in range(3):
        manifest = results[0][step][0]
        assert [sample.index for sample in manifest.samples] == [0, 1, 2, 3, 5, 5]
        assert all(result[step][:2] == (manifest, {"image": 1}) for result in results)
        learned = {sample: count for result in results for sample, count in result[step][2].items()}
        assert learned == dict.fromkeys(range(6), 2)


def message_of(work):
    with pytest.raises(DataError) as raised:
        work()
    return str(raised.value)


def failing(rank, shard):
    loader = loader_of(rank, shard, "fail")
    message = message_of(lambda: loader.load(0))
    loader.close()
    return message


def test_fail_raises_on_all_ranks_with_key_and_shard(tmp_path):
    shard = shard_with_one_corrupt_image(tmp_path)
    messages = run_ranks(RANKS, failing, shard, timeout=60)
    assert all(f"{shard}: __key__ 's4': media 0 (image)" in message for message in messages)


def vanished(rank, shard):
    loader = loader_of(rank, shard, "skip")
    dist.barrier()
    if rank == 1:  # only this rank reads another, empty file from now on
        loader.dataset._shards = (str(shard.with_name("empty.tar")),)
    message = message_of(lambda: loader.load(0))
    loader.close()
    return message


def test_a_rank_that_cannot_read_its_shard_stops_all(tmp_path):
    (tmp_path / "empty.tar").touch()
    messages = run_ranks(RANKS, vanished, shard_with_one_corrupt_image(tmp_path), timeout=60)
    assert all("empty.tar ends before byte" in message for message in messages)


def opening(rank, folder, shards):
    path = folder / shards[rank]
    return message_of(lambda: ShardDataset.open(path, byte_encoder(), seq_length=256, group=dist.group.WORLD))


def test_opening_raises_on_all_ranks_for_a_missing_or_a_different_shard(tmp_path):
    write_shard(tmp_path / "a.tar", {"a.json": chat("q", "a", "image"), "a.0.png": png(8, 8, 1)})
    write_shard(tmp_path / "b.tar", {"b.json": chat("q", "a", "image"), "b.0.png": png(8, 8, 1)})
    missing = run_ranks(RANKS, opening, tmp_path, ["a.tar", "none.tar", "a.tar"], timeout=60)
    assert all("1 of 1 files do not exist" in message and "none.tar" in message for message in missing)
    different = run_ranks(RANKS, opening, tmp_path, ["a.tar", "a.tar", "b.tar"], timeout=60)
    assert all("ranks disagree on sizes of shards, keys or lengths" in message for message in different)
