"""Every redirect is needed on a CPU, is enough for the use it is listed for, and leaves users' torch alone.

Each case runs in a fork of its own: with all redirects but one a small use of megatron-core fails, with all it works.
"""

import math
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import GlobalMemoryBuffer

from mimo_gemma4.distributed.layout import ModuleLayout, build_layout
from mimo_gemma4.distributed.platform import MODULES, REDIRECTS, Overlay, Platform, install
from mimo_gemma4.distributed.process_groups import create_process_groups
from tests.dist.harness import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is redirected where CUDA is present")


def gather_buffer() -> None:
    assert GlobalMemoryBuffer().get_tensor([2, 3], torch.float32, "mpu").shape == (2, 3)


def reduce_gradients() -> None:
    class Scale(MegatronModule):
        def __init__(self) -> None:
            super().__init__(TransformerConfig(num_layers=1, hidden_size=2, num_attention_heads=1))
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight * x).sum()

    groups = create_process_groups(build_layout({"language": ModuleLayout()}, 1), Platform.detect())
    module = Scale()
    ddp = DistributedDataParallel(
        module.config, DistributedDataParallelConfig(), module, pg_collection=groups.modules["language"]
    )
    ddp.zero_grad_buffer()
    ddp(torch.tensor([3.0, 4.0])).backward()
    ddp.finish_grad_sync()
    assert module.weight.main_grad.tolist() == [3.0, 4.0]


def maximum_norm() -> None:
    assert get_grad_norm_fp32([torch.tensor([-3.0, 2.0])], math.inf, dist.group.WORLD) == 3.0


def square_norm() -> None:
    assert get_grad_norm_fp32([torch.tensor([3.0, 4.0])], 2, dist.group.WORLD) == 5.0


def clip() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([weight], 1.0, 5.0)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))


def track_random_states() -> None:
    tracker = CudaRNGStatesTracker()
    draws = []
    torch.manual_seed(0)
    outside = torch.rand(1)
    torch.manual_seed(0)
    for seed in (11, 12):
        tracker.add(f"state {seed}", seed)
        with tracker.fork(f"state {seed}"):
            draws.append(torch.rand(1))
    assert draws == [torch.rand(1, generator=torch.Generator().manual_seed(seed)) for seed in (11, 12)]
    assert torch.rand(1) == outside, "the default state must be as it was"


def recompute_dropout() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)
        x = torch.ones(64, requires_grad=True)
        dropped = checkpoint(torch.nn.functional.dropout, False, x) if recompute else torch.nn.functional.dropout(x)
        torch.rand(3)  # the state moves on between forward and recomputation
        (dropped * torch.arange(64.0)).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


USES: dict[str, Callable[[], None]] = {
    "cuda.current_device": gather_buffer,
    "cuda.current_stream": reduce_gradients,
    "tensor": maximum_norm,
    "zeros": square_norm,
    "cuda.manual_seed": track_random_states,
    "cuda.get_rng_state": track_random_states,
    "_get_cuda_rng_state": recompute_dropout,
    "_set_cuda_rng_state": track_random_states,
    "type": clip,
}


def needed_and_enough(rank: int, name: str) -> None:
    assert not isinstance(vars(import_module(MODULES[0]))["torch"], Overlay), (
        "the test needs an untouched megatron-core"
    )
    for redirect in REDIRECTS:
        if redirect.name != name:
            redirect.install()
    try:
        USES[name]()
    except Exception:
        failed = True
    else:
        failed = False
    assert failed, f"{name} is not needed"
    next(redirect for redirect in REDIRECTS if redirect.name == name).install()
    USES[name]()


@pytest.mark.parametrize("name", [redirect.name for redirect in REDIRECTS])
def test_redirect_is_needed_and_enough(name: str) -> None:
    run_ranks(1, needed_and_enough, name)


def users_torch(rank: int) -> None:
    before = {name: getattr(torch.cuda, name) for name in ("current_device", "current_stream", "manual_seed")}
    factories = torch.tensor, torch.zeros
    install(Platform.detect())
    layers = [import_module(name).torch for name in MODULES]
    install(Platform.detect())
    assert [import_module(name).torch for name in MODULES] == layers, "a second install must change nothing"
    assert {name: getattr(torch.cuda, name) for name in before} == before
    assert (torch.tensor, torch.zeros) == factories
    weight = torch.zeros(2)
    assert weight.type() == "torch.FloatTensor" and weight.type() != "torch.DoubleTensor"
    assert weight.type(torch.float64).dtype == torch.float64
    assert weight.type("torch.DoubleTensor").dtype == torch.float64


def test_users_torch_is_untouched() -> None:
    run_ranks(1, users_torch)


def nothing_on_cuda(rank: int) -> None:
    chosen = []
    torch.cuda.set_device = chosen.append  # stands for a machine with CUDA
    install(Platform(torch.device("cuda", 3), "nccl"))
    assert chosen == [torch.device("cuda", 3)]
    assert all(import_module(name).torch is torch for name in MODULES)
    assert "type" not in vars(torch.Tensor)
    for redirect in REDIRECTS:
        if hasattr(redirect, "owner") and redirect.owner != "torch:Tensor":
            assert getattr(import_module(redirect.owner), redirect.name) is not redirect.replacement


def test_nothing_is_redirected_where_cuda_is() -> None:
    run_ranks(1, nothing_on_cuda)


def deterministic(rank: int) -> bool:
    install(Platform.detect(), deterministic=True)
    return torch.are_deterministic_algorithms_enabled()


def test_deterministic_asks_torch() -> None:
    assert run_ranks(1, deterministic) == [True]
