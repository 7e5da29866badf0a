"""A checkpoint knows its data: what has changed is named, and a resumed run misses and repeats no sample.

Expected samples are counted by hand from passes: in a pass over a source, each of its samples comes once.
"""

import json
import os
from collections import Counter
from types import SimpleNamespace

import pytest

from mimo_gemma4.checkpoint.files import MARKER
from mimo_gemma4.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    LayoutConfig,
    RunConfig,
    ShardsConfig,
    TrainConfig,
)
from mimo_gemma4.data.dataset import Source
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.train.data_record import DataProgress, resume_data
from tests.shard_maker import chat, open_dataset, png, write_shard

LENGTH = 120


def configuration(batch=4, seed=5, seq_length=LENGTH, resume_data="strict"):
    return Config(
        layout=LayoutConfig(),
        data=DataConfig(train=ShardsConfig("unused"), seq_length=seq_length),
        run=RunConfig(seed=seed),
        train=TrainConfig(global_batch_size=batch),
        checkpoint=CheckpointConfig(resume_data=resume_data),
    )


class Run:
    """A run without a model: it takes samples in the order of its steps and writes markers of checkpoints."""

    def __init__(self, folder, sources, config, resume=None):
        self.folder, self.dataset, self.seen = folder, open_dataset(sources, seq_length=config.data.seq_length), []
        point = None if resume is None else resume_data(config, self.dataset, resume, report=True)
        self.planner = StepPlanner(
            self.dataset,
            global_batch_size=config.train.global_batch_size,
            microbatch_size=1,
            seed=config.run.seed,
            language_lanes=1,
            encoder_lanes={"vision": 1},
            packing=False,
            start=None if point is None else point.start,
        )
        self.bad = {}
        loader = SimpleNamespace(planner=self.planner, dataset=self.dataset, bad=self.bad)
        self.progress = DataProgress(config, loader, None if point is None else point.earlier)
        self.step = 0 if point is None else point.start.step

    def train(self, steps):
        for _ in range(steps):
            self.seen += [self.dataset.key(index) for index in self.planner.samples(self.step)]
            self.step += 1
        return self

    def save(self, **state):
        path = self.folder / f"step_{self.step}"
        path.mkdir(exist_ok=True)
        trainer = {"step": self.step, "data": self.progress.record(self.step), **state}
        (path / MARKER).write_text(json.dumps({"trainer": trainer, "files": {}}))
        return path

    def consumed(self):
        return [source["consumed"] for source in self.progress.record(self.step)["sources"]]


def shard(path, count, *, name="s", answer="answer {}", changed=None, shade=0):
    """Samples <name>0, <name>1, …, each with an image; `changed`: the sample with another answer of the same length."""
    members = {}
    for number in range(count):
        text = answer.format(number) if number != changed else answer.format(number)[::-1]
        members[f"{name}{number}.json"] = chat("?", text, "image")
        members[f"{name}{number}.0.png"] = png(16, 16, shade)
    return write_shard(path, members)


@pytest.fixture
def source(tmp_path):
    return shard(tmp_path / "train-0.tar", 64)


def test_a_changed_batch_size_misses_and_repeats_no_sample_of_a_pass(tmp_path, source, capsys):
    """Batches of 8, 4 and 16: 3 x 8 + 2 x 4 + 2 x 16 = 64 samples, which is a pass. An unbroken run has that order."""
    one = Run(tmp_path, source, configuration(8)).train(3)
    two = Run(tmp_path, source, configuration(4), one.save()).train(2)
    assert (
        "train.global_batch_size is 4, was 8: step 4 goes on with the next sample, after 24" in capsys.readouterr().out
    )
    three = Run(tmp_path, source, configuration(16), two.save()).train(2)
    seen = one.seen + two.seen + three.seen
    assert sorted(seen) == sorted(f"s{number}" for number in range(64))
    assert seen == Run(tmp_path, source, configuration(1)).train(64).seen
    assert (one.consumed(), two.consumed(), three.consumed()) == ([24], [32], [64])


def test_an_unchanged_run_goes_on_where_it_would_have_gone(tmp_path, source, capsys):
    """Also where other files lie beside it, its folder has moved, or its files have other times."""
    straight = Run(tmp_path, source, configuration()).train(6)
    first = Run(tmp_path, source, configuration()).train(4)
    path = first.save()
    (tmp_path / "moved").mkdir()
    moved = source.rename(tmp_path / "moved" / "other.tar")
    os.utime(moved, (1, 1))
    second = Run(tmp_path, moved, configuration(), path).train(2)
    assert first.seen + second.seen == straight.seen
    assert second.progress.record(6)["place"] == 24 and capsys.readouterr().out == ""


def changed_answer(path, source):
    """Same names, same sizes: 'answer 7' became '7 rewsna'."""
    return {"sources": shard(source, 64, changed=7)}, [
        "data.train.shards",
        "train-0.tar holds other .json members (the same size)",
    ]


def changed_image(path, source):
    size = source.stat().st_size
    shard(source, 64, shade=9)
    assert source.stat().st_size == size
    return {"sources": source}, ["train-0.tar holds other media"]


def fewer_samples(path, source):
    return {"sources": shard(source, 63)}, ["has 63 usable samples, had 64"]


def another_shard(path, source):
    return {"sources": [source, shard(path / "train-1.tar", 2, name="t")]}, ["has 2 shards, had 1"]


def another_source(path, source):
    more = Source(shard(path / "more.tar", 2, name="t"), name="more")
    return {"sources": [Source(source, name="old"), more]}, ["2 sources (old, more), had 1"]


def another_seed(path, source):
    return {"seed": 6}, ["run.seed is 6, was 5"]


def another_length(path, source):
    return {"seq_length": 130}, ["data.seq_length is 130, was 120"]


CHANGES = [changed_answer, changed_image, fewer_samples, another_shard, another_source, another_seed, another_length]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_are_refused_by_name_and_accepted_on_request(tmp_path, source, caplog, change):
    path = Run(tmp_path, source, configuration()).train(4).save()
    options, parts = change(tmp_path, source)
    sources = options.pop("sources", source)
    with pytest.raises(ConfigError) as caught:
        Run(tmp_path, sources, configuration(**options), path)
    for part in [*parts, "checkpoint.resume_data=continue", str(path)]:
        assert part in str(caught.value)
    resumed = Run(tmp_path, sources, configuration(**options, resume_data="continue"), path).train(1)
    assert resumed.step == 5 and len(resumed.seen) == 4
    for part in parts:
        assert part in caplog.text


def two_sources(tmp_path, other=20, weights=(3.0, 1.0)):
    first, second = tmp_path / "a.tar", tmp_path / "b.tar"
    if not first.exists():
        shard(first, 48, name="a")
    shard(second, other, name="b")
    return [Source(first, weights[0], "a"), Source(second, weights[1], "b")]


def test_consumed_samples_are_counted_by_source(tmp_path):
    """Weights 3 and 1: of 16 samples 12 and 4. The order spreads them evenly, to within a sample."""
    run = Run(tmp_path, two_sources(tmp_path), configuration()).train(4)
    counted = Counter(key[0] for key in run.seen)
    assert run.consumed() == [counted["a"], counted["b"]] == [12, 4]


def test_weights_are_compared_by_their_ratio(tmp_path):
    path = Run(tmp_path, two_sources(tmp_path), configuration()).train(4).save()
    Run(tmp_path, two_sources(tmp_path, weights=(6.0, 2.0)), configuration(), path)
    with pytest.raises(ConfigError, match=r"the weights of 2 sources \(a, b\) are 1 : 1, were 3 : 1"):
        Run(tmp_path, two_sources(tmp_path, weights=(1.0, 1.0)), configuration(), path)


def test_a_source_that_has_not_changed_goes_on_and_the_other_begins_a_new_pass(tmp_path, caplog):
    """12 of 48 and 4 of 20 are done; b grows to 24, and weights become equal. Then 36 of each are taken in 18 steps."""
    first = Run(tmp_path, two_sources(tmp_path), configuration()).train(4)
    sources = two_sources(tmp_path, other=24, weights=(1.0, 1.0))
    second = Run(tmp_path, sources, configuration(resume_data="continue"), first.save()).train(9)
    assert "a: on at the next sample; b: a new pass" in caplog.text
    third = Run(tmp_path, sources, configuration(), second.save()).train(9)  # strict again
    later = second.seen + third.seen
    from_a = [key for key in first.seen + later if key.startswith("a")]
    from_b = [key for key in later if key.startswith("b")]
    assert sorted(from_a) == sorted(f"a{number}" for number in range(48))
    assert sorted(from_b[:24]) == sorted(f"b{number}" for number in range(24))
    assert third.consumed() == [48, 40]


def test_a_checkpoint_without_a_record_goes_on_with_a_warning(tmp_path, source, caplog):
    run = Run(tmp_path, source, configuration()).train(4)
    path = run.save()
    marker = json.loads((path / MARKER).read_text())
    del marker["trainer"]["data"]
    (path / MARKER).write_text(json.dumps(marker))
    resumed = Run(tmp_path, source, configuration(), path).train(2)
    assert "does not record its data" in caplog.text and "sample 16" in caplog.text
    assert resumed.seen == Run(tmp_path, source, configuration()).train(6).seen[16:]
    assert resumed.consumed() == [24]


def test_skipped_samples_are_counted_over_resumptions(tmp_path, source):
    path, run = None, None
    for _ in range(2):
        run = Run(tmp_path, source, configuration(), path).train(1)
        run.bad[3] = SimpleNamespace(fault="image")
        run.progress.count_skipped(SimpleNamespace(skipped_samples=(3,)))
        path = run.save()
    assert run.progress.record(2)["sources"][0]["skipped"] == {"image": 2}


def test_what_was_left_out_is_recorded(tmp_path, source):
    members = {"long.json": chat("q" * 500, "a"), "good.json": chat("q", "a"), "torn.json": b"{"}
    mixed = write_shard(tmp_path / "mixed.tar", members)
    dataset = open_dataset(mixed, seq_length=LENGTH, on_bad_sample="skip", max_bad_fraction=1.0)
    assert dict(dataset.contents[0].left_out) == {"json": 1, "length": 1}
    assert dataset.contents[0].samples == dataset.contents[0].shards[0].samples == 1
