"""Windowed attention of packed sequences by Transformer Engine, for sliding layers without media groups."""

from functools import cache
from types import ModuleType

import torch

from mimo_gemma4.errors import ConfigError
from mimo_gemma4.language.attention_context import VisibleKeys

WIDEST_HEAD = 256
"""Channels per head of the widest head that its flash and cuDNN kernels train."""


def import_transformer_engine() -> ModuleType:
    """Transformer Engine's torch part. Raises `ConfigError` with what to install."""
    try:
        import transformer_engine.pytorch
    except ImportError as error:
        raise ConfigError(
            "model.backend = 'te' needs Transformer Engine, which cannot be imported "
            f"({error}); install it with `pip install mimo-gemma4[te]`, or use model.backend = 'local'"
        ) from error
    return transformer_engine.pytorch


class TransformerEnginePlan:
    """Stretches of consecutive queries of one segment, each over its own stretch of the keys."""

    def __init__(self, keys: VisibleKeys, window: int, starts: torch.Tensor) -> None:
        """`starts`: bool [B, S/cp] on the host, where stretches begin."""
        first, last = _flat(keys.first, keys.count), _flat(keys.last, keys.count)
        begins = torch.cat((starts.flatten().nonzero().squeeze(1), torch.tensor([starts.numel()])))
        key_begins = torch.cat((first[begins[:-1]], last[-1:] + 1))
        device, self.window, self.rows = keys.runs.device, window, starts.shape[0]
        self.query_ends, self.key_ends = (
            ends.int().pin_memory().to(device, non_blocking=True) for ends in (begins, key_begins)
        )
        self.longest_query, self.longest_key = int(begins.diff().max()), int(key_begins.diff().max())

    @classmethod
    def where_supported(cls, keys: VisibleKeys, head_dim: int) -> "TransformerEnginePlan | None":
        """The plan, or None for what its kernels do not cover: full layers, wide heads, media groups, shared keys.

        Keys are shared between stretches where chunks are shorter than the window; the packed format has no place for
        that.
        """
        if keys.rule.window is None or keys.grouped or head_dim > WIDEST_HEAD:
            return None
        starts = torch.ones_like(keys.segments, dtype=torch.bool)
        starts[:, 1:] = (keys.segments.diff(dim=1) != 0) | (keys.last.diff(dim=1) != 1)
        ends = starts.roll(-1, dims=1)  # the row's first position starts a stretch, so its last one ends one
        begin, end = _flat(keys.first, keys.count)[starts.flatten()], _flat(keys.last, keys.count)[ends.flatten()]
        tiles = begin[0] == 0 and torch.equal(begin[1:], end[:-1] + 1) and end[-1] + 1 == keys.count * starts.shape[0]
        return cls(keys, keys.rule.window, starts) if tiles else None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend as `AttentionPlan` says."""
        attention = _dot_product_attention(query.shape[2], key.shape[2], query.shape[3])
        # [S, B, heads, D] → [B * S, heads, D]; for one row no copy.
        flat = [states.transpose(0, 1).flatten(0, 1).contiguous() for states in (query, key, value)]
        attended = attention(
            *flat,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            window_size=(self.window - 1, 0),
            cu_seqlens_q=self.query_ends,
            cu_seqlens_kv=self.key_ends,
            max_seqlen_q=self.longest_query,
            max_seqlen_kv=self.longest_key,
        )
        return attended.view(self.rows, -1, query.shape[2] * query.shape[3]).transpose(0, 1)


def _flat(ends: torch.Tensor, count: int) -> torch.Tensor:
    """Key numbers [B, S/cp] as numbers in the flattened [B * K]."""
    return (ends.long() + count * torch.arange(ends.shape[0])[:, None]).flatten()


@cache
def _dot_product_attention(heads: int, key_value_heads: int, head_dim: int) -> torch.nn.Module:
    return import_transformer_engine().DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=key_value_heads,
        attention_dropout=0.0,
        softmax_scale=1.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
    )
