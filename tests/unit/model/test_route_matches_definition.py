"""The routes of an edge are those of a plain definition that looks at one soft token after the other.

Exact: routes are numbers of ranks and positions. Random manifests with packed and padded sequences, zigzag and
contiguous context-parallel ranks in one step, and every rank's route at both ends.
"""

import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch

from mimo_gemma4.distributed.layout import ModuleLayout, build_layout
from mimo_gemma4.distributed.platform import Platform
from mimo_gemma4.model.bridge import Bridge, Share
from mimo_gemma4.partition import cp_token_index, pack_multiple, segment_multiple, sequence_multiple
from tests.dist.model.test_bridge import random_manifest

# (vision lanes, vision tp, language lanes, tp, cp, sequence parallel, packed)
CASES = [
    (1, 1, 4, 1, 1, False, True),
    (3, 1, 2, 1, 3, False, True),
    (2, 2, 3, 2, 2, False, True),
    (2, 3, 3, 3, 2, False, False),
    (3, 2, 2, 2, 2, True, True),
    (1, 1, 5, 2, 1, True, False),
]


def definition(manifest, number, layout):
    """For every rank: the parcels of its module's share and of its language share, and its flat positions."""
    module, language = layout.grids["vision"], layout.language
    module_ranks, language_ranks = (
        torch.tensor(ranks).view(shape)
        for ranks, shape in zip(
            layout.edge("vision"), [(module.dp, module.tp), (language.dp, language.cp, language.tp)], strict=True
        )
    )
    items = [item for item in manifest.media if item.microbatch == number]
    of_module = Counter()
    for item in items:
        of_module[item.module_lane] += item.soft_tokens
    tokens = defaultdict(list)  # by (lane, cp), in the order of the lane's items
    for item in items:
        microbatch = manifest.microbatch(item.lane, number)
        for inside in range(item.soft_tokens):
            cp, local = place(item.start + inside, microbatch, language.cp)
            place_in_module = item.module_offset + inside
            module_tp = place_in_module // -(-of_module[item.module_lane] // module.tp)
            at_module = int(module_ranks[item.module_lane, module_tp])
            tokens[item.lane, cp].append((at_module, place_in_module, local, microbatch, item.sequence))
    sent, received, positions = defaultdict(list), defaultdict(list), defaultdict(list)
    for (lane, cp), held in tokens.items():
        needed = Counter()
        for order, (at_module, place_in_module, local, microbatch, sequence) in enumerate(held):
            if language.sequence_parallel:
                length = microbatch.seq_length // (language.cp * language.tp)
                tp, local = divmod(local, length)
                order = needed[tp]
                needed[tp] += 1
            else:
                tp = order // -(-len(held) // language.tp)
            rank = int(language_ranks[lane, cp, tp])
            sent[at_module, rank].append(place_in_module)
            received[rank, at_module].append(order)
            for sharer in [tp] if language.sequence_parallel else range(language.tp):
                flat = local * microbatch.sequences + sequence
                positions[int(language_ranks[lane, cp, sharer])].append(flat)
    return sent, received, positions


def place(position, microbatch, cp_size):
    for cp in range(cp_size):
        index = cp_token_index(microbatch.seq_length, cp_size, cp, microbatch.segment_starts, microbatch.cp_layout)
        if position in index:
            return cp, index.tolist().index(position)
    raise AssertionError(f"no rank holds {position}")


def parcels(share: Share):
    whole = torch.arange(max(share.needed, 1))
    return {parcel.peer: whole[parcel.index].tolist() for parcel in share.parcels}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_routes_are_those_of_the_definition(case):
    vision_lanes, vision_tp, language_lanes, tp, cp, sequence_parallel, packed = case
    vision_ranks, language_ranks = vision_lanes * vision_tp, language_lanes * tp * cp
    layout = build_layout(
        {
            "vision": ModuleLayout(ranks=vision_ranks, tp=vision_tp),
            "language": ModuleLayout(ranks=language_ranks, tp=tp, cp=cp, sequence_parallel=sequence_parallel),
        },
        world_size=vision_ranks + language_ranks,
    )
    sp = tp if sequence_parallel else 1
    multiples = (sequence_multiple(cp, sp), segment_multiple(cp), pack_multiple(cp, sp))
    generator, moved = random.Random(0), 0
    for seed in range(3):
        manifest = random_manifest(seed, vision_lanes, language_lanes, 2, multiples, packed)
        layouts = [generator.choice(["zigzag", "contiguous"]) for _ in manifest.microbatches]
        microbatches = (replace(m, cp_layout=kind) for m, kind in zip(manifest.microbatches, layouts, strict=True))
        manifest = replace(manifest, microbatches=tuple(microbatches))
        for number in range(2):
            sent, received, positions = definition(manifest, number, layout)
            moved += sum(map(len, sent.values()))
            for rank in range(vision_ranks + language_ranks):
                route = bridge_without_communication(layout, rank).route(manifest, number)
                assert parcels(route.module) == {
                    peer: sorted(index) for (own, peer), index in sent.items() if own == rank
                }
                assert parcels(route.language) == {
                    peer: index for (own, peer), index in received.items() if own == rank
                }
                assert route.positions.tolist() == positions.get(rank, [])
                assert route.language.needed == len(route.positions)
    assert moved > 50


def bridge_without_communication(layout, rank):
    return Bridge(
        layout, "vision", rank, to_language_group=None, to_module_group=None, module_tp_group=None,
        language_tp_group=None, hidden_size=4, dtype=torch.float32, platform=Platform.detect(),
    )  # fmt: skip
