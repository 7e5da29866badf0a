"""A resumed run equals an uninterrupted one bit for bit; another layout reads the same weights and moments exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_gemma4.checkpoint import save_load as checkpoint
from mimo_gemma4.checkpoint.files import read_marker
from mimo_gemma4.config import OptimConfig
from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer
from mimo_gemma4.optim.step_reduction import StepReduction
from tests.checkpoint_reader import whole_tensors
from tests.dist.harness import run_ranks
from tests.dist.optim.toy_modules import SHAPES, TRAINABLE, Grids, ToyModule, loss, samples, toy_world

CONFIG = OptimConfig(lr=0.01, weight_decay=0.1, clip_grad=0.5)
TP2_DP2: Grids = {"language": ((0, 1, 2, 3), 2)}
TWO_GRIDS: Grids = {"vision": ((0, 1), 1), "language": ((2, 3), 2)}
SHARED_RANKS: Grids = {"vision": ((0, 1), 2), "language": ((0, 1), 1)}
ONE_RANK: Grids = {"vision": ((0,), 1), "language": ((0,), 1)}


class Run:
    """A training run of toy modules on the ranks of this world."""

    def __init__(self, grids: Grids, dtype: torch.dtype, frozen: tuple[str, ...] = (), seed: int = 7):
        layout, self.groups = toy_world(grids)
        self.optimizers: dict[str, ModuleOptimizer] = {}
        for name, groups in self.groups.modules.items():
            module = ToyModule(name, groups.tp, dtype, seed)
            module.requires_grad_(name not in frozen)
            self.optimizers[name] = ModuleOptimizer(module, groups, CONFIG)
        self.reduction = StepReduction(layout, CONFIG.clip_grad, torch.device("cpu"))

    def train(self, steps: range) -> None:
        for step in steps:
            for name, optimizer in self.optimizers.items():
                optimizer.zero_gradients()
                lane = self.groups.modules[name].dp
                batch = samples(step, len(name)).to(optimizer.module.up.dtype)[lane.rank() :: lane.size()]
                loss(optimizer.module(batch)).backward()
                optimizer.finish_gradients()
            agreed = self.reduction.reduce(self.optimizers, loss_tokens=5.0)
            for optimizer in self.optimizers.values():
                optimizer.apply(agreed, CONFIG.lr)

    def save(self, folder: Path, step: int, keep: int | None = None) -> Path:
        return checkpoint.save(folder, step, self.optimizers, {"step": step}, host=self.groups.host, keep=keep)

    def load(self, path: Path) -> dict[str, Any]:
        return checkpoint.load(path, self.optimizers, host=self.groups.host)

    def weights(self) -> list[tuple[str, tuple[slice, ...], torch.Tensor]]:
        return [
            (f"{name}.weight.{b.name}", b.index, b.view().detach().clone())
            for name, optimizer in self.optimizers.items()
            for b in optimizer.bindings
        ]


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype
        and one[k].flatten().view(torch.uint8).equal(other[k].flatten().view(torch.uint8))
        for k in one
    )


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def straight(rank: int, folder: Path, grids: Grids, dtype: torch.dtype) -> None:
    run = Run(grids, dtype)
    run.train(range(1, 3))
    run.save(folder / "straight", 2)
    run.train(range(3, 5))
    run.save(folder / "straight", 4)


def resumed(rank: int, folder: Path, grids: Grids, dtype: torch.dtype) -> None:
    run = Run(grids, dtype, seed=99)  # other initial weights: all that counts must come from the checkpoint
    state = run.load(folder / "straight" / "step_00000002")
    assert state == {"step": 2}
    run.save(folder / "again", 2)
    run.train(range(3, 5))
    run.save(folder / "again", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("grids", [TP2_DP2, TWO_GRIDS], ids=["tp2dp2", "two grids"])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path, grids, dtype):
    run_ranks(4, straight, tmp_path, grids, dtype)
    run_ranks(4, resumed, tmp_path, grids, dtype)
    one, other = tmp_path / "straight", tmp_path / "again"
    assert files(one / "step_00000002") == files(other / "step_00000002")
    assert same_bits(whole_tensors(one / "step_00000004"), whole_tensors(other / "step_00000004"))
    assert not same_bits(whole_tensors(one / "step_00000002"), whole_tensors(one / "step_00000004"))
    marker = read_marker(other / "step_00000004")
    assert set(marker["update_counts"].values()) == {4}


def test_contents_name_every_element_once(tmp_path):
    run_ranks(4, straight, tmp_path, TWO_GRIDS, torch.bfloat16)
    whole = whole_tensors(tmp_path / "straight" / "step_00000004")
    expected = {f"{m}.weight.{m}.{n}": SHAPES[n] for m in TWO_GRIDS for n in SHAPES}
    for kind in ("main_weight", "exp_avg", "exp_avg_sq"):
        expected |= {f"{m}.{kind}.{m}.{n}": SHAPES[n] for m in TWO_GRIDS for n in TRAINABLE}
    assert {key: tuple(value.shape) for key, value in whole.items()} == expected
    for key, value in whole.items():
        assert value.dtype == (torch.bfloat16 if ".weight." in key else torch.float32)
        assert value.count_nonzero() > value.numel() // 2  # moments have moved


def reload_elsewhere(rank: int, path: Path, target: Path, grids: Grids, dtype: torch.dtype) -> list[Any]:
    run = Run(grids, dtype, seed=99)
    run.load(path)
    run.save(target, 4)
    return run.weights()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("world", "grids"), [(2, SHARED_RANKS), (1, ONE_RANK)], ids=["tp and placement", "one rank"])
def test_other_layout_reads_the_same_bits(tmp_path, world, grids, dtype):
    run_ranks(4, straight, tmp_path, TWO_GRIDS, dtype)
    source, target = tmp_path / "straight" / "step_00000004", tmp_path / "elsewhere"
    held = run_ranks(world, reload_elsewhere, source, target, grids, dtype)
    whole = whole_tensors(source)
    assert same_bits(whole, whole_tensors(target / "step_00000004"))
    for key, index, value in (entry for rank in held for entry in rank):
        assert torch.equal(value, whole[key][index]), key


def to_bf16(rank: int, path: Path) -> list[Any]:
    run = Run(ONE_RANK, torch.bfloat16, frozen=("vision",), seed=99)
    run.load(path)
    return run.weights()


def test_precision_and_freezing_may_change(tmp_path):
    run_ranks(4, straight, tmp_path, TWO_GRIDS, torch.float32)
    source = tmp_path / "straight" / "step_00000004"
    whole = whole_tensors(source)
    for key, index, value in run_ranks(1, to_bf16, source)[0]:
        assert torch.equal(value, whole[key][index].bfloat16()), key


def misfit(rank: int, folder: Path) -> str:
    run = Run(ONE_RANK, torch.float32, frozen=("vision",))
    run.save(folder, 1)
    thawed = Run(ONE_RANK, torch.float32, seed=99)
    language = thawed.optimizers["language"]
    language.bindings = [
        type(b)(b.name, (9, *b.shape[1:]), b.index, b.tensor, b.region) if b.name.endswith("up") else b
        for b in language.bindings
    ]
    before = thawed.weights()
    with pytest.raises(CheckpointError) as caught:
        thawed.load(folder / "step_00000001")
    assert all(torch.equal(a[2], b[2]) for a, b in zip(before, thawed.weights(), strict=True))
    return str(caught.value)


def test_misfit_lists_everything_and_changes_nothing(tmp_path):
    message = run_ranks(1, misfit, tmp_path)[0]
    assert "checkpoint.resume" in message and "step_00000001" in message
    for name in TRAINABLE:  # saved frozen, now trained: no moments
        assert f"vision.exp_avg.vision.{name}" in message
    assert "language.weight.language.up is [12, 6] in the checkpoint and [9, 6] in the model" in message
