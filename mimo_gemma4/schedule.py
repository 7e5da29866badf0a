"""One global step as a list of actions per rank: pure Python, so that tests can check it without ranks.

Encoders run up to `run_ahead` rounds ahead of the language module; a round is one microbatch of every language lane.
All ranks walk the rounds in the same order, so transfers of one edge and direction pair up first in, first out.
"""

from dataclasses import dataclass
from typing import Literal

ActionKind = Literal["encode", "transfer", "language", "return", "encoder_backward"]


@dataclass(frozen=True)
class Action:
    """One thing that a rank does: `kind`, in `round`, for `module` (the encoder it concerns, or `language`)."""

    kind: ActionKind
    round: int
    module: str


def plan_step(
    rounds: int,
    encoders: tuple[str, ...],
    held: frozenset[str],
    trainable_edges: frozenset[str],
    run_ahead: int,
    train: bool = True,
) -> list[Action]:
    """The actions of one rank in one global step.

    Args:
        rounds: number of microbatches of every language lane.
        encoders: encoders of the layout, in its order.
        held: modules that this rank holds.
        trainable_edges: encoders whose rows need a gradient.
        run_ahead: rounds that an encoder may be ahead of the gradients it waits for, at least 1.
        train: whether there is a backward pass at all.

    Returns:
        Actions in execution order. `transfer` moves a round's rows to the language ranks, `return` its gradients back;
        each rank of the edge, sender or receiver, has both. `language` is forward and backward of a microbatch.
    """
    actions: list[Action] = []
    edges = [name for name in encoders if name in held or "language" in held]
    ahead = max(1, run_ahead) if "language" not in held else 1
    for step in range(rounds + ahead - 1):
        if step < rounds:
            actions += [Action("encode", step, name) for name in edges if name in held]
            actions += [Action("transfer", step, name) for name in edges]
        done = step - (ahead - 1)
        if done < 0:
            continue
        if "language" in held:
            actions.append(Action("language", done, "language"))
        if train:
            returning = [name for name in edges if name in trainable_edges]
            actions += [Action("return", done, name) for name in returning]
            actions += [Action("encoder_backward", done, name) for name in returning if name in held]
    return actions
