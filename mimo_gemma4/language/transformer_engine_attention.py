"""Windowed attention by Transformer Engine, for sliding layers without media groups.

Its packed (THD) format is not used: with cuDNN 9.19 the backward pass of 256-channel heads is wrong there (gradients
off by 20%, or not finite), but right with `sbhd`. Each stretch of consecutive queries is a call of its own.
"""

from functools import cache
from types import ModuleType

import torch

from mimo_gemma4.errors import ConfigError
from mimo_gemma4.language.attention_context import VisibleKeys
from mimo_gemma4.language.kernels.packed import stretch_begins

WIDEST_HEAD = 256
"""Channels per head of the widest head that its flash and cuDNN kernels train."""
MOST_STRETCHES = 8
"""Stretches up to which a call for each is worth it: packs of many short documents are served better by one kernel."""


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
    """Stretches of consecutive queries of one segment, each over its own stretch of keys, equal in all sequences."""

    def __init__(self, window: int, stretches: list[tuple[slice, slice]]) -> None:
        """`window`: keys that a query sees, itself included; `stretches`: (queries, keys) of each."""
        self.window, self.stretches = window, stretches

    @classmethod
    def where_supported(cls, keys: VisibleKeys, head_dim: int) -> "TransformerEnginePlan | None":
        """The plan, or None for what it does not cover: full layers, wide heads, media groups, many stretches."""
        if keys.rule.window is None or keys.grouped or head_dim > WIDEST_HEAD:
            return None
        starts = stretch_begins(keys)
        begins = [*starts[0].nonzero().squeeze(1).tolist(), starts.shape[1]]
        key_begins, key_ends = keys.first[:, begins[:-1]], keys.last[:, [end - 1 for end in begins[1:]]] + 1
        equal = all((bounds == bounds[:1]).all() for bounds in (starts, key_begins, key_ends))  # in all sequences
        if not equal or len(begins) - 1 > MOST_STRETCHES:
            return None
        queries = (slice(*ends) for ends in zip(begins, begins[1:], strict=False))
        own = (slice(*ends) for ends in zip(key_begins[0].tolist(), key_ends[0].tolist(), strict=True))
        return cls(keys.rule.window, list(zip(queries, own, strict=True)))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend as `AttentionPlan` says."""
        attention = _dot_product_attention(query.shape[2], key.shape[2], query.shape[3])
        attended = [
            attention(*map(_own_memory, (query[queries], key[keys], value[keys])), window_size=(self.window - 1, 0))
            for queries, keys in self.stretches
        ]
        return attended[0] if len(attended) == 1 else torch.cat(attended)


def _own_memory(states: torch.Tensor) -> torch.Tensor:
    """States that begin where their memory begins: Transformer Engine refuses views into the middle of a tensor."""
    return states.contiguous() if states.storage_offset() == 0 else states.clone(memory_format=torch.contiguous_format)


@cache
def _dot_product_attention(heads: int, key_value_heads: int, head_dim: int) -> torch.nn.Module:
    return import_transformer_engine().DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=key_value_heads,
        attention_dropout=0.0,
        softmax_scale=1.0,
        qkv_format="sbhd",
        attn_mask_type="causal_bottom_right",
    )
