"""The architecture of a run as the nested dict of a Hugging Face `config.json`, from a preset or a model directory."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mimo_gemma4.config import REPOSITORY, ModelConfig
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.structured import did_you_mean

PRESETS = REPOSITORY / "configs" / "model"
TEXT_ONLY = ("gemma4_text", "gemma4_unified_text")


def load_model_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json` (`text_config`, `vision_config`, `image_token_id`, …) of the model to train.

    They come from `model.hf_path` where it is set, else from `configs/model/<model.preset>.yaml`. The flat file of a
    text-only model becomes the `text_config` of a model without media. Raises `ConfigError` where the file is missing
    or is not a Gemma 4 configuration.
    """
    config, source = _from_directory(Path(model.hf_path)) if model.hf_path else _from_preset(model.preset)
    if isinstance(config, dict) and config.get("model_type") in TEXT_ONLY:
        return {"text_config": config}
    if not isinstance(config, dict) or "text_config" not in config:
        raise ConfigError(f"{source} has no `text_config`, so it does not describe a Gemma 4 model")
    return config


def _from_directory(directory: Path) -> tuple[Any, Path]:
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"`model.hf_path`: {directory} has no config.json; give a Hugging Face model directory")
    try:
        return json.loads(path.read_text(encoding="utf-8")), path
    except ValueError as error:
        raise ConfigError(f"`model.hf_path`: {path} is not valid JSON: {error}") from error


def _from_preset(name: str) -> tuple[Any, Path]:
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))
        raise ConfigError(f"`model.preset`: no preset `{name}` in {PRESETS}{did_you_mean(name, known)}")
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True), path
