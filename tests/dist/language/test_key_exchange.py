"""Keys reach exactly the context-parallel ranks that need them, gradients return once, and no byte more is moved."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from mimo_gemma4.language.attention_context import MaskRule, attention_context, visible_runs
from mimo_gemma4.language.config import FULL, SLIDING, Gemma4TextConfig
from mimo_gemma4.language.key_exchange import (
    GatherExchange,
    HaloExchange,
    finish_exchange,
    plan_exchange,
    start_exchange,
)
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.partition import cp_token_index
from mimo_gemma4.weights.bindings import initialise
from tests.dist.harness import run_ranks
from tests.dist.language.language_ranks import language_groups

RANKS = 4
COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes that each collective brings to this rank from others, in the order of the calls."""
    moved: list[int] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str):
        def call(output: torch.Tensor, source: torch.Tensor, *arguments, **options):
            group = options["group"]
            larger = max(output.nbytes, source.nbytes)
            moved.append(output.nbytes if name == "all_to_all_single" else larger // group.size() * (group.size() - 1))
            return originals[name](output, source, *arguments, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield moved
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@dataclass(frozen=True)
class Sequence:
    """Documents of one sequence and how it is cut."""

    lengths: tuple[int, ...]
    """Real tokens per document."""
    padded: tuple[int, ...]
    """Positions per document."""
    zigzag: bool
    pack: bool
    """Each document is cut over the ranks, instead of the sequence as a whole."""

    @property
    def size(self) -> int:
        return sum(self.padded)

    @property
    def starts(self) -> list[int]:
        return [sum(self.padded[:number]) for number in range(len(self.padded) + 1)]

    def segments(self) -> torch.Tensor:
        segments = torch.zeros(1, self.size, dtype=torch.long)
        for number, (start, length) in enumerate(zip(self.starts, self.lengths, strict=False), start=1):
            segments[:, start : start + length] = number
        return segments

    def held(self) -> list[torch.Tensor]:
        if not self.zigzag:
            return list(torch.arange(self.size).chunk(RANKS))
        starts = self.starts if self.pack else None
        return [cp_token_index(self.size, RANKS, rank, starts) for rank in range(RANKS)]


SEQUENCES = [
    Sequence((64,), (64,), zigzag=True, pack=False),
    Sequence((50,), (64,), zigzag=True, pack=False),
    Sequence((23, 30, 5), (24, 32, 8), zigzag=True, pack=True),
    Sequence((23, 30, 5), (24, 32, 8), zigzag=True, pack=False),
    Sequence((61,), (64,), zigzag=False, pack=False),
    Sequence((16, 16, 32), (16, 16, 32), zigzag=False, pack=False),
]
GROUPS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 3 + [0] * 13 + [3] * 14 + [0] * 20])
RULES = [MaskRule(4), MaskRule(21), MaskRule(4, "inside_window"), MaskRule(4, "always"), MaskRule(None)]


def exchange_rank(rank: int) -> None:
    group = dist.group.WORLD
    for sequence in SEQUENCES:
        held = sequence.held()
        for rule in RULES:
            # Media inside one document only: the reach of a group never leaves its segment.
            groups = torch.where(sequence.segments() == 1, GROUPS, 0)
            first, last = visible_runs(rule, sequence.segments(), groups)
            seen = [sorted({k for q in own for k in range(first[0, q], last[0, q] + 1)}) for own in held]
            needed = [torch.zeros(sequence.size, dtype=torch.bool) for _ in held]
            for mask, keys in zip(needed, seen, strict=True):
                mask[keys] = True
            planned = plan_exchange(needed, held, group, torch.clone, windowed=rule.window is not None)
            exchanges = [planned, HaloExchange(needed, held, group, torch.clone)]
            exchanges.append(GatherExchange(needed, held, group, torch.clone))
            for exchange in exchanges:
                check_exchange(exchange, held, seen, rank)
            absent = [len(set(keys) - set(own.tolist())) for keys, own in zip(seen, held, strict=True)]
            assert (planned is None) == (max(absent) == 0)


def check_exchange(exchange, held: list[torch.Tensor], seen: list[list[int]], rank: int) -> None:
    """Two states of two sequences; every rank weights what it receives by its own numbers; gradients are their sums."""
    generator = torch.Generator().manual_seed(1)
    size = sum(own.numel() for own in held)
    whole = [torch.randn(size, 2, 3, 4, generator=generator) for _ in range(2)]
    weights = [[torch.randn(size, 2, 3, 4, generator=generator) for _ in range(2)] for _ in held]
    local = tuple(state[held[rank]].requires_grad_() for state in whole)
    arrived = finish_exchange(start_exchange(exchange, local))
    for state, keys in zip(whole, arrived, strict=True):
        assert torch.equal(keys, state[seen[rank]])
    torch.autograd.backward(arrived, [weight[seen[rank]] for weight in weights[rank]])
    for number, state in enumerate(local):
        expected = torch.zeros(size, 2, 3, 4)
        for keys, weight in zip(seen, weights, strict=True):
            expected[keys] += weight[number][keys]
        torch.testing.assert_close(state.grad, expected[held[rank]])


def test_every_rank_gets_what_it_needs_and_gradients_return() -> None:
    run_ranks(RANKS, exchange_rank)


TEXT = dict(
    vocab_size=32,
    vocab_size_per_layer_input=32,
    hidden_size=16,
    intermediate_size=16,
    num_attention_heads=4,
    head_dim=4,
    global_head_dim=8,
    hidden_size_per_layer_input=0,
    layer_types=(SLIDING, FULL, SLIDING, FULL),
)
MODELS = {
    "shared keys and values": Gemma4TextConfig(
        **TEXT, num_hidden_layers=4, num_key_value_heads=2, num_kv_shared_layers=2
    ),
    "keys as values": Gemma4TextConfig(
        **TEXT, num_hidden_layers=4, num_key_value_heads=2, num_global_key_value_heads=1, attention_k_eq_v=True
    ),
}


def model_bytes(rank: int, model_name: str, sequence: Sequence, window: int) -> tuple[list[int], list[int]]:
    """Bytes brought to this rank by each collective of a forward, and of a backward pass."""
    text = Gemma4TextConfig(**vars(MODELS[model_name]) | {"sliding_window": window})
    groups, device = language_groups(rank, 1, RANKS), torch.device("cpu")
    model = Gemma4LanguageModel(text, groups, sequence_parallel=False, dtype=torch.float32, device=device)
    initialise(model.bindings(), 0)
    segments, held = sequence.segments(), sequence.held()
    context = attention_context(
        text, torch.zeros_like(segments), segments, None, held=held, cp_group=groups.cp, put=torch.clone
    )
    ids = torch.ones(1, held[rank].numel(), dtype=torch.long)
    with counted_bytes() as forward:
        hidden = model(model.first_inputs(model.embed(ids)), ids, context).hidden
    with counted_bytes() as backward:
        hidden.sum().backward()
    return forward, backward


def halo_holders(rank: int, sequence: Sequence, window: int) -> list[int]:
    """Who holds each key that `rank` needs in sliding layers of a zigzag pack, the closed form.

    Before each half of each segment, min(window - 1, available) keys; those on the same rank are free.
    """
    found = set()
    for number, (length, padded) in enumerate(zip(sequence.lengths, sequence.padded, strict=True)):
        chunk = padded // (2 * RANKS)
        for half in (rank, 2 * RANKS - 1 - rank):
            if half * chunk < length:
                for index in range(half * chunk - min(window - 1, half * chunk), half * chunk):
                    at = index // chunk
                    found.add((number, index, min(at, 2 * RANKS - 1 - at)))
    return [holder for _, _, holder in found if holder != rank]


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize(
    ("sequence", "window"),
    [
        (Sequence((128,), (128,), zigzag=True, pack=True), 9),
        (Sequence((256,), (256,), zigzag=True, pack=True), 9),
        (Sequence((64,), (64,), zigzag=True, pack=True), 21),
        (Sequence((23, 40), (24, 40), zigzag=True, pack=True), 6),
    ],
    ids=["long", "twice as long", "several hops", "pack"],
)
def test_bytes_are_the_closed_form(model_name: str, sequence: Sequence, window: int) -> None:
    """Per layer with keys of its own: halos in sliding layers, (P-1) S/P tokens in full ones; backward moves the same
    in the other direction.
    """
    text = MODELS[model_name]
    holders = [halo_holders(rank, sequence, window) for rank in range(RANKS)]
    everything_else = (RANKS - 1) * sequence.size // RANKS
    for rank, (forward, backward) in enumerate(run_ranks(RANKS, model_bytes, model_name, sequence, window)):
        there, back = len(holders[rank]), sum(others.count(rank) for others in holders)
        owners = [layer for layer in text.layers if layer.owns_key_values]
        token = [4 * (1 + layer.has_value_projection) * layer.num_key_value_heads * layer.head_dim for layer in owners]
        full = [layer.attention == FULL for layer in owners]
        assert forward == [
            size * (everything_else if whole else there) for size, whole in zip(token, full, strict=True)
        ]
        way_back = [size * (everything_else if whole else back) for size, whole in zip(token, full, strict=True)]
        assert backward == way_back[::-1]
        if sequence.size >= 128:  # whatever the length: W - 1 per half whose predecessor is on another rank
            assert there == back == (1 if rank in (0, RANKS - 1) else 2) * (window - 1)
