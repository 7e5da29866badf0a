"""The tensors of a step hold every sample at the place that its manifest names, in every layout."""

import pytest
import torch

from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.errors import DataError
from tests.shard_maker import (
    SoundProcessor,
    TileProcessor,
    chat,
    jpeg,
    mixed_shard,
    open_dataset,
    png,
    wav,
    write_shard,
)


def loaders(dataset, lanes, encoders, *, step_options=None, **options):
    """One loader per language lane, each also the encoder lane of its number where there is one."""
    options = {"global_batch_size": 6, "microbatch_size": 2, "seed": 3, "packing": False, **options}
    modalities = [processor.modality for processor in dataset.encoder.processors.values()]
    plan = StepPlanner(
        dataset, language_lanes=lanes, encoder_lanes=dict.fromkeys(modalities, encoders), row_multiple=4, **options
    )
    return [
        StepLoader(
            plan,
            language_lane=rank if rank < lanes else None,
            encoder_lanes={name: rank for name in modalities if rank < encoders},
            **(step_options or {}),
        )
        for rank in range(max(lanes, encoders))
    ]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(mixed_shard(tmp_path_factory.mktemp("shards") / "a.tar", 0, 17), seq_length=120)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("lanes, encoders", [(1, 1), (2, 1), (3, 4)])
def test_every_sample_and_every_soft_token_is_where_the_manifest_says(dataset, lanes, encoders, packing):
    ranks = loaders(dataset, lanes, encoders, packing=packing)
    for step in (0, 1, 2):
        data = [loader.load(step) for loader in ranks]
        manifest = data[0].manifest
        assert all(other.manifest == manifest and not manifest.skipped_samples for other in data)
        for microbatch in manifest.microbatches:
            batch = data[microbatch.lane].language[microbatch.number]
            assert batch.input_ids.shape == (microbatch.sequences, microbatch.seq_length)
            covered = torch.zeros_like(batch.segments, dtype=torch.bool)
            for sample in microbatch.samples:
                where = (sample.sequence, slice(sample.start, sample.start + sample.length))
                encoded = dataset.encode(sample.index)
                assert batch.input_ids[where].tolist() == encoded.input_ids.tolist()
                assert batch.labels[where].tolist() == encoded.labels.tolist()
                assert batch.positions[where].tolist() == list(range(sample.length))
                assert len(batch.segments[where].unique()) == 1 and batch.segments[where][0] > 0
                covered[where] = True
            assert (batch.labels[~covered] == -100).all()
            for tensor in (batch.input_ids, batch.positions, batch.segments, batch.groups):
                assert not tensor[~covered].any()
            for sequence in range(microbatch.sequences):
                count = sum(sample.sequence == sequence for sample in microbatch.samples)
                assert batch.segments[sequence].unique().tolist()[-count:] == list(range(1, count + 1))
        check_groups_and_tiles(dataset, data)
    for loader in ranks:
        loader.close()


def check_groups_and_tiles(dataset, data):
    manifest = data[0].manifest
    expected_groups = {key: torch.zeros_like(batch.groups) for key, batch in all_batches(data).items()}
    for item in sorted(manifest.media, key=lambda item: (item.lane, item.microbatch, item.sequence, item.start)):
        where = (item.sequence, slice(item.start, item.start + item.soft_tokens))
        groups = expected_groups[item.lane, item.microbatch]
        groups[where] = groups[item.sequence].max() + 1
        assert (data[item.lane].language[item.microbatch].input_ids[where] == 6).all()
        tiles = data[item.module_lane].media["vision", item.microbatch]["tiles"]
        medium = dataset.media(item.index)[item.ordinal]
        with open(medium.shard, "rb") as file:
            file.seek(medium.offset)
            alone = TileProcessor().decode(file.read(medium.size))["tiles"]
        assert torch.equal(tiles[item.module_offset : item.module_offset + item.soft_tokens], alone)
    for key, batch in all_batches(data).items():
        assert batch.groups.tolist() == expected_groups[key].tolist()


def all_batches(data):
    return {(lane, number): b for lane, rank in enumerate(data) for number, b in rank.language.items()}


def test_a_resumed_loader_continues_with_the_same_tensors(dataset):
    [straight] = loaders(dataset, 1, 1, packing=True)
    expected = [straight.load(step) for step in range(6)]
    [resumed] = loaders(dataset, 1, 1, packing=True, step_options={"prefetch": 3})
    for step in (4, 5, 2):
        data = resumed.load(step)
        assert data.manifest == expected[step].manifest
        for number, batch in data.language.items():
            assert batch.labels.tolist() == expected[step].language[number].labels.tolist()
        for key, inputs in data.media.items():
            assert torch.equal(inputs["tiles"], expected[step].media[key]["tiles"])
    straight.close(), resumed.close()


def test_steps_without_media_and_idle_lanes_are_empty(tmp_path):
    dataset = open_dataset(write_shard(tmp_path / "a.tar", {"a.json": chat("q", "a"), "b.json": chat("r", "b")}))
    ranks = loaders(dataset, 3, 2, global_batch_size=2)
    data = [loader.load(0) for loader in ranks]
    for loader in ranks:
        loader.close()
    assert all(not rank.media for rank in data)
    shapes = [tuple(rank.language[0].input_ids.shape) for rank in data]
    assert sorted(sequences for sequences, _ in shapes) == [0, 1, 1] and (0, 0) in shapes


def test_sound_stays_causal(tmp_path):
    members = {"a.json": chat("q", "a", "audio", "image"), "a.0.wav": wav(500), "a.1.png": png(16, 16, 9)}
    dataset = open_dataset(write_shard(tmp_path / "a.tar", members), TileProcessor(), SoundProcessor())
    [loader] = loaders(dataset, 1, 1, global_batch_size=1)
    data = loader.load(0)
    loader.close()
    sound, image = dataset.media(0)
    groups = data.language[0].groups[0]
    assert groups[sound.start : sound.start + 5].tolist() == [0] * 5
    assert groups[image.start : image.start + 4].tolist() == [1] * 4 and groups.sum() == 4
    assert data.media["audio", 0]["samples"].tolist() == list(range(500))


MANY_MAY_BE_BAD = {"on_bad_sample": "skip", "max_bad_fraction": 1.0}


def corrupt_shard(path, bad):
    members = {}
    for number in range(6):
        picture = jpeg(64, 64, number)
        members[f"s{number}.json"] = chat("q", "a", "image")
        members[f"s{number}.0.jpg"] = picture[: len(picture) // 3] if number in bad else picture
    return write_shard(path, members)


def test_the_next_good_sample_takes_the_place_of_a_corrupt_one(tmp_path, caplog):
    dataset = open_dataset(corrupt_shard(tmp_path / "a.tar", {2, 3}))
    [loader] = loaders(dataset, 1, 1, shuffle=False, step_options=MANY_MAY_BE_BAD)
    data = [loader.load(step) for step in range(2)]
    loader.close()
    for step in data:
        assert [sample.index for sample in step.manifest.samples] == [0, 1, 4, 4, 4, 5]
        assert step.manifest.skipped_samples == (2, 3, 3)
        assert loader.faults(step.manifest) == {"image": 3}
        assert step.media["vision", 0]["tiles"].any()
    logged = [line for line in caplog.messages if "skipped" in line]
    assert len(logged) == 2, "each is decoded once"
    assert f"step 0: skipped {tmp_path / 'a.tar'}: __key__ 's2': media 0 (image)" in logged[0]


def test_one_pass_leaves_out_a_corrupt_sample(tmp_path):
    dataset = open_dataset(corrupt_shard(tmp_path / "a.tar", {1, 2, 3}))
    [loader] = loaders(
        dataset, 1, 1, shuffle=False, repeat=False, global_batch_size=2, step_options=MANY_MAY_BE_BAD
    )  # fmt: skip
    assert [[sample.index for sample in loader.load(step).manifest.samples] for step in range(3)] == [[0], [], [4, 5]]
    loader.close()


def test_a_header_that_promises_another_size_makes_a_sample_bad(tmp_path):
    class Halved(TileProcessor):
        def decode(self, data):
            return {"tiles": super().decode(data)["tiles"][::2]}

    dataset = open_dataset(corrupt_shard(tmp_path / "a.tar", set()), Halved())
    [loader] = loaders(dataset, 1, 1)
    with pytest.raises(DataError, match=r"holds \{'tiles': \(32, 64\)\}, but its header promises .*\(64, 64\)"):
        loader.load(0)
    loader.close()


def test_corrupt_media_fail_or_exceed_the_allowed_share(tmp_path):
    dataset = open_dataset(corrupt_shard(tmp_path / "a.tar", {1, 4}))
    [loader] = loaders(dataset, 1, 1, shuffle=False)
    with pytest.raises(DataError, match=r"a\.tar: __key__ 's1': media 0 .*on_bad_sample=skip"):
        loader.load(0)
    [strict] = loaders(dataset, 1, 1, shuffle=False, step_options={**MANY_MAY_BE_BAD, "max_bad_fraction": 0.3})
    with pytest.raises(DataError, match="2 samples met so far .*max_bad_fraction=0.3 of 6"):
        strict.load(0)
    [tolerant] = loaders(dataset, 1, 1, shuffle=False, step_options={**MANY_MAY_BE_BAD, "max_bad_fraction": 0.4})
    assert [len(tolerant.load(step).manifest.skipped_samples) for step in range(3)] == [2, 2, 2]
    for each in (loader, strict, tolerant):
        each.close()


def test_a_source_without_any_good_sample_is_an_error(tmp_path):
    dataset = open_dataset(corrupt_shard(tmp_path / "a.tar", set(range(6))))
    [loader] = loaders(dataset, 1, 1, step_options=MANY_MAY_BE_BAD)
    with pytest.raises(DataError, match=r"all samples are bad, the last one is .*a\.tar: __key__ 's"):
        loader.load(0)
    loader.close()


def test_a_shard_that_changed_under_its_index_is_an_error(tmp_path):
    members = {"a.json": chat("qq", "a"), "b.json": chat("r", "b")}
    dataset = open_dataset(write_shard(tmp_path / "a.tar", members))
    write_shard(tmp_path / "a.tar", {**members, "a.json": chat("é", "a")})  # as many bytes of JSON, other tokens
    [loader] = loaders(dataset, 1, 1, global_batch_size=2)
    with pytest.raises(DataError, match="__key__ 'a'"):
        loader.load(0)
    loader.close()
