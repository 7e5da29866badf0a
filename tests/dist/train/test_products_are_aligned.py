"""Every matrix product of a bf16 step has operands that cuBLAS serves by its aligned kernels, whatever the lengths.

A step of packed samples of odd lengths runs under a dispatch mode that sees each product. An operand is aligned where
its pointer and the distance of its rows (or columns) are multiples of 16 bytes; one unaligned operand made a kernel
several times slower. Attention itself is left out: on the CPU it is written out, on GPUs its kernels take any length.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mimo_gemma4.config import load_config
from mimo_gemma4.language.reference_attention import ReferencePlan
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.setup import set_up_run
from tests.dist.harness import run_ranks
from tests.dist.train.step_parity import write_run
from tests.vlm_reference import IMAGES, SOUNDS_AND_IMAGES

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "addmv", "mv")
BYTES = 16
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}


class SeesProducts(TorchDispatchMode):
    """Collects the operands of matrix products that are not aligned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.unaligned: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in PRODUCTS:
            self.seen += 1
            for operand in args:
                if isinstance(operand, torch.Tensor) and operand.dtype == torch.bfloat16 and not aligned(operand):
                    self.unaligned.add(f"{name}: {tuple(operand.shape)} with strides {operand.stride()}")
        return function(*args, **(kwargs or {}))


def aligned(operand: torch.Tensor) -> bool:
    """Whether the pointer and all strides but the unit one are multiples of 16 bytes; empty ones are."""
    distances = [
        stride for stride, size in zip(operand.stride(), operand.shape, strict=True) if size > 1 and stride != 1
    ]
    places = [operand.data_ptr(), *(distance * operand.element_size() for distance in distances)]
    return operand.numel() == 0 or all(place % BYTES == 0 for place in places)


@contextmanager
def attention_unseen() -> Iterator[None]:
    """Attention of the language model runs outside all modes."""
    attend = ReferencePlan.attend

    def unseen(self: ReferencePlan, *states: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            return attend(self, *states)

    ReferencePlan.attend = unseen  # type: ignore[method-assign]
    try:
        yield
    finally:
        ReferencePlan.attend = attend  # type: ignore[method-assign]


def products_of_a_step(rank: int, folder: Path, overrides: list[str]) -> tuple[int, set[str], int]:
    """Products seen, unaligned ones, and samples of odd length in the step."""
    config = load_config([f"config={folder}/run.yaml", "model.precision=bf16", "data.packing=true", *overrides])
    trainer = build_trainer(set_up_run(config))
    mode = SeesProducts()
    with attention_unseen(), mode:
        trainer.train_step()
    manifest = trainer.loader.load(1).manifest
    trainer.close()
    return mode.seen, mode.unaligned, sum(sample.length % 8 > 0 for sample in manifest.samples)


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "images": ({"media": IMAGES}, ["layout.vision={}"]),
    "sounds and images": ({"media": SOUNDS_AND_IMAGES, "audio": True}, ["layout.vision={}", "layout.audio={}"]),
    "experts": ({"media": IMAGES, **EXPERTS}, ["layout.vision={}"]),
    "adapters": ({"media": IMAGES}, ["layout.vision={}", 'modules.language.lora={targets: ["*.layers.*"], rank: 8}']),
}


@pytest.mark.parametrize("case", CASES)
def test_products_of_packed_odd_lengths_are_aligned(case: str, tmp_path: Path) -> None:
    model, overrides = CASES[case]
    write_run(tmp_path, **model)
    ((seen, unaligned, odd),) = run_ranks(1, products_of_a_step, tmp_path, ["layout.placement=colocated", *overrides])
    assert seen > 100 and odd > 0
    assert not unaligned, "\n".join(sorted(unaligned))
