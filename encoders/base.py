"""What an encoder is: the base class that every file of this package derives from.

A third party writes one file in this package with a subclass of `Encoder` and a `mimo_gemma4.media.MediaProcessor`;
`encoders.registry` finds it by its `modality` and `architecture`. `docs/add_an_encoder.md` walks through an example.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mimo_gemma4.distributed.stages import Stage
from mimo_gemma4.media import MediaHeader, MediaProcessor
from mimo_gemma4.weights.bindings import Binding


class ConfiguredProcessor(MediaProcessor, Protocol):
    """A media processor that can be built from a model configuration."""

    @classmethod
    def from_config(cls, hf_config: dict[str, Any]) -> Self:
        """Build it from the nested dict of a Hugging Face `config.json`. Raises `ConfigError` for unfit values."""
        ...


class Encoder(nn.Module, ABC):
    """Media items in, rows of the language model's width out.

    A subclass sets the three class attributes and `self.config`, and defines `__init__`, `forward`, `flops`, `bindings`
    and `projector_parameters`.

    A replicated parameter that sees only this rank's share of the work under tensor parallelism (a norm over local
    heads, say) carries `parameter.tp_gradient_partial = True`: its gradient is summed over the tensor parallel group
    after backward. Gradients of all other replicated parameters must come out equal on those ranks.
    """

    modality: ClassVar[str]
    """Name of the module in `layout`, and of `<modality>_config` in the model configuration, for example `vision`."""
    architecture: ClassVar[str]
    """The `model_type` in `<modality>_config` that selects this class, for example `gemma4_vision`."""
    processor: ClassVar[type[ConfiguredProcessor]]
    """The host side: file bytes to the keyword arguments of `forward`."""
    frame_processor: ClassVar[type[ConfiguredProcessor] | None] = None
    """For an encoder that takes videos too, a `mimo_gemma4.media.FrameProcessor`: frames to items like `processor`'s,
    which its `collate` joins with images."""
    config: TransformerConfig
    """Read by megatron-core's data parallelism and optimizer; `calculate_per_token_loss=True`, as losses are sums."""

    @abstractmethod
    def __init__(
        self,
        hf_config: dict[str, Any],
        groups: ProcessGroupCollection,
        *,
        language_hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        activation_checkpointing: str = "none",
    ):
        """Build the tower and projector with uninitialised weights; `bindings` says how they are filled.

        `hf_config` is the whole model configuration, `groups.tp` the tensor parallel group, `language_hidden` the width
        of the output rows, `dtype` that of weights and outputs, and `activation_checkpointing` one of none, selective
        and full. Raises `ConfigError` or `LayoutError` where the sizes do not fit.
        """
        super().__init__()

    @abstractmethod
    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        """Encode what `processor.collate` returned, as keyword arguments on the device, into [rows, language_hidden].

        Soft tokens come item by item, `processor.soft_tokens(header)` of each, in the order of the items given to
        `collate`, and are equal on all tensor-parallel ranks. It must not wait for the device (`.item()`, `.tolist()`,
        boolean indexing).
        """

    @abstractmethod
    def flops(self, headers: Iterable[MediaHeader]) -> float:
        """Floating point operations of one forward over these items, summed over tensor parallel ranks."""

    def frame_flops(self, headers: Iterable[MediaHeader]) -> float:
        """As `flops`, for frames of videos."""
        return self.flops(headers)

    @abstractmethod
    def bindings(self) -> list[Binding]:
        """Where every parameter and persistent buffer of this rank lies in the Hugging Face tensors."""

    def unused_tensors(self) -> Collection[str]:
        """Names of tensors that Hugging Face files may hold beside the bound ones, and that the model does not use."""
        return ()

    @abstractmethod
    def projector_parameters(self) -> list[nn.Parameter]:
        """The parameters that `freeze: tower` leaves trainable."""


class StagedEncoder(Encoder):
    """An encoder that can be cut into pipeline stages of consecutive layers, `layout.<modality>.pp` of them.

    The first stage has what lies before the layers, the last what lies behind them and the projector; `bindings` and
    `projector_parameters` tell of what this rank's stage has. Every stage's `forward` is given the inputs. On stages
    after the first it has one more keyword argument, `hidden`: what the stage before returned. That is, in place of
    rows, one tensor of hidden states of the weights' type, equal on all tensor parallel ranks, as its gradient must be.
    """

    stage: Stage
    """What of the encoder this rank holds."""
    only_first: ClassVar[frozenset[str]]
    """Arguments of `forward` that the first stage alone reads; the others are given None."""

    @abstractmethod
    def __init__(
        self,
        hf_config: dict[str, Any],
        groups: ProcessGroupCollection,
        *,
        language_hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        stage: Stage,
        activation_checkpointing: str = "none",
    ):
        """Build `stage` of the encoder, as `Encoder` says."""
        super().__init__(hf_config, groups, language_hidden=language_hidden, dtype=dtype, device=device)
        self.stage = stage

    @classmethod
    @abstractmethod
    def layer_costs(cls, hf_config: dict[str, Any], language_hidden: int) -> list[float]:
        """Forward operations of each layer for an item of the largest size, up to a constant factor.

        What lies before the layers counts as the first's, what lies behind them as the last's. Raises `ConfigError`.
        """

    @abstractmethod
    def hidden_shape(self, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of the hidden states between stages for what `processor.collate` returned, on the host."""
