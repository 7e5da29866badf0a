"""An optimizer step over parallel ranks and over two grids equals one-process AdamW with global clipping.

Tolerances: fp32 sums of a few terms in another order differ by a few 1e-7 of the largest term; 1e-6 relative to the
tensor's size leaves room for that through three steps and fails for any wrong factor, missing term or double count.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mimo_gemma4.config import OptimConfig
from mimo_gemma4.optim.learning_rate import learning_rate
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer
from mimo_gemma4.optim.step_reduction import StepReduction, StepReport
from tests.dist.harness import run_ranks
from tests.dist.optim.toy_modules import (
    TRAINABLE,
    Grids,
    ToyModule,
    loss,
    reference_forward,
    reference_weights,
    samples,
    toy_world,
)

STEPS = 3
CONFIG = OptimConfig(lr=0.01, weight_decay=0.1, beta2=0.99, eps=1e-4, clip_grad=0.5, warmup_steps=2)
ONE_GRID: Grids = {"language": ((0, 1, 2, 3), 2)}
TWO_GRIDS: Grids = {"vision": ((0, 1), 1), "language": ((2, 3), 2)}
SHARED_RANKS: Grids = {"vision": ((0, 1), 1), "language": ((0, 1), 2)}


def lane_samples(rank: int, count: int) -> slice:
    """Uneven lanes: the first takes one sample, the second the rest; one lane takes all."""
    return slice(None) if count == 1 else slice(0, 1) if rank == 0 else slice(1, None)


def train(rank: int, grids: Grids, frozen: tuple[str, ...]) -> dict[str, Any]:
    layout, groups = toy_world(grids)
    modules = {name: ToyModule(name, groups.modules[name].tp) for name in layout.modules_of(rank)}
    for name in modules.keys() & set(frozen):
        modules[name].requires_grad_(False)
    optimizers = {name: ModuleOptimizer(module, groups.modules[name], CONFIG) for name, module in modules.items()}
    reduction = StepReduction(layout, CONFIG.clip_grad, torch.device("cpu"))
    reports = []
    for step in range(1, STEPS + 1):
        counts: dict[str, Any] = {}
        for name, module in modules.items():
            optimizers[name].zero_gradients()
            lane = groups.modules[name].dp
            mine = samples(step, len(name))[lane_samples(lane.rank(), lane.size())]
            losses = [loss(module(sample[None])) for sample in mine]  # one microbatch a sample
            if optimizers[name].trainable:
                for microbatch_loss in losses:
                    microbatch_loss.backward()
            if name == "language":
                counts = {"loss_sum": sum(losses).detach(), "loss_tokens": len(mine), "tokens": len(mine) + 1}
            optimizers[name].finish_gradients()
        results = reduction.reduce(optimizers, **counts)
        for optimizer in optimizers.values():
            optimizer.apply(results, learning_rate(CONFIG, step, STEPS))
        reports.append(StepReport(results).read())
    state = {b.name: (b.index, b.view().detach().clone()) for o in optimizers.values() for b in o.bindings}
    return {"reports": reports, "state": state}


def reference(grids: Grids, frozen: tuple[str, ...]) -> dict[str, Any]:
    """The same on whole tensors: the sum of all modules' losses over the number of language samples."""
    weights = {name: reference_weights(name) for name in grids}
    trained = [weights[name][short].requires_grad_() for name in grids if name not in frozen for short in TRAINABLE]
    adamw = torch.optim.AdamW(
        [
            {"params": [w for w in trained if w.ndim > 1], "weight_decay": CONFIG.weight_decay},
            {"params": [w for w in trained if w.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.eps,
        foreach=False,
    )
    norms, losses = [], []
    for step in range(1, STEPS + 1):
        sums = {name: loss(reference_forward(weights[name], samples(step, len(name)))) for name in grids}
        count = len(samples(step, len("language")))
        adamw.zero_grad()
        (sum(sums.values()) / count).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, CONFIG.clip_grad).item())
        losses.append(sums["language"].item() / count)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(CONFIG, step, STEPS)
        adamw.step()
    state = {f"{name}.{short}": weights[name][short].detach() for name in grids for short in weights[name]}
    return {"norms": norms, "losses": losses, "state": state}


@pytest.mark.parametrize(
    ("world", "grids", "frozen"),
    [(4, ONE_GRID, ()), (4, TWO_GRIDS, ()), (2, SHARED_RANKS, ()), (4, TWO_GRIDS, ("vision",))],
    ids=["tp2dp2", "two grids", "two grids on the same ranks", "frozen encoder"],
)
def test_steps_equal_one_process(world, grids, frozen):
    expected = reference(grids, frozen)
    lanes = len(grids["language"][0]) // grids["language"][1]
    assert max(expected["norms"]) > CONFIG.clip_grad, "the reference must clip"
    for result in run_ranks(world, train, grids, frozen):
        norms, losses = ([report[key] for report in result["reports"]] for key in ("grad_norm", "loss"))
        torch.testing.assert_close(norms, expected["norms"], rtol=1e-6, atol=0)
        torch.testing.assert_close(losses, expected["losses"], rtol=1e-6, atol=0)
        assert all((r["loss_tokens"], r["tokens"]) == (5.0, 5.0 + lanes) for r in result["reports"])
        for name, (index, value) in result["state"].items():
            whole = expected["state"][name]
            torch.testing.assert_close(value, whole[index], rtol=1e-6, atol=1e-6 * whole.abs().max().item(), msg=name)


def skip_nonfinite(rank: int) -> list[Any]:
    layout, groups = toy_world(TWO_GRIDS)
    (name,) = layout.modules_of(rank)
    optimizer = ModuleOptimizer(ToyModule(name, groups.modules[name].tp), groups.modules[name], CONFIG)
    before = [binding.view().detach().clone() for binding in optimizer.bindings]
    optimizer.zero_gradients()
    poison = float("nan") if rank == 1 else 1.0  # one data-parallel lane of the encoder
    loss(optimizer.module(samples(1, 0) * poison)).backward()
    optimizer.finish_gradients()
    results = StepReduction(layout, CONFIG.clip_grad, torch.device("cpu")).reduce({name: optimizer}, 1.0, 1.0, 1.0)
    optimizer.apply(results, 0.1)
    same = all(torch.equal(old, b.view()) for old, b in zip(before, optimizer.bindings, strict=True))
    clean = all(torch.count_nonzero(shard.state["exp_avg"]) == 0 for shard in optimizer.trainable_shards)
    report = StepReport(results).read()
    counts = {int(count) for count in optimizer.step_counts}
    return [report["nonfinite"], report["nonfinite_ranks"], same, clean, counts]


def test_non_finite_gradient_skips_every_grid():
    for nonfinite, ranks, same, clean, counts in run_ranks(4, skip_nonfinite):
        assert nonfinite == 1.0 and same and clean and counts == {0}
        assert ranks[0] >= 1.0 and ranks[1] == 0.0  # the encoder is named, the language module is not


def empty_step(rank: int) -> dict[str, Any]:
    layout, groups = toy_world({"language": ((0, 1), 1)})
    language = groups.modules["language"]
    optimizer = ModuleOptimizer(ToyModule("language", language.tp), language, CONFIG)
    optimizer.zero_gradients()
    optimizer.finish_gradients()
    results = StepReduction(layout, 1.0, torch.device("cpu")).reduce(
        {"language": optimizer},
        hash_difference=torch.tensor([0.0, 5.0 if rank == 0 else -3.0], dtype=torch.float64),
        usage=SimpleNamespace(modules=torch.tensor([[1.0, 2.0, rank]], dtype=torch.float64), memory_gib=1.0 + rank),
    )
    before = optimizer.module.norm.detach().clone()
    optimizer.apply(results, 0.1)
    return StepReport(results).read() | {"unmoved": torch.equal(before, optimizer.module.norm)}


def test_step_without_loss_tokens_and_what_travels_with_it():
    for report in run_ranks(2, empty_step):
        assert (report["loss"], report["grad_norm"], report["gradient_divisor"], report["nonfinite"]) == (
            0.0,
            0.0,
            1.0,
            0.0,
        )
        assert report["unmoved"]  # a vector: no gradient, no weight decay
        assert report["hash_difference"] == [0.0, 2.0]
        assert report["usage"] == [[2.0, 4.0, 1.0]] and report["memory_gib"] == [1.0, 2.0]
