"""What speed is judged by: seconds per module and kind, operations counted once per lane, and their shares of a step.

Operations are compared exactly with numbers worked out from the layer sizes below: all terms are small integers.
"""

import resource
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mimo_gemma4.config import ModuleLayout
from mimo_gemma4.data.manifest import Microbatch, PlannedMedia, PlannedSample, StepManifest
from mimo_gemma4.distributed.layout import build_layout
from mimo_gemma4.distributed.platform import CPU, Platform
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.media import MediaHeader
from mimo_gemma4.optim.step_reduction import ModuleUsage
from mimo_gemma4.train.usage import Stopwatch, UsageMeter, utilisation
from mimo_gemma4.weights.lora import AdaptedModule

LAYOUT = build_layout(
    {
        "vision": ModuleLayout(ranks=4, tp=2),  # two lanes: ranks 0, 1 and 2, 3
        "language": ModuleLayout(ranks=8, tp=2, cp=2, sequence_parallel=True),  # two lanes: ranks 4 … 7 and 8 … 11
        "pixels": ModuleLayout(ranks=2, reads="vision"),  # two lanes: ranks 12 and 13
    },
    14,
)
WINDOW = 3
TEXT = Gemma4TextConfig.from_hf(
    {
        "vocab_size": 32,
        "hidden_size": 8,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "global_head_dim": 4,
        "sliding_window": WINDOW,
        "num_kv_shared_layers": 0,
    }
)
LINEARS = 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16) + 8 * 32
"""Weights that every token is multiplied with: q and o, k and v, gate, up and down of two layers; the output head."""


def attention(length: int) -> int:
    """Forward operations of both layers: two products of 2 heads x 4 channels per visible (query, key) pair."""
    sliding = sum(1 for query in range(length) for key in range(query + 1) if query - key < WINDOW)
    full = sum(1 for query in range(length) for _ in range(query + 1))
    return 2 * 2 * 2 * 4 * (sliding + full)


class Encoder(nn.Module):
    """A tower and a projector; an image takes one operation per pixel, a frame ten."""

    def __init__(self) -> None:
        super().__init__()
        self.config = None
        self.tower, self.projector = nn.Linear(2, 2), nn.Linear(2, 2)

    def projector_parameters(self) -> list[nn.Parameter]:
        return list(self.projector.parameters())

    def flops(self, headers) -> float:  # noqa: ANN001
        return float(sum(header.width * header.height for header in headers))

    def frame_flops(self, headers) -> float:  # noqa: ANN001
        return 10.0 * sum(header.width * header.height for header in headers)


class Decoder(nn.Linear):
    """A soft token takes seven operations."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def flops(self, soft_tokens) -> float:  # noqa: ANN001
        return 7.0 * sum(soft_tokens)


def adapted(module: nn.Module) -> AdaptedModule:
    """A frozen module with a trainable adapter."""
    module.requires_grad_(False)
    if not hasattr(module, "config"):
        module.config = None
    return AdaptedModule(module, [nn.Linear(2, 1)])


def meter(rank: int, modules: dict[str, nn.Module] | None = None) -> UsageMeter:
    """The meter of a rank that holds its modules of `LAYOUT`, all trainable, or the given ones."""
    encoder, decoder = Encoder(), Decoder()
    modules = modules or {"vision": encoder, "language": nn.Linear(2, 2), "pixels": decoder}
    held = {name: module for name, module in modules.items() if name in LAYOUT.modules_of(rank)}
    model = SimpleNamespace(
        layout=LAYOUT,
        rank=rank,
        modules=held,
        encoders={name: encoder_of(held[name]) for name in held.keys() & {"vision"}},
        decoders={name: held[name] for name in held.keys() & {"pixels"}},
        text=TEXT,
        platform=Platform(CPU, "gloo"),
    )
    return UsageMeter(model, SimpleNamespace(media=MEDIA.__getitem__))


def encoder_of(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, AdaptedModule) else module


MEDIA = {
    0: [SimpleNamespace(media_type="image", header=MediaHeader(width=3, height=5))],
    1: [
        SimpleNamespace(media_type="image", header=MediaHeader(width=2, height=2)),
        SimpleNamespace(media_type="video", header=MediaHeader(width=7, height=1)),
    ],
    2: [],
}
LENGTHS = {0: 5, 1: 9, 2: 4}
LANES = {0: 0, 1: 1, 2: 0}
"""Language lane by sample."""
ITEMS = [(0, 0, 2, 0), (1, 0, 1, 0), (1, 1, 3, 1)]
"""Sample, ordinal, soft tokens, and the lane of the encoder; the decoder's is the other one."""


def planned_media(module: str, index: int, ordinal: int, soft_tokens: int, module_lane: int) -> PlannedMedia:
    return PlannedMedia(
        module=module, batch_index=index, index=index, ordinal=ordinal, soft_tokens=soft_tokens, lane=LANES[index],
        microbatch=0, sequence=0, start=1, module_lane=module_lane, module_offset=0,
    )  # fmt: skip


def manifest() -> StepManifest:
    samples = [
        PlannedSample(
            batch_index=index, index=index, lane=LANES[index], microbatch=0, sequence=0, start=0, length=length,
            padded_length=length,
        )
        for index, length in LENGTHS.items()
    ]  # fmt: skip
    microbatches = [
        Microbatch(lane, 0, 1, 16, tuple(sample for sample in samples if sample.lane == lane)) for lane in (0, 1)
    ]
    media = [planned_media("vision", *item) for item in ITEMS]
    media += [planned_media("pixels", *item[:3], 1 - item[3]) for item in ITEMS]
    return StepManifest(0, 1, tuple(microbatches), tuple(media))


def flops(rank: int, name: str, modules: dict[str, nn.Module] | None = None) -> float:
    usage = meter(rank, modules).usage(manifest(), {})
    return ModuleUsage(*usage.modules[list(LAYOUT.grids).index(name)].tolist()).flops


# --- seconds ---


def test_a_stopwatch_sums_the_blocks_of_a_module_and_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 1.5, 2.0, 2.25, 3.0, 3.125, 4.0, 6.0, 7.0, 7.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    stopwatch = Stopwatch(CPU)
    for module, kind in [("vision", "busy"), ("language", "busy"), ("vision", "wait"), ("vision", "busy")]:
        with stopwatch.measure(module, kind):
            pass
    expected = {("vision", "busy"): 2.5, ("language", "busy"): 0.25, ("vision", "wait"): 0.125}
    assert stopwatch.collect() == expected
    assert stopwatch.collect() == {}, "what was collected is not counted again"
    with stopwatch.measure("language", "wait"):
        pass
    assert stopwatch.collect() == {("language", "wait"): 0.5}


def test_seconds_stand_in_the_row_of_their_module_on_ranks_that_hold_it() -> None:
    seconds = {("vision", "busy"): 1.5, ("vision", "wait"): 0.25, ("language", "busy"): 8.0}
    usage = meter(1).usage(manifest(), seconds)
    assert usage.modules.dtype == torch.float64
    rows = {name: ModuleUsage(*row) for name, row in zip(LAYOUT.grids, usage.modules.tolist(), strict=True)}
    assert rows["vision"] == ModuleUsage(busy=1.5, wait=0.25, flops=0.0)
    assert rows["language"] == rows["pixels"] == ModuleUsage(0.0, 0.0, 0.0)
    assert usage.memory_gib == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, rel=0.01)


def test_a_module_that_was_not_timed_has_no_seconds() -> None:
    [row] = [row for row in meter(4).usage(manifest(), {}).modules.tolist() if any(row)]
    assert (row[0], row[1]) == (0.0, 0.0) and row[2] > 0


# --- operations ---


def test_one_rank_of_a_lane_reports_the_operations_of_its_sequences() -> None:
    lanes = [
        3 * (2 * LINEARS * (5 + 4) + attention(5) + attention(4)),  # forward, and twice as much backward
        3 * (2 * LINEARS * 9 + attention(9)),
    ]
    found = {rank: flops(rank, "language") for rank in LAYOUT.grids["language"].ranks}
    assert found == {4: lanes[0], 8: lanes[1]} | dict.fromkeys((5, 6, 7, 9, 10, 11), 0.0)


def test_one_rank_of_a_lane_reports_the_operations_of_its_media() -> None:
    encoded = {rank: flops(rank, "vision") for rank in LAYOUT.grids["vision"].ranks}
    assert encoded == {0: 3 * (3 * 5 + 2 * 2), 1: 0.0, 2: 3 * 10 * 7, 3: 0.0}
    decoded = {rank: flops(rank, "pixels") for rank in LAYOUT.grids["pixels"].ranks}
    assert decoded == {12: 3 * 7 * 3, 13: 3 * 7 * (2 + 1)}


def test_a_frozen_language_model_computes_no_gradients_of_weights_but_all_of_attention() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    expected = 2 * 2 * LINEARS * 9 + 3 * attention(9)
    assert flops(8, "language", {"language": frozen}) == expected
    assert flops(8, "language", {"language": adapted(nn.Linear(2, 2))}) == expected


def projector_only() -> Encoder:
    encoder = Encoder()
    encoder.tower.requires_grad_(False)
    return encoder


@pytest.mark.parametrize(
    ("encoder", "passes"),
    [
        (Encoder(), 3),
        (projector_only(), 1),
        (Encoder().requires_grad_(False), 1),
        (adapted(Encoder()), 2),
    ],
    ids=["trained", "projector trained", "frozen", "adapters trained"],
)
def test_passes_through_an_encoder(encoder: nn.Module, passes: int) -> None:
    assert flops(0, "vision", {"vision": encoder}) == passes * (3 * 5 + 2 * 2)


@pytest.mark.parametrize(("trained", "passes"), [(True, 3), (False, 2)])
def test_gradients_pass_through_a_frozen_decoder(trained: bool, passes: int) -> None:
    assert flops(12, "pixels", {"pixels": Decoder().requires_grad_(trained)}) == passes * 7 * 3


# --- shares ---


def test_shares_are_of_all_ranks_of_a_module() -> None:
    usage = ModuleUsage(busy=6.0, wait=1.0, flops=3e12)  # summed over 4 ranks in a step of 2 seconds
    shares = utilisation(usage, ranks=4, seconds=2.0, peak=1e12)
    assert shares == {"mfu": 0.375, "busy": 0.75, "wait": 0.125}


def test_without_a_known_peak_there_is_no_mfu() -> None:
    assert utilisation(ModuleUsage(1.0, 0.0, 1e9), ranks=1, seconds=1.0, peak=None)["mfu"] is None
