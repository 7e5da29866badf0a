"""The interface of attention kernels: a backend plans a microbatch per attention type, and layers call the plan.

| backend | where | what |
|---|---|---|
| reference | everywhere, any dtype | plain torch, a block of queries at a time |
| flex | CUDA | FlexAttention over blocks that some query sees |
| Transformer Engine | CUDA, sliding layers without media groups | packed attention with a window; else flex |

None keeps attention scores for the backward pass, and none scales them: Gemma 4 normalises queries and keys instead.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from mimo_gemma4.errors import ConfigError
from mimo_gemma4.language.attention_context import VisibleKeys
from mimo_gemma4.language.flex_attention import FlexPlan
from mimo_gemma4.language.reference_attention import ReferencePlan
from mimo_gemma4.language.transformer_engine_attention import TransformerEnginePlan, import_transformer_engine


class AttentionPlan(Protocol):
    """Attention in all layers of one type, in one microbatch."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Query [S/cp, B, heads, D] over key and value [K, B, key/value heads, D] (heads local) → [S/cp, B, heads * D].

        Every query sees some key: padding sees itself.
        """


AttentionBackend = Callable[[VisibleKeys, int], AttentionPlan]
"""Plans the attention of layers with so many channels per head."""


def attention_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend that `model.backend` names, on `device`.

    Raises:
        ConfigError: `name` is `te`, and Transformer Engine or a GPU is missing.
    """
    if name == "te":
        if device.type != "cuda":
            raise ConfigError("model.backend = 'te' needs CUDA; on the CPU use model.backend = 'local'")
        import_transformer_engine()
        return _transformer_engine
    return _flex if device.type == "cuda" else _reference


def _reference(keys: VisibleKeys, head_dim: int) -> AttentionPlan:
    return ReferencePlan(keys)


def _flex(keys: VisibleKeys, head_dim: int) -> AttentionPlan:
    return FlexPlan(keys)


def _transformer_engine(keys: VisibleKeys, head_dim: int) -> AttentionPlan:
    return TransformerEnginePlan.where_supported(keys, head_dim) or FlexPlan(keys)
