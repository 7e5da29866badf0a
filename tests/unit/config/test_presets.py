"""A model's configuration comes from a preset or a Hugging Face directory; what is neither is named."""

import json
from pathlib import Path

import pytest

from mimo_gemma4.config import ModelConfig, ModuleConfig
from mimo_gemma4.config.presets import PRESETS, load_model_config
from mimo_gemma4.errors import ConfigError


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_has_the_shape_of_config_json(preset: str):
    config = load_model_config(ModelConfig(preset=preset))
    assert config["text_config"]["hidden_size"] > 0
    json.dumps(config)  # plain values only


# The published models. Layer patterns as (sliding layers before each full one, repetitions).
COMMON = dict(
    vocab_size=262_144,
    head_dim=256,
    global_head_dim=512,
    rms_norm_eps=1e-6,
    hidden_activation="gelu_pytorch_tanh",
    final_logit_softcapping=30.0,
    tie_word_embeddings=True,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
SMALL = dict(max_position_embeddings=131_072, sliding_window=512, hidden_size_per_layer_input=256)
LARGE = dict(max_position_embeddings=262_144, sliding_window=1024, use_bidirectional_attention="vision")
PUBLISHED = {
    "gemma4_e2b": ((4, 7), SMALL)
    + (dict(hidden_size=1536, intermediate_size=6144, num_attention_heads=8, num_key_value_heads=1),)
    + (dict(num_kv_shared_layers=20, use_double_wide_mlp=True, attention_k_eq_v=False),),
    "gemma4_e4b": ((5, 7), SMALL)
    + (dict(hidden_size=2560, intermediate_size=10240, num_attention_heads=8, num_key_value_heads=2),)
    + (dict(num_kv_shared_layers=18, use_double_wide_mlp=False, attention_k_eq_v=False),),
    "gemma4_12b": ((5, 8), LARGE)
    + (dict(hidden_size=3840, intermediate_size=15360, num_attention_heads=16, num_key_value_heads=8),)
    + (dict(num_global_key_value_heads=1, attention_k_eq_v=True, num_kv_shared_layers=0),),
    "gemma4_26b_a4b": ((5, 5), LARGE)
    + (dict(hidden_size=2816, intermediate_size=2112, num_attention_heads=16, num_key_value_heads=8),)
    + (dict(num_global_key_value_heads=2, attention_k_eq_v=True, num_kv_shared_layers=0),)
    + (dict(hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=128, top_k_experts=8),)
    + (dict(moe_intermediate_size=704),),
    "gemma4_31b": ((5, 10), LARGE)
    + (dict(hidden_size=5376, intermediate_size=21504, num_attention_heads=32, num_key_value_heads=16),)
    + (dict(num_global_key_value_heads=4, attention_k_eq_v=True, num_kv_shared_layers=0),)
    + (dict(hidden_size_per_layer_input=0),),
}
IDS = dict(image_token_id=258_880, video_token_id=258_884, audio_token_id=258_881, boi_token_id=255_999)
IDS |= dict(eoi_token_id=258_882, boa_token_id=256_000, eoa_token_index=258_883)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_values(preset: str):
    (sliding, times), *parts = PUBLISHED[preset]
    config = load_model_config(ModelConfig(preset=preset))
    text = config["text_config"]
    assert text["layer_types"] == (["sliding_attention"] * sliding + ["full_attention"]) * times
    assert text["num_hidden_layers"] == (sliding + 1) * times
    assert text["rope_parameters"] == {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    }
    published = COMMON | {key: value for part in parts for key, value in part.items()}
    assert {key: text.get(key) for key in published} == published
    assert {key: config[key] for key in IDS} == IDS


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="no preset `gemma4_tinny`.*did you mean `gemma4_tiny`"):
        load_model_config(ModelConfig(preset="gemma4_tinny"))


def test_hugging_face_directory_wins_over_the_preset(tmp_path: Path):
    content = {"text_config": {"hidden_size": 7}, "vision_config": None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_model_config(ModelConfig(preset="none such", hf_path=str(tmp_path))) == content


@pytest.mark.parametrize(
    ("text", "message"), [(None, "has no config.json"), ("{", "not valid JSON"), ("{}", "no `text_config`")]
)
def test_unusable_directory(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_model_config(ModelConfig(hf_path=str(tmp_path)))


def test_preprocessing_comes_from_the_directory_and_can_be_changed(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {}, "vision_config": {}}))
    images = {"max_soft_tokens": 560, "patch_size": 16, "do_resize": True}
    videos = {"max_soft_tokens": 140, "num_frames": 16}
    processors = {"image_processor": images, "video_processor": videos}
    (tmp_path / "processor_config.json").write_text(json.dumps(processors))
    model = ModelConfig(hf_path=str(tmp_path))
    stored = {"max_soft_tokens": 560, "patch_size": 16, "max_frame_tokens": 140, "num_frames": 16}
    assert load_model_config(model)["vision_processor"] == stored
    changed = load_model_config(model, {"vision": ModuleConfig(processor={"num_frames": 8})})
    assert changed["vision_processor"] == stored | {"num_frames": 8}


def test_an_encoder_s_directory_replaces_the_section_and_the_preprocessing(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {"model_type": "eyes"}}))
    config = load_model_config(ModelConfig(preset="gemma4_tiny"), {"vision": ModuleConfig(hf_path=str(tmp_path))})
    assert config["vision_config"] == {"model_type": "eyes"}
    assert "vision_processor" not in config
    assert config["audio_config"]["model_type"] == "gemma4_audio"


def test_preprocessing_comes_from_the_encoder_s_directory(tmp_path: Path):
    """Whole for another encoder, the keys of sizes for one of Gemma's, and from config.json in an export of ours."""
    model = ModelConfig(preset="gemma4_tiny")
    written = {"image_mean": [0.4, 0.5, 0.6], "resample": 2, "max_soft_tokens": 3}
    for kind, expected in (("siglip_vision_model", written), ("gemma4_vision", {"max_soft_tokens": 3})):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"vision_config": {"model_type": kind}}))
        (folder / "preprocessor_config.json").write_text(json.dumps(written))
        modules = {"vision": ModuleConfig(hf_path=str(folder))}
        assert load_model_config(model, modules)["vision_processor"] == expected
        modules["vision"].processor = {"resample": 3}
        assert load_model_config(model, modules)["vision_processor"] == expected | {"resample": 3}
        export = {"vision_config": {"model_type": kind}, "vision_processor": {"resample": 0}}
        (folder / "config.json").write_text(json.dumps(export))
        assert load_model_config(model, {"vision": ModuleConfig(hf_path=str(folder))})["vision_processor"] == {
            "resample": 0
        }
