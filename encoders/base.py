"""The base classes of encoders.

An encoder is one file with a subclass of `Encoder` and a `mimo_gemma4.media.MediaProcessor`; `encoders.registry` finds
it by its `modality` and `architecture`. `docs/add_an_encoder.md` walks through an example.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Protocol, Self

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.distributed.stages import Stage, cut_evenly
from mimo_gemma4.errors import LayoutError
from mimo_gemma4.media import MediaHeader, MediaProcessor
from mimo_gemma4.weights.bindings import Binding


class ConfiguredProcessor(MediaProcessor, Protocol):
    """A media processor that can be built from a model configuration."""

    @classmethod
    def from_config(cls, hf_config: dict[str, Any]) -> Self:
        """Build it from the nested dict of a Hugging Face `config.json`. Raises `ConfigError` for unfit values."""
        ...


class Encoder(nn.Module, ABC):
    """Turns media items into soft tokens: vectors of the language model's width.

    A subclass sets the three class attributes and `self.config`, and defines `__init__`, `forward`, `flops`, `bindings`
    and `projector_parameters`.

    Tensor-parallel ranks may each apply a parameter that they all hold whole to a share of the work, such as a norm
    to local heads. Its binding has `gradient_sum=("tp",)`, and its gradient is summed over these ranks after backward.
    Gradients of all other replicated parameters must come out equal on these ranks.
    """

    modality: ClassVar[str]
    """Name of the module in `layout`, and of `<modality>_config` in the model configuration, for example `vision`."""
    architecture: ClassVar[str]
    """The `model_type` in `<modality>_config` that selects this class, for example `gemma4_vision`."""
    processor: ClassVar[type[ConfiguredProcessor]]
    """The host side: file bytes to the keyword arguments of `forward`."""
    frame_processor: ClassVar[type[ConfiguredProcessor] | None] = None
    """For an encoder that takes videos too, a `mimo_gemma4.media.FrameProcessor`. `processor.collate` must be able to
    join its items with images."""
    config: TransformerConfig
    """Read by megatron-core's data parallelism and optimizer; `calculate_per_token_loss=True`, as losses are sums."""

    @abstractmethod
    def __init__(self, hf_config: dict[str, Any], context: ModuleContext):
        """Build the tower and projector with uninitialised weights; `bindings` says how they are filled.

        Args:
            hf_config: the whole model configuration, in the shape of a Hugging Face `config.json`.
            context: process groups, width of the language model, type and device of the weights, and so on.

        Raises `ConfigError` or `LayoutError` where the sizes do not fit.
        """
        super().__init__()

    @abstractmethod
    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        """Encode items into soft tokens [soft tokens, language_hidden], equal on all tensor-parallel ranks.

        The keyword arguments are what `processor.collate` returned, tensors on the device. Soft tokens come item by
        item, `processor.soft_tokens(header)` of each, in the order in which `collate` had the items. It must not wait
        for the device (`.item()`, `.tolist()`, boolean indexing).
        """

    @abstractmethod
    def flops(self, headers: Iterable[MediaHeader]) -> float:
        """Floating point operations of one forward over these items, summed over tensor-parallel ranks."""

    def frame_flops(self, headers: Iterable[MediaHeader]) -> float:
        """As `flops`, for frames of videos."""
        return self.flops(headers)

    @abstractmethod
    def bindings(self) -> list[Binding]:
        """Which slice of which Hugging Face tensor each parameter and persistent buffer of this rank holds."""

    def unused_tensors(self) -> Collection[str]:
        """Names of tensors that Hugging Face files may hold beside the bound ones; the model does not use them."""
        return ()

    @abstractmethod
    def projector_parameters(self) -> list[nn.Parameter]:
        """The parameters that `freeze: tower` leaves trainable."""


class StagedEncoder(Encoder):
    """An encoder that can be cut into pipeline stages of consecutive layers, `layout.<modality>.pp` of them.

    The first stage has the modules before the layers, the last has those behind them and the projector; `bindings` and
    `projector_parameters` list the parameters of this rank's stage. `forward` gets the inputs on every stage. On stages
    after the first it has one more keyword argument, `hidden`, the output of the previous stage. Stages before the last
    return one tensor of hidden states of the weights' type; it and its gradient are equal on all tensor-parallel ranks.
    """

    stage: Stage
    """The layers that this rank holds."""
    only_first: ClassVar[frozenset[str]]
    """Arguments of `forward` that only the first stage reads; on other stages they are None."""

    @abstractmethod
    def __init__(self, hf_config: dict[str, Any], context: ModuleContext):
        """Build stage number `context.pp_rank` of the encoder, `self.stage`. Arguments and errors are `Encoder`'s."""
        super().__init__(hf_config, context)
        self.stage = self._cut(hf_config, context)[context.pp_rank]

    @classmethod
    def _cut(cls, hf_config: dict[str, Any], context: ModuleContext) -> list[Stage]:
        """The encoder's stages, of about equal cost."""
        costs, stages = cls.layer_costs(hf_config, context.language_hidden), context.pp_size
        if len(costs) < stages:
            raise LayoutError(
                f"`layout.{cls.modality}.pp` is {stages}, but {cls.modality}_config has {len(costs)} layers, and "
                "every pipeline stage needs one: lower it"
            )
        bounds = cut_evenly(costs, stages)
        return [Stage(range(*ends), len(costs)) for ends in zip(bounds, bounds[1:], strict=False)]

    @classmethod
    @abstractmethod
    def layer_costs(cls, hf_config: dict[str, Any], language_hidden: int) -> list[float]:
        """Forward operations of each layer for an item of the largest size, up to a constant factor.

        The first layer's cost includes everything before the layers, the last layer's everything behind them. Raises
        `ConfigError`.
        """

    @abstractmethod
    def hidden_shape(self, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of the hidden states between stages, from the inputs that `processor.collate` returned, on the host."""
