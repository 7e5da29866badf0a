"""Cuts the language model into pipeline stages; the tensors that one stage sends to the next."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mimo_gemma4.distributed.stages import Stage, cut_evenly
from mimo_gemma4.errors import LayoutError
from mimo_gemma4.flops import head_flops, layer_flops
from mimo_gemma4.language.attention import KeyValues
from mimo_gemma4.language.config import Gemma4TextConfig, LayerConfig


@dataclass(frozen=True)
class LanguageStage(Stage):
    """The decoder layers of one pipeline stage, and which layers' keys and values it receives and sends.

    The first stage also has the embedding, the last the final norm and the head.
    """

    received: tuple[int, ...] = ()
    """Layers of earlier stages whose keys and values this or later stages use."""
    sent: tuple[int, ...] = ()
    """Layers of this or earlier stages whose keys and values later stages use."""


@dataclass(frozen=True)
class StageTensors:
    """Inputs of a stage, and what it sends to the next."""

    hidden: torch.Tensor
    """[S/(cp*tp), B, H] (local)."""
    embeddings: torch.Tensor | None = None
    """[S/(cp*tp), B, H] (local): embeddings with soft tokens, from which every stage computes its per-layer embeddings;
    None in models without."""
    shared: dict[int, KeyValues] = field(default_factory=dict)
    """By layer, keys and values that later stages use."""

    def flat(self) -> list[torch.Tensor]:
        """All tensors in a fixed order."""
        own = [self.hidden] if self.embeddings is None else [self.hidden, self.embeddings]
        return own + [tensor for layer in sorted(self.shared) for tensor in self.shared[layer]]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], layers: Sequence[int], per_layer_inputs: bool) -> "StageTensors":
        """The inverse of `flat`; `layers` are those of `shared`."""
        hidden, *rest = tensors
        embeddings = rest.pop(0) if per_layer_inputs else None
        pairs = zip(rest[::2], rest[1::2], strict=True)
        return cls(hidden, embeddings, {layer: KeyValues(*pair) for layer, pair in zip(layers, pairs, strict=True)})


def cut_stages(
    text: Gemma4TextConfig, stages: int, *, sequence_length: int, part_shared_key_values: bool = False
) -> tuple[LanguageStage, ...]:
    """Cut the layers into consecutive stages of about equal cost.

    The cost is the forward operations for a sequence of `sequence_length` tokens; the head counts in the last stage.
    Minimises the largest cost of a stage; the stages before any given one are cut in the same way.

    Args:
        text: hyperparameters.
        stages: number of stages.
        sequence_length: tokens of a sequence.
        part_shared_key_values: allow cuts between layers and the source of their keys and values.

    Raises `LayoutError` where there are too few places to cut.
    """
    count = text.num_hidden_layers
    layers = text.layers
    cuts = [cut for cut in range(1, count) if part_shared_key_values or not _crossing(layers, cut)]
    if len(cuts) < stages - 1:
        few = (
            f"`layout.language.pp` is {stages}, but the model's {count} layers can be cut into {len(cuts) + 1} at most"
        )
        if part_shared_key_values or not text.num_kv_shared_layers:
            raise LayoutError(f"{few}: lower it")
        raise LayoutError(
            f"{few} without parting the last {text.num_kv_shared_layers} layers from those whose keys and values they "
            "share: lower it, or set `layout.language.part_shared_key_values: true` to send those from stage to stage"
        )
    costs = [layer_flops(text, layer, sequence_length) for layer in layers]
    costs[-1] += head_flops(text, sequence_length)
    bounds = cut_evenly(costs, stages, cuts)
    return tuple(
        LanguageStage(range(start, stop), count, _crossing(layers, start), _crossing(layers, stop))
        for start, stop in zip(bounds, bounds[1:], strict=False)
    )


def _crossing(layers: Sequence[LayerConfig], cut: int) -> tuple[int, ...]:
    """Layers before `cut` whose keys and values are used by layers from `cut` on."""
    return tuple(sorted({layer.key_value_source for layer in layers[cut:] if layer.key_value_source < cut}))
