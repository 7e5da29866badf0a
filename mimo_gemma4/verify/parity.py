"""Deviation of one implementation of a model from another: errors per layer and of logits, greedy tokens, near ties."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from mimo_gemma4.errors import NumericsError


@dataclass(frozen=True)
class Outputs:
    """What a model computes for one sequence, on the host."""

    hidden: list[torch.Tensor]
    """After every decoder layer, [S, H]."""
    logits: torch.Tensor
    """fp32 [S, vocabulary], softcapped."""


@dataclass(frozen=True)
class Deviation:
    """Errors of one implementation against the truth."""

    layer_errors: torch.Tensor
    """[sequences, layers]: squared norm of the difference of hidden states."""
    layer_sizes: torch.Tensor
    """[sequences, layers]: squared norm of the truth's hidden states."""
    logit_errors: torch.Tensor
    """[sequences]: squared norm of the difference of logits."""
    logit_sizes: torch.Tensor
    """[sequences]: squared norm of the truth's logits."""
    noise: torch.Tensor
    """[positions of all sequences]: largest error of any logit."""
    lead: torch.Tensor
    """[positions]: the truth's best logit minus its second best."""
    cost: torch.Tensor
    """[positions]: the truth's best logit minus its logit of the token chosen here; 0 where they are the same token."""

    @classmethod
    def join(cls, parts: Sequence["Deviation"]) -> "Deviation":
        """The deviations of several sequences as one."""
        return cls(*(torch.cat([getattr(part, entry.name) for part in parts]) for entry in fields(cls)))

    @property
    def layers(self) -> list[float]:
        """Error of the hidden states after every layer, relative to their Frobenius norm."""
        return (self.layer_errors.sum(0) / self.layer_sizes.sum(0)).sqrt().tolist()

    @property
    def logits(self) -> float:
        """Error of the logits, relative to their Frobenius norm."""
        return float((self.logit_errors.sum() / self.logit_sizes.sum()).sqrt())


def deviation(outputs: Outputs, truth: Outputs) -> Deviation:
    """Errors of one sequence. Raises `NumericsError` where logits are not finite."""
    broken = int((~outputs.logits.isfinite()).any(dim=1).sum())
    if broken:
        raise NumericsError(f"logits of {broken} of {len(outputs.logits)} positions are not finite")
    pairs = list(zip(outputs.hidden, truth.hidden, strict=True))
    difference = outputs.logits - truth.logits
    best = truth.logits.topk(2, dim=1).values
    chosen = outputs.logits.argmax(dim=1, keepdim=True)
    return Deviation(
        torch.stack([_square(ours.float() - theirs.float()) for ours, theirs in pairs])[None],
        torch.stack([_square(theirs.float()) for _, theirs in pairs])[None],
        _square(difference)[None],
        _square(truth.logits)[None],
        difference.abs().amax(dim=1),
        best[:, 0] - best[:, 1],
        best[:, 0] - truth.logits.gather(1, chosen).squeeze(1),
    )


@dataclass(frozen=True)
class GreedyAgreement:
    """Greedy tokens of one implementation compared with the truth's, judged by the noise of a peer.

    The peer is the reference in the precision of the run. Errors up to its noise can swap two logits that are less than
    twice that noise apart in the truth: such positions are near ties and prove nothing.
    """

    decided: torch.Tensor
    """bool [positions]: whether the truth's lead exceeds twice the noise."""
    near_ties: torch.Tensor
    """Numbers of the positions where another token was chosen and the noise explains it."""
    faults: torch.Tensor
    """Numbers of the positions where another token was chosen and the noise does not explain it."""

    @classmethod
    def of(cls, ours: Deviation, peer: Deviation) -> "GreedyAgreement":
        """Judge every position."""
        reach = 2 * peer.noise
        wrong = ours.cost > 0
        near_ties, faults = ((wrong & test).nonzero().flatten() for test in (ours.cost <= reach, ours.cost > reach))
        return cls(ours.lead > reach, near_ties, faults)


def _square(values: torch.Tensor) -> torch.Tensor:
    return values.double().square().sum()
