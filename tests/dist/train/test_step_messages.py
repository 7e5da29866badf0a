"""What travels in a step of steady state: soft tokens, hidden states and gradients, nothing that announces them.

All operations of torch.distributed are recorded on every rank of a third training step. Between an encoder rank and a
language rank there is one message a microbatch, as long as the soft tokens that the manifest puts there, and one back;
each rank starts its messages of a microbatch and direction in one batch. Tensor-parallel ranks that hold the same
tokens are sent equal parts of the soft tokens, and one all-gather a microbatch joins them. Nothing is broadcast, nobody
waits at a barrier, and the only integers are the numbers of tokens that experts get.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.traffic import Message, Traffic
from mimo_gemma4.config import load_config
from mimo_gemma4.data.manifest import Microbatch, StepManifest
from mimo_gemma4.distributed.layout import Layout, build_layout
from mimo_gemma4.partition import cp_token_index
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.schedule import Action
from mimo_gemma4.train.setup import set_up_run
from tests.dist.harness import run_ranks
from tests.dist.train.step_parity import Case, write_run
from tests.dist.train.test_expert_lanes import TEXT

STAGES = Case(vision=2, tp=2, sp=True, pp=2, packing=True, sequences=1)
EXPERTS = Case(vision=2, dp=2, tp=2, ep=2, sequences=1)
COLLECTIVES = {
    "allreduce_",
    "_allgather_base_",
    "_reduce_scatter_base_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
}


@dataclass(frozen=True)
class Step:
    """A step as one rank did it."""

    manifest: StepManifest
    actions: list[Action]
    messages: list[Message]
    batches: int
    """Times that the rank started sends and receives together."""


def third_step(rank: int, folder: Path, overrides: list[str]) -> Step:
    trainer = build_trainer(set_up_run(load_config([f"config={folder}/run.yaml", *overrides, "train.steps=4"])))
    for _ in range(2):
        trainer.train_step()
    start, batches = dist.batch_isend_irecv, 0

    def counted(operations: list[dist.P2POp]) -> Any:
        nonlocal batches
        batches += 1
        return start(operations)

    dist.batch_isend_irecv = counted
    with Traffic() as traffic:
        trainer.train_step()
    trainer.close()
    manifest = trainer.loader.planner.plan(2)
    return Step(manifest, trainer.runner.plan(manifest), traffic.messages, batches)


def step_of(case: Case, folder: Path) -> tuple[Layout, list[Step]]:
    config = load_config([f"config={folder}/run.yaml", *case.overrides])
    return build_layout(config.layout, case.world), run_ranks(case.world, third_step, folder, case.overrides)


def holders(layout: Layout, microbatch: Microbatch) -> list[tuple[int, int]]:
    """For each position of a microbatch, the CP rank that holds it, and the TP rank if one alone does (else 0)."""
    language = layout.language
    held = [(0, 0)] * microbatch.seq_length
    for cp in range(language.cp):
        index = cp_token_index(microbatch.seq_length, language.cp, cp, microbatch.segment_starts, microbatch.cp_layout)
        for tp, part in enumerate(index.chunk(language.tp if language.sequence_parallel else 1)):
            for position in part.tolist():
                held[position] = cp, tp
    return held


def planned_transfers(layout: Layout, manifest: StepManifest) -> Counter[tuple[int, int, int]]:
    """(microbatch, encoder rank, language rank) → soft tokens that travel between them, encoder TP being 1."""
    language = layout.language
    sources: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)
    for planned in manifest.media:
        source = layout.grids["vision"].rank_at(dp=planned.module_lane)
        held = holders(layout, manifest.microbatch(planned.lane, planned.microbatch))
        for position in range(planned.start, planned.start + planned.soft_tokens):
            sources[planned.microbatch, planned.lane, *held[position]].append(source)
    travelling: Counter[tuple[int, int, int]] = Counter()
    for (microbatch, lane, cp, tp), of_soft_tokens in sources.items():
        size = len(of_soft_tokens) if language.sequence_parallel else -(-len(of_soft_tokens) // language.tp)
        for number, source in enumerate(of_soft_tokens):
            travelling[microbatch, source, language.rank_at(tp=tp + number // size, cp=cp, dp=lane)] += 1
    return travelling


def lengths(planned: Counter[tuple[int, int, int]]) -> Counter[tuple[int, int, int]]:
    """(encoder rank, language rank, soft tokens) of the messages."""
    return Counter((source, target, soft_tokens) for (_, source, target), soft_tokens in planned.items())


def received(layout: Layout, steps: list[Step], direction: str) -> Counter[tuple[int, int, int]]:
    """(encoder rank, language rank, soft tokens) of all messages that were received on the edge in one direction."""
    members = sorted({*layout.grids["vision"].ranks, *layout.language.stage_ranks(0)})
    found: Counter[tuple[int, int, int]] = Counter()
    for rank, message in on(steps, f"bridge.vision.{direction}"):
        if message.operation == "recv_":
            peer = members[message.peer]
            ends = (peer, rank) if direction == "to_language" else (rank, peer)
            found[*ends, message.shape[0]] += 1
    return found


def on(steps: list[Step], group: str) -> Iterator[tuple[int, Message]]:
    return ((rank, message) for rank, step in enumerate(steps) for message in step.messages if message.group == group)


def check_kinds(steps: list[Step]) -> None:
    """Point to point or one of the collectives that move weights, gradients and activations; one over all ranks."""
    kinds = {message.operation for step in steps for message in step.messages}
    assert kinds <= {"send", "recv_", "alltoall_base_", *COLLECTIVES}
    assert Counter(rank for rank, _ in on(steps, "default_pg")) == dict.fromkeys(range(len(steps)), 1)


def check_gathers(layout: Layout, steps: list[Step], planned: Counter[tuple[int, int, int]]) -> None:
    """Each language rank joins each microbatch's soft tokens once, besides what its layers gather."""
    language = layout.language
    for rank in language.ranks:
        at, expected = language.coordinate(rank), Counter[int]()
        peers = [language.rank_at(tp=tp, cp=at.cp, dp=at.dp) for tp in range(language.tp)]
        for microbatch in range(steps[rank].manifest.num_microbatches):
            parts = [
                sum(planned[microbatch, source, peer] for source in layout.grids["vision"].ranks) for peer in peers
            ]
            expected[max(parts) * language.tp] += any(parts)
        gathers = [message for member, message in on(steps, "language.tp") if member == rank]
        found = Counter(message.shape[0] for message in gathers if message.operation == "_allgather_base_")
        assert expected.total() > 0
        assert all(found[length] == count for length, count in expected.items() if count), f"{expected} in {found}"


def test_soft_tokens_and_stages(tmp_path: Path) -> None:
    write_run(tmp_path)
    layout, steps = step_of(STAGES, tmp_path)
    check_kinds(steps)
    assert all(message.dtype.is_floating_point for step in steps for message in step.messages)
    planned = planned_transfers(layout, steps[0].manifest)
    assert {target for *_, target in planned} == set(layout.language.stage_ranks(0))  # each has some to receive
    assert received(layout, steps, "to_language") == received(layout, steps, "to_module") == lengths(planned)
    for rank, step in enumerate(steps):
        kinds = Counter(action.kind for action in step.actions)
        between_stages = sum(
            kinds[f"{way}_{what}"] for way in ("send", "post_recv") for what in ("forward", "backward")
        )
        of_soft_tokens = 2 * len({microbatch for microbatch, *ends in planned if rank in ends})
        assert step.batches == between_stages + of_soft_tokens > 0


def test_token_counts_of_experts_are_the_only_integers(tmp_path: Path) -> None:
    write_run(tmp_path, **TEXT)
    layout, steps = step_of(EXPERTS, tmp_path)
    check_kinds(steps)
    manifest = steps[0].manifest
    planned = planned_transfers(layout, manifest)
    assert received(layout, steps, "to_language") == received(layout, steps, "to_module") == lengths(planned)
    check_gathers(layout, steps, planned)
    layers = 6
    for rank, step in enumerate(steps):
        integers = [message for message in step.messages if not message.dtype.is_floating_point]
        assert {(m.operation, m.dtype, m.shape) for m in integers} <= {
            ("alltoall_base_", torch.int64, (TEXT["num_experts"],))
        }
        assert len(integers) == (layers * manifest.num_microbatches if rank in layout.language else 0)
