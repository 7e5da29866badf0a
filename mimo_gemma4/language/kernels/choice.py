"""Which packed kernel serves heads of a size, and why not where none does."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mimo_gemma4.language.kernels.packed import PackedCall, PackedKernel

WIDEST_OF_FLASH = 256
"""Channels of the widest heads that flash-attn-4 trains on Hopper."""
MULTIPLE_OF_FFPA = 64
"""ffpa-attn takes heads of a multiple of so many channels, wider than flash-attn-4's."""
HOPPER = 9
"""Major compute capability that both kernels are known to be right and fast on."""


@dataclass(frozen=True)
class Choice:
    """The kernel of some layers."""

    name: str
    """As the start of a run prints it."""
    kernel: PackedKernel | None
    """None: FlexAttention serves these layers."""
    reason: str


def choose_kernel(head_dim: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Choice:
    """The fastest packed kernel for heads of `head_dim` channels; `window`: keys that a query sees, itself included."""
    refused = _refused(dtype, device)
    if refused:
        return Choice("FlexAttention", None, refused)
    if head_dim <= WIDEST_OF_FLASH:
        function, missing = _imported("flash_attn.cute", "flash_attn_varlen_func", "flash-attn-4")
        if function is None:
            return Choice("FlexAttention", None, missing)
        return Choice("flash-attn-4", partial(_flash, function, window), f"{head_dim} channels")
    if window is not None or head_dim % MULTIPLE_OF_FFPA:
        return Choice("FlexAttention", None, f"no packed kernel for windows of {head_dim} channels")
    function, missing = _imported("ffpa_attn", "ffpa_attn_varlen_func", "ffpa-attn")
    if function is None:
        return Choice("FlexAttention", None, missing)
    return Choice("ffpa-attn", partial(_ffpa, function), f"{head_dim} channels")


def _refused(dtype: torch.dtype, device: torch.device) -> str:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"packed kernels compute in bf16, not in {dtype}"
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return f"packed kernels are known on Hopper, not on {torch.cuda.get_device_name(device)}"
    return ""


def _imported(module: str, function: str, package: str) -> tuple[Callable[..., torch.Tensor] | None, str]:
    try:
        return getattr(importlib.import_module(module), function), ""
    except (ImportError, AttributeError) as error:
        return None, f"{package} cannot be imported ({error}): pip install 'mimo-gemma4[kernels]'"


def _flash(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    window: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: PackedCall,
) -> torch.Tensor:
    result = function(
        query,
        key,
        value,
        cu_seqlens_q=call.query_ends,
        cu_seqlens_k=call.key_ends,
        max_seqlen_q=call.longest_queries,
        max_seqlen_k=call.longest_keys,
        softmax_scale=1.0,  # Gemma 4 normalises queries and keys instead
        causal=True,
        window_size=(None, None) if window is None else (window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return result if isinstance(result, torch.Tensor) else result[0]


def _ffpa(
    function: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: PackedCall,
) -> torch.Tensor:
    return function(
        query,
        key,
        value,
        call.query_ends,
        call.key_ends,
        call.longest_queries,
        call.longest_keys,
        softmax_scale=1.0,
        causal=True,
        enable_gqa=True,
    )
