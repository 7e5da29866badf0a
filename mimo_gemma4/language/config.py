"""The text part of a Hugging Face Gemma 4 `config.json`, the properties of each layer, and megatron-core's config."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from mimo_gemma4.config.model_description import unsupported
from mimo_gemma4.errors import ConfigError, LayoutError

SLIDING = "sliding_attention"
FULL = "full_attention"
ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}

# transformers leaves class defaults out of the files it writes, so these are its class defaults, not a model's values.
UNIFIED_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 0,
}


@dataclass(frozen=True)
class LayerConfig:
    """What distinguishes one decoder layer from another."""

    index: int
    """Number of the layer, from 0."""
    attention: str
    """`sliding_attention` or `full_attention`."""
    head_dim: int
    """Channels of one head."""
    num_key_value_heads: int
    """Key/value heads, over all tensor-parallel ranks."""
    key_value_source: int
    """The layer whose keys and values this layer attends to: itself, or an earlier layer of the same attention type."""
    has_value_projection: bool
    """False where values are the normalised raw keys, so that no `v_proj` exists."""
    intermediate_size: int
    """Width of the feed-forward network, over all tensor-parallel ranks."""

    @property
    def owns_key_values(self) -> bool:
        """Whether the layer projects keys and values of its own."""
        return self.key_value_source == self.index


@dataclass(frozen=True)
class Gemma4TextConfig:
    """Gemma 4 text hyperparameters under their Hugging Face names, with the defaults of transformers' class."""

    vocab_size: int = 262_144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    num_global_key_value_heads: int | None = None
    """Key/value heads of full-attention layers, where `attention_k_eq_v`; None: as in sliding layers."""
    head_dim: int = 256
    global_head_dim: int = 512
    """Head size of full-attention layers."""
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    pad_token_id: int = 0
    rope_parameters: dict[str, dict[str, Any]] = field(default_factory=lambda: ROPE)
    sliding_window: int = 512
    """Number of keys a query of a sliding layer sees, itself included."""
    layer_types: tuple[str, ...] = ()
    """Attention type of every layer; empty: five sliding layers, then a full one. The last layer is always full."""
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: str | None = None
    """`vision`: tokens of one image see one another."""
    vocab_size_per_layer_input: int = 262_144
    hidden_size_per_layer_input: int = 256
    """Channels of the per-layer embeddings; 0: the model has none."""
    attention_k_eq_v: bool = False
    """Full-attention layers use their raw keys as values."""
    num_kv_shared_layers: int = 0
    """The last so many layers attend to keys and values of earlier layers."""
    use_double_wide_mlp: bool = False
    """Layers with shared keys and values have twice the `intermediate_size`."""
    enable_moe_block: bool = False
    """Every layer has experts beside its dense feed-forward network."""
    num_experts: int = 0
    """Experts of a layer, over all ranks; 0 without `enable_moe_block`."""
    top_k_experts: int = 0
    """Experts that a token goes to; 0 without `enable_moe_block`."""
    moe_intermediate_size: int = 0
    """Width of one expert; 0 without `enable_moe_block`."""
    model_type: str = "gemma4_text"
    placeholder_ids: tuple[int, ...] = ()
    """Token ids in place of soft tokens: `image_token_id`, `audio_token_id`, `video_token_id` of the whole model."""

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> "Gemma4TextConfig":
        """Read a whole model's `config.json` dict, or its `text_config` alone.

        Raises `ConfigError` for values that no Gemma 4 model has.
        """
        text = dict(hf_config.get("text_config", hf_config))
        if problems := unsupported(text):
            raise ConfigError("; ".join(problems))
        unified = str(text.get("model_type", "")).startswith("gemma4_unified")
        values: dict[str, Any] = (UNIFIED_DEFAULTS if unified else {}) | _merge_per_layer_config(text)
        known = {entry.name for entry in fields(cls)}
        values = {key: value for key, value in values.items() if key in known and value is not None}
        values["layer_types"] = tuple(values.get("layer_types", ()))
        names = ("image_token_id", "audio_token_id", "video_token_id")
        values["placeholder_ids"] = tuple(hf_config[name] for name in names if hf_config.get(name) is not None)
        return cls(**values)

    def __post_init__(self) -> None:
        """Fill in `layer_types` and check that values agree with one another."""
        count = self.num_hidden_layers
        types = self.layer_types or tuple(FULL if (index + 1) % 6 == 0 else SLIDING for index in range(count))
        if len(types) != count:
            raise ConfigError(f"text_config: {len(types)} `layer_types` for {count} `num_hidden_layers`")
        unknown = set(types) - {SLIDING, FULL}
        if unknown:
            raise ConfigError(f"text_config.layer_types: {sorted(unknown)}; known: {SLIDING}, {FULL}")
        object.__setattr__(self, "layer_types", (*types[:-1], FULL))
        first_shared = count - self.num_kv_shared_layers
        missing = set(self.layer_types) - set(self.layer_types[:first_shared])
        if missing:
            raise ConfigError(
                f"text_config.num_kv_shared_layers = {self.num_kv_shared_layers} of {count} layers leaves no layer of "
                f"type {sorted(missing)} with keys and values of its own"
            )
        self._check_experts()
        for name in set(self.layer_types):
            rope, known = self.rope_parameters.get(name, {}).get("rope_type"), ("default", "proportional")
            if rope not in known:
                raise ConfigError(f"text_config.rope_parameters.{name}.rope_type is {rope!r}; known: {known}")

    def _check_experts(self) -> None:
        for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            if not self.enable_moe_block:
                object.__setattr__(self, name, 0)
            elif getattr(self, name) < 1:
                value = getattr(self, name)
                raise ConfigError(f"text_config.{name} is {value}; with `enable_moe_block` it must be at least 1")
        if self.top_k_experts > self.num_experts:
            raise ConfigError(
                f"text_config.top_k_experts = {self.top_k_experts} is more than num_experts = {self.num_experts}"
            )

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """Properties of every layer."""
        return tuple(self._layer(index) for index in range(self.num_hidden_layers))

    def _layer(self, index: int) -> LayerConfig:
        attention = self.layer_types[index]
        full = attention == FULL
        first_shared = self.num_hidden_layers - self.num_kv_shared_layers
        shared = index >= first_shared
        sources = [source for source in range(first_shared) if self.layer_types[source] == attention]
        key_value_heads = self.num_key_value_heads
        if full and self.attention_k_eq_v and self.num_global_key_value_heads:
            key_value_heads = self.num_global_key_value_heads
        return LayerConfig(
            index=index,
            attention=attention,
            head_dim=self.global_head_dim if full else self.head_dim,
            num_key_value_heads=key_value_heads,
            key_value_source=sources[-1] if shared else index,
            has_value_projection=not (full and self.attention_k_eq_v),
            intermediate_size=self.intermediate_size * (2 if shared and self.use_double_wide_mlp else 1),
        )

    def unused_tensors(self, prefix: str) -> list[str]:
        """Names under `prefix` that files may hold for layers without keys and values of their own."""
        return [
            f"{prefix}layers.{layer.index}.self_attn.{name}.weight"
            for layer in self.layers
            if not layer.owns_key_values
            for name in ("k_proj", "v_proj", "k_norm", "v_norm")
        ]

    @property
    def groups_extend_window(self) -> bool:
        """Whether media groups widen every mask (`gemma4_unified`), not only sliding layers' inside the window."""
        return self.model_type.startswith("gemma4_unified")

    def transformer_config(
        self, *, tp: int, cp: int, ep: int = 1, sequence_parallel: bool, dtype: torch.dtype, device: torch.device
    ) -> TransformerConfig:
        """megatron-core's view of the model. Raises `LayoutError` where `tp` or `ep` does not divide it."""
        self._check_tensor_parallel(tp)
        self._check_expert_parallel(ep)
        experts: dict[str, Any] = {}
        if self.num_experts:
            experts = {
                "num_moe_experts": self.num_experts,
                "moe_router_topk": self.top_k_experts,
                "moe_ffn_hidden_size": self.moe_intermediate_size,
                "moe_router_dtype": "fp32",
            }
        return TransformerConfig(
            num_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_key_value_heads,
            kv_channels=self.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=self.rms_norm_eps,
            qk_layernorm=True,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=F.gelu,
            bias_activation_fusion=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            init_method_std=self.initializer_range,
            calculate_per_token_loss=True,
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            sequence_parallel=sequence_parallel and tp > 1,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_cpu_initialization=device.type != "cuda",
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            **experts,
        )

    def _check_tensor_parallel(self, tp: int) -> None:
        sizes = {"num_attention_heads": self.num_attention_heads, "vocab_size": self.vocab_size}
        sizes |= {"intermediate_size": self.intermediate_size}
        if self.hidden_size_per_layer_input:
            sizes |= {"vocab_size_per_layer_input": self.vocab_size_per_layer_input}
        for name, size in sizes.items():
            if size % tp:
                raise LayoutError(f"layout.language.tp = {tp} does not divide the model's {name} = {size}")
        for heads in {layer.num_key_value_heads for layer in self.layers}:
            if heads % tp and tp % heads:
                raise LayoutError(f"layout.language.tp = {tp} is no divisor or multiple of {heads} key/value heads")

    def _check_expert_parallel(self, ep: int) -> None:
        if ep > 1 and not self.num_experts:
            raise LayoutError(f"layout.language.ep = {ep}, but the model has no experts: set it to 1")
        if self.num_experts % ep:
            raise LayoutError(f"layout.language.ep = {ep} does not divide the model's num_experts = {self.num_experts}")


def _merge_per_layer_config(text: dict[str, Any]) -> dict[str, Any]:
    """`text` with the overrides that newer transformers write per layer put back under their two `global` keys.

    What such a file does not override is as in the other layers, so the `global` defaults do not apply to it.
    """
    if text.get("per_layer_config") is None:
        return text
    overrides = {tuple(sorted(entry.items())) for entry in text["per_layer_config"].values()}
    if len(overrides) > 1:
        raise ConfigError(f"text_config.per_layer_config: full-attention layers that differ, {sorted(overrides)}")
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    entry = dict(overrides.pop()) if overrides else {}
    unknown = sorted(set(entry) - set(names))
    if unknown:
        raise ConfigError(f"text_config.per_layer_config: unknown keys {unknown}; known: {sorted(names)}")
    same = {"global_head_dim": text.get("head_dim"), "num_global_key_value_heads": None}
    return text | same | {names[key]: value for key, value in entry.items()}
