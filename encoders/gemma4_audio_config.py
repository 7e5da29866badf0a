"""Sizes of the Gemma 4 audio tower, as `audio_config` of a Hugging Face `config.json` names them."""

from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from mimo_gemma4.errors import ConfigError

MEL_BANDS = 128
"""Frequency bands of a frame of features; the two subsampling convolutions leave a quarter of them."""


@dataclass(frozen=True)
class Gemma4AudioConfig:
    """The keys of `audio_config` that the tower reads; keys with a default may be left out."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    output_proj_dims: int
    """Width of the tower's output."""
    subsampling_conv_channels: tuple[int, int] = (128, 32)
    """Channels of the two convolutions that each halve time and frequency."""
    conv_kernel_size: int = 5
    """Soft tokens that the depthwise convolution of a layer sees, the last of them its own."""
    residual_weight: float = 0.5
    """Factor of the feed-forward branches."""
    attention_chunk_size: int = 12
    """Keys that a query sees, the last of them its own."""
    attention_logit_cap: float = 50.0
    """Attention scores are bent into ±cap by a tanh."""
    gradient_clipping: float = 1.0e10
    """Bound of the activations around the norms."""
    use_clipped_linears: bool = True
    """Whether the layers' linears clamp their inputs and outputs to bounds stored in the checkpoint."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    """Standard deviation of random initial weights."""

    @classmethod
    def from_config(cls, hf_config: dict[str, Any]) -> Self:
        """Read `hf_config["audio_config"]`; unknown keys are ignored. Raises `ConfigError`."""
        section = dict(hf_config.get("audio_config") or {})
        known = {field.name: section[field.name] for field in fields(cls) if section.get(field.name) is not None}
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in known]:
            raise ConfigError(f"audio_config lacks {', '.join(missing)}")
        if "subsampling_conv_channels" in known:
            known["subsampling_conv_channels"] = tuple(known["subsampling_conv_channels"])
        config = cls(**known)
        config._validate(section)
        return config

    def _validate(self, section: dict[str, Any]) -> None:
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 2:
            raise ConfigError(
                f"audio_config.hidden_size={self.hidden_size} is not an even multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        channels = self.subsampling_conv_channels
        if len(channels) != 2 or channels[0] // 4 != MEL_BANDS // 4:
            raise ConfigError(
                f"audio_config.subsampling_conv_channels is {list(channels)}; it must be two numbers, the first "
                f"{MEL_BANDS}: `input_proj_linear` is sized by it as if it were the number of mel bands"
            )
        implemented = {
            "hidden_act": "silu",
            "attention_context_left": self.attention_chunk_size + 1,
            "attention_context_right": 0,
        }
        for key, value in implemented.items():
            if section.get(key) not in (None, value):
                raise ConfigError(f"audio_config.{key} is {section[key]!r}; the Gemma 4 tower is built with {value!r}")

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def subsampled_width(self) -> int:
        """Channels times bands that the two convolutions leave of a soft token."""
        return self.subsampling_conv_channels[1] * (MEL_BANDS // 4)

    def flops(self, frames: int) -> float:
        """Forward operations of the tower for a clip of `frames` mel frames."""
        tokens = half(half(frames))
        output = 2.0 * tokens * self.hidden_size * self.output_proj_dims
        return self.subsampling_flops(frames) + self.num_hidden_layers * self.layer_flops(tokens) + output

    def subsampling_flops(self, frames: int) -> float:
        """Forward operations of the two convolutions and the projection behind them."""
        halved, tokens = half(frames), half(half(frames))
        first, second = self.subsampling_conv_channels
        convolutions = 9 * first * (MEL_BANDS // 2 * halved + second * MEL_BANDS // 4 * tokens)
        return 2.0 * (convolutions + tokens * self.hidden_size * self.subsampled_width)

    def layer_flops(self, tokens: int) -> float:
        """Forward operations of one layer for a sound of so many soft tokens."""
        feed_forward, attention, light_convolution = 16, 4, 3  # matrices of hidden_size² in a layer
        linears = tokens * self.hidden_size**2 * (feed_forward + attention + light_convolution)
        seen = min(tokens, self.attention_chunk_size)
        pairs = seen * (seen + 1) // 2 + (tokens - seen) * self.attention_chunk_size
        local = self.hidden_size * (3 * pairs + self.conv_kernel_size * tokens)  # keys, positions, values; depthwise
        return 2.0 * (linears + local)


def half(frames: int) -> int:
    """Frames that a convolution of stride 2 leaves: one for every even frame."""
    return (frames + 1) // 2
