"""A transformers module's weights as a source of `mimo_gemma4.weights.bindings.load`."""

import torch
from torch import nn


class StateSource:
    """Reads names of the whole model from a part of it, whose names lack the leading `model.`."""

    def __init__(self, module: nn.Module):
        self.state = module.state_dict()

    def read(self, name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self.state[name.removeprefix("model.")]
        assert tuple(tensor.shape) == shape
        return tensor[index]
