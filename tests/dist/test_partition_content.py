"""PartitionAdapter: every rank holds exactly the tokens the definition gives it, and the backward is bit-exact."""

import math

import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from mimo_gemma4.errors import LayoutError
from mimo_gemma4.partition import CpLayout, PartitionAdapter, PartitionConfig, cp_token_index
from tests.dist.harness import rank_device, run_ranks

LAYOUTS = [(tp, cp) for tp in (1, 2, 4, 8) for cp in (1, 2, 4, 8) if tp * cp <= 8]


def zigzag_by_definition(length: int, cp: int, rank: int) -> list[int]:
    """Chunks r and 2*cp-1-r of 2*cp, spelled out."""
    chunk = length // (2 * cp)
    return [
        position for number in (rank, 2 * cp - 1 - rank) for position in range(number * chunk, (number + 1) * chunk)
    ]


def expected_positions(lengths: list[int], cp: int, rank: int, layout: CpLayout) -> list[int]:
    if cp == 1 or layout == "contiguous":
        part = sum(lengths) // cp
        return list(range(rank * part, (rank + 1) * part))
    positions, start = [], 0
    for length in lengths:
        positions += [start + p for p in zigzag_by_definition(length, cp, rank)]
        start += length
    return positions


def make_groups(tp: int, cp: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Groups of the first tp*cp ranks, tp fastest."""
    mine: dict[str, dist.ProcessGroup] = {}
    for c in range(cp):
        ranks = [c * tp + t for t in range(tp)]
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine["tp"] = group
    for t in range(tp):
        ranks = [c * tp + t for c in range(cp)]
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine["cp"] = group
    return mine.get("tp"), mine.get("cp")


def check_one(
    tp: int,
    cp: int,
    sequence_parallel: bool,
    lengths: list[int],
    batch: int,
    groups: tuple,
    packed: bool,
    layout: CpLayout = "zigzag",
) -> None:
    adapter = PartitionAdapter(PartitionConfig(sequence_parallel, *groups, 4096, kv_format="thd" if packed else "sbhd"))
    total, width = sum(lengths), 3
    params = None
    if packed:
        starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_q_padded=starts)
    device = rank_device()
    whole = torch.arange(total * batch * width, dtype=torch.float32, device=device).view(total, batch, width)
    whole.requires_grad_()
    labels = torch.arange(batch * total, device=device).view(batch, total)
    mask = labels % 3 == 0
    out, out_labels, out_mask, out_params = adapter.shard(whole, labels, mask, params, layout)
    assert out_params is params
    t, c = groups[0].rank(), groups[1].rank()
    positions = torch.tensor(expected_positions(lengths, cp, c, layout))
    assert torch.equal(adapter.token_index(total, params, layout), positions)
    positions = positions.to(device)
    assert torch.equal(out_labels, labels[:, positions])
    assert torch.equal(out_mask, mask[:, positions])
    local = positions.chunk(tp)[t] if sequence_parallel else positions
    assert torch.equal(out, whole.detach()[local])
    if cp == 1 and (tp == 1 or not sequence_parallel):
        assert out is whole and out_labels is labels and out_mask is mask
    # Without embeddings (later pipeline stages) labels and mask are still cut.
    none, again, _, _ = adapter.shard(None, labels, mask, params, layout)
    assert none is None and torch.equal(again, out_labels)
    # Backward: the gradient of each element comes back to the positions that this rank's CP part holds; under SP every
    # TP rank ends with the gradients of all TP ranks. Bitwise: gradients are moved, never added.
    torch.manual_seed(c)
    local_gradient = torch.randn(len(positions), batch, width).to(device)
    out.backward(local_gradient.chunk(tp)[t] if sequence_parallel else local_gradient)
    expected = torch.zeros(total, batch, width, device=device)
    expected[positions] = local_gradient
    assert torch.equal(whole.grad, expected)
    # All ranks' shards together are the input, each element once.
    if sequence_parallel or tp == 1:
        total_sum = out.detach().double().sum()
        dist.all_reduce(total_sum, group=groups[0])
        dist.all_reduce(total_sum, group=groups[1])
        assert total_sum == whole.detach().double().sum()


def sharding_rank(rank: int) -> None:
    for tp, cp in LAYOUTS:
        if tp * cp > dist.get_world_size():
            continue
        groups = make_groups(tp, cp)
        if rank >= tp * cp:
            continue
        for sequence_parallel in (False, True):
            unit = 2 * cp * tp
            check_one(tp, cp, sequence_parallel, [3 * unit], 2, groups, packed=False)
            segments = [2 * cp * n for n in (1, 5, 2)]
            tail = -sum(segments) % (cp * math.lcm(2, tp))
            check_one(tp, cp, sequence_parallel, [*segments, *([tail] if tail else [])], 1, groups, packed=True)
            ragged = [1, 3, 4 * cp, 2]
            tail = -sum(ragged) % (cp * tp)
            ragged += [tail] if tail else []
            check_one(tp, cp, sequence_parallel, [5 * cp * tp], 2, groups, packed=False, layout="contiguous")
            check_one(tp, cp, sequence_parallel, ragged, 1, groups, packed=True, layout="contiguous")


def test_every_layout_on_eight_ranks() -> None:
    run_ranks(8, sharding_rank)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_token_index_of_all_ranks_is_a_permutation(layout: CpLayout) -> None:
    for cp in (1, 2, 3, 4, 8):
        starts = [0, 2 * cp, 8 * cp, 10 * cp]
        for segment_starts in (None, starts):
            index = torch.cat([cp_token_index(10 * cp, cp, rank, segment_starts, layout) for rank in range(cp)])
            assert torch.equal(index.sort().values, torch.arange(10 * cp))


class _Group:
    """Stands for a process group in checks that fail before any communication."""

    def __init__(self, size: int):
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("tp", "cp", "sequence_parallel", "length", "message"),
    [
        (2, 2, True, 12, r"length 12 is not a multiple of 2\*cp\*tp = 8 .*: 16"),
        (2, 2, False, 6, r"length 6 is not a multiple of 2\*cp = 4 .*: 8"),
        (4, 1, True, 6, r"length 6 is not a multiple of tp = 4 .*: 8"),
    ],
)
def test_uneven_sequence_names_the_factor(tp: int, cp: int, sequence_parallel: bool, length: int, message: str) -> None:
    adapter = PartitionAdapter(PartitionConfig(sequence_parallel, _Group(tp), _Group(cp), 64))
    with pytest.raises(LayoutError, match=message):
        adapter.token_index(length)


def test_uneven_segment_is_named() -> None:
    adapter = PartitionAdapter(PartitionConfig(False, _Group(1), _Group(2), 64))
    with pytest.raises(LayoutError, match=r"segment 1 of the pack has 6 positions, not a multiple of 2\*cp = 4"):
        adapter.token_index(20, [0, 8, 14, 20])


def test_pack_total_and_overlap_are_checked() -> None:
    adapter = PartitionAdapter(PartitionConfig(True, _Group(4), _Group(2), 64))
    with pytest.raises(LayoutError, match=r"12 positions, not a multiple of 8 .* up to 16"):
        adapter.token_index(12, [0, 12])
    overlap = PartitionAdapter(PartitionConfig(True, _Group(2), _Group(1), 64, tp_comm_overlap=True))
    with pytest.raises(LayoutError, match="exactly max_seq_len = 64 tokens, got 32"):
        overlap.token_index(32)
