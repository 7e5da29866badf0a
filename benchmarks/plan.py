"""Time to plan a step and to route its microbatches, and how it grows with the number of samples and lanes.

Run with:  python benchmarks/plan.py [--samples 256 1024 4096 16384]

One process, on the CPU. A language lane has 16 samples a step, packed to at most 4096 tokens; half of the samples have
an image or two. The encoder has as many lanes as the language model where
nothing else is printed. Each time is the median of several steps or microbatches, in processor time of one thread, so
that other processes on the machine do not count. With exponent p, the time grows as the number of samples to the power
p: 1 is proportional to the work.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product

import numpy as np
import torch
from torch import distributed as dist

from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset, Source
from mimo_gemma4.data.index import ShardIndex
from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.data.sample import MEDIA_TYPES
from mimo_gemma4.data.token_index import TokenIndex
from mimo_gemma4.data.tokenizer import byte_tokenizer
from mimo_gemma4.distributed.layout import ModuleLayout, build_layout
from mimo_gemma4.distributed.platform import Platform
from mimo_gemma4.encoders.gemma4_vision_processor import Gemma4ImageProcessor
from mimo_gemma4.media import MediaTokens
from mimo_gemma4.model.bridge import Bridge

SEQ_LENGTH = 4096
SAMPLES_PER_LANE = 16
ROUTED_LANES = 64
REPEATS = 5


def dataset_of(samples: int, images: bool) -> ShardDataset:
    """A dataset of one shard that exists in memory only: short and long samples, half of them with images."""
    generator = np.random.default_rng(0)
    text = np.minimum(generator.lognormal(6.8, 0.8, samples).astype(np.int32) + 8, 3500)
    count = generator.choice([0, 0, 1, 2], samples) if images else np.zeros(samples, np.int64)
    first = np.concatenate([[0], count.cumsum()])
    media = int(first[-1])
    soft_tokens = generator.integers(60, 281, media).astype(np.int32)
    before = np.concatenate([[0], soft_tokens.cumsum()])
    owner = np.repeat(np.arange(samples), count)
    start = 4 + before[:-1] - before[first[owner]] + 2 * (np.arange(media) - first[owner])
    nothing = np.array([], np.str_)
    index = ShardIndex(
        keys=np.array([f"{number:08}" for number in range(samples)], np.bytes_),
        json_offset=np.zeros(samples, np.int64),
        json_size=np.zeros(samples, np.int64),
        media_first=first,
        media_type=np.full(media, MEDIA_TYPES.index("image"), np.int8),
        media_offset=np.zeros(media, np.int64),
        media_size=np.zeros(media, np.int64),
        media_header=np.tile(np.array([[640, 480, 0, 0]]), (media, 1)),
        bad_keys=nothing,
        bad_faults=nothing,
        bad_reasons=nothing,
        shard_size=np.array(0),
    )
    tokens = TokenIndex(
        length=(text + before[first[1:]] - before[first[:-1]] + 2 * count).astype(np.int32),
        loss_tokens=text,
        media_start=start.astype(np.int32),
        media_soft_tokens=soft_tokens,
        bad_samples=np.array([], np.int64),
        bad_faults=nothing,
        bad_reasons=nothing,
    )
    encoder = ConversationEncoder(byte_tokenizer(), [Gemma4ImageProcessor()], {"image": MediaTokens(5, 6, 7)})
    return ShardDataset([(Source("memory"), 1)], ["memory.tar"], [index], [tokens], encoder, seq_length=SEQ_LENGTH)


def planner_of(dataset: ShardDataset, samples: int, packing: bool, encoder_lanes: int | None = None) -> StepPlanner:
    """A planner of steps of so many samples; by default the encoder has as many lanes as the language model."""
    lanes = max(1, samples // SAMPLES_PER_LANE)
    return StepPlanner(
        dataset,
        global_batch_size=samples,
        microbatch_size=1,
        seed=0,
        language_lanes=lanes,
        encoder_lanes={"vision": encoder_lanes or lanes},
        packing=packing,
        sample_cost=lambda length: 1e6 * length + 30.0 * length * length,
    )


def milliseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of the calls."""
    times = []
    for call in calls:
        started = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - started))
    return statistics.median(times)


def plan_times(sizes: Sequence[int]) -> None:
    """Print the time of a plan by number of samples, and the exponent of its growth from size to size."""
    print("samples                     " + "".join(f"{size:>10}" for size in sizes) + "   exponents")
    for name, images, packing in (
        ("packed, text", False, True),
        ("packed, text and images", True, True),
        ("padded, text and images", True, False),
    ):
        dataset = dataset_of(4 * max(sizes), images)
        times = []
        for samples in sizes:
            planner = planner_of(dataset, samples, packing)
            times.append(milliseconds([partial(planner.plan, step) for step in range(REPEATS)]))
        exponents = [
            math.log(after / before) / math.log(large / small)
            for (before, after), (small, large) in zip(pairwise(times), pairwise(sizes), strict=True)
        ]
        row = "".join(f"{value:>10.1f}" for value in times)
        print(f"{name:<25} ms {row}   {', '.join(f'{exponent:.2f}' for exponent in exponents)}", flush=True)


def bridge_of(encoder_lanes: int, rank: int, tp: int, cp: int) -> Bridge:
    """One rank's bridge from an encoder on its own ranks to the language model, without communication."""
    language_ranks = ROUTED_LANES * tp * cp
    layout = build_layout(
        {
            "vision": ModuleLayout(ranks=encoder_lanes),
            "language": ModuleLayout(ranks=language_ranks, tp=tp, cp=cp),
        },
        world_size=encoder_lanes + language_ranks,
    )
    group = dist.group.WORLD
    assert group is not None
    return Bridge(
        layout, "vision", rank, to_language_group=group, to_module_group=group, module_tp_group=None,
        language_tp_group=None, hidden_size=8, dtype=torch.float32, platform=Platform.detect(),
    )  # fmt: skip


def route_times() -> None:
    """Print the time of a rank's route at both ends of an edge: of the first microbatch, and of the others."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    samples = ROUTED_LANES * SAMPLES_PER_LANE
    dataset = dataset_of(4 * samples, images=True)
    print(f"\nroutes, {ROUTED_LANES} language lanes; ms      first    median   slowest")
    for encoder_lanes, (tp, cp) in product((ROUTED_LANES, 8, 1), ((1, 1), (2, 2))):
        manifest = planner_of(dataset, samples, packing=True, encoder_lanes=encoder_lanes).plan(0)
        for end, rank in (("encoder", 0), ("language", encoder_lanes)):
            first, others = _route(bridge_of(encoder_lanes, rank, tp, cp), manifest)
            row = "".join(f"{value:>10.2f}" for value in (first, statistics.median(others), max(others)))
            print(f"{encoder_lanes:>2} lanes to TP {tp}, CP {cp}: {end:<8} {row}", flush=True)
    dist.destroy_process_group()


def _route(bridge: Bridge, manifest: StepManifest) -> tuple[float, list[float]]:
    """Milliseconds of the first route, and of each of the others."""
    times = [milliseconds([partial(bridge.route, manifest, number)]) for number in range(manifest.num_microbatches)]
    return times[0], times[1:]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    torch.set_num_threads(1)
    plan_times(sorted(parser.parse_args().samples))
    route_times()


if __name__ == "__main__":
    main()
