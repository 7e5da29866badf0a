"""Bridge: every row reaches exactly the ranks that hold its token, and its gradient comes back exactly once.

Each row crosses between the two grids once in either direction, to and from one of the ranks that hold its token;
tensor parallel ranks that hold the same tokens answer for equal parts of them, which one all-gather joins.
"""

import random

import pytest
import torch
import torch.distributed as dist

from benchmarks.traffic import Message, Traffic
from mimo_gemma4.data.manifest import Microbatch, PlannedMedia, PlannedSample, StepManifest
from mimo_gemma4.distributed.layout import ModuleLayout, build_layout
from mimo_gemma4.distributed.platform import Platform
from mimo_gemma4.distributed.process_groups import create_process_groups
from mimo_gemma4.model.bridge import Bridge
from mimo_gemma4.partition import cp_token_index, pack_multiple, segment_multiple, sequence_multiple
from tests.dist.harness import in_turn, run_ranks

WIDTH = 4

# (vision ranks, vision tp, language ranks, tp, cp, sequence parallel, packed)
CASES = [
    (1, 1, 1, 1, 1, False, False),
    (3, 1, 2, 1, 1, False, False),
    (1, 1, 3, 1, 1, False, True),
    (2, 2, 2, 2, 1, True, False),
    (2, 1, 2, 1, 2, False, True),
    (1, 1, 2, 2, 1, False, False),
    (2, 1, 2, 2, 1, False, False),
    (1, 1, 4, 2, 1, False, False),
    (2, 1, 4, 2, 2, False, True),
    (3, 1, 3, 3, 1, False, False),
    (2, 1, 4, 2, 1, True, False),
    (3, 1, 4, 2, 2, True, True),
    (2, 2, 4, 2, 1, False, False),
    (4, 2, 4, 1, 4, False, True),
    (2, 2, 6, 2, 1, True, False),
    (4, 4, 4, 2, 2, False, False),
]


def random_manifest(
    seed: int, source_dp: int, target_dp: int, num_microbatches: int, multiples: tuple, packed: bool
) -> StepManifest:
    """Ragged samples with zero to three media items; lanes and microbatches without any media or samples occur."""
    generator = random.Random(seed)
    microbatches, pending = [], []
    sample = 0
    for lane in range(target_dp):
        for number in range(num_microbatches):
            count = generator.choice([0, 1, 3])
            samples, sequence, start = [], 0, 0
            for _ in range(count):
                media = [generator.randint(1, 9) for _ in range(generator.choice([0, 1, 1, 3]))]
                length = sum(media) + 3 + len(media)
                padded = -(-length // multiples[1]) * multiples[1] if packed else length
                samples.append(PlannedSample(sample, sample, lane, number, sequence, start, length, padded))
                position = start + 1
                for ordinal, soft_tokens in enumerate(media):
                    pending.append((sample, ordinal, soft_tokens, lane, number, sequence, position))
                    position += soft_tokens + 1
                sample += 1
                sequence, start = (0, start + padded) if packed else (sequence + 1, 0)
            longest = start if packed else max((s.length for s in samples), default=0)
            multiple = multiples[2] if packed else multiples[0]
            seq_length = -(-longest // multiple) * multiple
            sequences = min(count, 1) if packed else count
            microbatches.append(Microbatch(lane, number, sequences, seq_length, tuple(samples), packed))
    planned_media, filled = [], {}
    for index, ordinal, soft_tokens, lane, number, sequence, position in pending:
        module_lane = generator.randrange(source_dp)
        offset = filled.get((number, module_lane), 0)
        filled[number, module_lane] = offset + soft_tokens
        planned_media.append(
            PlannedMedia(
                "vision", index, index, ordinal, soft_tokens, lane, number, sequence, position, module_lane, offset
            )
        )
    return StepManifest(seed, num_microbatches, tuple(microbatches), tuple(planned_media))


def value_of(item: PlannedMedia, i: int) -> float:
    return item.batch_index * 1000 + item.ordinal * 100 + i + 1.0


def gradient_of(item: PlannedMedia, i: int) -> float:
    return -value_of(item, i) - 0.5


def bridge_rank(rank: int, case: tuple, seeds: list[int]) -> None:
    vision_ranks, vision_tp, language_ranks, tp, cp, sequence_parallel, packed = case
    layout = build_layout(
        {
            "vision": ModuleLayout(ranks=vision_ranks, tp=vision_tp),
            "language": ModuleLayout(ranks=language_ranks, tp=tp, cp=cp, sequence_parallel=sequence_parallel),
        },
        world_size=vision_ranks + language_ranks,
    )
    platform = Platform.detect()
    groups = create_process_groups(layout, platform)
    vision, language = layout.grids["vision"], layout.language
    bridge = Bridge(
        layout,
        "vision",
        rank,
        to_language_group=groups.bridge_to_language["vision"],
        to_module_group=groups.bridge_to_module["vision"],
        module_tp_group=groups.modules["vision"].tp if rank in vision else None,
        language_tp_group=groups.modules["language"].tp if rank in language else None,
        hidden_size=WIDTH,
        dtype=torch.float32,
        platform=platform,
    )
    sp = tp if sequence_parallel else 1
    multiples = (sequence_multiple(cp, sp), segment_multiple(cp), pack_multiple(cp, sp))
    for seed in seeds:
        manifest = random_manifest(seed, vision.dp, language.dp, 3, multiples, packed)
        for number in range(manifest.num_microbatches):
            check_microbatch(bridge, manifest, number, rank, sp)
    bridge.drain()
    groups.destroy()


def check_microbatch(bridge: Bridge, manifest: StepManifest, number: int, rank: int, sp: int) -> None:
    vision, language = bridge.module, bridge.language
    leaving, returns = None, torch.empty(0)
    if rank in vision:
        items = manifest.items_of_module("vision", number, vision.coordinate(rank).dp)
        if items:
            leaving = as_vectors([value_of(item, i) for item in items for i in range(item.soft_tokens)], bridge)
            returns = torch.tensor([gradient_of(item, i) for item in items for i in range(item.soft_tokens)])
    expected, gradient_at = {}, {}
    if rank in language:
        expected, gradient_at = oracle(manifest, number, language, language.coordinate(rank), sp)
    route = bridge.route(manifest, number)
    positions = route.positions.tolist()
    assert sorted(positions) == sorted(expected)
    with Traffic() as there:
        received = bridge.recv_in_language(route, bridge.post_to_language(route, leaving))
    check_values(received, torch.tensor([expected[position] for position in positions]))
    gradients = as_vectors([gradient_at[position] for position in positions], bridge) if positions else None
    with Traffic() as back:
        returned = bridge.recv_in_module(route, bridge.post_to_module(route, gradients))
    check_values(returned, returns)
    if rank in language:
        sharers = language.tp // sp
        check_crossings(there.messages, back.messages, len(expected), sharers, language.coordinate(rank).tp % sharers)
    else:
        check_crossings(back.messages, there.messages, len(returns), vision.tp, vision.coordinate(rank).tp)


def as_vectors(values: list[float], bridge: Bridge) -> torch.Tensor:
    return torch.tensor(values, device=bridge.device)[:, None].repeat(1, WIDTH)


def check_values(vectors: torch.Tensor, values: torch.Tensor) -> None:
    """Exact: each soft token is moved and added to nothing."""
    assert torch.equal(vectors.cpu(), values[:, None].expand(-1, WIDTH))


def check_crossings(arriving: list[Message], leaving: list[Message], needed: int, sharers: int, place: int) -> None:
    """Of the soft tokens that a rank needs its own part alone comes from the other grid, and as much goes back.

    Args:
        arriving: what the rank did while they arrived, …
        leaving: … and while their counterparts left.
        needed: how many it needs.
        sharers: how many tensor parallel ranks need the same ones.
        place: of the rank among them.
    """
    size = -(-needed // sharers)
    part = max(0, min(size, needed - place * size))
    received, gathers = ([m for m in arriving if (m.operation == "recv_") is crosses] for crosses in (True, False))
    assert sum(message.shape[0] for message in received) == sum(message.shape[0] for message in leaving) == part
    assert all(message.operation == "send" for message in leaving)
    assert [(message.operation, message.shape) for message in gathers] == [
        ("_allgather_base_", (size * sharers, WIDTH))
    ] * (needed > 0 and sharers > 1)


def oracle(manifest: StepManifest, number: int, language, at, sp: int) -> tuple[dict, dict]:  # noqa: ANN001
    """What this language rank must receive, by flat position, computed from whole sequences."""
    microbatch = manifest.microbatch(at.dp, number)
    if not microbatch.sequences:
        return {}, {}
    whole = torch.zeros(microbatch.seq_length, microbatch.sequences)
    gradient = torch.zeros_like(whole)
    for item in manifest.media:
        if (item.lane, item.microbatch) == (at.dp, number):
            for i in range(item.soft_tokens):
                whole[item.start + i, item.sequence] = value_of(item, i)
                gradient[item.start + i, item.sequence] = gradient_of(item, i)
    index = cp_token_index(microbatch.seq_length, language.cp, at.cp, microbatch.segment_starts)
    if sp > 1:
        index = index.chunk(sp)[at.tp]
    local, local_gradient = whole[index].flatten(), gradient[index].flatten()
    held = local.nonzero().flatten().tolist()
    return {p: local[p].item() for p in held}, {p: local_gradient[p].item() for p in held}


@pytest.mark.parametrize("world", sorted({case[0] + case[2] for case in CASES}))
def test_soft_tokens_arrive_and_gradients_return_once(world: int) -> None:
    cases = [case for case in CASES if case[0] + case[2] == world]
    run_ranks(world, in_turn, bridge_rank, [(case, list(range(6))) for case in cases])


def test_lost_and_doubled_gradients_are_caught() -> None:
    """The comparison above can fail: a route that drops or repeats one returned row does not pass it."""
    for mutation in ("drop", "double"):
        with pytest.raises(AssertionError):
            run_ranks(4, mutated_rank, mutation)


def mutated_rank(rank: int, mutation: str) -> None:
    original = Bridge.post_to_module

    def post_to_module(self: Bridge, route, gradients):  # noqa: ANN001, ANN202
        if gradients is not None and dist.get_rank() == 3 and len(gradients) > 1:
            gradients = gradients.clone()
            gradients[0] *= 0 if mutation == "drop" else 2
        return original(self, route, gradients)

    Bridge.post_to_module = post_to_module
    bridge_rank(rank, (2, 1, 2, 1, 1, False, False), [0, 1, 2])
