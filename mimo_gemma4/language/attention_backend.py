"""The interface of attention kernels: a backend plans a microbatch per attention type, and layers call the plan.

| kernel | where | what |
|---|---|---|
| reference | everywhere, any dtype | plain torch, a block of queries at a time |
| packed | Hopper, bf16, layers without media groups | ffpa-attn for wide heads, flash-attn-4 for others (`kernels`) |
| flex | CUDA | FlexAttention over blocks that some query sees |
| Transformer Engine | CUDA, sliding layers without media groups | with `model.backend: te` |

None keeps attention scores for the backward pass, and none scales them: Gemma 4 normalises queries and keys instead.
"""

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch

from mimo_gemma4.errors import ConfigError
from mimo_gemma4.language.attention_context import MaskRule, VisibleKeys, mask_rules
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.flex_attention import FlexPlan
from mimo_gemma4.language.kernels.choice import Choice, choose_kernel
from mimo_gemma4.language.kernels.packed import PackedPlan, packed_calls
from mimo_gemma4.language.reference_attention import ReferencePlan
from mimo_gemma4.language.transformer_engine_attention import TransformerEnginePlan, import_transformer_engine


class AttentionPlan(Protocol):
    """Attention in all layers of one type, in one microbatch."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Query [S/cp, B, heads, D] over key and value [K, B, key/value heads, D] (heads local) → [S/cp, B, heads * D].

        Every query sees some key: padding sees itself.
        """


PlanAttention = Callable[[VisibleKeys, int], AttentionPlan]
"""Plans the attention of layers with so many channels per head in one microbatch."""


class AttentionBackend:
    """The kernels that a model's layers attend with."""

    def __init__(
        self,
        text: Gemma4TextConfig,
        *,
        backend: Literal["local", "te"],
        attention: Literal["auto", "flex"],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Choose a kernel for every attention type of the model.

        Args:
            text: the model's hyperparameters.
            backend: `te` gives Transformer Engine the sliding layers that it covers.
            attention: `auto` takes the fastest packed kernel that is installed and fits, `flex` FlexAttention.
            dtype: of queries, keys and values.
            device: where they live.

        Raises:
            ConfigError: `backend` is `te`, and Transformer Engine or a GPU is missing.
        """
        self.cuda, self.transformer_engine = device.type == "cuda", backend == "te"
        if self.transformer_engine:
            if not self.cuda:
                raise ConfigError("model.backend = 'te' needs CUDA; on the CPU use model.backend = 'local'")
            import_transformer_engine()
        rules, head_dims = mask_rules(text), {layer.attention: layer.head_dim for layer in text.layers}
        self.choices: Mapping[MaskRule, Choice] = {
            rules[name]: self._choose(head_dim, rules[name], attention, dtype, device)
            for name, head_dim in head_dims.items()
        }
        self.described = {name: self._described(rules[name]) for name in head_dims}
        """By attention type, its kernel and why, for the start of a run."""

    def plan(self, keys: VisibleKeys, head_dim: int) -> AttentionPlan:
        """Plan the attention of one type of layers, with `head_dim` channels per head, in a microbatch."""
        if not self.cuda:
            return ReferencePlan(keys)
        if self.transformer_engine and (plan := TransformerEnginePlan.where_supported(keys, head_dim)):
            return plan
        kernel = self.choices[keys.rule].kernel
        if kernel is not None and not keys.grouped and (calls := packed_calls(keys)):
            return PackedPlan(kernel, calls)
        return FlexPlan(keys)

    def _choose(
        self, head_dim: int, rule: MaskRule, attention: str, dtype: torch.dtype, device: torch.device
    ) -> Choice:
        if not self.cuda:
            return Choice("plain torch", None, "on the CPU")
        if attention == "flex":
            return Choice("FlexAttention", None, "model.attention: flex")
        return choose_kernel(head_dim, rule.window, dtype, device)

    def _described(self, rule: MaskRule) -> str:
        choice = self.choices[rule]
        first = "Transformer Engine, else " if self.transformer_engine and rule.window is not None else ""
        media = "; FlexAttention with media" if choice.kernel is not None and rule.groups is not None else ""
        return f"{first}{choice.name} ({choice.reason}){media}"
