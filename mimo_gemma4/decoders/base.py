"""The base class of decoders, modules that read the language model's output.

A decoder is one file with a subclass of `Decoder` and a `TargetProcessor`; `registry` finds it by its `architecture`.
`docs/add_a_decoder.md` walks through an example.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import Any, ClassVar, Protocol, Self

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.media import ItemProcessor, MediaProcessor
from mimo_gemma4.weights.bindings import DECODERS, Binding


class TargetProcessor(ItemProcessor, Protocol):
    """The host side of a decoder: from a media file to the targets of the item's soft tokens."""

    @classmethod
    def for_media(cls, media: MediaProcessor, options: Any) -> Self:
        """Build it for the items of one of the encoder's media processors.

        `options` are the decoder's. Raises `ConfigError` where the decoder cannot work on these items.
        """
        ...


class Decoder(nn.Module, ABC):
    """Turns the language model's final hidden states at the soft tokens of media items into a loss.

    A subclass sets the three class attributes and `self.config`, and defines `__init__`, `forward`, `flops` and
    `bindings`. Parameters that tensor-parallel ranks hold whole but apply to a share of the work are bound with
    `gradient_sum=("tp",)`, as in encoders.
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
    def __init__(self, name: str, options: Any, context: ModuleContext):
        """Build it with uninitialised weights; `bindings` says how they are filled.

        Args:
            name: the module's in `layout`.
            options: an object of the class `options`.
            context: process groups, width of the language model, type and device of the weights, and so on.

        Raises `ConfigError` or `LayoutError` where the sizes do not fit.
        """
        super().__init__()
        self.prefix = f"{DECODERS}{name}."
        """Prefix of the names of this module's tensors."""

    @abstractmethod
    def forward(self, *args: Any, **targets: Any) -> Tensor:
        """The loss of some items, summed over their soft tokens: fp32 scalar, equal on all tensor-parallel ranks.

        The one positional argument is hidden states [soft tokens, language_hidden], item after item, whole on every
        tensor-parallel rank; their gradient must be whole on each rank, too. The keyword arguments are what
        `processor.collate` returned for the items, tensors on the device. It must not wait for the device.
        """

    @abstractmethod
    def flops(self, soft_tokens: Iterable[int]) -> float:
        """Operations of one forward over items of so many soft tokens each, summed over tensor-parallel ranks."""

    @abstractmethod
    def bindings(self) -> list[Binding]:
        """Every parameter and persistent buffer of this rank and its slice of the whole tensor, under `prefix`."""

    def unused_tensors(self) -> Collection[str]:
        """None: no Hugging Face file holds a decoder."""
        return ()
