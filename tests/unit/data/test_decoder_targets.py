"""Decoder lanes share a step's media, and each has the targets of its items' rows where the manifest says."""

import pytest
import torch

from mimo_gemma4.data.loader import StepLoader
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
        items = [planned for planned in manifest.media if planned.module == "means"]
        of_encoder = [planned for planned in manifest.media if planned.module == "vision"]
        assert sorted(map(place, items)) == sorted(map(place, of_encoder)) and items
        assert manifest.soft_tokens_of("means") == manifest.soft_tokens_of("vision")
        assert {planned.module_lane for planned in items} == set(range(DECODER_LANES))
        assert manifest.imbalance["means"].after <= manifest.imbalance["means"].before
        for planned in items:
            targets = data[planned.module_lane].media["means", planned.microbatch]["means"]
            item = dataset.media(planned.index)[planned.ordinal]
            with open(item.shard, "rb") as file:
                file.seek(item.offset)
                expected = TileProcessor().decode(file.read(item.size))["tiles"].mean(dim=1)
            assert torch.equal(targets[planned.module_offset : planned.module_offset + planned.soft_tokens], expected)
        for lane in range(2):  # the identities that modules were given are those that the lane tells of
            given = [name for rank in data for items in rank.items.values() for at, name in items if at == lane]
            assert sorted(given) == sorted(data[lane].expected)
    for loader in loaders:
        loader.close()


def place(planned) -> tuple:  # noqa: ANN001
    return (
        planned.batch_index,
        planned.ordinal,
        planned.soft_tokens,
        planned.lane,
        planned.microbatch,
        planned.sequence,
        planned.start,
    )
