"""A model's configuration comes from a preset or a Hugging Face directory; what is neither is named."""

import json
from pathlib import Path

import pytest

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.presets import PRESETS, load_model_config


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_has_the_shape_of_config_json(preset: str):
    config = load_model_config(ModelConfig(preset=preset))
    assert config["text_config"]["hidden_size"] > 0
    json.dumps(config)  # plain values only


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
