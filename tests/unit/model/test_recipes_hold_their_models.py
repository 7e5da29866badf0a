"""The recipes for real models, built at full size on the meta device, rank by rank, in a world of fake process groups.

They hold every tensor that transformers' model of the same configuration has, each element on one rank or on replicas;
they need the memory that they state; and their schedule runs.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, Gemma4ForConditionalGeneration

from mimo_gemma4.config import Config, load_config
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.data.manifest import Microbatch, PlannedMedia, PlannedSample, StepManifest
from mimo_gemma4.distributed.layout import LANGUAGE, Layout, build_layout
from mimo_gemma4.distributed.platform import CPU, Platform, install
from mimo_gemma4.distributed.process_groups import create_process_groups
from mimo_gemma4.model.mimo_model import MimoModel
from mimo_gemma4.weights.bindings import Binding, BoundModule
from mimo_gemma4.weights.freezing import freeze
from tests import REPOSITORY
from tests.schedule_simulator import World, simulate
from tests.schedule_worlds import connect

META = torch.device("meta")
MEMORY_LINE = re.compile(r"^#   (\w+)(?:, stage (\d))? +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)
PRESETS = {
    "vlm_31b_tp4_pp2": "gemma4_31b",
    "vlm_31b_tp4_pp4": "gemma4_31b",
    "avlm_e4b_8gpu": "gemma4_e4b",
    "vlm_26b_a4b_ep8": "gemma4_26b_a4b",
    "text_e4b_64k_cp8": "gemma4_e4b",
    "text_e4b_64k_cp16": "gemma4_e4b",
}


class Recipe:
    """A configuration file with its model's architecture instead of its weights."""

    def __init__(self, name: str):
        self.path = REPOSITORY / "configs" / f"{name}.yaml"
        self.config = load_config([f"config={self.path}", "model.hf_path=null", f"model.preset={PRESETS[name]}"])
        self.hf_config = load_model_config(self.config.model)
        self.layout = build_layout(self.config.layout, world_size(self.config), None)

    @contextmanager
    def model(self, rank: int) -> Iterator[MimoModel]:
        """What a rank holds, frozen as configured; nothing has storage."""
        size = self.layout.world_size
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        try:
            groups = create_process_groups(self.layout, Platform(CPU, "fake"))
            with META:
                model = MimoModel(self.config, self.hf_config, self.layout, groups, Platform(META, "fake"))
            for name, module in model.modules.items():
                freeze(name, module, self.config.module(name).frozen)
            yield model
        finally:
            dist.destroy_process_group()


def world_size(config: Config) -> int:
    ranks = [module.ranks for module in config.layout.modules.values() if isinstance(module.ranks, int)]
    return max(ranks) if config.layout.placement == "colocated" else sum(ranks)


def replica(layout: Layout) -> list[int]:
    """Ranks that together hold every module whole: cp and dp 0, but experts are spread over those."""
    grids = layout.grids.values()
    return sorted({r for grid in grids for r in grid.ranks if grid.ep > 1 or grid.coordinate(r)[1:3] == (0, 0)})


@pytest.fixture(scope="module", autouse=True)
def fake_world() -> Iterator[None]:
    """megatron-core on the CPU, and groups that hold no connection, those of the host included."""
    install(Platform(CPU, "fake"))
    new_group = dist.new_group

    def new_fake_group(ranks: list[int], backend: str | None = None, **options: Any) -> Any:
        return new_group(ranks, backend="fake", **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", new_fake_group)
        yield


@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_is_held_once_in_the_stated_memory(name: str):
    recipe = Recipe(name)
    stated = {
        (module, int(stage or 0)): [float(size) for size in sizes]
        for module, stage, *sizes in MEMORY_LINE.findall(recipe.path.read_text(encoding="utf-8"))
    }
    assert {module for module, _ in stated} == set(recipe.layout.grids)
    slices: dict[str, set[tuple[tuple[int, int], ...]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    unused: set[str] = set()
    for rank in replica(recipe.layout):
        with recipe.model(rank) as model:
            for module_name, module in model.modules.items():
                stage = recipe.layout.grids[module_name].coordinate(rank).pp
                needed = gigabytes(module, model.groups.modules[module_name])
                assert needed == pytest.approx(stated[module_name, stage], rel=0.05, abs=0.05), (module_name, stage)
                unused |= set(module.unused_tensors())
                for binding in module.bindings():
                    shapes[binding.name] = binding.shape
                    slices.setdefault(binding.name, set()).add(bounds(binding))
    assert shapes == {key: shape for key, shape in tensors_of(recipe).items() if key not in unused}
    for key, held in slices.items():
        assert sum(math.prod(stop - start for start, stop in part) for part in held) == math.prod(shapes[key]), key
        assert not any(overlap(*pair) for pair in combinations(held, 2)), key


def gigabytes(module: BoundModule, groups: Any) -> list[float]:
    """Weights, fp32 gradients and the optimizer's fp32 weight and moments of one rank, in 10^9 bytes."""
    weights = gradients = optimizer = 0.0
    replicas = {id(binding.tensor): getattr(groups, binding.replicas) for binding in module.bindings()}
    for parameter in module.parameters():
        weights += parameter.numel() * parameter.element_size()
        if parameter.requires_grad:
            gradients += 4 * parameter.numel()
            optimizer += 12 * parameter.numel() / replicas[id(parameter)].size()
    return [size / 1e9 for size in (weights, gradients, optimizer)]


def bounds(binding: Binding) -> tuple[tuple[int, int], ...]:
    return tuple((part.start, part.stop) for part in binding.index)


def overlap(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))


def tensors_of(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of transformers' model that modules of the layout answer for; the head is tied."""
    with META:
        model = Gemma4ForConditionalGeneration(AutoConfig.for_model(**recipe.hf_config))
    parts = {"language_model": LANGUAGE} | {f"{kind}_tower": kind for kind in ("vision", "audio")}
    parts |= {f"embed_{kind}": kind for kind in ("vision", "audio")}
    return {
        key: tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if key != "lm_head.weight" and parts[key.split(".")[1]] in recipe.layout.grids
    }


@pytest.mark.parametrize("name", PRESETS)
def test_the_schedule_runs(name: str):
    recipe = Recipe(name)
    layout, count = recipe.layout, 3 * recipe.layout.language.pp + 2
    manifest = illustrated_step(layout, count)
    world = World(
        layout,
        manifest,
        dict.fromkeys(layout.encoders, 0),
        {encoder: recipe.config.module(encoder).run_ahead for encoder in layout.encoders},
        experts=layout.language.ep > 1,
    )
    for encoder in layout.encoders:
        connect(world, encoder)
    timeline = simulate(world, world.plans())
    passes = 2 * count
    assert all(timeline.busy[rank] >= passes for rank in layout.language.ranks)
    assert all(timeline.in_flight[rank, LANGUAGE] <= layout.language.pp for rank in layout.language.ranks)


def illustrated_step(layout: Layout, count: int) -> StepManifest:
    """Every lane trains on a sequence a microbatch; of four, three have an item of each encoder, dealt out in turn."""
    lanes = range(layout.language.dp)
    microbatches = [
        Microbatch(lane, number, 1, 8, (PlannedSample(0, 0, lane, number, 0, 0, 8, 8),))
        for lane in lanes
        for number in range(count)
    ]
    media, offsets = [], {}
    for encoder in layout.encoders:
        for number in range(count):
            for lane in lanes:
                item = number * layout.language.dp + lane
                if item % 4 == 3:
                    continue
                module_lane = item % layout.grids[encoder].dp
                offset = offsets.get((encoder, number, module_lane), 0)
                offsets[encoder, number, module_lane] = offset + 2
                media.append(PlannedMedia(encoder, item, item, 0, 2, lane, number, 0, 0, module_lane, offset))
    return StepManifest(0, count, tuple(microbatches), tuple(media))
