"""Gemma 4 vision encoder: tower (`vision_tower`) and projector (`embed_vision`), tensor-parallel, no padding.

The patches of all images of a call are concatenated, [P, D]; only attention looks at where images end. Numerical
reference: transformers' `Gemma4VisionModel` and `Gemma4MultimodalEmbedder`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, cast

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.base import StagedEncoder
from mimo_gemma4.encoders.gemma4_layers import ClippableLinear, RMSNorm, tower_config
from mimo_gemma4.encoders.gemma4_vision_config import Gemma4VisionConfig
from mimo_gemma4.encoders.gemma4_vision_processor import Gemma4FrameProcessor, Gemma4ImageProcessor
from mimo_gemma4.errors import LayoutError
from mimo_gemma4.media import MediaHeader
from mimo_gemma4.weights.bindings import (
    ONES,
    Binding,
    Constant,
    Normal,
    bind_replicated,
    qk_norm_init,
    residual_norm_init,
)


class Gemma4VisionEncoder(StagedEncoder):
    """Vision tower and projector of Gemma 4 E2B, E4B (clipped linears), 26B-A4B and 31B (standardised soft tokens)."""

    modality = "vision"
    architecture = "gemma4_vision"
    processor = Gemma4ImageProcessor
    frame_processor = Gemma4FrameProcessor
    only_first = frozenset({"pixel_values"})

    def __init__(self, hf_config: dict[str, Any], context: ModuleContext):
        """Build it as `StagedEncoder` says.

        `activation_checkpointing="full"` recomputes every layer in backward; "selective" is as "none", because
        attention scores are never stored.
        """
        super().__init__(hf_config, context)
        tp_group, dtype, stage = context.groups.tp, context.dtype, self.stage
        self.vision = Gemma4VisionConfig.from_config(hf_config)
        self.language_hidden = context.language_hidden
        self.recompute_layers = context.activation_checkpointing == "full"
        self.images = Gemma4ImageProcessor.from_config(hf_config)
        self.frames = Gemma4FrameProcessor.from_config(hf_config)
        self.config = _transformer_config(self.vision, tp_group.size(), dtype)
        self.patch_embedder: PatchEmbedder | None = None
        self.pooler: Pooler | None = None
        self.projector: nn.Linear | None = None
        with torch.device(context.device):
            if stage.first:
                self.patch_embedder = PatchEmbedder(self.vision, dtype)
            self.layers = nn.ModuleList(VisionLayer(self.vision, self.config, tp_group) for _ in stage.layers)
            if stage.last:
                self.pooler = Pooler(self.vision, dtype)
                self.projector = nn.Linear(self.vision.hidden_size, self.language_hidden, bias=False, dtype=dtype)

    @classmethod
    def layer_costs(cls, hf_config: dict[str, Any], language_hidden: int) -> list[float]:
        """Forward operations per patch of an image of the largest size."""
        vision, images = Gemma4VisionConfig.from_config(hf_config), Gemma4ImageProcessor.from_config(hf_config)
        pooled = images.pooling_kernel_size**2
        layers = vision.linear_flops - vision.embedding_flops
        layers += vision.attention_flops * images.max_soft_tokens * pooled
        costs = [layers / vision.num_hidden_layers] * vision.num_hidden_layers
        costs[0] += vision.embedding_flops
        costs[-1] += 2.0 * vision.hidden_size * language_hidden / pooled
        return costs

    def hidden_shape(self, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        """[P, D], P patches."""
        return len(inputs["positions"]), self.vision.hidden_size

    def forward(
        self,
        pixel_values: Tensor | None,
        positions: Tensor,
        lengths: list[int],
        boundaries: Tensor,
        soft_token_order: Tensor,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Encode images as `Gemma4ImageProcessor.collate` gives them.

        pixel_values [P, patch_size**2 * 3] in [0, 1]; positions [P, 2], (x, y) of each patch; lengths, patches per
        image (host), and boundaries [images + 1], their cumulative sums; soft_token_order [soft tokens] restores the
        items' order. Returns [soft tokens, language_hidden], equal on tensor-parallel ranks; stages before the last
        return hidden states [P, D].
        """
        if self.patch_embedder is not None:
            hidden = self.patch_embedder(pixel_values, positions)  # [P, D]
        assert hidden is not None
        rotary = axial_rotary(positions, self.vision.head_dim, self.vision.rope_theta, hidden.dtype)
        images = PackedImages(lengths, boundaries)
        for layer in self.layers:
            if self.recompute_layers and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, rotary, images, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(hidden, rotary, images)
        if self.pooler is None or self.projector is None:
            return hidden
        pooled = self.pooler(hidden).index_select(0, soft_token_order)  # [P, D] → [soft tokens, D]
        return self.projector(F.rms_norm(pooled, pooled.shape[-1:], eps=self.vision.rms_norm_eps))

    def flops(self, headers: Iterable[MediaHeader]) -> float:
        """Forward operations for images of these sizes: tower by `Gemma4ImageProcessor.cost`, and projector."""
        return self._flops(self.images, headers)

    def frame_flops(self, headers: Iterable[MediaHeader]) -> float:
        """As `flops`, for frames of videos."""
        return self._flops(self.frames, headers)

    def _flops(self, process: Gemma4ImageProcessor, headers: Iterable[MediaHeader]) -> float:
        projector = 2.0 * self.vision.hidden_size * self.language_hidden
        return sum(process.cost(header) + projector * process.soft_tokens(header) for header in headers)

    def projector_parameters(self) -> list[nn.Parameter]:
        """The projection to the language model's width; the norm before it has no weight."""
        return [] if self.projector is None else list(self.projector.parameters())

    def bindings(self) -> list[Binding]:
        """Parameters and buffers under `model.vision_tower.` and `model.embed_vision.`."""
        drawn = Normal(self.vision.initializer_range)
        bindings: list[Binding] = []
        if self.patch_embedder is not None:
            bindings += self.patch_embedder.bindings("model.vision_tower.patch_embedder.", drawn)
        for number, layer in zip(self.stage.layers, cast(Iterable[VisionLayer], self.layers), strict=True):
            bindings += layer.bindings(f"model.vision_tower.encoder.layers.{number}.", drawn)
        if self.pooler is not None and self.projector is not None:
            bindings += self.pooler.bindings("model.vision_tower.")
            name = "model.embed_vision.embedding_projection.weight"
            bindings.append(bind_replicated(name, self.projector.weight, drawn))
        return bindings


def _transformer_config(vision: Gemma4VisionConfig, tp: int, dtype: torch.dtype) -> TransformerConfig:
    """Configuration of megatron-core's linears, data parallelism and optimizer. Raises `LayoutError`."""
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(vision, key) % tp:
            raise LayoutError(f"layout.vision.tp={tp} does not divide vision_config.{key}={getattr(vision, key)}")
    return tower_config(
        tp,
        dtype,
        num_layers=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_attention_heads,
        num_query_groups=vision.num_key_value_heads,
        kv_channels=vision.head_dim,
        layernorm_epsilon=vision.rms_norm_eps,
    )


class PatchEmbedder(nn.Module):
    """Linear embedding of pixels plus learned x and y embeddings; replicated over tensor-parallel ranks."""

    def __init__(self, vision: Gemma4VisionConfig, dtype: torch.dtype):
        """Allocate the projection [D, patch_size**2 * 3] and the tables [2, position_embedding_size, D]."""
        super().__init__()
        width = vision.hidden_size
        self.input_proj = nn.Linear(3 * vision.patch_size**2, width, bias=False, dtype=dtype)
        self.position_embedding_table = nn.Parameter(torch.empty(2, vision.position_embedding_size, width, dtype=dtype))

    def forward(self, pixel_values: Tensor, positions: Tensor) -> Tensor:
        """[P, patch_size**2 * 3] in [0, 1] and (x, y) [P, 2] → [P, D]."""
        hidden = self.input_proj((2 * (pixel_values - 0.5)).to(self.input_proj.weight.dtype))
        columns, rows = self.position_embedding_table
        return hidden + (F.embedding(positions[:, 0], columns) + F.embedding(positions[:, 1], rows))

    def bindings(self, prefix: str, drawn: Normal) -> list[Binding]:
        """Bindings under `prefix`.

        Random position tables are normal, unlike transformers', which are all ones: these would drown the pixels.
        """
        return [
            bind_replicated(f"{prefix}input_proj.weight", self.input_proj.weight, drawn),
            bind_replicated(f"{prefix}position_embedding_table", self.position_embedding_table, drawn),
        ]


@dataclass(frozen=True)
class PackedImages:
    """Where the images of a concatenation of patches begin and end."""

    lengths: list[int]
    """Patches per image, ascending, so that equally long images are neighbours."""
    boundaries: Tensor
    """[images + 1] int32 on the device: cumulative sums of `lengths`, from 0."""


class VisionLayer(nn.Module):
    """Attention and gated MLP, each between two norms, heads and MLP channels cut over the tensor-parallel group."""

    def __init__(self, vision: Gemma4VisionConfig, config: TransformerConfig, tp_group: ProcessGroup):
        """Allocate this rank's part of the layer."""
        super().__init__()
        self.vision, self.tp_group = vision, tp_group
        width, dtype = vision.hidden_size, config.params_dtype
        queries, keys = vision.num_attention_heads * vision.head_dim, vision.num_key_value_heads * vision.head_dim

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, vision.rms_norm_eps, dtype)

        def linear(cut: Literal["column", "row"], inputs: int, outputs: int) -> ClippableLinear:
            return ClippableLinear(cut, inputs, outputs, config, tp_group, clipped=vision.use_clipped_linears)

        self.input_layernorm, self.post_attention_layernorm = norm(width), norm(width)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(width), norm(width)
        self.q_proj, self.k_proj = linear("column", width, queries), linear("column", width, keys)
        self.v_proj, self.o_proj = linear("column", width, keys), linear("row", queries, width)
        self.q_norm, self.k_norm = norm(vision.head_dim), norm(vision.head_dim)
        self.gate_proj = linear("column", width, vision.intermediate_size)
        self.up_proj = linear("column", width, vision.intermediate_size)
        self.down_proj = linear("row", vision.intermediate_size, width)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], images: PackedImages) -> Tensor:
        """[P, D] → [P, D]."""
        hidden = hidden + self.post_attention_layernorm(self._attention(self.input_layernorm(hidden), rotary, images))
        return hidden + self.post_feedforward_layernorm(self._mlp(self.pre_feedforward_layernorm(hidden)))

    def _attention(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], images: PackedImages) -> Tensor:
        # Sums the input gradients of q, k and v over the group, all at once.
        hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.vision.head_dim))  # [P, heads (local), head_dim]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = rotate(self.q_norm(query), rotary)
        key = rotate(self.k_norm(key), rotary)
        value = F.rms_norm(value, value.shape[-1:], eps=self.vision.rms_norm_eps)
        return self.o_proj(attend_within_images(query, key, value, images).flatten(1))

    def _mlp(self, hidden: Tensor) -> Tensor:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self.down_proj(F.gelu(self.gate_proj(hidden), approximate="tanh") * self.up_proj(hidden))

    def bindings(self, prefix: str, drawn: Normal) -> list[Binding]:
        """Bindings under `prefix`, a layer's name with a dot."""
        bindings = []
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            bindings += getattr(self, name).bindings(f"{prefix}self_attn.{name}.", drawn)
        for name in ("gate_proj", "up_proj", "down_proj"):
            bindings += getattr(self, name).bindings(f"{prefix}mlp.{name}.", drawn)
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            # One for all heads, of which every rank normalises its own.
            initial = qk_norm_init(self.vision.head_dim)
            bindings.append(
                bind_replicated(f"{prefix}self_attn.{name}.weight", norm.weight, initial, gradient_sum=("tp",))
            )
        residual = residual_norm_init(self.vision.num_hidden_layers)
        for place, initial in (
            ("input", ONES),
            ("post_attention", residual),
            ("pre_feedforward", ONES),
            ("post_feedforward", residual),
        ):
            name = f"{place}_layernorm"
            bindings.append(bind_replicated(f"{prefix}{name}.weight", getattr(self, name).weight, initial))
        return bindings


class Pooler(nn.Module):
    """Mean over each soft token's patches, scaled by sqrt(D) and, in some models, standardised, all in fp32."""

    std_bias: Tensor
    std_scale: Tensor

    def __init__(self, vision: Gemma4VisionConfig, dtype: torch.dtype):
        """Allocate the buffers of a standardising model."""
        super().__init__()
        self.patches_per_soft_token = vision.pooling_kernel_size**2
        self.standardize = vision.standardize
        if vision.standardize:
            self.register_buffer("std_bias", torch.empty(vision.hidden_size, dtype=dtype))
            self.register_buffer("std_scale", torch.empty(vision.hidden_size, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """[P, D] → [soft tokens, D]; the patches of a soft token are adjacent."""
        width = hidden.shape[-1]
        patches = hidden.float().view(-1, self.patches_per_soft_token, width)  # [soft tokens, patches, D]
        pooled = patches.mean(dim=1).to(hidden.dtype).float() * width**0.5
        if self.standardize:
            pooled = (pooled - self.std_bias.float()) * self.std_scale.float()
        return pooled.to(hidden.dtype)

    def bindings(self, prefix: str) -> list[Binding]:
        """The shift and scale of a standardising model."""
        if not self.standardize:
            return []
        return [
            bind_replicated(f"{prefix}std_bias", self.std_bias, Constant(0.0)),
            bind_replicated(f"{prefix}std_scale", self.std_scale, ONES),
        ]


def axial_rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [P, 1, 2, head_dim // 4] for (x, y) positions [P, 2].

    The first half of a head turns with x, the second with y, each at the frequencies theta ** (-2i / (head_dim / 2)).
    Computed in fp32, then rounded to `dtype`, as the reference does.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half
    angles = positions[:, :, None].float() * (1.0 / theta**exponents)  # [P, 2, head_dim // 4]
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn [P, heads, head_dim] by the angles of `axial_rotary`, each half of a head by its own axis."""
    cos, sin = rotary
    first, second = heads.unflatten(-1, (2, 2, -1)).unbind(dim=-2)  # each [P, heads, axis, head_dim // 4]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2).flatten(-3)


def attend_within_images(query: Tensor, key: Tensor, value: Tensor, images: PackedImages) -> Tensor:
    """Unmasked attention inside each image, scores unscaled (q and k are normed): [P, heads, head_dim] → the same.

    Nothing is padded and no P x P mask is built. In half precision on a GPU one variable-length kernel serves all
    images; elsewhere each run of equally long images is one batch.
    """
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not grouped:
        bounds, longest = images.boundaries, images.lengths[-1]
        return cast(Tensor, varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=1.0))
    outputs, start = [], 0
    for length, run in groupby(images.lengths):
        count = len(list(run))
        stop = start + length * count
        q, k, v = (t[start:stop].unflatten(0, (count, length)).transpose(1, 2) for t in (query, key, value))
        output = F.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=grouped)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(outputs)
