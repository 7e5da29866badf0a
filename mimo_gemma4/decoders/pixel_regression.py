"""The mean colour of what each soft token of an image stands for, told from its hidden state: a small decoder to copy.

Two linears, cut over tensor parallel ranks, and half the squared error.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from mimo_gemma4.decoders.base import Decoder
from mimo_gemma4.distributed.megatron_config import module_config
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
    """Targets of an image: {"colours": [rows, 3] float32 in [0, 1], the mean over the pixels of each soft token}."""

    media: MediaProcessor
    """Resizes the image and cuts it into patches, those of a soft token behind one another."""

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
        return {"colours": item["pixel_values"].view(self._rows(item), -1, CHANNELS).mean(dim=1)}

    def placeholder(self, header: MediaHeader) -> dict[str, Tensor]:
        """Black."""
        return {"colours": torch.zeros(self.media.soft_tokens(header), CHANNELS)}

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Targets of all rows: colours [rows, 3]."""
        return {"colours": torch.cat([item["colours"] for item in items])}

    @staticmethod
    def _rows(item: dict[str, Tensor]) -> int:
        return int(item["grid"].prod())


class PixelRegression(Decoder):
    """Linear → GELU → Linear to three channels."""

    architecture = "pixel_regression"
    options = PixelRegressionOptions
    processor = MeanColours

    def __init__(
        self,
        name: str,
        options: PixelRegressionOptions,
        groups: ProcessGroupCollection,
        *,
        language_hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        activation_checkpointing: str = "none",
    ):
        """Build it as `Decoder` says; there is too little inside to compute anything again."""
        super().__init__(name, options, groups, language_hidden=language_hidden, dtype=dtype, device=device)
        tp, width = groups.tp.size(), options.hidden_size
        if width < 1 or width % tp:
            raise LayoutError(
                f"`layout.{name}.tp` is {tp} and does not divide `modules.{name}.decoder_options.hidden_size` {width}"
            )
        self.tp_group, self.language_hidden, self.width = groups.tp, language_hidden, width
        self.config = module_config(tp, dtype, hidden_size=width)
        shared = {"config": self.config, "init_method": None, "bias": True, "tp_group": groups.tp}
        with torch.device(device):
            self.linear_fc1 = ColumnParallelLinear(language_hidden, width, gather_output=False, **shared)
            self.linear_fc2 = RowParallelLinear(width, CHANNELS, input_is_parallel=True, skip_bias_add=False, **shared)

    def forward(self, hidden: Tensor, colours: Tensor) -> Tensor:
        """Half the squared error of the colours [rows, 3] told from `hidden` [rows, language_hidden], summed."""
        told = self.linear_fc2(F.gelu(self.linear_fc1(hidden)[0]))[0]
        return 0.5 * (told.float() - colours).square().sum()

    def flops(self, rows: Iterable[int]) -> float:
        """Forward operations: both weight matrices times every row."""
        return 2.0 * sum(rows) * self.width * (self.language_hidden + CHANNELS)

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
