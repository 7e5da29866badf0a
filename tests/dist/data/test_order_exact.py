"""Keys and contents of every step are the same at any number of lanes and decoding threads, and after a resume.

A third of the samples of one source cannot be decoded, so the replacements must be the same too.
"""

from itertools import chain

import pytest
import torch.distributed as dist

from mimo_gemma4.data import dataset as dataset_module
from mimo_gemma4.data import loader as loader_module
from mimo_gemma4.data.dataset import ShardDataset, Source
from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.planner import StepPlanner
from tests.dist.harness import run_ranks
from tests.shard_maker import byte_encoder, chat, jpeg, mixed_shard, write_shard

STEPS = 7
"""Of 6 samples, of which source "good" gives 4 and "spoilt" 2: both pass their ends inside a step."""


def shards(folder):
    members = {}
    for number in range(9):
        picture = jpeg(64, 32, number)
        members[f"t{number}.json"] = chat("?" * number, "a" * (1 + number % 4), "image")
        members[f"t{number}.0.jpg"] = picture[: len(picture) // 3] if number % 3 == 0 else picture
    return [
        Source(mixed_shard(folder / "good.tar", 0, 13), 2.0),
        Source(write_shard(folder / "spoilt.tar", members), 1.0),
    ]


def read_steps(rank, sources, lanes, encoders, workers, steps):
    """This rank's part of each step: tokens and labels by (position, key), pixels by (position, key, item).

    Also the byte ranges that it read, and those of its samples and media.
    """
    reads, owned = [], []

    def counting(shard, offset, size, original=loader_module.read_range):
        reads.append((shard, offset))
        return original(shard, offset, size)

    dataset = ShardDataset.open(sources, byte_encoder(), seq_length=120, group=dist.group.WORLD)
    dataset_module.read_range = loader_module.read_range = counting
    planner = StepPlanner(
        dataset, global_batch_size=6, microbatch_size=1, seed=5, language_lanes=lanes,
        encoder_lanes={"vision": encoders}, packing=True, row_multiple=4, total_multiple=8,
    )  # fmt: skip
    loader = StepLoader(
        planner,
        language_lane=rank if rank < lanes else None,
        encoder_lanes={"vision": rank} if rank < encoders else {},
        group=dist.group.WORLD,
        on_bad_sample="skip",
        max_bad_fraction=0.5,
        workers=workers,
        stop=steps[-1] + 1,
    )
    found = []
    for step in steps:
        data = loader.load(step)
        content = {}
        for sample in data.manifest.samples:
            if sample.lane == rank:
                batch = data.language[sample.microbatch]
                where = (sample.sequence, slice(sample.start, sample.start + sample.length))
                tokens = batch.input_ids[where].tolist(), batch.labels[where].tolist()
                content[sample.batch_index, dataset.key(sample.index)] = tokens
        for item in data.manifest.media:
            if item.module_lane == rank:
                tiles = data.media["vision", item.microbatch]["tiles"][item.module_offset :][: item.soft_tokens]
                content[item.batch_index, dataset.key(item.index), item.ordinal] = tiles.tolist()
        found.append((content, loader.faults(data.manifest)))
        owned += owned_ranges(dataset, data.manifest, rank)
    loader.close()
    return found, sorted(reads), sorted(owned)


def owned_ranges(dataset, manifest, rank):
    documents = [
        (dataset.shard(s.index), int(dataset._index(s.index).json_offset[dataset._number_in_shard[s.index]]))
        for s in manifest.samples
        if s.lane == rank
    ]
    media = [dataset.media(s.index)[s.ordinal] for s in manifest.media if s.module_lane == rank]
    return {*documents, *((item.shard, item.offset) for item in media)}


def steps_of(results):
    """All ranks' contents of each step joined, and the faults they agree on."""
    joined = []
    for parts in zip(*(found for found, _, _ in results), strict=True):
        assert all(faults == parts[0][1] for _, faults in parts)
        joined.append(
            (dict(sorted(chain.from_iterable(content.items() for content, _ in parts), key=repr)), parts[0][1])
        )
    return joined


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def reference(corpus):
    return steps_of(run_ranks(1, read_steps, corpus, 1, 1, 0, range(STEPS)))


def test_the_reference_holds_every_source_by_its_weight_and_replaces(reference):
    assert len(reference) == STEPS and sum(sum(faults.values()) for _, faults in reference) >= 3
    for content, _ in reference:
        keys = [name[1] for name in content if len(name) == 2]
        assert len(keys) == 6 and sum(key.startswith("t") for key in keys) == 2
        assert not {key for key in keys} & {"t0", "t3", "t6"}


@pytest.mark.parametrize("lanes, encoders, workers", [(2, 3, 1), (3, 1, 2), (4, 4, 4), (1, 2, 3)])
def test_every_layout_reads_the_same_steps(corpus, reference, lanes, encoders, workers):
    results = run_ranks(max(lanes, encoders), read_steps, corpus, lanes, encoders, workers, range(STEPS))
    assert steps_of(results) == reference


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_run_resumed_in_mid_epoch_with_other_lanes_and_workers_continues_alike(corpus, reference, start):
    results = run_ranks(2, read_steps, corpus, 2, 1, start - 1, range(start, STEPS))
    assert steps_of(results) == reference[start:]


def test_a_rank_reads_what_it_owns_once_and_nothing_else(corpus):
    good = corpus[:1]
    results = run_ranks(3, read_steps, good, 2, 3, 2, range(STEPS))
    assert all(reads == owned and owned for _, reads, owned in results)
