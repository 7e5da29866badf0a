"""What a decoder is: the base class that every file of this package derives from.

A third party writes one file in this package with a subclass of `Decoder` and a `TargetProcessor`; `registry` finds it
by its `architecture`. `docs/add_a_decoder.md` walks through an example.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import Any, ClassVar, Protocol, Self

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mimo_gemma4.media import ItemProcessor, MediaProcessor
from mimo_gemma4.weights.bindings import DECODERS, Binding


class TargetProcessor(ItemProcessor, Protocol):
    """The host side of a decoder: from a media file to what the decoder is to make of the item's rows."""

    @classmethod
    def for_media(cls, media: MediaProcessor, options: Any) -> Self:
        """Build it for the items of one of the encoder's media processors.

        `options` are the decoder's. Raises `ConfigError` where the decoder cannot work on these items.
        """
        ...


class Decoder(nn.Module, ABC):
    """Final hidden states of the language model at media items' soft tokens in, a loss out.

    A subclass sets the three class attributes and `self.config`, and defines `__init__`, `forward`, `flops` and
    `bindings`. Replicated parameters under tensor parallelism follow the rule of encoders: one that sees only this
    rank's share of the work carries `parameter.tp_gradient_partial = True`.
    """

    architecture: ClassVar[str]
    """What `modules.<name>.decoder` selects this class by, for example `pixel_regression`."""
    options: ClassVar[type]
    """Dataclass of `modules.<name>.decoder_options`; every field has a default."""
    processor: ClassVar[type[TargetProcessor]]
    """The host side: file bytes to the keyword arguments of `forward`."""
    config: TransformerConfig
    """Read by megatron-core's data parallelism and optimizer; `calculate_per_token_loss=True`, as losses are sums."""

    @abstractmethod
    def __init__(
        self,
        name: str,
        options: Any,
        groups: ProcessGroupCollection,
        *,
        language_hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        activation_checkpointing: str = "none",
    ):
        """Build it with uninitialised weights; `bindings` says how they are filled.

        `name` is the module's in `layout`, `options` an object of the class `options`, `groups.tp` the tensor parallel
        group, `language_hidden` the width of the rows, `dtype` that of weights and rows, and `activation_checkpointing`
        one of none, selective and full. Raises `ConfigError` or `LayoutError` where the sizes do not fit.
        """
        super().__init__()
        self.prefix = f"{DECODERS}{name}."
        """What the names of this module's tensors start with."""

    @abstractmethod
    def forward(self, *args: Any, **targets: Any) -> Tensor:
        """The loss of some items, summed over their rows: a scalar in fp32, equal on all tensor parallel ranks.

        The one positional argument is their hidden states [rows, language_hidden], item after item, whole on every
        tensor parallel rank; the gradient must come out whole on each of them. `targets` is what `processor.collate`
        returned for the items, as keyword arguments on the device. It must not wait for the device.
        """

    @abstractmethod
    def flops(self, rows: Iterable[int]) -> float:
        """Floating point operations of one forward over items of so many rows, summed over tensor parallel ranks."""

    @abstractmethod
    def bindings(self) -> list[Binding]:
        """Every parameter and persistent buffer of this rank and its slice of the whole tensor, under `prefix`."""

    def unused_tensors(self) -> Collection[str]:
        """None: no Hugging Face file holds a decoder."""
        return ()
