"""Peak memory and time of head + loss + backward against full logits with torch's cross entropy, on one GPU.

Run with:  python benchmarks/head_loss_memory.py
"""

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mimo_gemma4.language.loss import softcapped, summed_cross_entropy

VOCABULARY, CAP = 262_144, 30.0
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The language model's loss."""
    return summed_cross_entropy(hidden, weight, labels, cap=CAP, tp_group=dist.group.WORLD)


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What a model without a fused loss does."""
    return F.cross_entropy(softcapped(F.linear(hidden, weight), CAP), labels, reduction="sum")


def measure(loss: Loss, tokens: int, hidden_size: int, repeats: int) -> tuple[float, float, torch.Tensor]:
    """Peak GiB beyond the inputs (gradients included), median milliseconds, gradient of the hidden states."""
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    hidden = torch.randn(tokens, hidden_size, **options).requires_grad_()
    weight = torch.randn(VOCABULARY, hidden_size, **options).mul_(hidden_size**-0.5).requires_grad_()
    labels = torch.randint(VOCABULARY, (tokens,), device="cuda", generator=generator)
    times = []
    for repeat in range(repeats + 2):
        hidden.grad = weight.grad = None
        if repeat == 2:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss(hidden, weight, labels).backward()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    assert hidden.grad is not None
    return peak, sorted(times[2:])[repeats // 2], hidden.grad


def main() -> None:
    """Print one row per number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=2560, help="default: that of E4B")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    print(f"{torch.cuda.get_device_name()}, hidden size {options.hidden_size}, {VOCABULARY} words, bf16")
    names = ("tokens", "here GiB", "full GiB", "ratio", "here ms", "full ms", "gradient difference")
    print("".join(f"{name:>{len(name) + 2}}" for name in names))
    for tokens in options.tokens:
        here, here_ms, gradient = measure(ours, tokens, options.hidden_size, options.repeats)
        torch.cuda.empty_cache()
        try:
            full, full_ms, expected = measure(full_logits, tokens, options.hidden_size, options.repeats)
            difference = float((gradient - expected).float().norm() / expected.float().norm())
        except torch.cuda.OutOfMemoryError:
            full, full_ms, difference = float("nan"), float("nan"), float("nan")
        ratio = f"1/{full / here:.1f}"
        cells = (tokens, f"{here:.2f}", f"{full:.2f}", ratio, f"{here_ms:.1f}", f"{full_ms:.1f}", f"{difference:.1e}")
        print("".join(f"{cell:>{len(name) + 2}}" for name, cell in zip(names, cells, strict=True)))
        torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
