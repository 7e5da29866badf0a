"""Hugging Face text configurations of every Gemma 4 variant are read as transformers reads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig
from transformers import Gemma4TextConfig as HuggingFaceTextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedTextConfig

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.errors import ConfigError, LayoutError
from mimo_gemma4.language.config import FULL, SLIDING, Gemma4TextConfig
from mimo_gemma4.language.rotary import inverse_frequencies, rotary_tables

PRESETS = ("gemma4_tiny", "gemma4_e2b", "gemma4_e4b", "gemma4_12b", "gemma4_26b_a4b", "gemma4_31b")


def preset(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(f"configs/model/{name}.yaml"))


def huggingface(text: dict[str, Any]) -> Any:
    unified = text["model_type"] == "gemma4_unified_text"
    return (Gemma4UnifiedTextConfig if unified else HuggingFaceTextConfig)(**text)


def assert_layers_are_those_of(reference: Any, text: Gemma4TextConfig) -> None:
    """`reference` is transformers' text configuration."""
    assert len(text.layers) == reference.num_hidden_layers
    stored = {kind: i for i, kind in enumerate(reference.layer_types) if reference.kv_sharing_modes[i] == "store"}
    for layer, mode in zip(text.layers, reference.kv_sharing_modes, strict=True):
        expected = reference.per_layer_config[layer.index]
        assert layer.attention == reference.layer_types[layer.index]
        assert (layer.head_dim, layer.num_key_value_heads) == (expected.head_dim, expected.num_key_value_heads)
        assert layer.key_value_source == (stored[layer.attention] if mode == "reuse" else layer.index)
        assert layer.has_value_projection == (layer.attention == SLIDING or not reference.attention_k_eq_v)
        double = 2 if mode == "reuse" and reference.use_double_wide_mlp else 1
        assert layer.intermediate_size == double * reference.intermediate_size


@pytest.mark.parametrize("name", PRESETS)
def test_layers_are_those_of_transformers(name: str) -> None:
    config = preset(name)
    assert_layers_are_those_of(huggingface(config["text_config"]), Gemma4TextConfig.from_hf(config))


# Published totals of the language models (without towers), in millions of parameters.
@pytest.mark.parametrize(
    ("name", "sources", "embedding", "per_layer_table"),
    [
        ("gemma4_e2b", (13, 14), 403, 2349),
        ("gemma4_e4b", (22, 23), 671, 2819),
        ("gemma4_26b_a4b", None, 738, 0),
        ("gemma4_31b", None, 1409, 0),
    ],
)
def test_published_sizes(name: str, sources: tuple[int, int] | None, embedding: int, per_layer_table: int) -> None:
    text = Gemma4TextConfig.from_hf(preset(name))
    assert round(text.vocab_size * text.hidden_size / 1e6) == embedding
    table = text.vocab_size_per_layer_input * text.num_hidden_layers * text.hidden_size_per_layer_input
    assert round(table / 1e6) == per_layer_table
    found = {layer.key_value_source for layer in text.layers if not layer.owns_key_values}
    assert found == set(sources or ())


# What a text model reads beside what its layers show.
READ = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "sliding_window",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "hidden_size_per_layer_input",
    "model_type",
]
SIZES = dict(hidden_size=48, num_hidden_layers=7, num_attention_heads=6, num_key_value_heads=3, head_dim=12)
SAVED = {
    "class defaults": {},
    "small": SIZES | dict(global_head_dim=20, num_kv_shared_layers=1, use_double_wide_mlp=True),
    "keys as values": SIZES | dict(attention_k_eq_v=True, num_global_key_value_heads=1, pad_token_id=3),
    "one head size": SIZES | dict(global_head_dim=12, attention_k_eq_v=True),
    "causal": SIZES | dict(use_bidirectional_attention=None, final_logit_softcapping=30.0),
    "vision": SIZES | dict(use_bidirectional_attention="vision", sliding_window=37, vocab_size=777),
    "other rope": SIZES
    | dict(
        rope_parameters={
            SLIDING: {"rope_type": "default", "rope_theta": 5_000.0},
            FULL: {"rope_type": "proportional", "rope_theta": 7e5, "partial_rotary_factor": 0.5, "factor": 4.0},
        },
    ),
}


@pytest.mark.parametrize("values", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"])
def test_what_transformers_saves_is_read_as_transformers_reads_it(
    model_type: str, values: dict[str, Any], tmp_path: Path
) -> None:
    """Its files leave class defaults out and write `per_layer_config` in place of the `global` keys."""
    whole = not model_type.endswith("_text")
    AutoConfig.for_model(model_type, **({"text_config": values} if whole else values)).save_pretrained(tmp_path)
    reference = AutoConfig.from_pretrained(tmp_path)
    text = Gemma4TextConfig.from_hf(load_model_config(ModelConfig(hf_path=str(tmp_path))))

    if whole:
        names = ("image_token_id", "audio_token_id", "video_token_id")
        assert set(text.placeholder_ids) == {getattr(reference, name) for name in names}
        reference = reference.text_config
    assert_layers_are_those_of(reference, text)
    assert text.rope_parameters == reference.rope_parameters
    for key in READ:
        expected = getattr(reference, key, 0)  # the unified class has no per-layer embeddings
        assert getattr(text, key) == expected, key


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_back_equal_after_transformers_saved_it(name: str, tmp_path: Path) -> None:
    config = preset(name)
    AutoConfig.for_model(**config).save_pretrained(tmp_path)
    ours = Gemma4TextConfig.from_hf(config)
    saved = Gemma4TextConfig.from_hf(load_model_config(ModelConfig(hf_path=str(tmp_path))))
    assert ours.layers == saved.layers
    for key in READ:
        assert getattr(ours, key) == getattr(saved, key), key
    assert set(ours.placeholder_ids) == set(saved.placeholder_ids)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_experts": None, "enable_moe_block": True, "top_k_experts": 2, "moe_intermediate_size": 8},
        {"top_k_experts": 5, "enable_moe_block": True, "num_experts": 4, "moe_intermediate_size": 8},
        {"attention_bias": True},
        {"hidden_activation": "silu"},
        {"tie_word_embeddings": False},
        {"use_bidirectional_attention": "all"},
        {"num_kv_shared_layers": 27},
        {"layer_types": [SLIDING, FULL]},
        {"rope_parameters": {SLIDING: {"rope_type": "yarn"}, FULL: {"rope_type": "proportional"}}},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_unsupported_values_name_their_key(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).split("_")[-1]):
        Gemma4TextConfig.from_hf({"text_config": wrong})


def test_tensor_parallel_sizes_that_do_not_fit_are_refused() -> None:
    text = Gemma4TextConfig.from_hf(preset("gemma4_tiny"))
    arguments = {"cp": 1, "sequence_parallel": False, "dtype": torch.float32, "device": torch.device("cpu")}
    assert text.transformer_config(tp=4, **arguments).tensor_model_parallel_size == 4
    with pytest.raises(LayoutError, match="tp = 3 .* num_attention_heads = 4"):
        text.transformer_config(tp=3, **arguments)


def test_expert_parallel_sizes_that_do_not_fit_are_refused() -> None:
    arguments = {"tp": 1, "cp": 1, "sequence_parallel": False, "dtype": torch.float32, "device": torch.device("cpu")}
    experts = Gemma4TextConfig.from_hf(preset("gemma4_26b_a4b"))
    assert experts.transformer_config(ep=8, **arguments).expert_model_parallel_size == 8
    with pytest.raises(LayoutError, match="ep = 3 .* num_experts = 128"):
        experts.transformer_config(ep=3, **arguments)
    with pytest.raises(LayoutError, match="ep = 2, but the model has no experts"):
        Gemma4TextConfig.from_hf(preset("gemma4_tiny")).transformer_config(ep=2, **arguments)


@pytest.mark.parametrize("attention", [SLIDING, FULL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_are_those_of_transformers(attention: str, dtype: torch.dtype) -> None:
    config = preset("gemma4_e4b")["text_config"]
    text = Gemma4TextConfig.from_hf(config)
    positions = torch.tensor([[0, 1, 2, 511, 131_071], [0, 0, 7, 9_999, 3]])
    head_dim = next(layer.head_dim for layer in text.layers if layer.attention == attention)
    tables = rotary_tables(positions, inverse_frequencies(text.rope_parameters[attention], head_dim), dtype)
    expected = Gemma4TextRotaryEmbedding(huggingface(config))(torch.empty(0, dtype=dtype), positions, attention)
    for table, other in zip(tables, expected, strict=True):
        # the same fp32 operations in the same order: no tolerance
        torch.testing.assert_close(table.squeeze(2).transpose(0, 1), other, rtol=0, atol=0)
