"""Which keys each query sees, computed on the host: for every query of Gemma 4, one run of consecutive tokens.

Causality, window, segment and media group each bound that run, so a mask is two numbers per query. The runs also
determine which keys a context-parallel rank needs, and so what the ranks exchange.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from mimo_gemma4.language.config import FULL, SLIDING, Gemma4TextConfig
from mimo_gemma4.language.key_exchange import KeyExchange, plan_exchange

Put = Callable[[torch.Tensor], torch.Tensor]
"""Moves a host tensor to the device without waiting (`Platform.put`)."""


@dataclass(frozen=True)
class MaskRule:
    """Which tokens of its segment a query sees in layers of one attention type, beside earlier ones."""

    window: int | None
    """Number of keys a query sees, itself included; None: all."""
    groups: Literal["inside_window", "always"] | None = None
    """Tokens of its own media item: None: nothing more; `inside_window`: later ones, too; `always`: the whole item."""


def mask_rules(text: Gemma4TextConfig) -> dict[str, MaskRule]:
    """The rule of every attention type. Gemma 4 widens sliding layers only; the unified model widens both, fully."""
    if text.use_bidirectional_attention is None:
        return {SLIDING: MaskRule(text.sliding_window), FULL: MaskRule(None)}
    if text.groups_extend_window:
        return {SLIDING: MaskRule(text.sliding_window, "always"), FULL: MaskRule(None, "always")}
    return {SLIDING: MaskRule(text.sliding_window, "inside_window"), FULL: MaskRule(None)}


@dataclass(frozen=True)
class VisibleKeys:
    """What this rank's queries see in layers of one attention type; keys are numbered in sequence order."""

    rule: MaskRule
    """The rule that the runs follow."""
    count: int
    """Number of keys, K: this rank's own and those of other ranks that some query here sees."""
    first: torch.Tensor
    """[B, S/cp] (local) int32 on the host: number of the first key that each query sees."""
    last: torch.Tensor
    """[B, S/cp] (local) int32 on the host: number of the last key that each query sees."""
    segments: torch.Tensor
    """[B, S/cp] (local) on the host: segment of each query, 0 in padding."""
    grouped: bool
    """Whether media groups make any run reach beyond what causality and window allow."""
    runs: torch.Tensor
    """[2, B, S/cp] (local) int32 on the device: `first` and `last`."""
    positions: torch.Tensor | None
    """[B, K] on the device: positions of the keys, where keys travel unrotated; None: they are the queries' own."""
    exchange: KeyExchange | None
    """How the keys of other ranks come here; None: every query sees local keys alone, on every rank."""


@dataclass(frozen=True)
class AttentionContext:
    """Metadata of one microbatch."""

    positions: torch.Tensor
    """[B, S/cp] (local) on the device: position of each token in its segment."""
    keys: dict[str, VisibleKeys]
    """What queries see, by attention type."""


def attention_context(
    text: Gemma4TextConfig,
    positions: torch.Tensor,
    segments: torch.Tensor,
    groups: torch.Tensor | None,
    *,
    held: Sequence[torch.Tensor],
    cp_group: dist.ProcessGroup,
    put: Put,
) -> AttentionContext:
    """Plan the attention of one microbatch from whole host tensors; nothing is communicated.

    Args:
        text: the model's hyperparameters.
        positions: [B, S] position of each token in its segment.
        segments: [B, S] number of the token's segment in its sequence, each one run of tokens; 0 is padding.
        groups: [B, S] number of the media item the token belongs to, each one run of tokens; 0 is text. None: no media.
        held: for each context-parallel rank the sequence indices that it holds, ascending.
        cp_group: the context-parallel group.
        put: moves host tensors to the device.
    """
    mine = held[cp_group.rank()]
    unrotated = {layer.attention for layer in text.layers if layer.owns_key_values and not layer.has_value_projection}
    keys = {}
    for attention, rule in mask_rules(text).items():
        first, last = visible_runs(rule, segments, groups)
        exchange = None
        seen = mine  # without context parallelism all tokens, so that keys have their sequence indices as numbers
        if cp_group.size() > 1:
            needed = [_union(first[:, index], last[:, index], segments.shape[1]) for index in held]
            exchange = plan_exchange(needed, held, cp_group, put, windowed=rule.window is not None)
            seen = needed[cp_group.rank()].nonzero().squeeze(1)
            # Every run lies inside `seen`, so its ends are found there and everything between them is consecutive.
            first, last = (torch.searchsorted(seen, ends[:, mine].contiguous()) for ends in (first, last))
        first, last = first.int(), last.int()
        keys[attention] = VisibleKeys(
            rule=rule,
            count=seen.numel(),
            first=first,
            last=last,
            segments=segments[:, mine],
            grouped=rule.groups is not None and groups is not None and bool(groups.any()),
            runs=put(torch.stack((first, last))),
            positions=put(positions[:, seen]) if exchange is not None and attention in unrotated else None,
            exchange=exchange,
        )
    return AttentionContext(put(positions[:, mine]), keys)


def visible_runs(
    rule: MaskRule, segments: torch.Tensor, groups: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last sequence index, both [B, S], that the token at each index sees; padding sees itself alone.

    Padding's runs keep every softmax finite at no cost, and nothing else sees padding.
    """
    index = torch.arange(segments.shape[1]).expand_as(segments)
    first, last = _run_starts(segments, index), index
    if rule.window is not None:
        first = torch.maximum(first, index - rule.window + 1)
    if rule.groups is not None and groups is not None:
        start = _run_starts(groups, index)
        end = segments.shape[1] - 1 - _run_starts(groups.flip(1), index).flip(1)
        last = torch.where(groups > 0, end, last)
        if rule.groups == "always":
            first = torch.where(groups > 0, torch.minimum(first, start), first)
    padding = segments == 0
    return torch.where(padding, index, first), torch.where(padding, index, last)


def _run_starts(numbers: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Where the run of equal numbers [B, S] that each index belongs to begins."""
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return torch.where(begins, index, 0).cummax(dim=1).values


def _union(first: torch.Tensor, last: torch.Tensor, length: int) -> torch.Tensor:
    """Whether each of `length` indices lies in any of the runs: bool [length]."""
    begun = torch.bincount(first.flatten(), minlength=length + 1)
    ended = torch.bincount(last.flatten() + 1, minlength=length + 1)
    return (begun - ended).cumsum(0)[:length] > 0
