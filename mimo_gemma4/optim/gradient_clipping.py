"""How gradients are clipped: one coefficient for all modules, from the norm over all of them."""

import torch
from torch import Tensor


def clip_coefficient(norm: Tensor, clip_grad: float | None) -> Tensor:
    """Factor of all gradients, at most 1, that brings their norm down to `clip_grad` (None: 1). On the device.

    `norm` is the norm over all modules of all ranks (`step_reduction.StepReduction`). Every module divides its
    gradients by the same number (`module_optimizer.ModuleOptimizer.apply`), so clipping keeps the direction of the
    whole.
    """
    if clip_grad is None:
        return torch.ones_like(norm)
    return (clip_grad / (norm + 1e-6)).clamp(max=1.0)
