"""Wrong values of a model's `config.json` and tokenizer end in one error that lists all of them.

The values are single changes to a directory that loads, found by trying what each key must not be.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.model_description import check_token_ids
from mimo_gemma4.config.presets import PRESETS, load_model_config
from mimo_gemma4.errors import ConfigError

TINY = yaml.safe_load((PRESETS / "gemma4_tiny.yaml").read_text())
WRONG: list[tuple[str, Any]] = [
    ("model_type", "llama"),
    ("model_type", 3),
    ("tie_word_embeddings", False),
    ("image_token_id", "<|image|>"),
    ("image_token_id", -1),
    ("audio_token_id", 6),  # image_token_id
    ("boi_token_id", 5.0),
    ("text_config", []),
    ("text_config", "gemma4_text"),
    ("vision_config", [1]),
    ("audio_config", "none"),
    ("text_config.model_type", "llama"),
    ("text_config.vocab_size", 0),
    ("text_config.vocab_size", "384"),
    ("text_config.hidden_size", -128),
    ("text_config.hidden_size", 128.5),
    ("text_config.intermediate_size", True),
    ("text_config.num_hidden_layers", 0),
    ("text_config.num_hidden_layers", 7),  # six layer_types
    ("text_config.num_hidden_layers", "6"),
    ("text_config.num_attention_heads", 3),  # two key/value heads
    ("text_config.num_attention_heads", 0),
    ("text_config.num_key_value_heads", 0),
    ("text_config.num_key_value_heads", 3),
    ("text_config.num_global_key_value_heads", 3),
    ("text_config.head_dim", 15),
    ("text_config.global_head_dim", 0),
    ("text_config.layer_types", "sliding_attention"),
    ("text_config.layer_types", ["chunked_attention"] * 6),
    ("text_config.layer_types", [3]),
    ("text_config.num_kv_shared_layers", 6),
    ("text_config.num_kv_shared_layers", -1),
    ("text_config.sliding_window", 0),
    ("text_config.sliding_window", "32"),
    ("text_config.rms_norm_eps", 0),
    ("text_config.rms_norm_eps", "1e-6"),
    ("text_config.initializer_range", float("nan")),
    ("text_config.final_logit_softcapping", -30),
    ("text_config.hidden_size_per_layer_input", -1),
    ("text_config.pad_token_id", 384),
    ("text_config.use_double_wide_mlp", "yes"),
    ("text_config.tie_word_embeddings", False),
    ("text_config.attention_bias", True),
    ("text_config.attention_dropout", 0.1),
    ("text_config.hidden_activation", "silu"),
    ("text_config.use_bidirectional_attention", "all"),
    ("text_config.rope_parameters", 10_000),
    ("text_config.rope_parameters.sliding_attention", None),
    ("text_config.rope_parameters.sliding_attention.rope_theta", 0),
    ("text_config.rope_parameters.sliding_attention.rope_type", "yarn"),
    ("text_config.rope_parameters.full_attention.partial_rotary_factor", 1.5),
    ("text_config.num_experts", "16"),
    ("vision_config.num_hidden_layers", -3),
    ("vision_config.num_attention_heads", 0),
    ("vision_config.patch_size", "24"),
    ("vision_config.rms_norm_eps", None or "small"),
    ("vision_config.rope_parameters", [100.0]),
    ("vision_config.use_clipped_linears", 1),
    ("audio_config.num_attention_heads", 0),
    ("audio_config.subsampling_conv_channels", [128]),
    ("audio_config.subsampling_conv_channels", 128),
    ("audio_config.conv_kernel_size", 0),
    ("audio_config.gradient_clipping", "none"),
]


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    config = json.loads(json.dumps(TINY))
    for path, value in changes:
        *parents, key = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section[key] = value
    return config


def load(folder: Path, config: object) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(config))
    return load_model_config(ModelConfig(hf_path=str(folder)))


def test_the_unchanged_directory_loads(tmp_path: Path) -> None:
    assert load(tmp_path, TINY) == TINY


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_named(path: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, changed((path, value)))
    assert path.rpartition(".")[2] in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "3", '"gemma4"', "null", "{", "\x00"])
def test_a_file_that_is_no_table_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="not valid JSON|not a table of keys and values"):
        load_model_config(ModelConfig(hf_path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in TINY.items() if k != "vision_processor"}))
    (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises(ConfigError, match="processor_config.json (is not valid JSON|holds)"):
        load_model_config(ModelConfig(hf_path=str(tmp_path)))


def test_one_error_lists_all(tmp_path: Path) -> None:
    config = changed(
        ("text_config.sliding_window", 0),
        ("text_config.tie_word_embeddings", False),
        ("text_config.num_key_value_heads", 3),
        ("vision_config.patch_size", 0),
        ("audio_config.hidden_size", "64"),
        ("model_type", "llama"),
    )
    with pytest.raises(ConfigError, match=r"\(6 values\)") as caught:
        load(tmp_path, config)
    for key in ("sliding_window", "tie_word_embeddings", "num_key_value_heads", "vision_config.patch_size", "llama"):
        assert key in str(caught.value)


VOCABULARY = {"a": 0, "<image>": 6, "b": 9}


@pytest.mark.parametrize(
    ("text", "media", "message"),
    [
        ({"vocab_size": 9}, {}, r"vocab_size is 9, .* has 1 tokens with ids from 9 on, such as 'b' \(9\)"),
        ({"vocab_size": 6}, {}, r"2 tokens with ids from 6 on, such as '<image>' \(6\), 'b' \(9\)"),
        ({"vocab_size": 10, "vocab_size_per_layer_input": 9}, {}, "per_layer_input is 9"),
        ({"vocab_size": 10}, {"image": (6, 7, 6)}, r"token ids \{'image': \(6, 7, 6\)\}, but its tokenizer has no"),
    ],
)  # fmt: skip
def test_token_ids_agree_with_the_embedding(text: dict[str, int], media: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"somewhere: .*{message}"):
        check_token_ids(VOCABULARY, {"text_config": text}, "somewhere", media)


def test_token_ids_within_the_embedding_pass() -> None:
    """The per-layer embedding counts only where the model has one; 0 channels: it has none."""
    text = {"vocab_size": 10, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 3}
    check_token_ids(VOCABULARY, {"text_config": text}, "somewhere", {"image": (6, 6, 6)})
