"""The samples of a step depend only on (seed, epoch, global index); every sample has exactly one place."""

from collections import Counter
from itertools import pairwise

import pytest

from mimo_gemma4.data.dataset import Source
from mimo_gemma4.data.order import OrderStart
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.errors import ConfigError, DataError
from tests.shard_maker import chat, mixed_shard, open_dataset, png, write_shard


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    mixed_shard(folder / "train-0.tar", 0, 14)
    mixed_shard(folder / "train-1.tar", 14, 9)
    return open_dataset(f"{folder}/train-{{0..1}}.tar", seq_length=120)


def planner(dataset, lanes=2, encoders=3, **options):
    options = {"global_batch_size": 7, "microbatch_size": 2, "seed": 5, "packing": False, **options}
    return StepPlanner(dataset, language_lanes=lanes, encoder_lanes={"vision": encoders}, **options)


LAYOUTS = [(*lanes, packing) for lanes in ((1, 1), (2, 3), (3, 2), (4, 1)) for packing in (False, True)]


@pytest.mark.parametrize("lanes, encoders, packing", LAYOUTS)
def test_samples_of_a_step_are_the_same_in_every_layout_and_epochs_are_permutations(dataset, lanes, encoders, packing):
    reference = planner(dataset, 1, 1)
    plan = planner(dataset, lanes, encoders, packing=packing, row_multiple=4, total_multiple=16)
    seen = []
    for step in range(7):
        chosen = [sample.index for sample in plan.plan(step).samples]
        assert chosen == reference.samples(step)
        seen += chosen
    size = len(dataset)
    assert sorted(seen[:size]) == sorted(seen[size : 2 * size]) == list(range(size))
    assert seen[:size] != seen[size : 2 * size] != list(range(size))


def test_a_plan_does_not_depend_on_the_plans_before_it(dataset):
    plan = planner(dataset)
    straight = [plan.plan(step) for step in range(8)]
    for step in (6, 1, 3):  # 3 is the step in which an epoch ends
        assert planner(dataset).plan(step) == straight[step] == plan.plan(step)
    assert planner(dataset, seed=6).samples(0) != plan.samples(0)


@pytest.mark.parametrize("global_batch_size", [1, 2, 5, 11, 23])
@pytest.mark.parametrize("lanes, encoders, packing", LAYOUTS)
def test_every_sample_and_media_item_has_one_place(dataset, lanes, encoders, packing, global_batch_size):
    sizes = {"global_batch_size": global_batch_size, "row_multiple": 4, "total_multiple": 16}
    plan = planner(dataset, lanes, encoders, packing=packing, **sizes)
    manifest = plan.plan(2)
    assert [sample.batch_index for sample in manifest.samples] == list(range(global_batch_size))
    assert len(manifest.microbatches) == lanes * manifest.num_microbatches
    for lane in range(lanes):
        for number in range(manifest.num_microbatches):
            microbatch = manifest.microbatch(lane, number)
            assert (microbatch.lane, microbatch.number) == (lane, number)
            check_sequences(microbatch, packing)
    check_media(dataset, manifest, encoders)


def check_sequences(microbatch, packing):
    placed = microbatch.samples
    assert list(placed) == sorted(placed, key=lambda sample: (sample.sequence, sample.start))
    assert bool(placed) == bool(microbatch.sequences) == bool(microbatch.seq_length)
    if packing:
        assert microbatch.sequences <= 1 and microbatch.seq_length % 16 == 0
        assert all(sample.padded_length == -(-sample.length // 4) * 4 for sample in placed)
        assert all(after.start == sample.start + sample.padded_length for sample, after in pairwise(placed))
        assert sum(sample.padded_length for sample in placed) <= 2 * 120, "two packs of data.seq_length"
        assert microbatch.seq_length - sum(sample.padded_length for sample in placed) < 16
    else:
        assert [sample.sequence for sample in placed] == list(range(microbatch.sequences))
        assert microbatch.sequences <= 2
        assert all(sample.start == 0 and sample.padded_length == sample.length for sample in placed)
        assert microbatch.seq_length == -(-max((sample.length for sample in placed), default=0) // 4) * 4


def check_media(dataset, manifest, encoders):
    expected = [(s.batch_index, n) for s in manifest.samples for n in range(len(dataset.media(s.index)))]
    assert sorted((item.batch_index, item.ordinal) for item in manifest.media) == sorted(expected)
    samples = {sample.batch_index: sample for sample in manifest.samples}
    for item in manifest.media:
        sample, file = samples[item.batch_index], dataset.media(item.index)[item.ordinal]
        assert (item.lane, item.microbatch, item.sequence) == (sample.lane, sample.microbatch, sample.sequence)
        assert (item.start, item.soft_tokens) == (sample.start + file.start, file.soft_tokens)
    by_lane = [
        manifest.items_of_module("vision", number, lane)
        for number in range(manifest.num_microbatches)
        for lane in range(encoders)
    ]
    assert tuple(item for items in by_lane for item in items) == manifest.media
    for items in by_lane:
        assert [item.module_offset for item in items] == [
            sum(before.soft_tokens for before in items[:n]) for n in range(len(items))
        ]


def test_lanes_and_encoders_are_balanced(dataset):
    manifest = planner(dataset, 4, 3, global_batch_size=23, packing=True).plan(0)
    tokens, soft_tokens = Counter(), Counter()
    for sample in manifest.samples:
        tokens[sample.lane] += sample.padded_length
    for item in manifest.media:
        soft_tokens[item.microbatch, item.module_lane] += item.soft_tokens
    longest = max(sample.length for sample in manifest.samples)
    assert max(tokens.values()) - min(tokens.values()) <= longest
    for number in range(manifest.num_microbatches):
        lanes = [soft_tokens[number, lane] for lane in range(3)]
        assert max(lanes) - min(lanes) <= max(item.soft_tokens for item in manifest.media), lanes


def test_few_samples_are_spread_over_the_lanes(dataset):
    for packing in (False, True):
        manifest = planner(dataset, 4, 1, global_batch_size=5, microbatch_size=4, packing=packing).plan(0)
        assert manifest.num_microbatches == 1 and {sample.lane for sample in manifest.samples} == {0, 1, 2, 3}


def test_a_sample_as_long_as_the_limit_is_packed_alone_whatever_its_padding(tmp_path):
    text = chat("q" * 65, "a")
    dataset = open_dataset(write_shard(tmp_path / "a.tar", {f"s{n}.json": text for n in range(3)}), seq_length=84)
    assert dataset.lengths.tolist() == [84] * 3
    plan = planner(dataset, 1, 1, global_batch_size=3, microbatch_size=1, packing=True, row_multiple=16)
    assert [m.seq_length for m in plan.plan(0).microbatches] == [96] * 3


def test_one_epoch_in_shard_order_for_evaluation(dataset):
    plan = planner(dataset, global_batch_size=10, shuffle=False, repeat=False)
    assert plan.steps == 3
    assert [plan.samples(step) for step in range(3)] == [list(range(10)), list(range(10, 20)), [20, 21, 22]]
    assert planner(dataset).steps is None


def test_an_evaluation_of_a_part_takes_of_every_set(tmp_path):
    """Sets of 6 and 12 samples: of 9, 3 and 6."""
    first, second = mixed_shard(tmp_path / "a.tar", 0, 6), mixed_shard(tmp_path / "b.tar", 6, 12)
    held_out = open_dataset([Source(first), Source(second)], seq_length=120)
    plan = planner(held_out, global_batch_size=4, shuffle=False, repeat=False, limit=9)
    assert [plan.samples(step) for step in range(plan.steps)] == [[0, 1, 2, 6], [7, 8, 9, 10], [11]]


def test_a_resumed_run_enters_the_order_at_its_place_whatever_its_batch_size(dataset):
    """Steps of 7, then of 3 after two of them: the samples of a run of single samples."""
    order = [index for step in range(40) for index in planner(dataset, global_batch_size=1).samples(step)]
    resumed = planner(dataset, global_batch_size=3, start=OrderStart(step=2, place=14))
    assert [index for step in range(2, 10) for index in resumed.samples(step)] == order[14:38]
    assert resumed.turns(10) == (38,)


def test_sizes_and_modules_are_checked(dataset):
    with pytest.raises(ConfigError, match="train.global_batch_size is 0"):
        planner(dataset, global_batch_size=0)
    with pytest.raises(DataError, match="'vision'; add it to layout"):
        StepPlanner(
            dataset, global_batch_size=1, microbatch_size=1, seed=0, language_lanes=1, encoder_lanes={}, packing=False
        )


def skewed_shard(path):
    """Forty short samples, and eight long ones with large images, in the places of one lane of four."""
    members = {}
    for number in range(48):
        long = number % 4 == 0 and number < 32
        members[f"s{number:02}.json"] = chat("q" * (400 if long else 5), "a", "image")
        members[f"s{number:02}.0.png"] = png(128 if long else 8, 64 if long else 8, number)
    return write_shard(path, members)


@pytest.mark.parametrize("packing", [False, True])
def test_balance_evens_out_a_skewed_batch(tmp_path, packing):
    """The cost has a quadratic part, like attention. Lanes are even up to about the largest sample: 10%."""
    dataset = open_dataset(skewed_shard(tmp_path / "a.tar"), seq_length=600)

    def cost(length):
        return length + length**2 / 50

    options = {"global_batch_size": 48, "microbatch_size": 1, "shuffle": False, "packing": packing}
    manifest = planner(dataset, 4, 4, sample_cost=cost, **options).plan(0)
    lanes, encoders = [0.0] * 4, [0.0] * 4
    for sample in manifest.samples:
        lanes[sample.lane] += cost(sample.length)
    for item in manifest.media:
        encoders[item.module_lane] += item.soft_tokens
    for name, loads in (("language", lanes), ("vision", encoders)):
        imbalance = manifest.imbalance[name]
        assert imbalance.after == pytest.approx(max(loads) / (sum(loads) / 4))
        assert imbalance.before > 3 and imbalance.after < 1.1, (name, imbalance)


def test_packs_are_balanced_by_cost_not_by_length(tmp_path):
    """Two lanes with equally many tokens, one with a single long sample, would differ in the cost of attention."""
    members = {"long.json": chat("q" * 480, "a")}
    members |= {f"s{number}.json": chat("q" * 10, "a") for number in range(30)}
    dataset = open_dataset(write_shard(tmp_path / "a.tar", members), seq_length=1200)
    options = {"global_batch_size": 31, "microbatch_size": 1, "shuffle": False, "packing": True}
    by_cost = planner(dataset, 2, 1, sample_cost=lambda length: length + length**2 / 1000, **options).plan(0)
    by_length = planner(dataset, 2, 1, **options).plan(0)

    def short_samples(manifest):
        lane = manifest.samples[0].lane
        return sum(sample.lane == lane for sample in manifest.samples) - 1

    assert short_samples(by_cost) < short_samples(by_length)
    assert by_cost.imbalance["language"].after < 1.05


def test_bad_samples_give_their_places_to_the_next_of_the_order(dataset):
    plan = planner(dataset, global_batch_size=len(dataset))
    order = plan.samples(0)
    bad = {order[4], order[5], order[-1]}
    expected = list(order)
    expected[4] = expected[5] = order[6]
    expected[-1] = order[0]
    assert plan.samples(0, bad) == expected and plan.samples(0) == order
    assert sorted(plan.plan(0, bad).skipped_samples) == sorted([order[4], order[5], order[5], order[-1]])
