"""The audio encoder in bf16 at the size of Gemma 4 E2B is as near to fp32 as transformers' own bf16 is.

pytest -m gpu -s tests/gpu/encoders/test_audio_bfloat16.py
"""

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.registry import build_encoder, build_processor
from mimo_gemma4.weights.bindings import load
from tests.audio_reference import AudioReference
from tests.dist.harness import run_ranks
from tests.state_source import StateSource

pytestmark = pytest.mark.gpu

FRAMES = [2999, 30, 731, 1500, 99, 5, 1204]
BAND = 1.25
"""Both errors are sums of the same roundings in other places; their ratio scatters by a few per cent."""


def relative_error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    wrong = sum((a.double() - e.double()).square().sum() for a, e in zip(actual, expected, strict=True))
    return float((wrong / sum(e.double().square().sum() for e in expected)).sqrt().detach())


def soft_tokens_and_gradients(rank: int) -> dict[str, tuple[float, float]]:
    """Relative errors against fp32 of (this project in bf16, transformers in bf16)."""
    torch.backends.cudnn.allow_tf32 = False  # the truth's convolutions
    hf_config = load_model_config(ModelConfig(preset="gemma4_e2b"))
    width, device = hf_config["text_config"]["hidden_size"], torch.device("cuda")
    generator = torch.Generator().manual_seed(2)
    features = [torch.randn(frames, 128, generator=generator) * 2 - 3 for frames in FRAMES]  # levels of log-mel frames

    def run(reference: AudioReference) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        soft_tokens = reference([sound.to(device) for sound in features])
        (soft_tokens * cotangent(soft_tokens)).sum().backward()
        return soft_tokens, {f"model.{name}": parameter.grad for name, parameter in reference.named_parameters()}

    def cotangent(soft_tokens: torch.Tensor) -> torch.Tensor:
        return torch.randn(soft_tokens.shape, generator=torch.Generator().manual_seed(3)).to(soft_tokens)

    options = {key: value for key, value in hf_config["audio_config"].items() if key != "model_type"}
    exact = AudioReference(options, width)
    exact.randomise(seed=0)
    for tensor in exact.state_dict().values():  # weights that both precisions can hold
        tensor.copy_(tensor.bfloat16())
    peer = AudioReference(options, width)
    peer.load_state_dict(exact.state_dict())
    for name, tensor in [*peer.named_parameters(), *peer.named_buffers()]:
        if name in exact.state_dict():  # not the wavelengths of the positions, which need fp32
            tensor.data = tensor.data.bfloat16()
    true, true_gradients = run(exact.to(device))
    peers, peer_gradients = run(peer.to(device))

    context = ModuleContext(
        ProcessGroupCollection(tp=dist.group.WORLD),
        language_hidden=width,
        dtype=torch.bfloat16,
        device=device,
        activation_checkpointing="full",
    )
    encoder = build_encoder("audio", hf_config, context)
    load(encoder.bindings(), StateSource(exact), "fp32")
    inputs = build_processor("audio", hf_config).collate([{"features": sound} for sound in features])
    soft_tokens = encoder(
        **{key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    )
    (soft_tokens * cotangent(soft_tokens)).sum().backward()

    bound = [binding for binding in encoder.bindings() if isinstance(binding.tensor, nn.Parameter)]
    ours = [binding.view(binding.tensor.grad) for binding in bound]
    theirs = [peer_gradients[binding.name][binding.index] for binding in bound]
    truth = [true_gradients[binding.name][binding.index] for binding in bound]
    return {
        "soft tokens": (relative_error([soft_tokens], [true]), relative_error([peers], [true])),
        "gradients": (relative_error(ours, truth), relative_error(theirs, truth)),
    }


def test_errors_are_those_of_bfloat16() -> None:
    for name, (ours, peer) in run_ranks(1, soft_tokens_and_gradients, backend="nccl")[0].items():
        print(f"{name}: relative error {ours:.2e} here, {peer:.2e} in transformers")
        assert 0 < peer < 0.5
        assert ours <= BAND * peer, name
