"""Predicts the mean colour of the pixels of each soft token of an image: a small decoder to copy.

Two linears, cut over tensor-parallel ranks, and half the squared error.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from mimo_gemma4.decoders.base import Decoder
from mimo_gemma4.distributed.megatron_config import module_config
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.errors import ConfigError, LayoutError
from mimo_gemma4.media import MediaHeader, MediaProcessor
from mimo_gemma4.weights.bindings import Binding, Constant, Normal, bind_replicated, bind_sharded

CHANNELS = 3
"""Red, green and blue."""


@dataclass(frozen=True)
class PixelRegressionOptions:
    """Sizes of the decoder."""

    hidden_size: int = 256
    """Width between the two linears."""


@dataclass(frozen=True)
class MeanColours:
    """Targets of an image: {"colours": [soft tokens, 3] float32 in [0, 1], means over their pixels}."""

    media: MediaProcessor
    """Resizes the image and cuts it into patches; the patches of a soft token are adjacent."""

    @classmethod
    def for_media(cls, media: MediaProcessor, options: PixelRegressionOptions) -> Self:
        """For Gemma 4's own images and frames."""
        if media.modality != "vision" or "pixel_values" not in media.placeholder(MediaHeader(width=64, height=64)):
            raise ConfigError(f"it reads patches of pixels, which the items of {media.modality} are not")
        return cls(media)

    def cost(self, header: MediaHeader) -> float:
        """All soft tokens cost the same."""
        return float(self.media.soft_tokens(header))

    def decode(self, data: bytes) -> dict[str, Tensor]:
        """Resize the image as its encoder sees it, and average. Raises as the media processor does."""
        item = self.media.decode(data)
        return {"colours": item["pixel_values"].view(_soft_tokens(item), -1, CHANNELS).mean(dim=1)}

    def placeholder(self, header: MediaHeader) -> dict[str, Tensor]:
        """Black."""
        return {"colours": torch.zeros(self.media.soft_tokens(header), CHANNELS)}

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Targets of all soft tokens: colours [soft tokens, 3]."""
        return {"colours": torch.cat([item["colours"] for item in items])}


def _soft_tokens(item: dict[str, Tensor]) -> int:
    return int(item["grid"].prod())


class PixelRegression(Decoder):
    """Linear → GELU → Linear to three channels."""

    architecture = "pixel_regression"
    options = PixelRegressionOptions
    processor = MeanColours

    def __init__(self, name: str, options: PixelRegressionOptions, context: ModuleContext):
        """Build it as `Decoder` says; there are too few activations to recompute."""
        super().__init__(name, options, context)
        self.tp_group, self.language_hidden = context.groups.tp, context.language_hidden
        self.width = width = options.hidden_size
        tp = self.tp_group.size()
        if width < 1 or width % tp:
            raise LayoutError(
                f"`layout.{name}.tp` is {tp} and does not divide `modules.{name}.decoder_options.hidden_size` {width}"
            )
        self.config = module_config(tp, context.dtype, hidden_size=width)
        shared = {"config": self.config, "init_method": None, "bias": True, "tp_group": self.tp_group}
        with torch.device(context.device):
            self.linear_fc1 = ColumnParallelLinear(self.language_hidden, width, gather_output=False, **shared)
            self.linear_fc2 = RowParallelLinear(width, CHANNELS, input_is_parallel=True, skip_bias_add=False, **shared)

    def forward(self, hidden: Tensor, colours: Tensor) -> Tensor:
        """Half the squared error of colours [soft tokens, 3] from `hidden` [soft tokens, language_hidden], summed."""
        predicted = self.linear_fc2(F.gelu(self.linear_fc1(hidden)[0]))[0]
        return 0.5 * (predicted.float() - colours).square().sum()

    def flops(self, soft_tokens: Iterable[int]) -> float:
        """Forward operations: both weight matrices times every hidden state."""
        return 2.0 * sum(soft_tokens) * self.width * (self.language_hidden + CHANNELS)

    def bindings(self) -> list[Binding]:
        """`fc1` and `fc2`, weight and bias."""
        zeros, group = Constant(0.0), self.tp_group
        first, second = self.linear_fc1, self.linear_fc2
        return [
            bind_sharded(f"{self.prefix}fc1.weight", first.weight, 0, group, Normal(self.language_hidden**-0.5)),
            bind_sharded(f"{self.prefix}fc1.bias", first.bias, 0, group, zeros),
            bind_sharded(f"{self.prefix}fc2.weight", second.weight, 1, group, Normal(self.width**-0.5)),
            bind_replicated(f"{self.prefix}fc2.bias", second.bias, zeros),
        ]
