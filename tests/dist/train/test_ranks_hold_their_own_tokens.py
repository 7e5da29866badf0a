"""In a training step no rank puts a whole sequence together: it embeds its tokens and receives their soft tokens.

A step runs with context, tensor and sequence parallelism. The ids that each language rank embeds are those at its
context-parallel rank's positions of the whole sequence, by the definition spelled out in `test_partition_content`; what
it receives from the encoder is as many soft tokens as its sequence-parallel part of them has placeholders. Packs can be
cut because their samples were padded for it. Ids and counts are integers, so the comparison is exact.
"""

from pathlib import Path

import pytest
import torch

from benchmarks.traffic import Traffic
from mimo_gemma4.config import load_config
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.setup import set_up_run
from tests.dist.harness import run_ranks
from tests.dist.test_partition_content import expected_positions
from tests.dist.train.step_parity import STEP, Case, write_run


def step_on_rank(rank: int, folder: Path, overrides: list[str]) -> int:
    """Check a step of this rank; the number of soft tokens that it received."""
    embedded: list[torch.Tensor] = []
    embed = Gemma4LanguageModel.embed

    def noted(self: Gemma4LanguageModel, input_ids: torch.Tensor) -> torch.Tensor:
        embedded.append(input_ids)
        return embed(self, input_ids)

    Gemma4LanguageModel.embed = noted
    trainer = build_trainer(set_up_run(load_config([f"config={folder}/run.yaml", *overrides])))
    data = trainer.loader.load(STEP)
    with Traffic() as traffic:
        trainer.runner.run(data)
    trainer.close()
    language = trainer.model.layout.language
    if rank not in language:
        assert not embedded
        return 0
    if data.manifest.microbatches[0].packed:
        assert any(planned.padded_length > planned.length for planned in data.manifest.samples), "none needed padding"
    at, placeholders = language.coordinate(rank), 0
    assert len(embedded) == data.manifest.num_microbatches
    for number, ids in enumerate(embedded):
        microbatch = data.manifest.microbatch(at.dp, number)
        starts = microbatch.segment_starts or [0, microbatch.seq_length]
        lengths = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
        positions = expected_positions(lengths, language.cp, at.cp, microbatch.cp_layout)
        assert len(positions) == microbatch.seq_length // language.cp
        assert torch.equal(ids, data.language[number].input_ids[:, positions])
        own = set(positions[at.tp * len(positions) // language.tp : (at.tp + 1) * len(positions) // language.tp])
        for planned in data.manifest.media:
            if (planned.lane, planned.microbatch) == (at.dp, number):
                placeholders += len(own & set(range(planned.start, planned.start + planned.soft_tokens)))
    received = [m for m in traffic.messages if m.operation == "recv_" and m.group.startswith("bridge.vision.")]
    assert sum(message.shape[0] for message in received) == placeholders
    return placeholders


@pytest.mark.parametrize("packing", [False, True])
def test_a_step(packing: bool, tmp_path: Path) -> None:
    write_run(tmp_path)
    case = Case(vision=1, tp=2, cp=2, sp=True, packing=packing)
    received = run_ranks(case.world, step_on_rank, tmp_path, case.overrides)
    assert sum(map(bool, received)) > 1, "several ranks must have had soft tokens to receive"
