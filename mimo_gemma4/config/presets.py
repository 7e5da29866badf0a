"""The architecture of a run as the nested dict of a Hugging Face `config.json`, from a preset or a model directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mimo_gemma4.config.loading import CONFIGS
from mimo_gemma4.config.options import ModelConfig, ModuleConfig
from mimo_gemma4.config.structured import did_you_mean
from mimo_gemma4.errors import ConfigError

PRESETS = CONFIGS / "model"
TEXT_ONLY = ("gemma4_text", "gemma4_unified_text")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files in which a Hugging Face directory keeps its preprocessing; transformers 5 writes the first."""
IMAGE_KEYS = ("patch_size", "pooling_kernel_size", "max_soft_tokens")
"""Their keys that decide the size of images."""
VIDEO_KEYS = {"max_soft_tokens": "max_frame_tokens", "num_frames": "num_frames"}
"""Their keys that decide the size of videos, and the names of these in `vision_processor`."""


def load_model_config(model: ModelConfig, modules: Mapping[str, ModuleConfig] | None = None) -> dict[str, Any]:
    """The keys of `config.json` (`text_config`, `vision_config`, `image_token_id`, …) of the model to train.

    They come from `model.hf_path` where it is set, else from `configs/model/<model.preset>.yaml`; `vision_processor`
    holds the preprocessing of images. The flat file of a text-only model becomes the `text_config` of a model without
    media. `modules.<name>.hf_path` replaces `<name>_config`, and `modules.<name>.processor` changes `<name>_processor`.
    Raises `ConfigError` where a file is missing or is not a Gemma 4 configuration.
    """
    config, source = _from_directory(Path(model.hf_path)) if model.hf_path else _from_preset(model.preset)
    if isinstance(config, dict) and config.get("model_type") in TEXT_ONLY:
        config = {"text_config": config}
    if not isinstance(config, dict) or "text_config" not in config:
        raise ConfigError(f"{source} has no `text_config`, so it does not describe a Gemma 4 model")
    for name, module in (modules or {}).items():
        if module.hf_path:
            content = _read_json(Path(module.hf_path) / "config.json", f"modules.{name}.hf_path")
            config[f"{name}_config"] = content.get(f"{name}_config", content)
            config.pop(f"{name}_processor", None)
        if module.processor:
            config[f"{name}_processor"] = (config.get(f"{name}_processor") or {}) | module.processor
    return config


def _from_directory(directory: Path) -> tuple[Any, Path]:
    path = directory / "config.json"
    config = _read_json(path, "model.hf_path")
    processor = next((directory / name for name in PROCESSOR_FILES if (directory / name).is_file()), None)
    if processor is not None and "text_config" in config and "vision_processor" not in config:
        content = _read_json(processor, "model.hf_path")
        images, videos = content.get("image_processor", content), content.get("video_processor") or {}
        options = {key: images[key] for key in IMAGE_KEYS if key in images}
        options |= {option: videos[key] for key, option in VIDEO_KEYS.items() if key in videos}
        config["vision_processor"] = options
    return config, path


def _read_json(path: Path, key: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"`{key}`: {path.parent} has no {path.name}; give a Hugging Face model directory")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"`{key}`: {path} is not valid JSON: {error}") from error


def _from_preset(name: str) -> tuple[Any, Path]:
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))
        raise ConfigError(f"`model.preset`: no preset `{name}` in {PRESETS}{did_you_mean(name, known)}")
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True), path
