"""Gemma 4 12B (`gemma4_unified`): images and sounds are embedded without a tower, each soft token on its own.

A soft token of an image is a square of 48 x 48 pixels, one of a sound is 40 ms of samples. Numerical reference:
transformers' `Gemma4UnifiedVisionEmbedder` and `Gemma4UnifiedMultimodalEmbedder`.

Under tensor parallelism every rank holds all weights (50 million) and embeds its share of the soft tokens, which are
then gathered: cutting the weights would cost a collective per linear.
"""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from mimo_gemma4.distributed.megatron_config import module_config
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.base import Encoder
from mimo_gemma4.encoders.gemma4_unified_processors import (
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedAudioProcessor,
    Gemma4UnifiedFrameProcessor,
    Gemma4UnifiedImageProcessor,
    Gemma4UnifiedVisionConfig,
)
from mimo_gemma4.media import MediaHeader
from mimo_gemma4.weights.bindings import ONES, Binding, Constant, Normal, bind_replicated


class Gemma4UnifiedVisionEncoder(Encoder):
    """LayerNorm → Linear → LayerNorm → plus x and y embedding → LayerNorm → RMSNorm → Linear, square by square."""

    modality = "vision"
    architecture = "gemma4_unified_vision"
    processor = Gemma4UnifiedImageProcessor
    frame_processor = Gemma4UnifiedFrameProcessor

    def __init__(self, hf_config: dict[str, Any], context: ModuleContext):
        """Build it as `Encoder` says; there are too few activations to recompute."""
        super().__init__(hf_config, context)
        self.vision = Gemma4UnifiedVisionConfig.from_config(hf_config)
        self.image_processor = Gemma4UnifiedImageProcessor.from_config(hf_config)
        self.frames = Gemma4UnifiedFrameProcessor.from_config(hf_config)
        self.tp_group, dtype, hidden = context.groups.tp, context.dtype, context.language_hidden
        self.config = module_config(self.tp_group.size(), dtype, hidden_size=hidden)
        pixels, width = 3 * self.vision.side**2, self.vision.mm_embed_dim
        with torch.device(context.device):
            self.patch_ln1 = nn.LayerNorm(pixels, dtype=dtype)
            self.patch_dense = nn.Linear(pixels, width, dtype=dtype)
            self.patch_ln2 = nn.LayerNorm(width, dtype=dtype)
            self.pos_embedding = nn.Parameter(torch.empty(self.vision.mm_posemb_size, 2, width, dtype=dtype))
            self.pos_norm = nn.LayerNorm(width, dtype=dtype)
            self.projector = nn.Linear(width, hidden, bias=False, dtype=dtype)

    def forward(self, pixel_values: Tensor, positions: Tensor) -> Tensor:
        """Embed images as `Gemma4UnifiedImageProcessor.collate` gives them.

        For N soft tokens: pixel_values [N, side**2 * 3] in [0, 1]; positions [N, 2], (x, y) of each square. Returns
        [N, language_hidden], equal on tensor-parallel ranks.
        """
        count = pixel_values.shape[0]
        pixel_values, positions = (_share(tensor, self.tp_group) for tensor in (pixel_values, positions))
        hidden = self.patch_ln2(self.patch_dense(self.patch_ln1(pixel_values.to(self.patch_dense.weight.dtype))))
        columns, lines = self.pos_embedding.unbind(dim=1)
        hidden = self.pos_norm(hidden + (F.embedding(positions[:, 0], columns) + F.embedding(positions[:, 1], lines)))
        return _gather(self.projector(_normalise(hidden, self.vision.rms_norm_eps)), count, self.tp_group)

    def flops(self, headers: Iterable[MediaHeader]) -> float:
        """Forward operations of both linears for images of these sizes."""
        return self._soft_token_flops * sum(self.image_processor.soft_tokens(header) for header in headers)

    def frame_flops(self, headers: Iterable[MediaHeader]) -> float:
        """Forward operations of both linears for frames of these sizes."""
        return self._soft_token_flops * sum(self.frames.soft_tokens(header) for header in headers)

    @property
    def _soft_token_flops(self) -> float:
        return 2.0 * (self.patch_dense.weight.numel() + self.projector.weight.numel())

    def projector_parameters(self) -> list[nn.Parameter]:
        """The projection to the language model's width; the norm before it has no weight."""
        return list(self.projector.parameters())

    def bindings(self) -> list[Binding]:
        """Parameters under `model.vision_embedder.` and `model.embed_vision.`, as the released files name them."""
        prefix, drawn = "model.vision_embedder.", Normal(self.vision.initializer_range)
        bindings = [
            _bind(f"{prefix}patch_dense.weight", self.patch_dense.weight, drawn),
            _bind(f"{prefix}patch_dense.bias", self.patch_dense.bias, Constant(0.0)),
            _bind(f"{prefix}pos_embedding", self.pos_embedding, drawn),
        ]
        for name in ("patch_ln1", "patch_ln2", "pos_norm"):
            norm = getattr(self, name)
            bindings.append(_bind(f"{prefix}{name}.weight", norm.weight, ONES))
            bindings.append(_bind(f"{prefix}{name}.bias", norm.bias, Constant(0.0)))
        name = "model.embed_vision.embedding_projection.weight"
        return [*bindings, _bind(name, self.projector.weight, drawn)]


class Gemma4UnifiedAudioEncoder(Encoder):
    """RMSNorm → Linear, for every 40 ms of samples."""

    modality = "audio"
    architecture = "gemma4_unified_audio"
    processor = Gemma4UnifiedAudioProcessor

    def __init__(self, hf_config: dict[str, Any], context: ModuleContext):
        """Build it as `Encoder` says; there are too few activations to recompute."""
        super().__init__(hf_config, context)
        self.audio = Gemma4UnifiedAudioConfig.from_config(hf_config)
        self.audio_processor = Gemma4UnifiedAudioProcessor.from_config(hf_config)
        self.tp_group, dtype, hidden = context.groups.tp, context.dtype, context.language_hidden
        self.config = module_config(self.tp_group.size(), dtype, hidden_size=hidden)
        with torch.device(context.device):
            self.projector = nn.Linear(self.audio.audio_embed_dim, hidden, bias=False, dtype=dtype)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Samples [soft tokens, audio_embed_dim] → [soft tokens, language_hidden], equal on tensor-parallel ranks."""
        share = _share(waveforms, self.tp_group).to(self.projector.weight.dtype)
        return _gather(self.projector(_normalise(share, self.audio.rms_norm_eps)), waveforms.shape[0], self.tp_group)

    def flops(self, headers: Iterable[MediaHeader]) -> float:
        """Forward operations of the projection for sounds of these lengths."""
        return 2.0 * self.projector.weight.numel() * sum(self.audio_processor.soft_tokens(header) for header in headers)

    def projector_parameters(self) -> list[nn.Parameter]:
        """All there is."""
        return list(self.projector.parameters())

    def bindings(self) -> list[Binding]:
        """The parameter under `model.embed_audio.`."""
        name = "model.embed_audio.embedding_projection.weight"
        return [_bind(name, self.projector.weight, Normal(self.audio.initializer_range))]


def _bind(name: str, parameter: Tensor, initial: Normal | Constant) -> Binding:
    """A parameter that every rank holds whole and applies to its share of the soft tokens."""
    return bind_replicated(name, parameter, initial, gradient_sum=("tp",))


def _share(tensor: Tensor, tp_group: ProcessGroup) -> Tensor:
    """This rank's part of [N, …]: [ceil(N / tp), …] (local), filled up with zeros."""
    size = -(-tensor.shape[0] // tp_group.size())
    part = tensor[size * tp_group.rank() : size * (tp_group.rank() + 1)]
    return torch.cat([part, part.new_zeros(size - part.shape[0], *part.shape[1:])])


def _gather(share: Tensor, count: int, tp_group: ProcessGroup) -> Tensor:
    """All ranks' shares [ceil(count / tp), H] (local) as [count, H]; every rank gets the same gradient of these."""
    return gather_from_sequence_parallel_region(share, tensor_parallel_output_grad=False, group=tp_group)[:count]


def _normalise(hidden: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension without a weight, rounded once."""
    return F.rms_norm(hidden, hidden.shape[-1:], eps=eps)
