"""Sizes of the Gemma 4 vision tower, as `vision_config` of a Hugging Face `config.json` names them."""

from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from mimo_gemma4.errors import ConfigError


@dataclass(frozen=True)
class Gemma4VisionConfig:
    """The keys of `vision_config` that the tower reads; keys with a default may be left out."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int = 16
    """Pixels on the side of a patch."""
    pooling_kernel_size: int = 3
    """Patches on the side of a soft token."""
    position_embedding_size: int = 10240
    """Rows of the x and y position tables: the most patches along one side of an image."""
    rope_theta: float = 100.0
    """`vision_config.rope_parameters.rope_theta`."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    """Standard deviation of random initial weights."""
    use_clipped_linears: bool = False
    """Whether the layers' linears clamp their inputs and outputs to bounds stored in the checkpoint (E2B, E4B)."""
    standardize: bool = False
    """Whether pooled soft tokens are shifted and scaled by vectors stored in the checkpoint (26B, 31B)."""

    @classmethod
    def from_config(cls, hf_config: dict[str, Any]) -> Self:
        """Read `hf_config["vision_config"]`; unknown keys are ignored. Raises `ConfigError`."""
        section = dict(hf_config.get("vision_config") or {})
        section.setdefault("num_key_value_heads", section.get("num_attention_heads"))
        rope = section.get("rope_parameters") or {}
        if "rope_theta" in rope:
            section["rope_theta"] = rope["rope_theta"]
        known = {field.name: section[field.name] for field in fields(cls) if section.get(field.name) is not None}
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in known]:
            raise ConfigError(f"vision_config lacks {', '.join(missing)}")
        config = cls(**known)
        config._validate(section, rope)
        return config

    def _validate(self, section: dict[str, Any], rope: dict[str, Any]) -> None:
        if self.head_dim % 4:
            raise ConfigError(
                f"vision_config.head_dim is {self.head_dim}; axial rotary embedding needs a multiple of 4"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"vision_config.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        implemented = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0}
        for key, value in implemented.items():
            if section.get(key) not in (None, value):
                raise ConfigError(f"vision_config.{key} is {section[key]!r}; the Gemma 4 tower is built with {value!r}")
        if rope.get("rope_type", "axial") != "axial":
            raise ConfigError(f"vision_config.rope_parameters.rope_type is {rope['rope_type']!r}; it must be 'axial'")

    @property
    def embedding_flops(self) -> float:
        """Forward operations of the patch embedding, per patch."""
        return 2.0 * 3 * self.patch_size**2 * self.hidden_size

    @property
    def linear_flops(self) -> float:
        """Forward operations of the patch embedding and the layers' linears, per patch."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads  # q and o, k and v
        layer = 2.0 * self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)
        return self.num_hidden_layers * layer + self.embedding_flops

    @property
    def attention_flops(self) -> float:
        """Forward operations of scores and weighted values of all layers, per pair of patches of one image."""
        return 4.0 * self.num_hidden_layers * self.num_attention_heads * self.head_dim
