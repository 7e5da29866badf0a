"""Decoder lanes share a step's media, and the targets of every item lie where the manifest says."""

import pytest
import torch

from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.manifest import PlannedMedia
from mimo_gemma4.data.planner import DecoderTargets, StepPlanner
from tests.shard_maker import TileProcessor, mixed_shard, open_dataset

DECODER_LANES = 2


class MeanProcessor(TileProcessor):
    """The mean of each tile."""

    def decode(self, data: bytes) -> dict[str, torch.Tensor]:
        return {"means": super().decode(data)["tiles"].mean(dim=1)}

    def placeholder(self, header) -> dict[str, torch.Tensor]:  # noqa: ANN001
        return {"means": torch.zeros(self.soft_tokens(header))}

    def collate(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"means": torch.cat([item["means"] for item in items])}


@pytest.mark.parametrize("packing", [False, True])
def test_targets_lie_where_the_manifest_says(tmp_path, packing: bool):
    dataset = open_dataset(mixed_shard(tmp_path / "a.tar", 0, 17), seq_length=120)
    planner = StepPlanner(
        dataset,
        global_batch_size=7,
        microbatch_size=2,
        seed=3,
        language_lanes=2,
        encoder_lanes={"vision": 1},
        decoders={"means": DecoderTargets("vision", DECODER_LANES, {"image": MeanProcessor()})},
        packing=packing,
    )
    # Rank 0 has the encoder's lane and the decoder's first, rank 1 the decoder's second; each has a language lane.
    loaders = [
        StepLoader(
            planner,
            language_lane=rank,
            encoder_lanes={"vision": 0} if rank == 0 else {},
            decoder_lanes={"means": rank},
        )
        for rank in range(DECODER_LANES)
    ]
    for step in range(3):
        data = [loader.load(step) for loader in loaders]
        manifest = data[0].manifest
        items = [item for item in manifest.media if item.module == "means"]
        of_encoder = [item for item in manifest.media if item.module == "vision"]
        assert sorted(map(place, items)) == sorted(map(place, of_encoder)) and items
        assert manifest.soft_tokens_of("means") == manifest.soft_tokens_of("vision")
        assert {item.module_lane for item in items} == set(range(DECODER_LANES))
        assert manifest.imbalance["means"].after <= manifest.imbalance["means"].before
        for item in items:
            targets = data[item.module_lane].media["means", item.microbatch]["means"]
            medium = dataset.media(item.index)[item.ordinal]
            with open(medium.shard, "rb") as file:
                file.seek(medium.offset)
                expected = TileProcessor().decode(file.read(medium.size))["tiles"].mean(dim=1)
            assert torch.equal(targets[item.module_offset : item.module_offset + item.soft_tokens], expected)
        for lane in range(2):
            read = [name for rank in data for names in rank.items.values() for at, name in names if at == lane]
            assert sorted(read) == sorted(data[lane].expected)
    for loader in loaders:
        loader.close()


def place(item: PlannedMedia) -> tuple[int, ...]:
    """What an encoder's and a decoder's entry of the same media item have in common."""
    sample = (item.batch_index, item.ordinal, item.lane, item.microbatch)
    return (*sample, item.sequence, item.start, item.soft_tokens)
