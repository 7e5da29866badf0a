"""Vision and audio towers in pipeline stages, each cut over tensor-parallel ranks, are transformers' towers."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from mimo_gemma4.distributed.layout import ModuleGrid
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.distributed.pipeline import Pipeline
from mimo_gemma4.distributed.process_groups import group_members
from mimo_gemma4.encoders.base import StagedEncoder
from mimo_gemma4.encoders.registry import build_encoder, build_processor
from mimo_gemma4.errors import LayoutError
from mimo_gemma4.weights.bindings import load
from tests.audio_reference import AudioReference
from tests.dist.encoders import test_audio_tensor_parallel as audio
from tests.dist.harness import run_ranks
from tests.state_source import StateSource
from tests.vision_reference import VisionReference

LANGUAGE_HIDDEN = 24
VISION = dict(
    model_type="gemma4_vision",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    patch_size=4,
    position_embedding_size=64,
)
CLIPPED = VISION | {"use_clipped_linears": True}
STANDARDIZED = VISION | {"standardize": True, "num_key_value_heads": 2}
AUDIO = audio.AUDIO | {"num_hidden_layers": 3}
PROCESSOR = {"max_soft_tokens": 8}
GRIDS = [(2, 1), (1, 1), (2, 2), (1, 2)]  # soft tokens across and down
FRAMES = [30, 5, 90, 1]
STAGES = [(2, 1), (3, 1), (2, 2), (3, 2)]


@dataclass
class Sample:
    """A tower of transformers, its inputs here, its soft tokens, and its parameters' gradients for a cotangent."""

    modality: str
    hf_config: dict[str, Any]
    reference: nn.Module
    inputs: dict[str, Any]
    soft_tokens: torch.Tensor
    cotangent: torch.Tensor
    gradients: dict[str, torch.Tensor]


def vision_sample(options: dict[str, Any]) -> Sample:
    hf_config = {"vision_config": options, "vision_processor": PROCESSOR}
    processor, generator = build_processor("vision", hf_config), torch.Generator().manual_seed(2)
    items = [
        {"pixel_values": torch.rand(9 * x * y, 48, generator=generator), "grid": torch.tensor([x, y])} for x, y in GRIDS
    ]
    reference = VisionReference(options, LANGUAGE_HIDDEN)
    reference.randomise(seed=5)
    return sample("vision", hf_config, reference, reference(items, processor), processor.collate(items))


def audio_sample(options: dict[str, Any]) -> Sample:
    hf_config, generator = {"audio_config": options}, torch.Generator().manual_seed(2)
    features = [torch.randn(frames, 128, generator=generator) for frames in FRAMES]
    reference = AudioReference(options, LANGUAGE_HIDDEN)
    reference.randomise(seed=5)
    inputs = build_processor("audio", hf_config).collate([{"features": sound} for sound in features])
    return sample("audio", hf_config, reference, reference(features), inputs)


def sample(modality: str, hf_config: dict, reference: nn.Module, soft_tokens: torch.Tensor, inputs: dict) -> Sample:
    cotangent = torch.randn(soft_tokens.shape, generator=torch.Generator().manual_seed(3))
    (soft_tokens * cotangent).sum().backward()
    gradients = {f"model.{name}": parameter.grad for name, parameter in reference.named_parameters()}
    return Sample(modality, hf_config, reference, inputs, soft_tokens.detach(), cotangent, gradients)


def compare_with_transformers(rank: int, pp: int, tp: int) -> list[set[str]]:
    """The parameters of this rank's stage, tower by tower, whose gradients were compared."""
    grid = ModuleGrid("tower", tuple(range(pp * tp)), tp=tp, cp=1, dp=1, pp=pp, ep=1, sequence_parallel=False)
    tp_group, forward, backward = (new_group(rank, group_members(grid)[name]) for name in ("tp", "pp", "pp"))
    pipeline = Pipeline(grid, rank, forward, backward, torch.float32, torch.device("cpu"))
    compared = []
    for found in (vision_sample(CLIPPED), vision_sample(STANDARDIZED), audio_sample(AUDIO)):
        encoder = build(found.modality, found.hf_config, tp_group, grid.coordinate(rank).pp, pp)
        load(encoder.bindings(), StateSource(found.reference), "reference")
        soft_tokens = run_stage(encoder, pipeline, found)
        if encoder.stage.last:
            assert (soft_tokens - found.soft_tokens).norm() <= 1e-5 * found.soft_tokens.norm()
        compared.append(compare_gradients(encoder, found, tp_group))
    return compared


def new_group(rank: int, members: list[tuple[int, ...]]) -> dist.ProcessGroup:
    groups = {ranks: dist.new_group(list(ranks)) for ranks in members}
    return next(group for ranks, group in groups.items() if rank in ranks)


def build(modality: str, hf_config: dict, tp_group: dist.ProcessGroup, stage: int, stages: int) -> StagedEncoder:
    context = ModuleContext(
        ProcessGroupCollection(tp=tp_group),
        language_hidden=LANGUAGE_HIDDEN,
        dtype=torch.float32,
        device=torch.device("cpu"),
        pp_rank=stage,
        pp_size=stages,
    )
    return build_encoder(modality, hf_config, context)


def run_stage(encoder: StagedEncoder, pipeline: Pipeline, found: Sample) -> torch.Tensor:
    """Forward and backward of this rank's stage; what it hands on."""
    stage, given = encoder.stage, dict(found.inputs)
    if not stage.first:
        (hidden,) = pipeline.forward.post_recv([encoder.hidden_shape(found.inputs)]).wait()
        given |= {"hidden": hidden.requires_grad_()} | dict.fromkeys(encoder.only_first)
    output, gradient = encoder(**given), found.cotangent
    if not stage.last:
        pipeline.forward.send([output])
        (gradient,) = pipeline.backward.post_recv([tuple(output.shape)]).wait()
    output.backward(gradient)
    if not stage.first:
        pipeline.backward.send([given["hidden"].grad])
    pipeline.drain()
    return output.detach()


def compare_gradients(encoder: StagedEncoder, found: Sample, tp_group: dist.ProcessGroup) -> set[str]:
    """fp32: sums cut into as many parts as there are tensor-parallel ranks, and added in another order."""
    total = torch.stack([gradient.norm() for gradient in found.gradients.values()]).norm()
    names = set()
    for binding in encoder.bindings():
        if not isinstance(binding.tensor, nn.Parameter):
            continue
        gradient, whole = binding.tensor.grad, found.gradients[binding.name]
        if "tp" in binding.gradient_sum:
            dist.all_reduce(gradient, group=tp_group)
        deviation = (binding.view(gradient) - whole[binding.index]).norm()
        allowed = 1e-5 * whole[binding.index].norm() + 1e-7 * total
        assert deviation <= allowed, f"{binding.name}: {deviation:.3e} > {allowed:.3e}"
        names.add(binding.name)
    return names


@pytest.mark.parametrize(("pp", "tp"), STAGES)
def test_equal_to_transformers(pp: int, tp: int):
    compared = run_ranks(pp * tp, compare_with_transformers, pp, tp)
    for tower, whole in enumerate((vision_sample(CLIPPED), vision_sample(STANDARDIZED), audio_sample(AUDIO))):
        by_stage = [compared[stage * tp][tower] for stage in range(pp)]
        assert sum(map(len, by_stage)) == len(whole.gradients)  # no parameter on two stages
        assert set().union(*by_stage) == set(whole.gradients)


@pytest.mark.parametrize(
    ("modality", "options", "stages", "words"),
    [
        ("vision", CLIPPED, 4, r"`layout.vision.pp` is 4, but vision_config has 3 layers, .* lower it"),
        ("audio", AUDIO, 5, r"`layout.audio.pp` is 5, but audio_config has 3 layers, .* lower it"),
        (
            "vision",
            {"model_type": "gemma4_unified_vision"},
            2,
            r"`layout.vision.pp` is 2, but the encoder 'gemma4_unified_vision' cannot be cut",
        ),
        (
            "vision",
            {"model_type": "siglip_vision_model"},
            2,
            r"`layout.vision.pp` is 2, but .* 'siglip_vision_model' cannot .* `layout.vision.tp` or to more lanes",
        ),
    ],
)
def test_too_many_stages_are_refused(modality: str, options: dict, stages: int, words: str):
    with pytest.raises(LayoutError, match=words):
        build(modality, {f"{modality}_config": options, "vision_processor": PROCESSOR}, None, 0, stages)
