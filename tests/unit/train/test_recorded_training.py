"""A run that starts from a checkpoint trains what it trained, or an error names every difference."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from mimo_gemma4.checkpoint.files import MARKER
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.train.recorded_training import check_recorded_parts
from mimo_gemma4.weights.bindings import Binding, bind_replicated

LORA, SCALE = {"up": 2, "down": 2}, 1.5
"""Adapters of the checkpoint's language module."""


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A world of one, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Adapters on two linears of the language model; vision's projector trained, its tower frozen."""
    shapes = {f"language.weight.{linear}.weight": [4, 4] for linear in ("up", "down", "gate")}
    for linear, rank in LORA.items():
        for kind in ("weight", "exp_avg"):
            shapes |= {f"language.{kind}.{linear}.lora_A.weight": [rank, 4]}
            shapes |= {f"language.{kind}.{linear}.lora_B.weight": [4, rank]}
    shapes |= {"vision.weight.tower": [4, 1], "vision.weight.projector": [4, 1], "vision.exp_avg.projector": [4, 1]}
    tensors = {f"{key}@0,0": torch.zeros(shape) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "rank_00000.safetensors", metadata={"shapes": json.dumps(shapes)})
    size = (tmp_path / "rank_00000.safetensors").stat().st_size
    marker = {"files": {"rank_00000.safetensors": {"bytes": size}}, "trainer": {"lora": {"language": SCALE}}}
    (tmp_path / MARKER).write_text(json.dumps(marker))
    return tmp_path


def parameter(name: str, *shape: int, trains: bool = True) -> Binding:
    return bind_replicated(name, nn.Parameter(torch.zeros(shape), requires_grad=trains))


def check(path: Path, lora: dict[str, int], trained: set[str], weights_only: bool, **other: Any) -> None:
    language = [parameter(f"{linear}.weight", 4, 4, trains=linear in trained) for linear in ("up", "down", "gate")]
    for linear, rank in lora.items():
        language += [parameter(f"{linear}.lora_A.weight", rank, 4), parameter(f"{linear}.lora_B.weight", 4, rank)]
    vision = [parameter(name, 4, 1, trains=name in trained) for name in ("tower", "projector")]
    optimizers: Any = {"language": SimpleNamespace(bindings=language), "vision": SimpleNamespace(bindings=vision)}
    if other.get("without"):
        del optimizers[other["without"]]
    scales = {"language": other.get("scale", SCALE)} if lora else {}
    check_recorded_parts(path, optimizers, scales, dist.group.WORLD, weights_only=weights_only)


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_same_parts_pass(checkpoint: Path, weights_only: bool) -> None:
    check(checkpoint, LORA, {"projector"}, weights_only)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(
    ("lora", "scale", "message"),
    [
        ({"up": 2}, SCALE, "modules.language.lora.targets: down adapted there but not here"),
        (LORA | {"gate": 2}, SCALE, "modules.language.lora.targets: gate adapted here but not there"),
        ({"up": 2, "gate": 2}, SCALE, "down adapted there but not here; .*gate adapted here but not there"),
        ({"up": 3, "down": 3}, SCALE, "modules.language.lora.rank is 3, and 2 there, of down, up"),
        (LORA, 2.0, "the adapters of language in .* have the scale 1.5, but modules.language.lora asks for 2.0"),
        ({}, None, r"asks for None \(None: no adapters\); .*down, up adapted there but not here"),
    ],
)
def test_other_adapters_are_named(
    checkpoint: Path, lora: dict[str, int], scale: float | None, message: str, weights_only: bool
) -> None:
    key = "checkpoint.init_from" if weights_only else "checkpoint.resume"
    with pytest.raises(ConfigError, match=f"{key}: .*{message}"):
        check(checkpoint, lora, {"projector"}, weights_only, scale=scale)


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        (set(), "modules.vision.freeze: projector trained there but not here"),
        ({"projector", "tower"}, "modules.vision.freeze: tower trained here but not there"),
        ({"projector", "gate"}, "modules.language.freeze: gate.weight trained here but not there"),
    ],
)
def test_other_frozen_parts_are_named_on_resuming(checkpoint: Path, trained: set[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(checkpoint, LORA, trained, weights_only=False)
    check(checkpoint, LORA, trained, weights_only=True)  # a second stage loads all weights, and may train others


def test_a_module_that_is_left_out_is_named_on_resuming(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="`layout` lacks vision, which it trained"):
        check(checkpoint, LORA, set(), weights_only=False, without="vision")


def test_a_damaged_checkpoint_is_left_to_its_reader(checkpoint: Path) -> None:
    (checkpoint / "rank_00000.safetensors").write_bytes(b"")
    check(checkpoint, {}, set(), weights_only=True)
