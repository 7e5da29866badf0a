"""Tokens per second of E4B-wide models with images by where modules are placed, with all GPUs counted.

    torchrun --nproc-per-node 4 benchmarks/placement.py [--load heavy] [--layers 12] [--tp 2]

`homogeneous`: both modules on all ranks with the language model's TP and DP. `colocated`: both on all ranks, the vision
tower without TP. `disjoint`: each has ranks of its own, so many that no rank has more operations than it must.

Loads are those of `image_loads.py`. Real vision tower, the first layers of E4B's decoder with whole tables and head,
random weights; packed real training steps from shards, all modules trained, every layer computed again in backward.
Prints one table. On a CPU (`--tiny`) the model is `gemma4_tiny` and times mean nothing.
"""

import argparse
import gc
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from image_loads import LOADS, TINY_LOADS, Load, Operations, with_byte_tokens, write_shard
from random_checkpoint import shortened
from step_timeline import Timeline, busy_seconds, exposed_seconds

from mimo_gemma4.config import Config, load_config
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.distributed.layout import build_layout
from mimo_gemma4.distributed.platform import Platform, create_platform, destroy_distributed
from mimo_gemma4.distributed.process_groups import create_process_groups
from mimo_gemma4.model.mimo_model import MimoModel
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer
from mimo_gemma4.train.build import build_conversation_encoder, build_loader, build_modules, open_dataset
from mimo_gemma4.train.setup import RunSetup
from mimo_gemma4.train.trainer import Trainer
from mimo_gemma4.weights.bindings import Constant, Normal

WARM_UP = 2
PLACEMENTS = ("homogeneous", "colocated", "disjoint")


def layout_options(placement: str, world: int, tp: int, vision_share: float) -> list[str]:
    """The `layout` of a placement; a disjoint one leaves as few operations as it can to the rank that has most."""

    def language(ranks: int) -> str:
        size = tp if ranks % tp == 0 else 1
        return f"{{ranks: {ranks}, tp: {size}, sequence_parallel: {str(size > 1).lower()}}}"

    if placement == "disjoint":
        shares = {ranks: max(vision_share / ranks, (1.0 - vision_share) / (world - ranks)) for ranks in range(1, world)}
        vision = min(shares, key=shares.__getitem__)
        return [f"layout.vision={{ranks: {vision}}}", f"layout.language={language(world - vision)}"]
    vision_tp = tp if placement == "homogeneous" else 1
    return [f"layout.vision={{ranks: {world}, tp: {vision_tp}}}", f"layout.language={language(world)}"] + [
        "layout.placement=colocated"
    ]


def configuration(folder: Path, load: Load, options: argparse.Namespace) -> list[str]:
    """Arguments of a run, its layout left out."""
    (folder / "run.yaml").write_text("data: {train: {}}\nlayout: {}\n")
    return [
        f"config={folder}/run.yaml",
        f"run.dir={folder}/run",
        "run.timeout_seconds=180",
        f"model.preset={'gemma4_tiny' if options.tiny else 'gemma4_e4b'}",
        f"model.precision={'fp32' if options.tiny else 'bf16'}",
        f"modules.vision.processor={{max_soft_tokens: {load.soft_tokens}}}",
        f"data.train.shards={folder}/{load.name}-0.tar",
        f"data.seq_length={load.seq_length}",
        "data.workers=12",
        f"train.steps={WARM_UP + options.steps + 2}",
        f"train.global_batch_size={load.samples}",
        "train.activation_checkpointing=full",
        "optim.lr=1e-5",
        "logging.tensorboard=false",
    ]


def build(config: Config, hf_config: dict[str, Any], platform: Platform) -> tuple[RunSetup, Trainer]:
    """`build_trainer`, but for weights that are drawn on the device, which takes no time. Collective over all ranks."""
    layout = build_layout(config.layout, dist.get_world_size())
    setup = RunSetup(config, hf_config, layout, platform, create_process_groups(layout, platform))
    dataset = open_dataset(setup, "train", config.data.train, build_conversation_encoder(setup))
    model = build_modules(setup)
    fill(model)
    optimizers = {
        name: ModuleOptimizer(module, setup.groups.modules[name], config.optim)
        for name, module in model.modules.items()
    }
    return setup, Trainer(config, model, optimizers, build_loader(setup, dataset, train=True), None)


@torch.no_grad()
def fill(model: MimoModel) -> None:
    """First values, equal where ranks hold equal slices."""
    for module in model.modules.values():
        for binding in module.bindings():
            view, initial = binding.view(), binding.initial
            key = f"{binding.name}{[part.start for part in binding.index]}"
            if isinstance(initial, Normal):
                generator = torch.Generator(view.device).manual_seed(zlib.crc32(key.encode()))
                view.copy_(torch.randn(view.shape, generator=generator, device=view.device, dtype=view.dtype))
                view.mul_(initial.std)
            elif isinstance(initial, Constant):
                view.fill_(initial.value)


@dataclass(frozen=True)
class Measured:
    """Figures of a run; seconds are the slowest rank's."""

    step: float
    data: float
    """Share of the step that the host waited for data, on the rank that did so longest."""
    exposed: float
    """Share of the step that transfers took, on the rank on which they took longest."""
    busy: dict[str, float]
    """By module, the share of the step that its passes took, on the mean of its ranks."""
    tokens: int
    """Tokens of a step."""


def measure(trainer: Trainer, steps: int) -> Measured:
    """Time steps, then record one. Collective over all ranks."""
    model, device, load = trainer.model, trainer.model.platform.device, trainer.loader.load
    waited = 0.0

    def timed_load(step: int) -> Any:
        nonlocal waited
        begin = time.perf_counter()
        data = load(step)
        waited += time.perf_counter() - begin
        return data

    for _ in range(WARM_UP):
        trainer.train_step()
    trainer.loader.load = timed_load  # type: ignore[method-assign]
    _finish(device)
    begin = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    _finish(device)
    step = (time.perf_counter() - begin) / steps
    data = waited / steps
    timeline, everyone = Timeline(device), [[]] * model.layout.world_size
    trainer.train_step()  # the host has to be ahead of the device again, as it is in a run
    manifest = trainer.loader.planner.plan(trainer.step)
    trainer.runner.span = timeline.span
    trainer.train_step()
    dist.all_gather_object(everyone, timeline.spans(), group=model.groups.host)
    exposed = max(exposed_seconds(model.layout, manifest, everyone))
    slowest = torch.tensor([step, data])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=model.groups.host)
    step, data = slowest.tolist()
    busy = {name: seconds / step for name, seconds in busy_seconds(model.layout, everyone).items()}
    return Measured(step, data / step, exposed / step, busy, sum(planned.length for planned in manifest.samples))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier(group=dist.group.WORLD)


def row(
    load: Load, placement: str, trainer: Trainer, operations: Operations, measured: Measured
) -> tuple[float, list[str]]:
    """Tokens per second, and the line of the table."""
    grids, world = trainer.model.layout.grids.values(), trainer.model.layout.world_size
    layout = ", ".join(f"{grid.name} {len(grid.ranks)} (tp {grid.tp} dp {grid.dp})" for grid in grids)
    speed = measured.tokens / measured.step
    useful = 3 * load.samples * (operations.vision + operations.language) / measured.step / world / 1e12
    figures = [f"{speed:,.0f}", f"{1e3 * measured.step:.1f}", f"{useful:.1f}"]
    shares = [
        f"{100 * share:.1f}"
        for share in (operations.vision_share, *measured.busy.values(), measured.data, measured.exposed)
    ]
    return speed, [load.name, placement, layout, *figures, *shares]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="decoder layers")
    parser.add_argument("--tp", type=int, default=2, help="of the language model, where it divides its ranks")
    parser.add_argument("--load", choices=("light", "heavy"), help="default: both")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a CPU")
    options = parser.parse_args()
    platform = create_platform()
    folders = [tempfile.mkdtemp()] if platform.local_rank == 0 else [""]
    dist.broadcast_object_list(folders, src=0)
    folder, table = Path(folders[0]), []
    for load in TINY_LOADS if options.tiny else LOADS:
        if options.load not in (None, load.name):
            continue
        if platform.rank == 0:
            write_shard(folder / f"{load.name}-0.tar", load)
        arguments = configuration(folder, load, options)
        dist.barrier(group=dist.group.WORLD)
        rows = []
        for placement in PLACEMENTS:
            config = load_config([*arguments, "layout.vision={}", "layout.language={}"])
            hf_config = with_byte_tokens(load_model_config(config.model, config.modules))
            if not options.tiny:
                hf_config = shortened(hf_config, options.layers)
            operations = Operations.of(hf_config, load)
            layout = layout_options(placement, dist.get_world_size(), options.tp, operations.vision_share)
            setup, trainer = build(load_config([*arguments, *layout]), hf_config, platform)
            rows.append(row(load, placement, trainer, operations, measure(trainer, options.steps)))
            if platform.rank == 0:  # a run that is cut short keeps what it has measured
                print("  ".join(rows[-1][1]), flush=True)
            trainer.close()
            setup.groups.destroy()
            del setup, trainer
            gc.collect()
            torch.cuda.empty_cache()
        best = max(rows)[0]
        table += [[*cells, "wins" if speed == best else f"{speed / best:.2f}"] for speed, cells in rows]
    if platform.rank == 0:
        columns = ["load", "placement", "layout", "tokens/s", "step ms", "TFLOP/s/GPU"]
        columns += ["ops % vision", "busy % vision", "busy % language", "data wait %", "transfer %", "of the best"]
        widths = [max(len(line[column]) for line in [columns, *table]) for column in range(len(columns))]
        for line in [columns, *table]:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    destroy_distributed()


if __name__ == "__main__":
    main()
