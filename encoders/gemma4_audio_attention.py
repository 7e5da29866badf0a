"""Attention of the Gemma 4 audio tower: every soft token sees itself and the few before it in its own sound.

The sounds are concatenated into N soft tokens. Queries are cut into blocks as long as the window; a block's keys are
its own tokens and those of the block before it, so the cost is linear in N and no N x N mask is built.
"""

import math

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mimo_gemma4.encoders.gemma4_audio_config import Gemma4AudioConfig
from mimo_gemma4.encoders.gemma4_layers import ClippableLinear
from mimo_gemma4.weights.bindings import Binding, Constant, Normal, bind_replicated, bind_sharded


class LocalAttention(nn.Module):
    """Attention over a window with learned relative positions, heads cut over the tensor-parallel group."""

    def __init__(self, audio: Gemma4AudioConfig, config: TransformerConfig, tp_group: ProcessGroup, *, recompute: bool):
        """Allocate this rank's heads; with `recompute`, backward computes scores and weights again."""
        super().__init__()
        self.audio, self.tp_group, self.recompute = audio, tp_group, recompute
        width, dtype = audio.hidden_size, config.params_dtype
        clipped = audio.use_clipped_linears
        self.q_proj, self.k_proj, self.v_proj = (
            ClippableLinear("column", width, width, config, tp_group, clipped=clipped) for _ in range(3)
        )
        self.post = ClippableLinear("row", width, width, config, tp_group, clipped=clipped)
        self.relative_k_proj = ClippableLinear("column", width, width, config, tp_group, clipped=False)
        self.per_dim_scale = nn.Parameter(torch.empty(audio.head_dim, dtype=dtype))

    def forward(self, hidden: Tensor, distances: Tensor, seen: Tensor) -> Tensor:
        """[N, D] → [N, D]; `distances` from `embed_distances`, `seen` from `visible_keys`. Scores are made in fp32."""
        hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        query, key, value = (
            projection(hidden).float().unflatten(-1, (-1, self.audio.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [N, heads (local), head_dim]
        relative = self.relative_k_proj(distances).float().unflatten(-1, (-1, self.audio.head_dim))
        # Softplus of the zeros it starts from is ln 2: query and key are scaled by head_dim^-1/2 and log2(1 + e) then.
        query = query * (self.audio.head_dim**-0.5 / math.log(2) * F.softplus(self.per_dim_scale.float()))
        key = key * math.log2(1 + math.e)
        arguments = (query, key, value, relative, seen, self.audio.attention_logit_cap)
        if self.recompute and torch.is_grad_enabled():
            attended = checkpoint(attend_locally, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            attended = attend_locally(*arguments)
        return self.post(attended.flatten(1).to(hidden.dtype))

    def bindings(self, prefix: str, drawn: Normal) -> list[Binding]:
        """Bindings under `prefix`, the module's name with a dot."""
        bindings = []
        for name in ("q_proj", "k_proj", "v_proj", "post"):
            bindings += getattr(self, name).bindings(f"{prefix}{name}.", drawn)
        relative = self.relative_k_proj.linear.weight
        return [
            *bindings,
            bind_sharded(f"{prefix}relative_k_proj.weight", relative, 0, self.tp_group, drawn),
            # One for all heads, of which every rank scales its own.
            bind_replicated(f"{prefix}per_dim_scale", self.per_dim_scale, Constant(0.0), gradient_sum=("tp",)),
        ]


def embed_distances(window: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sines, then cosines [window, width] of the distances window - 1 … 0 from query to key.

    Wavelengths go from 2π to 10,000 · 2π in geometric steps. Computed in fp32.
    """
    timescales = torch.logspace(0, -4, width // 2, device=device)
    angles = torch.arange(window - 1, -1, -1, device=device)[:, None] * timescales
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


def visible_keys(positions: Tensor, window: int) -> Tensor:
    """Which keys queries see: bool [blocks, 1, window, 2 * window] from the tokens' positions [N] in their sounds.

    Key c of a block lies window + u - c tokens before its query u. The query sees it if this distance is less than the
    window and not more than the query's position, beyond which lies another sound.
    """
    reach = F.pad(positions, (0, -len(positions) % window)).clamp(max=window - 1).view(-1, 1, window, 1)
    query, key = (torch.arange(size, device=positions.device) for size in (window, 2 * window))
    distance = window + query[:, None] - key
    return (distance >= 0) & (distance <= reach)


def attend_locally(query: Tensor, key: Tensor, value: Tensor, relative: Tensor, seen: Tensor, cap: float) -> Tensor:
    """Softmax attention over the keys that `seen` allows: [N, heads, head_dim] → the same.

    The score of a query and a key is the query times key plus `relative` [window, heads, head_dim] of their distance,
    softly capped.
    """
    tokens, window = len(query), len(relative)
    blocks = len(seen)
    padding = blocks * window - tokens
    query = F.pad(query, (0, 0, 0, 0, 0, padding)).unflatten(0, (blocks, window)).transpose(1, 2)
    key, value = _with_previous_block(key, window, padding), _with_previous_block(value, window, padding)
    # Written so that the gradient of `relative` has its channels side by side, which aligned products need.
    by_distance = (relative.transpose(0, 1) @ query.transpose(2, 3)).transpose(2, 3)  # [blocks, heads, window, window]
    scores = query @ key.transpose(2, 3) + _by_key(by_distance)
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~seen, -math.inf)  # a query always sees itself
    attended = scores.softmax(dim=-1) @ value  # [blocks, heads, window, head_dim]
    return attended.transpose(1, 2).flatten(0, 1)[:tokens]


def _with_previous_block(states: Tensor, window: int, padding: int) -> Tensor:
    """[N, heads, head_dim] → [blocks, heads, 2 * window, head_dim]: every block behind the one before it."""
    blocks = F.pad(states, (0, 0, 0, 0, window, padding)).unflatten(0, (-1, window)).transpose(1, 2)
    return torch.cat([blocks[:-1], blocks[1:]], dim=2)


def _by_key(scores: Tensor) -> Tensor:
    """Scores by distance window - 1 … 0 [blocks, heads, window, window] → by key [blocks, heads, window, 2 * window].

    The key at distance d from query u is number window + u - d, so each query's scores lie one key further than the
    previous query's. Padding every row of scores to one element more than a row of the result, and reading the memory
    in rows of the result, moves each row by one. What lands on keys at other distances is not seen.
    """
    window = scores.shape[-1]
    padded = F.pad(scores, (1, window)).flatten(2)
    return padded[..., : 2 * window * window].unflatten(2, (window, 2 * window))
