"""Context parallel training steps: halo exchange and gather, against a full ring and against gathering everywhere.

    torchrun --nproc-per-node 4 benchmarks/context_parallel.py

Layers have the widths of Gemma 4 E4B: five sliding layers and a full one with keys and values of their own, then six
that share those. One packed row without padding, zigzag, random weights; a step is forward and backward. Prints the
agreement with one rank, then one table. On a CPU (`--tiny`) shapes are tiny and times mean nothing.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from ring_attention import RingPlan
from torch.profiler import ProfilerActivity, profile

from mimo_gemma4.distributed.platform import Platform, create_platform, destroy_distributed
from mimo_gemma4.language.attention_backend import PlanAttention
from mimo_gemma4.language.attention_context import AttentionContext, attention_context, mask_rules, visible_runs
from mimo_gemma4.language.config import FULL, SLIDING, Gemma4TextConfig
from mimo_gemma4.language.key_exchange import GatherExchange
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.partition import CpLayout, cp_token_index
from mimo_gemma4.weights.bindings import initialise

WARM_UP, TIMED = 3, 10
LAYERS = dict(num_hidden_layers=12, num_kv_shared_layers=6, layer_types=((SLIDING,) * 5 + (FULL,)) * 2)
VOCABULARY = dict(vocab_size=4096, vocab_size_per_layer_input=4096)  # tables and head are not what is measured
E4B = Gemma4TextConfig(
    **LAYERS,
    **VOCABULARY,
    hidden_size=2560,
    intermediate_size=10240,
    num_attention_heads=8,
    num_key_value_heads=2,
    sliding_window=512,
)
TINY = replace(
    E4B, hidden_size=32, intermediate_size=48, head_dim=8, global_head_dim=16, sliding_window=20, vocab_size=64
)


@dataclass(frozen=True)
class Way:
    """One way to train over the ranks of `cp_group`, ready for a sequence of `tokens`."""

    name: str
    model: Gemma4LanguageModel
    context: AttentionContext
    backend: PlanAttention
    input_ids: torch.Tensor
    """[1, S/cp] (local)."""

    def step(self) -> torch.Tensor:
        """Forward and backward; the final hidden states [S/cp, 1, H] (local)."""
        self.model.plan_attention = self.backend
        self.model.zero_grad()
        hidden = self.model(
            self.model.first_inputs(self.model.embed(self.input_ids)), self.input_ids, self.context
        ).hidden
        weights = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device, dtype=hidden.dtype)
        (hidden * weights).sum().backward()
        return hidden.detach()


class Bench:
    """Models and ways over all ranks, and over this rank alone."""

    def __init__(self, platform: Platform, text: Gemma4TextConfig) -> None:
        """Collective: makes the groups."""
        self.platform, self.text, self.whole = platform, text, dist.group.WORLD
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self.alone = groups[platform.rank]

    def model(self, cp_group: dist.ProcessGroup, dtype: torch.dtype) -> Gemma4LanguageModel:
        """The layers, with the same weights in every call."""
        groups = ProcessGroupCollection()
        groups.tp, groups.ep, groups.cp = self.alone, self.alone, cp_group
        device = self.platform.device
        model = Gemma4LanguageModel(self.text, groups, sequence_parallel=False, dtype=dtype, device=device)
        initialise(model.bindings(), 0)
        return model

    def ours(
        self, model: Gemma4LanguageModel, tokens: int, cp_group: dist.ProcessGroup, layout: CpLayout = "zigzag"
    ) -> Way:
        """What a training run does."""
        row, held = torch.arange(tokens)[None], _held(tokens, cp_group, layout)
        ids = torch.randint(self.text.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        put = self.platform.put
        context = attention_context(self.text, row, torch.ones_like(row), None, held=held, cp_group=cp_group, put=put)
        return Way("halo + gather", model, context, model.attention.plan, put(ids[:, held[cp_group.rank()]]))

    def gather(self, model: Gemma4LanguageModel, tokens: int) -> Way:
        """Sliding layers gather all keys too."""
        way, put, held = self.ours(model, tokens, self.whole), self.platform.put, _held(tokens, self.whole)
        everything = [torch.ones(tokens, dtype=torch.bool)] * len(held)
        first, last = visible_runs(mask_rules(self.text)[SLIDING], torch.ones(1, tokens, dtype=torch.long), None)
        first, last = (ends[:, held[self.whole.rank()]].int() for ends in (first, last))
        sliding = replace(
            way.context.keys[SLIDING],
            count=tokens,
            first=first,
            last=last,
            runs=put(torch.stack((first, last))),
            exchange=GatherExchange(everything, held, self.whole, put),
        )
        context = replace(way.context, keys=way.context.keys | {SLIDING: sliding})
        return replace(way, name="gather everywhere", context=context)

    def ring(self, model: Gemma4LanguageModel, tokens: int, layout: CpLayout) -> Way:
        """Local keys only, and plans that pass them round; these are built beforehand, unlike those of the others.

        Public rings for Gemma 4 hold contiguous parts; zigzag is the same ring with the causal work balanced.
        """
        way, held = self.ours(model, tokens, self.whole, layout), _held(tokens, self.whole, layout)
        segments, device = torch.ones(1, tokens, dtype=torch.long), self.platform.device
        plans = {rule: RingPlan(rule, segments, held, self.whole, device) for rule in mask_rules(self.text).values()}
        keys = {name: replace(visible, exchange=None) for name, visible in way.context.keys.items()}
        context = replace(way.context, keys=keys)
        name = f"full ring, {layout}"
        return replace(way, name=name, context=context, backend=lambda visible, _: plans[visible.rule])


def _held(tokens: int, cp_group: dist.ProcessGroup, layout: CpLayout = "zigzag") -> list[torch.Tensor]:
    return [cp_token_index(tokens, cp_group.size(), rank, layout=layout) for rank in range(cp_group.size())]


def difference(way: Way, other: Way, rows: torch.Tensor | slice = slice(None)) -> tuple[float, float]:
    """Relative distance of hidden states, and of all gradients summed over the ranks, from `other`'s.

    `rows` are those of `other`'s hidden states that this rank holds in `way`; other than all of them, `other` is one
    rank's, whose gradients are complete.
    """
    hidden, gradients = way.step(), _gradients(way, summed=True)
    expected, expected_gradients = other.step()[rows], _gradients(other, summed=isinstance(rows, slice))
    squares = torch.stack([(hidden - expected).double().square().sum(), expected.double().square().sum()])
    dist.all_reduce(squares, group=dist.group.WORLD)
    gradient = (gradients - expected_gradients).norm() / expected_gradients.norm()
    return (squares[0] / squares[1]).sqrt().item(), gradient.item()


def _gradients(way: Way, *, summed: bool) -> torch.Tensor:
    parts = [parameter.grad.flatten().float() for parameter in way.model.parameters() if parameter.grad is not None]
    flat = torch.cat(parts)
    if summed:
        dist.all_reduce(flat, group=dist.group.WORLD)
    return flat


def milliseconds(step: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Time of one step, ended by all that it enqueued."""
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_gib(way: Way, device: torch.device) -> float:
    """Peak memory of a step beyond what was there before it."""
    if device.type != "cuda":
        return float("nan")
    way.model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way.step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def communication_share(way: Way, device: torch.device) -> float:
    """Time in NCCL kernels, hidden or not, as a share of all kernels' time."""
    if device.type != "cuda":
        return float("nan")
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        way.step()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total for event in recorded.key_averages()}
    return sum(spent for name, spent in times.items() if "nccl" in name.lower()) / sum(times.values())


def measured(ways: list[Way], tokens: int, device: torch.device) -> list[list[str]]:
    """One row of the table per way; steps of all ways take turns."""
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(WARM_UP + TIMED):
        for way in ways:
            dist.barrier(group=dist.group.WORLD)
            spent = milliseconds(way.step, device)
            if turn >= WARM_UP:
                times[way.name].append(spent)
    found = [[median(times[way.name]), peak_gib(way, device), communication_share(way, device)] for way in ways]
    figures = torch.tensor(found, device=device)
    dist.all_reduce(figures, op=dist.ReduceOp.MAX, group=dist.group.WORLD)  # the slowest, fullest, busiest rank
    ours = figures[0, 0].item()
    return [
        [f"{tokens}", way.name, f"{spent:.1f}", f"{peak:.2f}", f"{100 * share:.1f}", f"{ours / spent:.2f}"]
        for way, (spent, peak, share) in zip(ways, figures.tolist(), strict=True)
    ]


def main() -> None:
    """Agreement with one rank, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--tiny", action="store_true", help="tiny widths, for a CPU")
    options = parser.parse_args()
    platform = create_platform()
    bench = Bench(platform, TINY if options.tiny else E4B)
    say = print if platform.rank == 0 else lambda *_, **__: None

    smallest = min(options.tokens)
    for dtype, tokens in ((torch.float32, smallest // 8), (torch.bfloat16, smallest)):
        mine = _held(tokens, bench.whole)[platform.rank].to(platform.device)
        way = bench.ours(bench.model(bench.whole, dtype), tokens, bench.whole)
        one = bench.ours(bench.model(bench.alone, dtype), tokens, bench.alone)
        hidden, gradient = difference(way, one, mine)
        say(
            f"{tokens} tokens, {dtype}: hidden states {hidden:.1e}, gradients {gradient:.1e} off one rank's", flush=True
        )
        del way, one

    model, rows = bench.model(bench.whole, torch.bfloat16), []
    for tokens in options.tokens:
        ours, gather = bench.ours(model, tokens, bench.whole), bench.gather(model, tokens)
        ways = [ours, gather, bench.ring(model, tokens, "zigzag"), bench.ring(model, tokens, "contiguous")]
        for other in ways[1:]:
            _, gradient = difference(other, ours)
            say(f"{tokens} tokens, {other.name}: gradients {gradient:.1e} off ours", flush=True)
        rows += measured(ways, tokens, platform.device)
    say(f"\n{dist.get_world_size()} ranks, E4B widths, 12 layers, bf16; the slowest rank's median of {TIMED}")
    columns = ["tokens", "way", "step ms", "peak GiB", "NCCL % of kernels", "ours / this"]
    for row in [columns, *rows]:
        say("  ".join(cell.rjust(21) for cell in row))
    destroy_distributed()


if __name__ == "__main__":
    main()
