"""Mixture of experts of the 26B-A4B variant: a branch beside the dense feed-forward network, off the same residual."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.dispatch import Dispatch
from mimo_gemma4.language.norm import RMSNorm, normalise
from mimo_gemma4.weights.bindings import ONES, Binding, GradientSum, Normal, bind_replicated, bind_sharded

SHARE: tuple[GradientSum, ...] = ("tp",)
"""`Binding.gradient_sum` of norms and router: every tensor-parallel rank applies them to its share of the tokens."""


@dataclass(frozen=True)
class RoutedTokens:
    """This rank's tokens of a microbatch, with their experts chosen."""

    shape: torch.Size
    """Shape of the hidden states, of which the tokens are all or a tensor-parallel share."""
    tokens: torch.Tensor
    """[T (local), H], not normalised."""
    weights: torch.Tensor
    """[T (local), K] fp32: weight of each expert's result."""
    dispatch: Dispatch
    """Sends the tokens to their experts."""


class MixtureOfExperts(nn.Module):
    """norm(experts(norm(h))), each token through the K experts that its router chooses.

    Every tensor-parallel rank routes tokens of its own: under sequence parallelism the tokens that it holds, else a
    share of the common ones. So each rank applies all parameters here to a part of the tokens. Experts are not cut over
    tensor-parallel ranks; their copies there are replicas like those on data-parallel ranks (`expt_dp` spans both).
    """

    def __init__(
        self,
        text: Gemma4TextConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        device: torch.device,
    ) -> None:
        """Allocate this rank's weights, uninitialised but for the norms."""
        super().__init__()
        self.text, self.tp_group, self.ep_group = text, groups.tp, groups.ep
        self.shares_tokens = groups.tp.size() > 1 and not config.sequence_parallel
        self.router = Router(text, config, device)
        self.experts = Experts(text, config, groups, device)
        norm = partial(RMSNorm, text.hidden_size, text.rms_norm_eps, dtype=config.params_dtype, device=device)
        self.pre_norm, self.post_norm = norm(), norm()

    def route(self, hidden: torch.Tensor) -> RoutedTokens:
        """Choose the experts of hidden states [S/(cp*tp), B, H] (local). Collective over the expert-parallel group."""
        tokens = hidden.flatten(0, 1)  # [S/(cp*tp) * B, H]
        if self.shares_tokens:
            missing = -len(tokens) % self.tp_group.size()
            tokens = F.pad(tokens, (0, 0, 0, missing)) if missing else tokens
            tokens = scatter_to_sequence_parallel_region(tokens, group=self.tp_group)  # [S/cp * B / tp, H]
        weights, chosen = self.router(tokens)
        return RoutedTokens(hidden.shape, tokens, weights, Dispatch(chosen, self.text.num_experts, self.ep_group))

    def forward(self, routed: RoutedTokens) -> torch.Tensor:
        """The branch's result [S/(cp*tp), B, H] (local). Collective over the expert-parallel group."""
        dispatch = routed.dispatch
        copies, weights = dispatch.dispatch(self.pre_norm(routed.tokens), routed.weights)  # [T, H] → [N, H]
        result = self.post_norm(dispatch.combine(self.experts(copies, weights, dispatch)))  # [N, H] → [T, H]
        if self.shares_tokens:
            result = gather_from_sequence_parallel_region(
                result, tensor_parallel_output_grad=False, group=self.tp_group
            )
            result = result[: routed.shape[:2].numel()]
        return result.view(routed.shape)

    def bindings(self, prefix: str) -> list[Binding]:
        """Weights under the names of transformers' decoder layer."""
        return [
            *self.router.bindings(f"{prefix}router."),
            *self.experts.bindings(f"{prefix}experts."),
            *(
                bind_replicated(f"{prefix}{name}_feedforward_layernorm_2.weight", norm.weight, ONES, gradient_sum=SHARE)
                for name, norm in (("pre", self.pre_norm), ("post", self.post_norm))
            ),
        ]


class Router(nn.Module):
    """Chooses experts in fp32: linear(norm(h) * scale * H^-0.5), then the K best of a softmax, times their scales."""

    def __init__(self, text: Gemma4TextConfig, config: TransformerConfig, device: torch.device) -> None:
        """Allocate the weights, uninitialised."""
        super().__init__()
        self.text = text

        def parameter(*shape: int) -> nn.Parameter:
            empty = torch.empty(shape, dtype=config.params_dtype, device=device)
            return nn.Parameter(empty)

        self.projection = parameter(text.num_experts, text.hidden_size)
        self.scale = parameter(text.hidden_size)
        self.per_expert_scale = parameter(text.num_experts)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (fp32) and numbers of the chosen experts, both [T, K], of tokens [T, H]."""
        normalised = normalise(tokens.float(), self.text.rms_norm_eps)
        projection = self.projection.float() * (self.scale.float() * self.text.hidden_size**-0.5)
        best, chosen = F.linear(normalised, projection).topk(self.text.top_k_experts)
        # A softmax over all experts, renormalised over the chosen ones, is the softmax over those.
        return best.softmax(dim=-1) * self.per_expert_scale.float()[chosen], chosen

    def bindings(self, prefix: str) -> list[Binding]:
        """Weights under `prefix` + `proj.weight`, `scale` and `per_expert_scale`."""
        drawn = Normal(self.text.initializer_range)
        return [
            bind_replicated(f"{prefix}proj.weight", self.projection, drawn, gradient_sum=SHARE),
            bind_replicated(f"{prefix}scale", self.scale, ONES, gradient_sum=SHARE),
            bind_replicated(f"{prefix}per_expert_scale", self.per_expert_scale, ONES, gradient_sum=SHARE),
        ]


class Experts(nn.Module):
    """Gated feed-forward networks of width I, of which each rank of the expert-parallel group holds equally many."""

    def __init__(
        self, text: Gemma4TextConfig, config: TransformerConfig, groups: ProcessGroupCollection, device: torch.device
    ) -> None:
        """Allocate this rank's weights, uninitialised."""
        super().__init__()
        self.text, self.ep_group = text, groups.ep
        local, width = text.num_experts // groups.ep.size(), text.moe_intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))

        self.gate_up = parameter(local, 2 * width, text.hidden_size)
        self.down = parameter(local, text.hidden_size, width)

    def forward(self, copies: torch.Tensor, weights: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """weight * down(gelu(gate(x)) * up(x)) of token copies [N (local), H], sorted by expert → [N (local), H].

        The weights [N (local)] scale the I channels in between, which are fewer than the H of the result.
        """
        gate, up = _linear_by_expert(copies, self.gate_up, dispatch).chunk(2, dim=-1)  # [N, I] each
        gated = F.gelu(gate, approximate="tanh") * up
        return _linear_by_expert((gated * weights.unsqueeze(-1)).to(copies.dtype), self.down, dispatch)

    def bindings(self, prefix: str) -> list[Binding]:
        """Weights under `prefix` + `gate_up_proj` [E, 2 * I, H] and `down_proj` [E, H, I], cut along the experts."""
        drawn = Normal(self.text.initializer_range)
        return [
            bind_sharded(f"{prefix}gate_up_proj", self.gate_up, 0, self.ep_group, drawn, replicas="expt_dp"),
            bind_sharded(f"{prefix}down_proj", self.down, 0, self.ep_group, drawn, replicas="expt_dp"),
        ]


def _linear_by_expert(copies: torch.Tensor, weight: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
    """Each expert's tokens times its weight: [N (local), in] and [experts (local), out, in] → [N (local), out]."""
    aligned = all(size * copies.element_size() % 16 == 0 for size in weight.shape[1:])
    if aligned and len(copies):
        return F.grouped_mm(copies, weight.transpose(1, 2), offs=dispatch.ends)
    # The grouped kernel does not take unaligned sizes; only toy models have these.
    parts = copies.split(dispatch.copies_by_expert())
    return torch.cat([F.linear(part, expert) for part, expert in zip(parts, weight.unbind(), strict=True)])
