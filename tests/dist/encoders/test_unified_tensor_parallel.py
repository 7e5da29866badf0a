"""The embedders of Gemma 4 12B spread over tensor-parallel ranks give the soft tokens and gradients of one rank."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.distributed.platform import Platform, install
from mimo_gemma4.encoders.base import Encoder
from mimo_gemma4.encoders.registry import build_encoder
from mimo_gemma4.weights.bindings import initialise
from tests.dist.harness import run_ranks

HF_CONFIG = {
    "vision_config": dict(
        model_type="gemma4_unified_vision", patch_size=4, pooling_kernel_size=1, mm_embed_dim=32, mm_posemb_size=280
    ),
    "audio_config": dict(model_type="gemma4_unified_audio", audio_embed_dim=16),
}
DRAWN = torch.Generator().manual_seed(1)
INPUTS = {  # numbers of soft tokens that 2 and 4 ranks do not divide, and fewer soft tokens than ranks
    "vision": [
        {
            "pixel_values": torch.rand(count, 48, generator=DRAWN),
            "positions": torch.randint(0, 9, (count, 2), generator=DRAWN),
        }
        for count in (11, 1)
    ],
    "audio": [{"waveforms": torch.rand(count, 16, generator=DRAWN)} for count in (7, 2)],
}


def build(modality: str, group: dist.ProcessGroup) -> Encoder:
    context = ModuleContext(
        ProcessGroupCollection(tp=group),
        language_hidden=24,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    encoder = build_encoder(modality, HF_CONFIG, context)
    initialise(encoder.bindings(), seed=5)
    return encoder


def compare_with_one_rank(rank: int, modality: str) -> None:
    install(Platform.detect())  # megatron-core's gather would look for a GPU
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    whole, spread = build(modality, alone), build(modality, dist.group.WORLD)
    for inputs in INPUTS[modality]:
        expected, actual = whole(**inputs), spread(**inputs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)  # the same operations on fewer soft tokens
        cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
        for soft_tokens in (expected, actual):
            (soft_tokens * cotangent).sum().backward()
    for ours, reference in zip(spread.bindings(), whole.bindings(), strict=True):
        assert ours.gradient_sum == ("tp",)
        dist.all_reduce(ours.tensor.grad)
        torch.testing.assert_close(ours.tensor.grad, reference.tensor.grad, rtol=1e-5, atol=1e-6, msg=ours.name)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("modality", ["vision", "audio"])
def test_equal_to_one_rank(modality: str, world_size: int):
    run_ranks(world_size, compare_with_one_rank, modality)
