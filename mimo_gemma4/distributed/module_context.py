"""What encoders and decoders are built from, beside their own configuration."""

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class ModuleContext:
    """This rank's place in a module's grid, and what the run asks of the module."""

    groups: ProcessGroupCollection
    """Process groups of the module's grid; encoders and decoders use `tp`, the tensor-parallel group."""
    language_hidden: int
    """H, the width of the language model: of an encoder's soft tokens, or of the hidden states that a decoder reads."""
    dtype: torch.dtype
    """Type of weights, soft tokens and hidden states."""
    device: torch.device
    """Where weights are allocated."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: nothing, the activations that need most memory for their cost, or all
    layers. A module may treat `selective` as `none`."""
    pp_rank: int = 0
    """Number of this rank's pipeline stage."""
    pp_size: int = 1
    """Number of pipeline stages."""
