"""One global step on ranks, held against the same step in one process: layouts, the step, and what is compared.

Loss and gradients are compared before clipping and before the optimizer, in fp32. The tolerance is the project's "to
1e-5" of a gradient: for every parameter the norm of the difference is at most 1e-5 of the parameter's gradient norm
plus 1e-7 of the norm of the whole gradient. Sums in another order differ by a few fp32 roundings (6e-8 each); attention
amplifies them.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mimo_gemma4.config import load_config
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.distributed.p2p import PendingRecv
from mimo_gemma4.model.bridge import Bridge, Route
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.setup import set_up_run
from tests.dist.harness import in_turn, run_ranks
from tests.vlm_reference import (
    IMAGES,
    Reference,
    huggingface_step,
    reference_planner,
    write_model,
    write_shards,
)

BATCH, SEED, STEP = 7, 11, 1
SHARD = "train-000000.tar"

PARAMETERS = {
    "vision": ("model.vision_tower.", "model.embed_vision."),
    "vision tower": ("model.vision_tower.",),
    "audio": ("model.audio_tower.", "model.embed_audio."),
    "audio tower": ("model.audio_tower.",),
    "language": ("model.language_model.",),
    "pixels": ("decoders.pixels.",),
}
"""What can be frozen, and how the names of its parameters begin."""
PIXELS = {"decoder": "pixel_regression", "decoder_options.hidden_size": 24, "loss_weight": 0.7}


@dataclass(frozen=True)
class Case:
    """A layout, what trains, and how the batch is cut."""

    vision: int = 1
    """Data parallel size of the vision encoder; 0: it is not in the layout."""
    vision_tp: int = 1
    vision_pp: int = 1
    audio: int = 0
    """Data parallel size of the audio encoder; 0: it is not in the layout."""
    audio_tp: int = 1
    audio_pp: int = 1
    pixels: int = 0
    """Data parallel size of the decoder that reads images' tokens; 0: it is not in the layout."""
    pixels_tp: int = 1
    dp: int = 1
    """Sizes of the language model."""
    tp: int = 1
    cp: int = 1
    sp: bool = False
    pp: int = 1
    ep: int = 1
    part: bool = False
    """Stages may part layers from the layer whose keys and values they share."""
    sequences: int = 2
    packing: bool = False
    colocated: bool = False
    """Every module is on all ranks, whose number follows from the language model's sizes."""
    ranks: tuple[tuple[int, ...], ...] = ()
    """Ranks of vision, audio, language and pixels, as far as they are in the layout; empty: one after the other."""
    frozen: tuple[str, ...] = ()
    """Keys of `PARAMETERS`."""
    checkpointing: str = "none"

    def __str__(self) -> str:
        """What differs from the defaults."""
        changed = ((field, getattr(self, field.name)) for field in fields(self))
        return " ".join(f"{field.name}={value}" for field, value in changed if value != field.default) or "one each"

    @property
    def world(self) -> int:
        """Number of ranks."""
        if self.ranks:
            return 1 + max(rank for ranks in self.ranks for rank in ranks)
        sizes = {name: module["ranks"] for name, module in self._modules.items()}
        return sizes["language"] if self.colocated else sum(sizes.values())

    @property
    def _modules(self) -> dict[str, dict[str, Any]]:
        """Options of each module in the layout."""
        modules: dict[str, dict[str, Any]] = {}
        for name in ("vision", "audio"):
            dp, tp, pp = (getattr(self, key) for key in (name, f"{name}_tp", f"{name}_pp"))
            if dp:
                modules[name] = {"ranks": dp * tp * pp, "tp": tp, "pp": pp}
        sizes = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "ep": self.ep}
        ways = {"sequence_parallel": self.sp, "part_shared_key_values": self.part}
        modules["language"] = {"ranks": self.dp * self.tp * self.cp * self.pp} | sizes | ways
        if self.pixels:
            modules["pixels"] = {"ranks": self.pixels * self.pixels_tp, "tp": self.pixels_tp, "reads": "vision"}
        return modules

    @property
    def _placement(self) -> str:
        if self.colocated:
            return "colocated"
        return "mixed" if sum(map(len, self.ranks)) > len(set().union(*self.ranks)) else "disjoint"

    @property
    def overrides(self) -> list[str]:
        """The case as arguments of the command line."""
        modules = self._modules
        for name, ranks in zip(modules, self.ranks, strict=bool(self.ranks)):
            assert len(ranks) == modules[name]["ranks"], f"{name} has other sizes than ranks"
            modules[name]["ranks"] = list(ranks)
        if self.colocated:
            for options in modules.values():
                del options["ranks"]
        frozen = (part.partition(" ") for part in self.frozen)
        return [
            *(f"layout.{name}={json.dumps(options)}" for name, options in modules.items()),
            *(f"modules.{name}.freeze={tower or 'true'}" for name, _, tower in frozen),
            *(f"modules.pixels.{key}={value}" for key, value in PIXELS.items() if self.pixels),
            f"layout.placement={self._placement}",
            f"train.microbatch_size={self.sequences}",
            f"data.packing={str(self.packing).lower()}",
            f"train.activation_checkpointing={self.checkpointing}",
        ]


@dataclass(frozen=True)
class Prepared:
    """A folder with model, shards and configuration, and the step as one process computes it."""

    folder: Path
    reference: Reference
    media: tuple[tuple[str, ...], ...]
    """Media types of each of the step's samples, sorted."""


Row = tuple[Case, Prepared]


def write_run(folder: Path, media: Sequence[tuple[str, ...]] = IMAGES, **model: Any) -> None:
    """A model (`model`: options of `write_model`), shards with these media, and a configuration."""
    write_model(folder / "model", **model)
    write_shards(folder, media)
    write_config(folder)


def write_config(folder: Path, **sections: Any) -> None:
    """The configuration of a step of `folder`'s model on its shard; `sections` come on top."""
    config = {
        "run": {"dir": f"{folder}/run", "seed": SEED},
        "model": {"hf_path": f"{folder}/model", "precision": "fp32"},
        "layout": {"language": {}},
        "data": {"train": {"shards": f"{folder}/{SHARD}"}, "seq_length": 300},
        "train": {"global_batch_size": BATCH},
        "logging": {"tensorboard": False},
    }
    (folder / "run.yaml").write_text(json.dumps(config | sections))  # JSON is YAML


def prepare(
    folder: Path, write: Callable[[Path], None], reference_step: Callable[[Path], Reference] | None = None
) -> Prepared:
    """What `write(folder)` writes, and the step as `reference_step(folder)` computes it; None: as transformers does."""
    return Prepared(folder, *run_ranks(1, _prepare, folder, write, reference_step or transformers_step)[0])


def _prepare(
    rank: int, folder: Path, write: Callable[[Path], None], reference_step: Callable[[Path], Reference]
) -> tuple[Reference, tuple[tuple[str, ...], ...]]:
    write(folder)
    config = load_config([f"config={folder}/run.yaml"])
    planner = reference_planner(load_model_config(config.model, config.modules), folder / SHARD, BATCH, SEED)
    media = [sorted(item.media_type for item in planner.dataset.media(index)) for index in planner.samples(STEP)]
    return reference_step(folder), tuple(map(tuple, media))


def transformers_step(folder: Path) -> Reference:
    """The step as transformers' Gemma 4 computes it."""
    return huggingface_step(folder / "model", folder / SHARD, STEP, BATCH, SEED)


def step_on_rank(rank: int, folder: Path, overrides: list[str]) -> tuple[dict, list]:
    """The step's results, and this rank's pieces of the gradient: (name, shape, index, values)."""
    config = load_config([f"config={folder}/run.yaml", *overrides])
    config.run.dir = f"{config.run.dir}/{os.getppid()}"
    setup = set_up_run(config)
    trainer = build_trainer(setup)
    data = trainer.loader.load(STEP)
    for optimizer in trainer.optimizers.values():
        optimizer.zero_gradients()
    totals = trainer.runner.run(data)
    for optimizer in trainer.optimizers.values():
        optimizer.finish_gradients()
    step_results = trainer.reduce(totals, data)
    pieces = []
    for optimizer in trainer.optimizers.values():
        trainable = [parameter for parameter in optimizer.module.parameters() if parameter.requires_grad]
        whole = {id(parameter): torch.zeros(parameter.numel(), device=setup.platform.device) for parameter in trainable}
        for shard in optimizer.trainable_shards:
            whole[id(shard.tensor)][shard.start : shard.end] = shard.gradient
        for parameter in trainable:  # ZeRO-1 shards of the replicas make one gradient
            replicas = getattr(optimizer.groups, optimizer.by_tensor[id(parameter)].replicas)
            dist.all_reduce(whole[id(parameter)], group=replicas)
        for binding in optimizer.owned:
            if id(binding.tensor) in whole:
                local = whole[id(binding.tensor)].view(binding.tensor.shape)
                values = binding.view(local) / step_results.loss_tokens
                pieces.append((binding.name, binding.shape, binding.index, values.float().cpu().clone()))
    trainer.loader.close()
    result = {name: float(getattr(step_results, name)) for name in ("loss", "loss_tokens", "grad_norm")}
    result["hashes"] = step_results.hash_difference.abs().sum().item()
    result["decoder_losses"] = step_results.decoder_losses.tolist()
    setup.groups.destroy()
    return result, pieces


def step_with_wrong_row(rank: int, folder: Path, overrides: list[str], method: str, factor: float) -> tuple[dict, list]:
    """As `step_on_rank`, but rank 2 multiplies the first row that it gives to `method` of a bridge once by `factor`."""
    post, done = getattr(Bridge, method), []

    def post_wrongly(self: Bridge, route: Route, leaving: torch.Tensor | None) -> PendingRecv:
        if leaving is not None and rank == 2 and not done:
            leaving = leaving.clone()
            leaving[0] *= factor
            done.append(True)
        return post(self, route, leaving)

    setattr(Bridge, method, post_wrongly)
    return step_on_rank(rank, folder, overrides)


def worst_gradient(results: list, reference: Reference) -> tuple[float, str]:
    """The largest ratio of a parameter's deviation to its tolerance, and the parameter.

    A parameter without a gradient in the reference must have none here; one that is only there deviates without bound.
    """
    gradients = {name: torch.full_like(g, float("nan")) for name, g in reference.gradients.items()}
    for _, pieces in results:
        for name, shape, index, values in pieces:
            gradient = gradients.setdefault(name, torch.full(shape, float("nan")))
            assert tuple(gradient.shape) == tuple(shape), name
            gradient[index] = values
    ratios = {}
    for name, gradient in gradients.items():
        expected = reference.gradients.get(name, torch.zeros_like(gradient))
        deviation = float((gradient - expected).norm())
        ratios[name] = deviation / (1e-5 * float(expected.norm()) + 1e-7 * reference.norm)
    name = max(ratios, key=lambda key: float("inf") if ratios[key] != ratios[key] else ratios[key])
    return ratios[name], name


def deviation(case: Case, results: list, reference: Reference) -> str | None:
    """What is wrong with the results of a case's ranks; None: nothing. Prints how far off the worst gradient is."""
    outcome = results[0][0]
    frozen = tuple(prefix for part in case.frozen for prefix in PARAMETERS[part])
    trained = {name: g for name, g in reference.gradients.items() if not name.startswith(frozen)}
    expected = replace(reference, gradients=trained)
    ratio, name = worst_gradient(results, expected)
    print(f"{case}: worst gradient {ratio:.2f} of its tolerance ({name})")
    if any(result != outcome for result, _ in results) or outcome["hashes"] != 0:
        return f"{case}: ranks disagree: {[result for result, _ in results]}"
    if outcome["loss_tokens"] != expected.loss_tokens or outcome["loss"] != pytest.approx(expected.loss, rel=1e-5):
        return f"{case}: loss {outcome} instead of {expected.loss} over {expected.loss_tokens} tokens"
    if outcome["decoder_losses"] != pytest.approx(expected.decoder_losses, rel=1e-5):
        return f"{case}: decoder losses {outcome['decoder_losses']} instead of {expected.decoder_losses}"
    if not ratio <= 1.0:
        return f"{case}: {name} deviates by {ratio:.2f} times its tolerance"
    if outcome["grad_norm"] != pytest.approx(expected.norm, rel=1e-5):
        return f"{case}: gradient norm {outcome['grad_norm']} instead of {expected.norm}"
    return None


def check(rows: Iterable[Row], backend: str = "gloo", timeout: float = 280.0) -> None:
    """Run the rows on ranks started once per number of ranks, and name all that deviate. `timeout`: of all rows."""
    by_world: dict[int, list[Row]] = defaultdict(list)
    for case, prepared in rows:
        by_world[case.world].append((case, prepared))
    found = []
    for world, mine in sorted(by_world.items()):
        layouts = [(prepared.folder, case.overrides) for case, prepared in mine]
        ranks = run_ranks(world, in_turn, step_on_rank, layouts, backend=backend, timeout=timeout)
        for (case, prepared), *results in zip(mine, *ranks, strict=True):
            print(prepared.folder.name, end=", ")
            if wrong := deviation(case, results, prepared.reference):
                found.append(f"{prepared.folder.name}, {wrong}")
    assert not found, "\n".join(found)
