"""transformers' vision tower and projector under the names of the whole model, with random weights."""

from typing import Any

import torch
from torch import nn
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig, Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder, Gemma4VisionModel


class VisionReference(nn.Module):
    """Its state dict has the names of `Gemma4Model` without `model.`."""

    def __init__(self, options: dict[str, Any], language_hidden: int, attention: str = "eager"):
        super().__init__()
        config = Gemma4VisionConfig(**options, attn_implementation=attention)
        self.vision_tower = Gemma4VisionModel(config)
        self.embed_vision = Gemma4MultimodalEmbedder(config, Gemma4TextConfig(hidden_size=language_hidden))

    @torch.no_grad()
    def randomise(self, seed: int) -> None:
        """Weights of unit gain, and clip bounds that many of the roughly unit-sized activations exceed."""
        generator = torch.Generator().manual_seed(seed)
        head_dim = self.vision_tower.config.head_dim
        for name, tensor in self.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("_min", "_max")):
                tensor.copy_((1 + 0.2 * noise.abs()) * (1 if name.endswith("max") else -1))
            elif name.endswith(("norm.weight", "std_scale")):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                tensor.mul_(head_dim**-0.25)  # scores of unit size: attention with scale 1 is ill-conditioned otherwise

    def forward(self, items: list[dict[str, torch.Tensor]], processor: Any) -> torch.Tensor:
        """Items of a `Gemma4ImageProcessor` → [rows, language_hidden], image by image."""
        inputs = processor.transformers_inputs(items)
        tower = self.vision_tower(inputs["pixel_values"], inputs["image_position_ids"])
        return self.embed_vision(tower.last_hidden_state)
