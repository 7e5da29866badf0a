"""What travels in a step of steady state: rows, hidden states and gradients, nothing that announces them.

All operations of torch.distributed are noted on every rank of a third training step. Between an encoder rank and a
language rank there is one message a round, as long as the rows that the manifest puts there, and one back. Nothing is
broadcast, nobody waits at a barrier, and the only integers are the numbers of rows that experts get.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.traffic import Message, Traffic
from mimo_gemma4.build import build_trainer, lay_foundation
from mimo_gemma4.config import load_config
from mimo_gemma4.data.manifest import Microbatch, StepManifest
from mimo_gemma4.layout import Layout, build_layout
from mimo_gemma4.partition import cp_token_index
from tests.dist.harness import run_ranks
from tests.dist.test_expert_lanes import TEXT
from tests.dist.test_step_gradient_parity import Case, write_run

STAGES = Case(vision=2, tp=2, sp=True, pp=2, packing=True, rows=1)
EXPERTS = Case(vision=2, dp=2, tp=2, ep=2, rows=1)
COLLECTIVES = {
    "allreduce_",
    "_allgather_base_",
    "_reduce_scatter_base_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
}


def third_step(rank: int, folder: Path, overrides: list[str]) -> tuple[list[Message], StepManifest]:
    """The messages of this rank in a step, and the step's plan."""
    config = load_config([f"config={folder}/run.yaml", *overrides, "train.steps=4"])
    trainer = build_trainer(lay_foundation(config))
    for _ in range(2):
        trainer.train_step()
    with Traffic() as traffic:
        trainer.train_step()
    trainer.close()
    return traffic.messages, trainer.loader.planner.plan(2)


def messages_of(case: Case, folder: Path) -> tuple[Layout, list[list[Message]], StepManifest]:
    results = run_ranks(case.world, third_step, folder, case.overrides)
    config = load_config([f"config={folder}/run.yaml", *case.overrides])
    return build_layout(config.layout, case.world), [messages for messages, _ in results], results[0][1]


def owners(layout: Layout, microbatch: Microbatch) -> list[list[int]]:
    """For each position of a microbatch, the first stage's ranks that hold it."""
    language = layout.language
    held: list[list[int]] = [[] for _ in range(microbatch.seq_length)]
    for cp in range(language.cp):
        index = cp_token_index(microbatch.seq_length, language.cp, cp, microbatch.segment_starts, microbatch.cp_layout)
        for tp in range(language.tp):
            part = index.chunk(language.tp)[tp] if language.sequence_parallel else index
            for position in part.tolist():
                held[position].append(language.rank_at(tp=tp, cp=cp, dp=microbatch.lane))
    return held


def planned_rows(layout: Layout, manifest: StepManifest) -> Counter[tuple[int, int, int]]:
    """(encoder rank, language rank, rows) of the messages that the media need, encoder TP being 1."""
    rows: Counter[tuple[int, int, int]] = Counter()
    for slot in manifest.media:
        source = layout.grids["vision"].rank_at(dp=slot.encoder_lane)
        held = owners(layout, manifest.microbatch(slot.lane, slot.microbatch))
        for position in range(slot.start, slot.start + slot.rows):
            rows.update((source, target, slot.microbatch) for target in held[position])
    return Counter((source, target, count) for (source, target, _), count in rows.items())


def arrived(layout: Layout, everyone: list[list[Message]], direction: str) -> Counter[tuple[int, int, int]]:
    """(encoder rank, language rank, rows) of all messages that were received on the edge in one direction."""
    members = sorted({*layout.grids["vision"].ranks, *layout.language.stage_ranks(0)})
    found: Counter[tuple[int, int, int]] = Counter()
    for rank, message in on(everyone, f"bridge.vision.{direction}"):
        if message.operation == "recv_":
            peer = members[message.peer]
            ends = (peer, rank) if direction == "forward" else (rank, peer)
            found[*ends, message.shape[0]] += 1
    return found


def on(everyone: list[list[Message]], group: str) -> Iterator[tuple[int, Message]]:
    return ((rank, message) for rank, messages in enumerate(everyone) for message in messages if message.group == group)


def check_kinds(everyone: list[list[Message]]) -> None:
    """Point to point or one of the collectives that move weights, gradients and activations; one over all ranks."""
    kinds = {message.operation for messages in everyone for message in messages}
    assert kinds <= {"send", "recv_", "alltoall_base_", *COLLECTIVES}
    assert Counter(rank for rank, _ in on(everyone, "default_pg")) == dict.fromkeys(range(len(everyone)), 1)


def test_rows_and_stages(tmp_path: Path) -> None:
    layout, everyone, manifest = messages_of(STAGES, write_run(tmp_path))
    check_kinds(everyone)
    assert all(message.dtype.is_floating_point for messages in everyone for message in messages)
    planned = planned_rows(layout, manifest)
    assert len(planned) > 4
    assert arrived(layout, everyone, "forward") == arrived(layout, everyone, "backward") == planned
    for group in ("language.pp", "language.pp.backward"):  # a microbatch crosses once in either direction
        tensors = Counter(rank for rank, message in on(everyone, group) if message.operation == "recv_")
        per_microbatch = {count / manifest.rounds for count in tensors.values()}
        assert len(tensors) == layout.language.tp and per_microbatch <= {1, 2}


def test_row_counts_of_experts_are_the_only_integers(tmp_path: Path) -> None:
    layout, everyone, manifest = messages_of(EXPERTS, write_run(tmp_path, **TEXT))
    check_kinds(everyone)
    planned = planned_rows(layout, manifest)
    assert arrived(layout, everyone, "forward") == planned
    # Tensor parallel ranks hold the same tokens here, so half of the copies' gradients go back, which are all rows.
    returned = arrived(layout, everyone, "backward")
    assert 2 * sum(n * count for (_, _, n), count in returned.items()) == sum(n * c for (_, _, n), c in planned.items())
    layers = 6
    for rank, messages in enumerate(everyone):
        integers = [message for message in messages if not message.dtype.is_floating_point]
        assert all(message.operation == "alltoall_base_" for message in integers)
        assert len(integers) == (layers * manifest.rounds if rank in layout.language else 0)
        assert {(message.dtype, message.shape) for message in integers} <= {(torch.int64, (TEXT["num_experts"],))}
