"""Useful floating point operations of the Gemma 4 text model for the sequences of a step.

Counted: matrix products (two operations per multiply-add) and attention over the keys that the causal mask or the
window lets through. Not counted: embedding and per-layer-embedding look-ups, norms, activations, recomputation,
padding, and the key/value projections that layers with shared keys and values do not have. Image groups that attend
both ways count as causal. A token's experts count, whichever rank computes them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

PEAK_TERAFLOPS = {"B300": 2250.0, "B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16 peak of one GPU, by a part of the device's name (vendor data sheets, no sparsity)."""


class LayerShape(Protocol):
    """Sizes of a decoder layer that determine its operations."""

    @property
    def attention(self) -> str:
        """`sliding_attention` or `full_attention`."""
        ...

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        ...

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads over all ranks."""
        ...

    @property
    def owns_key_values(self) -> bool:
        """False if the layer uses an earlier layer's keys and values."""
        ...

    @property
    def has_value_projection(self) -> bool:
        """False if the values are the raw keys."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward network over all ranks."""
        ...


class TextShape(Protocol):
    """Sizes of a text model that determine its operations, by their names in Hugging Face's `text_config`."""

    @property
    def vocab_size(self) -> int:
        """Width of the output head."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def hidden_size_per_layer_input(self) -> int:
        """Channels of the per-layer embeddings; 0: none."""
        ...

    @property
    def num_attention_heads(self) -> int:
        """Query heads over all ranks."""
        ...

    @property
    def sliding_window(self) -> int:
        """Keys that a query of a sliding layer sees, including its own."""
        ...

    @property
    def num_experts(self) -> int:
        """Experts of a layer, over all ranks; 0: the model has none."""
        ...

    @property
    def top_k_experts(self) -> int:
        """Experts that a token goes to."""
        ...

    @property
    def moe_intermediate_size(self) -> int:
        """Width of one expert."""
        ...

    @property
    def layers(self) -> Sequence[LayerShape]:
        """Every decoder layer."""
        ...


@dataclass(frozen=True)
class TextFlops:
    """Forward floating point operations of some sequences, by part."""

    linear: float
    """Projections of the decoder layers."""
    head: float
    """Output head."""
    sliding: float
    """Attention of the sliding layers."""
    full: float
    """Attention of the full layers."""

    @property
    def forward(self) -> float:
        """One forward pass."""
        return self.linear + self.head + self.sliding + self.full

    def training(self, frozen: bool = False) -> float:
        """Forward and backward. A frozen module computes no weight gradients but still passes gradients on."""
        return (2 if frozen else 3) * (self.linear + self.head) + 3 * (self.sliding + self.full)


def text_flops(text: TextShape, lengths: Iterable[int]) -> TextFlops:
    """Operations for sequences, packed or not, of these lengths in tokens; each attends only to itself."""
    lengths = list(lengths)
    tokens = sum(lengths)
    pairs_full = sum(causal_pairs(length, length) for length in lengths)
    pairs_sliding = sum(causal_pairs(length, text.sliding_window) for length in lengths)
    attention = {"sliding_attention": 0.0, "full_attention": 0.0}
    for layer in text.layers:
        pairs = pairs_full if layer.attention == "full_attention" else pairs_sliding
        attention[layer.attention] += 4.0 * text.num_attention_heads * layer.head_dim * pairs
    return TextFlops(
        linear=2.0 * tokens * linear_parameters(text),
        head=head_flops(text, tokens),
        sliding=attention["sliding_attention"],
        full=attention["full_attention"],
    )


def linear_parameters(text: TextShape) -> int:
    """Elements of the weight matrices that multiply every token, without the output head."""
    return sum(_layer_parameters(text, layer) for layer in text.layers)


def layer_flops(text: TextShape, layer: LayerShape, length: int) -> float:
    """Forward operations of one decoder layer for a sequence of `length` tokens."""
    window = length if layer.attention == "full_attention" else text.sliding_window
    attention = 4.0 * text.num_attention_heads * layer.head_dim * causal_pairs(length, window)
    return 2.0 * length * _layer_parameters(text, layer) + attention


def head_flops(text: TextShape, tokens: int) -> float:
    """Forward operations of the output head."""
    return 2.0 * tokens * text.hidden_size * text.vocab_size


def _layer_parameters(text: TextShape, layer: LayerShape) -> int:
    projections = 2 * text.num_attention_heads  # queries and output
    if layer.owns_key_values:
        projections += layer.num_key_value_heads * (2 if layer.has_value_projection else 1)
    total = text.hidden_size * layer.head_dim * projections
    total += 3 * text.hidden_size * layer.intermediate_size  # gate, up, down
    total += text.hidden_size * text.num_experts  # router
    total += 3 * text.hidden_size * text.moe_intermediate_size * text.top_k_experts
    # Per-layer embedding: gate, projection back, and this layer's rows of the model's projection.
    return total + 3 * text.hidden_size * text.hidden_size_per_layer_input


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in operations per second of a device, or None if it is not known (CPUs)."""
    return next((peak * 1e12 for name, peak in PEAK_TERAFLOPS.items() if name in device_name), None)


def causal_pairs(length: int, window: int) -> int:
    """(query, key) pairs of a causal sequence whose queries see at most `window` keys, including their own."""
    seen = min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * window
