"""The architecture of a run as the nested dict of a Hugging Face `config.json`, from a preset or a model directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mimo_gemma4.config.loading import CONFIGS
from mimo_gemma4.config.model_description import TEXT_TYPES, check_model_config
from mimo_gemma4.config.options import ModelConfig, ModuleConfig
from mimo_gemma4.config.structured import did_you_mean
from mimo_gemma4.errors import ConfigError

PRESETS = CONFIGS / "model"
TEXT_ONLY = TEXT_TYPES
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
    media. `modules.<name>.hf_path` replaces `<name>_config` and `<name>_processor`, which `modules.<name>.processor`
    changes. Raises `ConfigError` where a file is missing or is not a Gemma 4 configuration.
    """
    config, source = _from_directory(Path(model.hf_path)) if model.hf_path else _from_preset(model.preset)
    if isinstance(config, dict) and config.get("model_type") in TEXT_ONLY:
        config = {"text_config": config}
    if not isinstance(config, dict) or "text_config" not in config:
        raise ConfigError(f"{source} has no `text_config`, so it does not describe a Gemma 4 model")
    for name, module in (modules or {}).items():
        if module.hf_path:
            directory, key = Path(module.hf_path), f"modules.{name}.hf_path"
            content = _read_table(directory / "config.json", key)
            config[f"{name}_config"] = content.get(f"{name}_config", content)
            config.pop(f"{name}_processor", None)
            processor = content.get(f"{name}_processor")
            if processor is None and name == "vision":
                processor = _vision_processor(directory, key, config["vision_config"])
            if processor is not None:
                config[f"{name}_processor"] = processor
        if module.processor:
            config[f"{name}_processor"] = (config.get(f"{name}_processor") or {}) | module.processor
    check_model_config(config, source)
    return config


def _from_directory(directory: Path) -> tuple[Any, Path]:
    path = directory / "config.json"
    config = _read_table(path, "model.hf_path")
    if "text_config" in config and "vision_processor" not in config:
        processor = _vision_processor(directory, "model.hf_path", config.get("vision_config"))
        if processor is not None:
            config["vision_processor"] = processor
    return config, path


def _vision_processor(directory: Path, key: str, section: Any) -> dict[str, Any] | None:
    """The preprocessing of images in a model directory; None where it has no file of it.

    Of Gemma's files the keys that decide sizes are taken, of another encoder's all keys of its images.
    """
    path = next((directory / name for name in PROCESSOR_FILES if (directory / name).is_file()), None)
    if path is None:
        return None
    content = _read_table(path, key)
    images, videos = content.get("image_processor") or content, content.get("video_processor") or {}
    if not isinstance(images, dict) or not isinstance(videos, dict):
        raise ConfigError(f"`{key}`: image_processor or video_processor of {path} is no table of keys and values")
    if not _is_gemma(section):
        return dict(images)
    options = {name: images[name] for name in IMAGE_KEYS if name in images}
    return options | {option: videos[name] for name, option in VIDEO_KEYS.items() if name in videos}


def _is_gemma(section: Any) -> bool:
    """Whether `<modality>_config` is of one of Gemma's own encoders."""
    return not isinstance(section, dict) or str(section.get("model_type", "gemma4")).startswith("gemma4")


def foreign_encoders(config: Mapping[str, Any]) -> dict[str, str]:
    """By modality, the `model_type` of encoders in a configuration that are not Gemma's own."""
    sections = {key.removesuffix("_config"): value for key, value in config.items() if key.endswith("_config")}
    return {name: value["model_type"] for name, value in sections.items() if not _is_gemma(value)}


def read_config(directory: Path) -> dict[str, Any]:
    """A model directory's `config.json` as it is written there. Raises `ConfigError` where it is none."""
    return _read_table(directory / "config.json", "model.hf_path")


def _read_table(path: Path, key: str) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"`{key}`: {path.parent} has no {path.name}; give a Hugging Face model directory")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"`{key}`: {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"`{key}`: {path} holds {type(content).__name__}, not a table of keys and values")
    return content


def _from_preset(name: str) -> tuple[Any, Path]:
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))
        raise ConfigError(f"`model.preset`: no preset `{name}` in {PRESETS}{did_you_mean(name, known)}")
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True), path
