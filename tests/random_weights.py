"""Random weights that make a comparison with transformers sharp: nothing trivial, attention well conditioned."""

import torch
from torch import nn


@torch.no_grad()
def vary_norms(model: nn.Module) -> None:
    """Norm weights and layer scalars other than one, so that a missing or misplaced one shows.

    Scores with scale 1.0 have a variance of head_dim; q/k norms of head_dim^-1/4 bring it to about one.
    """
    for name, tensor in model.state_dict().items():
        if "norm" in name or name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
            tensor.uniform_(0.7, 1.3)
        if "q_norm" in name or "k_norm" in name:
            tensor.mul_(tensor.shape[0] ** -0.25)
