"""CUDA attention backends give what the reference gives, forward and backward, at Gemma 4's head sizes.

pytest -m gpu
"""

import pytest
import torch

from mimo_gemma4.language.attention_context import MaskRule, VisibleKeys, visible_runs
from mimo_gemma4.language.flex_attention import FlexPlan
from mimo_gemma4.language.kernels.choice import choose_kernel
from mimo_gemma4.language.kernels.packed import PackedPlan, packed_calls
from mimo_gemma4.language.reference_attention import ReferencePlan
from mimo_gemma4.language.transformer_engine_attention import TransformerEnginePlan

pytestmark = pytest.mark.gpu
LENGTH = 1000  # no multiple of any block
WINDOW = 300


def visible(rule: MaskRule, queries: torch.Tensor, *, batch: int, length: int = LENGTH) -> VisibleKeys:
    """What the queries at the sequence indices `queries` see of batch of packed documents with padding and media."""
    segments, groups = torch.zeros(batch, length, dtype=torch.long), torch.zeros(batch, length, dtype=torch.long)
    segments[:, :417], segments[:, 430:990] = 1, 2
    groups[:, 100:220], groups[:, 500:900] = 1, 2
    groups = groups if rule.groups is not None else None
    first, last = (ends[:, queries] for ends in visible_runs(rule, segments, groups))
    # The keys as a context-parallel rank has them: those that its queries see, renumbered.
    numbers = torch.arange(length)[:, None]
    seen = ((numbers >= first.flatten()) & (numbers <= last.flatten())).any(dim=1).nonzero().squeeze(1)
    first, last = (torch.searchsorted(seen, ends).int() for ends in (first, last))
    runs = torch.stack((first, last)).cuda()
    return VisibleKeys(rule, seen.numel(), first, last, segments[:, queries], groups is not None, runs, None, None)


def compare(keys: VisibleKeys, plan: object, head_dim: int, dtype: torch.dtype, tolerance: float) -> None:
    """Results and gradients of `plan` against the reference's in fp64 at the same rounded inputs."""
    torch.manual_seed(0)
    batch, queries = keys.first.shape
    shapes = [(queries, batch, 8, head_dim), (keys.count, batch, 2, head_dim), (keys.count, batch, 2, head_dim)]
    inputs = [torch.randn(shape, device="cuda").mul_(head_dim**-0.25).to(dtype) for shape in shapes]
    weights = torch.randn(queries, batch, 8 * head_dim, device="cuda").to(dtype)
    # Padding is not compared: kernels may have it see itself or its neighbours, and no loss depends on it.
    weights *= (keys.segments > 0).t().cuda()[..., None]
    results = []
    for attend, precision in ((plan.attend, dtype), (ReferencePlan(keys).attend, torch.float64)):
        states = [tensor.to(precision).requires_grad_() for tensor in inputs]
        attended = attend(*states)
        assert attended.isfinite().all()
        gradients = torch.autograd.grad(attended, states, weights.to(precision))
        results.append([attended * (weights != 0), *gradients])
    for mine, expected in zip(*results, strict=True):
        assert mine.isfinite().all()
        error = (mine.double() - expected).norm() / expected.norm()
        assert error < tolerance, f"off by {error:.1e}"


# bf16 keeps 8 bits: 2e-2 leaves room for P and dS rounded to bf16; fp32 kernels without TF32 stay near 1e-6.
PRECISIONS = [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)]
RULES = {
    256: [MaskRule(WINDOW), MaskRule(WINDOW, "inside_window"), MaskRule(WINDOW, "always")],
    512: [MaskRule(None), MaskRule(None, "always")],
}
# All tokens, and the halves of a zigzag rank, whose keys are two halos and two chunks.
QUERIES = {"all": torch.arange(LENGTH), "halves": torch.cat((torch.arange(250, 375), torch.arange(625, 750)))}


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["bf16", "fp32"])
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize(("head_dim", "rule"), [(dim, rule) for dim in RULES for rule in RULES[dim]], ids=str)
def test_flex(head_dim: int, rule: MaskRule, queries: str, dtype: torch.dtype, tolerance: float) -> None:
    keys = visible(rule, QUERIES[queries], batch=2)
    compare(keys, FlexPlan(keys), head_dim, dtype, tolerance)


def test_flex_is_not_compiled_for_every_length() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for length in (1000, 1024, 1100, 1537, 2048):
        keys = visible(MaskRule(WINDOW), torch.arange(length), batch=1, length=length)
        compare(keys, FlexPlan(keys), 256, torch.bfloat16, 2e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_plan_and_attention_do_not_wait_for_the_device() -> None:
    keys = visible(MaskRule(None), torch.arange(LENGTH), batch=1)
    states = [torch.randn(LENGTH, 1, heads, 512, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
    FlexPlan(keys).attend(*states)  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        FlexPlan(keys).attend(*states)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("batch", [1, 2])  # alike, so that one call serves both
def test_transformer_engine(batch: int, queries: str) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    keys = visible(MaskRule(WINDOW), QUERIES[queries], batch=batch)
    plan = TransformerEnginePlan.where_supported(keys, 256)
    assert plan is not None
    compare(keys, plan, 256, torch.bfloat16, 2e-2)


def packed_plan(keys: VisibleKeys, head_dim: int) -> PackedPlan:
    choice = choose_kernel(head_dim, keys.rule.window, torch.bfloat16, torch.device("cuda"))
    if choice.kernel is None:
        pytest.skip(choice.reason)
    calls = packed_calls(keys)
    assert calls is not None
    return PackedPlan(choice.kernel, calls)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("head_dim", "window"), [(256, WINDOW), (256, None), (512, None), (128, WINDOW)])
def test_packed_kernels(head_dim: int, window: int | None, batch: int, queries: str) -> None:
    keys = visible(MaskRule(window), QUERIES[queries], batch=batch)
    compare(keys, packed_plan(keys, head_dim), head_dim, torch.bfloat16, 2e-2)


@pytest.mark.parametrize(("head_dim", "window"), [(256, WINDOW), (512, None)])
def test_packed_kernels_do_not_wait_for_the_device(head_dim: int, window: int | None) -> None:
    keys = visible(MaskRule(window), torch.arange(LENGTH), batch=1)
    states = [
        torch.randn(LENGTH, 1, heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    ]
    packed_plan(keys, head_dim).attend(*states).sum().backward()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_plan(keys, head_dim).attend(*states).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
