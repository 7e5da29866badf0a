"""CPU with gloo and CUDA with NCCL behind one code path.

megatron-core assumes CUDA in about a dozen places. On a machine without CUDA `install` serves those places from the
CPU, so that the production modules and optimizer run everywhere; where CUDA is present it redirects nothing.
Functions of torch are redirected only inside the megatron-core modules of `MODULES`: user code and other libraries keep
their torch. The exception is `Tensor.type`, which belongs to no module and is redirected for everybody.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce, wraps
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mimo_gemma4.errors import LayoutError

DEFAULT_TIMEOUT = timedelta(minutes=10)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Platform:
    """Where this rank computes and how ranks communicate."""

    device: torch.device
    """Device of this rank, for example `cuda:3` or `cpu`."""
    backend: str
    """`nccl` or `gloo`."""
    timeout: timedelta = DEFAULT_TIMEOUT
    """How long a collective waits for its peers before the run ends with an error."""

    @classmethod
    def detect(cls, timeout: timedelta = DEFAULT_TIMEOUT) -> "Platform":
        """CUDA where there is one, with the device that torchrun's LOCAL_RANK names; the CPU otherwise.

        Raises `LayoutError` where more ranks were started on a host than it has GPUs.
        """
        if not torch.cuda.is_available():
            return cls(CPU, "gloo", timeout)
        number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= gpus:
            raise LayoutError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', '?')} ranks were started on this host, which has {gpus} GPUs: "
                "start fewer (--nproc-per-node), or put CUDA_VISIBLE_DEVICES= before torchrun to run on the CPU"
            )
        return cls(torch.device("cuda", number), "nccl", timeout)

    @property
    def device_type(self) -> str:
        """`cuda` or `cpu`."""
        return self.device.type

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a host tensor to the device through pinned memory, without waiting for the device."""
        if self.device_type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    @property
    def local_rank(self) -> int:
        """Number of this process on its host, from torchrun; 0 without torchrun."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return dist.get_rank()


def create_platform(*, deterministic: bool = False, timeout: timedelta = DEFAULT_TIMEOUT) -> Platform:
    """Detect the platform, make megatron-core run on it and join the other ranks: the first call of every process."""
    platform = Platform.detect(timeout)
    install(platform, deterministic=deterministic)
    init_distributed(platform)
    return platform


def install(platform: Platform, *, deterministic: bool = False) -> None:
    """Make megatron-core run on `platform`; calling it again changes nothing.

    Args:
        platform: the platform of this process.
        deterministic: ask PyTorch, cuBLAS and Transformer Engine for results that repeat bit for bit on the same
            machine. An operation that has no such variant raises `RuntimeError`.
    """
    if platform.device_type == "cuda":
        torch.cuda.set_device(platform.device)
    else:
        for redirect in REDIRECTS:
            redirect.install()
    # Tensor-parallel layers gather into this buffer; its setter may be called only once in a process.
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def init_distributed(platform: Platform) -> None:
    """Join the ranks of torchrun, or be the only rank without torchrun; no-op once joined."""
    if dist.is_initialized():
        return
    if "RANK" in os.environ:
        dist.init_process_group(platform.backend, timeout=platform.timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(platform.backend, store=store, rank=0, world_size=1, timeout=platform.timeout)


def destroy_distributed() -> None:
    """Leave the other ranks; no-op for a process that never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def ranks_per_host() -> list[int]:
    """Number of ranks on each host, in rank order; a collective over all ranks.

    torchrun's GROUP_RANK distinguishes hosts even where two of them share one machine. Ranks of a host that are not
    contiguous count as several hosts.
    """
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, (socket.gethostname(), os.environ.get("GROUP_RANK")))
    counts: list[int] = []
    for rank, host in enumerate(hosts):
        if rank > 0 and host == hosts[rank - 1]:
            counts[-1] += 1
        else:
            counts.append(1)
    return counts


class Overlay(ModuleType):
    """A module seen with some of its names replaced; every other name is the module's own."""

    def __init__(self, module: ModuleType):
        """Start with no replacement."""
        super().__init__(module.__name__)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        """The name in the module itself."""
        return getattr(self.__dict__["_module"], name)


MODULES = (
    "megatron.core.utils",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
)
"""The modules of megatron-core that are used here and name CUDA through their `torch`."""


@dataclass(frozen=True)
class TorchRedirect:
    """A function that the modules of `MODULES` reach through their `torch`."""

    name: str
    """Path below `torch`, for example `cuda.synchronize`."""
    replacement: Callable[..., Any]
    """What those modules get instead."""
    reason: str
    """Which use in megatron-core needs it."""

    def install(self) -> None:
        """Replace the name in every module of `MODULES`."""
        *path, function = self.name.split(".")
        for name in MODULES:
            reduce(_overlaid, path, _overlaid(import_module(name), "torch")).__dict__[function] = self.replacement


@dataclass(frozen=True)
class AttributeRedirect:
    """An attribute of one class or module, replaced for everybody."""

    owner: str
    """Module and, after a colon, the class in it that holds the attribute."""
    name: str
    """The attribute."""
    replacement: Callable[..., Any]
    """What everybody gets instead."""
    reason: str
    """Which use in megatron-core needs it."""

    def install(self) -> None:
        """Replace the attribute."""
        module, _, cls = self.owner.partition(":")
        owner = import_module(module)
        setattr(getattr(owner, cls) if cls else owner, self.name, self.replacement)


def _overlaid(module: ModuleType, name: str) -> ModuleType:
    """The overlay under `module.name`, put there by the first redirect that passes through."""
    value = getattr(module, name)
    if not isinstance(value, Overlay):
        value = Overlay(value)
        setattr(module, name, value)
    return value


def _cuda_means_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


class _TypeName(str):
    """A tensor type that equals itself with and without device: `torch.FloatTensor` is `torch.cuda.FloatTensor`."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.replace("cuda.", "") == other.replace("cuda.", "")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.replace("cuda.", ""))


def _tensor_type(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        return _TypeName(torch._C.TensorBase.type(tensor))
    return torch._C.TensorBase.type(tensor, dtype, *args, **kwargs)


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


_RANDOM = "megatron.core.tensor_parallel.random"

REDIRECTS: tuple[TorchRedirect | AttributeRedirect, ...] = (
    TorchRedirect("cuda.current_device", lambda: CPU, "device of gradient buffers and gathered activations"),
    TorchRedirect("cuda.current_stream", torch.cpu.current_stream, "gradient reduction waits for graph replays on it"),
    TorchRedirect("tensor", _cuda_means_cpu(torch.tensor), "device='cuda' of maximum norms and overflow flags"),
    TorchRedirect("zeros", _cuda_means_cpu(torch.zeros), "device='cuda' of gradient norms and of clipping"),
    TorchRedirect("cuda.manual_seed", torch.manual_seed, "the RNG tracker seeds a state"),
    TorchRedirect("cuda.get_rng_state", _get_rng_state, "the RNG tracker keeps the state"),
    AttributeRedirect(_RANDOM, "_get_cuda_rng_state", _get_rng_state, "activation checkpointing saves the state"),
    AttributeRedirect(_RANDOM, "_set_cuda_rng_state", _set_rng_state, "the RNG tracker restores the state"),
    AttributeRedirect("torch:Tensor", "type", _tensor_type, "optimizers compare it with 'torch.cuda.FloatTensor'"),
)
"""Everything that is redirected where there is no CUDA."""
