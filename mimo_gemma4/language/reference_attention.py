"""Attention by torch's scaled-dot-product attention with an explicit mask: right everywhere, fast nowhere."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mimo_gemma4.language.attention_context import AttentionContext
from mimo_gemma4.language.config import FULL, SLIDING, Gemma4TextConfig


class ReferenceAttention:
    """Masks from the metadata of a microbatch, once per attention type, and attention under such a mask."""

    def __init__(self, text: Gemma4TextConfig, *, recompute: bool) -> None:
        """Remember the model's window and bidirectional rule; `recompute`: keep only the inputs for backward."""
        self.recompute = recompute
        bidirectional = text.use_bidirectional_attention is not None
        always = bidirectional and text.groups_extend_window
        self.window = {SLIDING: text.sliding_window, FULL: None}
        self.groups = {
            SLIDING: "always" if always else "inside_window" if bidirectional else None,
            FULL: "always" if always else None,
        }

    def plan(self, context: AttentionContext, attention: str) -> torch.Tensor:
        """The mask of layers of type `attention`, bool [B, 1, S/cp (local), S]."""
        return context.mask(self.window[attention], groups=self.groups[attention])

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
        """Query [S/cp, B, heads, D] over key and value [S, B, key/value heads, D] (local heads) → [S/cp, B, heads * D].

        Logits are not scaled: Gemma 4 normalises queries and keys instead.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(_attend, query, key, value, plan, use_reentrant=False, preserve_rng_state=False)
        return _attend(query, key, value, plan)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # Key/value heads are expanded here: with `enable_gqa`, torch 2.11 falls back to its O(S^2) kernel at D = 512.
    repeats = query.shape[2] // key.shape[2]
    key, value = (states.repeat_interleave(repeats, dim=2).permute(1, 2, 0, 3) for states in (key, value))
    attended = F.scaled_dot_product_attention(query.permute(1, 2, 0, 3), key, value, attn_mask=mask, scale=1.0)
    return attended.permute(2, 0, 1, 3).flatten(2)
