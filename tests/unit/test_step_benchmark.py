"""The benchmark of whole steps compares like with like, and tells kernels and moments apart.

Ours and transformers start from the same weights and documents: their first losses differ by 1e-5 at most, relative,
in fp32, where rounding makes about 1e-7. The run itself checks that and fails otherwise.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.step_profile import Kernel, plot, shares, summary
from mimo_gemma4.errors import NumericsError
from tests import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"

KINDS = {
    "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT": "GEMM",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_nn_align8>": "GEMM",
    "triton_tem_fused_flex_attention_backward_0": "attention",
    "fmha_cutlassB_bf16_aligned_64x64_k65536_sm80(PyTorchMemEffAttention)": "attention",
    "kernel_cutlass_flash_attn_sm90_fwd": "attention",
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": "optimizer",
    "triton_red_fused__to_copy_mean_mul_pow_0": "element-wise and norm",
    "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>": "element-wise and norm",
    "kernel_cutlass_quack_rmsnorm_bwd": "element-wise and norm",
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL": "communication",
    "Memcpy DtoD (Device -> Device)": "copies",
    "void at::native::direct_copy_kernel_cuda": "copies",
}


@pytest.mark.parametrize("name", KINDS)
def test_kernels_are_told_apart_by_their_names(name: str) -> None:
    assert Kernel(name, 0.0, 1.0).kind == KINDS[name]


def test_shares_count_every_moment_once_and_hidden_communication_not_at_all() -> None:
    kernels = [
        Kernel("nvjet_a", 0.0, 40.0),
        Kernel("nccl_hidden", 10.0, 30.0),
        Kernel("nccl_half_hidden", 30.0, 50.0),
        Kernel("flash_fwd", 60.0, 80.0),
        Kernel("vectorized_add", 70.0, 90.0),
        Kernel("nvjet_b", 90.0, 100.0),
    ]
    expected = {"GEMM": 0.5, "attention": 0.2, "element-wise and norm": 0.1, "communication": 0.1, "idle": 0.1}
    found = shares(kernels)
    assert {kind: share for kind, share in found.items() if share} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "unaligned"),
    [
        ("cutlass_75_tensorop_bf16_s1688gemm_bf16_128x128_nn_align1", True),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_64x64_nn_align2", True),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_64x64_nn_align8", False),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_64x64_nn_align16", False),
    ],
)
def test_unaligned_matrix_products_are_warned_of(name: str, unaligned: bool) -> None:
    assert bool(summary([Kernel(name, 0.0, 1.0)])["unaligned"]) == unaligned


def test_another_first_loss_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from step import Round, check_loss  # type: ignore[import-not-found]

    others = [Round("ours", "", [1.0], [7.5], None, 100, 1)]
    check_loss("HF plain", 7.50007, others, 1e-5)
    for loss in (7.5001, float("nan")):
        with pytest.raises(NumericsError, match="HF plain"):
            check_loss("HF plain", loss, others, 1e-5)


def test_packed_odd_documents_cost_both_implementations_the_same_loss(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--case", "tiny-packed", "--rounds", "A-C", "--steps", "1", "--profile", "--json", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "step.py", *arguments], cwd=BENCHMARKS, check=True, timeout=200, env=environment)
    result = json.loads(out.read_text())
    (case,) = result["cases"]
    first, second = (found["losses"] for found in case["rounds"])
    assert first == pytest.approx(second, rel=1e-5)
    assert set(case["systems"]) == set(case["profile"]) == {"ours", "HF plain"}
    assert sum(case["profile"]["ours"]["shares"].values()) == pytest.approx(1.0)
    plot([result], tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000
