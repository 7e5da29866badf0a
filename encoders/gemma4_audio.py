"""Gemma 4 audio encoder: conformer tower (`audio_tower`) and projector (`embed_audio`), tensor-parallel, no padding.

The sounds of a call are concatenated; convolutions and attention stay inside each sound. Heads and channels of the
layers are cut over tensor-parallel ranks. The subsampling and the projections behind the layers, 2 to 3% of the
operations of the released models, are computed on all ranks. Numerical reference: transformers' `Gemma4AudioModel` and
`Gemma4MultimodalEmbedder`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.base import StagedEncoder
from mimo_gemma4.encoders.gemma4_audio_attention import LocalAttention, embed_distances, visible_keys
from mimo_gemma4.encoders.gemma4_audio_config import Gemma4AudioConfig, half
from mimo_gemma4.encoders.gemma4_audio_processor import HOP, Gemma4AudioProcessor
from mimo_gemma4.encoders.gemma4_layers import ClippableLinear, RMSNorm, tower_config
from mimo_gemma4.encoders.waveform import MAX_SAMPLES
from mimo_gemma4.errors import LayoutError
from mimo_gemma4.media import MediaHeader
from mimo_gemma4.weights.bindings import ONES, Binding, Constant, Normal, bind_replicated, bind_sharded

LAYER_NORM_EPS = 1e-6
"""Epsilon of the norms around attention and feed-forward; `audio_config.rms_norm_eps` applies to other norms."""


class Gemma4AudioEncoder(StagedEncoder):
    """Audio tower and projector of Gemma 4 E2B and E4B."""

    modality = "audio"
    architecture = "gemma4_audio"
    processor = Gemma4AudioProcessor
    only_first = frozenset({"features", "frame_index", "halved_index"})

    def __init__(self, hf_config: dict[str, Any], context: ModuleContext):
        """Build it as `StagedEncoder` says.

        `activation_checkpointing="full"` recomputes the subsampling and every layer in backward, "selective" the scores
        and weights of the attention.
        """
        super().__init__(hf_config, context)
        tp_group, dtype, stage = context.groups.tp, context.dtype, self.stage
        self.audio = Gemma4AudioConfig.from_config(hf_config)
        self.language_hidden = context.language_hidden
        self.recompute = context.activation_checkpointing == "full"
        self.audio_processor = Gemma4AudioProcessor(self.audio)
        self.config = _transformer_config(self.audio, tp_group.size(), dtype)
        recompute_attention = context.activation_checkpointing == "selective"
        self.subsampling: Subsampling | None = None
        self.output_proj: nn.Linear | None = None
        self.projector: nn.Linear | None = None
        with torch.device(context.device):
            if stage.first:
                self.subsampling = Subsampling(self.audio, dtype)
            self.layers = nn.ModuleList(
                ConformerLayer(self.audio, self.config, tp_group, recompute_attention=recompute_attention)
                for _ in stage.layers
            )
            if stage.last:
                self.output_proj = nn.Linear(self.audio.hidden_size, self.audio.output_proj_dims, dtype=dtype)
                self.projector = nn.Linear(self.audio.output_proj_dims, self.language_hidden, bias=False, dtype=dtype)

    @classmethod
    def layer_costs(cls, hf_config: dict[str, Any], language_hidden: int) -> list[float]:
        """Forward operations for a sound of the largest length."""
        audio, frames = Gemma4AudioConfig.from_config(hf_config), MAX_SAMPLES // HOP
        tokens = half(half(frames))
        costs = [audio.layer_flops(tokens)] * audio.num_hidden_layers
        costs[0] += audio.subsampling_flops(frames)
        costs[-1] += 2.0 * tokens * audio.output_proj_dims * (audio.hidden_size + language_hidden)
        return costs

    def hidden_shape(self, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        """[soft tokens, D]."""
        return len(inputs["positions"]), self.audio.hidden_size

    def forward(
        self,
        features: Tensor | None,
        frame_index: Tensor | None,
        halved_index: Tensor | None,
        positions: Tensor,
        sounds: Tensor,
        count: int,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Encode sounds as `Gemma4AudioProcessor.collate` gives them into [soft tokens, language_hidden].

        Stages before the last return hidden states [soft tokens, D].
        """
        audio, device = self.audio, positions.device
        if self.subsampling is not None:
            hidden = self._run(self.subsampling, features, frame_index, halved_index)  # [N, D], N soft tokens
        assert hidden is not None
        distances = embed_distances(audio.attention_chunk_size, audio.hidden_size, hidden.dtype, device)
        seen = visible_keys(positions, audio.attention_chunk_size)
        # Places of soft tokens once every sound has the zeros before it that a causal convolution starts from.
        zeros = audio.conv_kernel_size - 1
        apart = torch.arange(len(positions), device=device) + zeros * (sounds + 1)
        for layer in self.layers:
            hidden = self._run(layer, hidden, distances, seen, apart, len(positions) + zeros * count)
        if self.output_proj is None or self.projector is None:
            return hidden
        output = self.output_proj(hidden)  # [N, output_proj_dims]
        return self.projector(F.rms_norm(output.float(), output.shape[-1:], eps=audio.rms_norm_eps).to(output.dtype))

    def _run(self, module: nn.Module, *arguments: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(module, *arguments, use_reentrant=False, preserve_rng_state=False))
        return module(*arguments)

    def flops(self, headers: Iterable[MediaHeader]) -> float:
        """Forward operations for sounds of these lengths: tower by `Gemma4AudioProcessor.cost`, and projector."""
        projector = 2.0 * self.audio.output_proj_dims * self.language_hidden
        process = self.audio_processor
        return sum(process.cost(header) + projector * process.soft_tokens(header) for header in headers)

    def projector_parameters(self) -> list[nn.Parameter]:
        """The projection to the language model's width; the norm before it has no weight."""
        return [] if self.projector is None else list(self.projector.parameters())

    def bindings(self) -> list[Binding]:
        """Parameters and buffers under `model.audio_tower.` and `model.embed_audio.`."""
        drawn = Normal(self.audio.initializer_range)
        bindings: list[Binding] = []
        if self.subsampling is not None:
            bindings += self.subsampling.bindings("model.audio_tower.subsample_conv_projection.", drawn)
        for number, layer in zip(self.stage.layers, cast(Iterable[ConformerLayer], self.layers), strict=True):
            bindings += layer.bindings(f"model.audio_tower.layers.{number}.", drawn)
        if self.output_proj is not None and self.projector is not None:
            bindings += [
                bind_replicated("model.audio_tower.output_proj.weight", self.output_proj.weight, drawn),
                bind_replicated("model.audio_tower.output_proj.bias", self.output_proj.bias, Constant(0.0)),
                bind_replicated("model.embed_audio.embedding_projection.weight", self.projector.weight, drawn),
            ]
        return bindings


def _transformer_config(audio: Gemma4AudioConfig, tp: int, dtype: torch.dtype) -> TransformerConfig:
    """Configuration of megatron-core's linears, data parallelism and optimizer. Raises `LayoutError`."""
    if audio.num_attention_heads % tp:
        raise LayoutError(
            f"layout.audio.tp={tp} does not divide audio_config.num_attention_heads={audio.num_attention_heads}"
        )
    return tower_config(
        tp,
        dtype,
        num_layers=audio.num_hidden_layers,
        hidden_size=audio.hidden_size,
        ffn_hidden_size=4 * audio.hidden_size,
        num_attention_heads=audio.num_attention_heads,
        layernorm_epsilon=audio.rms_norm_eps,
    )


class Subsampling(nn.Module):
    """Two convolutions that each halve time and frequency, and a projection; replicated over tensor-parallel ranks."""

    def __init__(self, audio: Gemma4AudioConfig, dtype: torch.dtype):
        """Allocate it."""
        super().__init__()
        first, second = audio.subsampling_conv_channels
        # `_convolve` gathers the inputs of every output, so no kernel reaches into another sound: time has no stride.
        self.conv0 = nn.Conv2d(1, first, 3, stride=(1, 2), padding=(0, 1), bias=False, dtype=dtype)
        self.conv1 = nn.Conv2d(first, second, 3, stride=(1, 2), padding=(0, 1), bias=False, dtype=dtype)
        self.norm0 = nn.LayerNorm(first, eps=audio.rms_norm_eps, bias=False, dtype=dtype)
        self.norm1 = nn.LayerNorm(second, eps=audio.rms_norm_eps, bias=False, dtype=dtype)
        self.input_proj_linear = nn.Linear(audio.subsampled_width, audio.hidden_size, bias=False, dtype=dtype)

    def forward(self, features: Tensor, frame_index: Tensor, halved_index: Tensor) -> Tensor:
        """[F, MEL_BANDS] → [soft tokens, D]."""
        hidden = features.to(self.conv0.weight.dtype)[..., None]  # [F, MEL_BANDS, 1]
        hidden = F.relu(self.norm0(_convolve(self.conv0, hidden, frame_index)))  # [≈ F / 2, MEL_BANDS / 2, first]
        hidden = F.relu(self.norm1(_convolve(self.conv1, hidden, halved_index)))  # [N, MEL_BANDS / 4, second]
        return self.input_proj_linear(hidden.flatten(1))

    def bindings(self, prefix: str, drawn: Normal) -> list[Binding]:
        """Bindings under `prefix`, the module's name with a dot."""
        bindings = [bind_replicated(f"{prefix}input_proj_linear.weight", self.input_proj_linear.weight, drawn)]
        for number, conv, norm in ((0, self.conv0, self.norm0), (1, self.conv1, self.norm1)):
            bindings.append(bind_replicated(f"{prefix}layer{number}.conv.weight", conv.weight, drawn))
            bindings.append(bind_replicated(f"{prefix}layer{number}.norm.weight", norm.weight, ONES))
        return bindings


def _convolve(convolution: nn.Conv2d, hidden: Tensor, index: Tensor) -> Tensor:
    """[T, bands, inputs] and the inputs [T', 3] of every output → [T', bands / 2, outputs]; T stands for a zero."""
    seen = F.pad(hidden, (0, 0, 0, 0, 0, 1)).index_select(0, index.flatten()).unflatten(0, index.shape)
    return convolution(seen.permute(0, 3, 1, 2)).squeeze(2).transpose(1, 2)


class ConformerLayer(nn.Module):
    """Half a feed-forward branch, attention, convolution, the other half, and a norm."""

    def __init__(
        self, audio: Gemma4AudioConfig, config: TransformerConfig, tp_group: ProcessGroup, *, recompute_attention: bool
    ):
        """Allocate this rank's part of the layer."""
        super().__init__()
        self.bound = activation_bound(audio, config.params_dtype)
        self.feed_forward1 = FeedForward(audio, config, tp_group)
        self.self_attn = LocalAttention(audio, config, tp_group, recompute=recompute_attention)
        self.lconv1d = LightConvolution(audio, config, tp_group)
        self.feed_forward2 = FeedForward(audio, config, tp_group)
        self.norm_pre_attn, self.norm_post_attn, self.norm_out = (
            RMSNorm(audio.hidden_size, LAYER_NORM_EPS, config.params_dtype) for _ in range(3)
        )

    def forward(self, hidden: Tensor, distances: Tensor, seen: Tensor, apart: Tensor, length: int) -> Tensor:
        """[N, D] → [N, D]; the other arguments as in `LocalAttention` and `LightConvolution`."""
        bound = self.bound
        hidden = self.feed_forward1(hidden)
        attended = self.self_attn(self.norm_pre_attn(hidden.clamp(-bound, bound)), distances, seen)
        hidden = hidden + self.norm_post_attn(attended.clamp(-bound, bound))
        hidden = self.feed_forward2(self.lconv1d(hidden, apart, length))
        return self.norm_out(hidden.clamp(-bound, bound))

    def bindings(self, prefix: str, drawn: Normal) -> list[Binding]:
        """Bindings under `prefix`, a layer's name with a dot."""
        bindings = []
        for name in ("feed_forward1", "self_attn", "lconv1d", "feed_forward2"):
            bindings += getattr(self, name).bindings(f"{prefix}{name}.", drawn)
        for name in ("norm_pre_attn", "norm_post_attn", "norm_out"):
            bindings.append(bind_replicated(f"{prefix}{name}.weight", getattr(self, name).weight, ONES))
        return bindings


class FeedForward(nn.Module):
    """A residual feed-forward branch between two norms, its channels cut over the tensor-parallel group."""

    def __init__(self, audio: Gemma4AudioConfig, config: TransformerConfig, tp_group: ProcessGroup):
        """Allocate this rank's part."""
        super().__init__()
        self.tp_group, self.weight = tp_group, audio.residual_weight
        self.bound = activation_bound(audio, config.params_dtype)
        width, clipped = audio.hidden_size, audio.use_clipped_linears
        self.ffw_layer_1 = ClippableLinear("column", width, 4 * width, config, tp_group, clipped=clipped)
        self.ffw_layer_2 = ClippableLinear("row", 4 * width, width, config, tp_group, clipped=clipped)
        self.pre_layer_norm = RMSNorm(width, LAYER_NORM_EPS, config.params_dtype)
        self.post_layer_norm = RMSNorm(width, LAYER_NORM_EPS, config.params_dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, D] → [N, D]."""
        normed = self.pre_layer_norm(hidden.clamp(-self.bound, self.bound))
        normed = copy_to_tensor_model_parallel_region(normed, group=self.tp_group)
        branch = self.ffw_layer_2(F.silu(self.ffw_layer_1(normed)))
        return torch.add(hidden, self.post_layer_norm(branch.clamp(-self.bound, self.bound)), alpha=self.weight)

    def bindings(self, prefix: str, drawn: Normal) -> list[Binding]:
        """Bindings under `prefix`, the module's name with a dot."""
        return [
            *self.ffw_layer_1.bindings(f"{prefix}ffw_layer_1.", drawn),
            *self.ffw_layer_2.bindings(f"{prefix}ffw_layer_2.", drawn),
            bind_replicated(f"{prefix}pre_layer_norm.weight", self.pre_layer_norm.weight, ONES),
            bind_replicated(f"{prefix}post_layer_norm.weight", self.post_layer_norm.weight, ONES),
        ]


class LightConvolution(nn.Module):
    """A residual branch that mixes each channel over a few soft tokens, channels cut over tensor-parallel ranks."""

    def __init__(self, audio: Gemma4AudioConfig, config: TransformerConfig, tp_group: ProcessGroup):
        """Allocate this rank's part."""
        super().__init__()
        self.tp_group, self.width = tp_group, audio.hidden_size
        self.eps, self.bound = audio.rms_norm_eps, activation_bound(audio, config.params_dtype)
        clipped, dtype = audio.use_clipped_linears, config.params_dtype
        local_width = audio.hidden_size // tp_group.size()
        self.pre_layer_norm = RMSNorm(self.width, self.eps, dtype)
        # Locally, the values of this rank's channels lie before their gates.
        self.linear_start = ClippableLinear("column", self.width, 2 * self.width, config, tp_group, clipped=clipped)
        self.convolution = nn.Parameter(torch.empty(local_width, 1, audio.conv_kernel_size, dtype=dtype))
        self.conv_norm = nn.Parameter(torch.empty(local_width, dtype=dtype))
        self.linear_end = ClippableLinear("row", self.width, self.width, config, tp_group, clipped=clipped)

    def forward(self, hidden: Tensor, apart: Tensor, length: int) -> Tensor:
        """[N, D] → [N, D]; `apart` [N] are the soft tokens' places among `length` when zeros part the sounds."""
        normed = copy_to_tensor_model_parallel_region(self.pre_layer_norm(hidden), group=self.tp_group)
        gated = F.glu(self.linear_start(normed), dim=-1)  # [N, D (local)]
        parted = gated.new_zeros(length, gated.shape[-1]).index_copy(0, apart, gated)
        mixed = F.conv1d(parted.t().contiguous()[None], self.convolution, groups=len(self.convolution))[0].t()
        # Output t of a convolution without padding belongs to place t + kernel - 1.
        mixed = mixed.index_select(0, apart - (self.convolution.shape[-1] - 1)).clamp(-self.bound, self.bound)
        return hidden + self.linear_end(F.silu(self._norm(mixed)))

    def _norm(self, mixed: Tensor) -> Tensor:
        """Root mean square norm over the channels of all ranks."""
        squares = mixed.float().square().sum(-1, keepdim=True)
        # Every rank's loss depends on every rank's squares: summed forward, and so are their gradients backward.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        scale = torch.rsqrt(squares / self.width + self.eps)
        return (mixed.float() * scale * self.conv_norm.float()).to(mixed.dtype)

    def bindings(self, prefix: str, drawn: Normal) -> list[Binding]:
        """Bindings under `prefix`, the module's name with a dot."""
        start, *bounds = self.linear_start.bindings(f"{prefix}linear_start.", drawn)
        return [
            *(self._halves(start) if self.tp_group.size() > 1 else [start]),
            *bounds,
            *self.linear_end.bindings(f"{prefix}linear_end.", drawn),
            bind_sharded(f"{prefix}depthwise_conv1d.weight", self.convolution, 0, self.tp_group, drawn),
            bind_sharded(f"{prefix}conv_norm.weight", self.conv_norm, 0, self.tp_group, ONES),
            bind_replicated(f"{prefix}pre_layer_norm.weight", self.pre_layer_norm.weight, ONES),
        ]

    def _halves(self, start: Binding) -> Iterable[Binding]:
        """Bindings of the values and the gates of this rank's channels, which are not adjacent in the whole tensor."""
        local = len(start.tensor) // 2
        for number in (0, 1):
            first = number * self.width + self.tp_group.rank() * local
            index = (slice(first, first + local), start.index[1])
            region = (slice(number * local, (number + 1) * local), start.region[1])
            yield replace(start, index=index, region=region)


def activation_bound(audio: Gemma4AudioConfig, dtype: torch.dtype) -> float:
    """`gradient_clipping`, or the largest number of the type where that is smaller."""
    return min(audio.gradient_clipping, torch.finfo(dtype).max)
