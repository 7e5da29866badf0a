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
        return {"means": torch.zeros(self.rows(header))}

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
        slots = [slot for slot in manifest.media if slot.modality == "means"]
        of_encoder = [slot for slot in manifest.media if slot.modality == "vision"]
        assert sorted(map(place, slots)) == sorted(map(place, of_encoder)) and slots
        assert manifest.rows_of("means") == manifest.rows_of("vision")
        assert {slot.encoder_lane for slot in slots} == set(range(DECODER_LANES))
        assert manifest.imbalance["means"].after <= manifest.imbalance["means"].before
        for slot in slots:
            targets = data[slot.encoder_lane].media["means", slot.microbatch]["means"]
            item = dataset.media(slot.index)[slot.ordinal]
            with open(item.shard, "rb") as file:
                file.seek(item.offset)
                expected = TileProcessor().decode(file.read(item.size))["tiles"].mean(dim=1)
            assert torch.equal(targets[slot.encoder_offset : slot.encoder_offset + slot.rows], expected)
        for lane in range(2):  # the identities that modules were given are those that the lane tells of
            given = [name for rank in data for items in rank.encoded.values() for at, name in items if at == lane]
            assert sorted(given) == sorted(data[lane].expected)
    for loader in loaders:
        loader.close()


def place(slot) -> tuple:  # noqa: ANN001
    return slot.sample, slot.ordinal, slot.rows, slot.lane, slot.microbatch, slot.row, slot.start
