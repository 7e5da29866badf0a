"""Hugging Face text configurations of every Gemma 4 variant are read as transformers reads them."""

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig
from transformers import Gemma4TextConfig as HuggingFaceTextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedTextConfig

from mimo_gemma4.errors import ConfigError, LayoutError
from mimo_gemma4.language.config import FULL, SLIDING, Gemma4TextConfig
from mimo_gemma4.language.rotary import inverse_frequencies, rotary_tables

PRESETS = ("gemma4_tiny", "gemma4_e2b", "gemma4_e4b", "gemma4_12b", "gemma4_31b")


def preset(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(f"configs/model/{name}.yaml"))


def huggingface(text: dict[str, Any]) -> Any:
    unified = text["model_type"] == "gemma4_unified_text"
    return (Gemma4UnifiedTextConfig if unified else HuggingFaceTextConfig)(**text)


@pytest.mark.parametrize("name", PRESETS)
def test_layers_are_those_of_transformers(name: str) -> None:
    config = preset(name)
    text, reference = Gemma4TextConfig.from_hf(config), huggingface(config["text_config"])
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


# Published totals of the language models (without towers), in millions of parameters.
@pytest.mark.parametrize(
    ("name", "sources", "embedding", "per_layer_table"),
    [("gemma4_e2b", (13, 14), 403, 2349), ("gemma4_e4b", (22, 23), 671, 2819), ("gemma4_31b", None, 1409, 0)],
)
def test_published_sizes(name: str, sources: tuple[int, int] | None, embedding: int, per_layer_table: int) -> None:
    text = Gemma4TextConfig.from_hf(preset(name))
    assert round(text.vocab_size * text.hidden_size / 1e6) == embedding
    table = text.vocab_size_per_layer_input * text.num_hidden_layers * text.hidden_size_per_layer_input
    assert round(table / 1e6) == per_layer_table
    found = {layer.key_value_source for layer in text.layers if not layer.owns_key_values}
    assert found == set(sources or ())


@pytest.mark.parametrize("name", PRESETS)
def test_what_transformers_saves_reads_back_equal(name: str, tmp_path: Any) -> None:
    """Its files leave defaults out and write `per_layer_config` in place of the `global` keys."""
    config = preset(name)
    AutoConfig.for_model(**config).save_pretrained(tmp_path)
    saved = OmegaConf.to_container(OmegaConf.load(tmp_path / "config.json"))
    ours, theirs = Gemma4TextConfig.from_hf(config), Gemma4TextConfig.from_hf(saved)
    assert ours.layers == theirs.layers
    for key in ("hidden_size", "sliding_window", "final_logit_softcapping", "hidden_size_per_layer_input"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.use_bidirectional_attention == theirs.use_bidirectional_attention
    assert set(ours.placeholder_ids) == set(theirs.placeholder_ids)


@pytest.mark.parametrize(
    "wrong",
    [
        {"enable_moe_block": True},
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
