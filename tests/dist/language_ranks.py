"""What tests of the language model on gloo ranks share: its process groups and a weight source."""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from mimo_gemma4.platform import Platform, install


class StateDict:
    """Whole tensors by Hugging Face name."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> torch.Tensor | None:
        assert tuple(self.tensors[name].shape) == shape, name
        return self.tensors[name][index]


def language_groups(rank: int, tp: int, cp: int) -> ProcessGroupCollection:
    """Groups of a grid of tp * cp ranks, tp fastest; megatron-core is made to run on this platform."""
    install(Platform.detect())
    groups = ProcessGroupCollection()
    for c in range(cp):
        group = dist.new_group([c * tp + t for t in range(tp)])
        if rank // tp == c:
            groups.tp = group
    for t in range(tp):
        group = dist.new_group([c * tp + t for c in range(cp)])
        if rank % tp == t:
            groups.cp = group
    return groups
