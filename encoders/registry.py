"""Finds the encoder and media processor of a model configuration among the files of this package.

Every concrete `Encoder` subclass written in a file of this package is registered, under its `modality` and
`architecture`; adding an encoder is adding a file.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from mimo_gemma4 import encoders
from mimo_gemma4.discovery import classes_in
from mimo_gemma4.distributed.stages import Stage, cut_evenly
from mimo_gemma4.encoders.base import Encoder, StagedEncoder
from mimo_gemma4.errors import ConfigError, LayoutError
from mimo_gemma4.media import MediaProcessor


def registered_encoders() -> dict[tuple[str, str], type[Encoder]]:
    """All encoder classes of this package by (modality, architecture)."""
    found: dict[tuple[str, str], type[Encoder]] = {}
    for encoder in classes_in(encoders, Encoder):  # type: ignore[type-abstract]
        key = (encoder.modality, encoder.architecture)
        if key in found:
            raise ConfigError(f"two encoders are registered for {key}: {found[key]} and {encoder}; rename one")
        found[key] = encoder
    return found


def encoder_class(modality: str, hf_config: dict[str, Any]) -> type[Encoder]:
    """The class that `hf_config["<modality>_config"]["model_type"]` names. Raises `ConfigError` if it names none."""
    known = registered_encoders()
    modalities = sorted({name for name, _ in known})
    if modality not in modalities:
        raise ConfigError(f"layout.{modality}: no encoder for modality {modality!r}; known: {', '.join(modalities)}")
    section = hf_config.get(f"{modality}_config")
    architectures = sorted(name for other, name in known if other == modality)
    if not section:
        raise ConfigError(
            f"layout has a module {modality!r}, but the model configuration has no {modality}_config; "
            f"take {modality} out of layout or choose a model that has it"
        )
    architecture = section.get("model_type")
    if architecture not in architectures:
        raise ConfigError(
            f"{modality}_config.model_type is {architecture!r}; known for {modality}: {', '.join(architectures)}"
        )
    return known[modality, architecture]


def build_encoder(
    modality: str,
    hf_config: dict[str, Any],
    groups: ProcessGroupCollection,
    *,
    language_hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    activation_checkpointing: str = "none",
    stage: int = 0,
    stages: int = 1,
) -> Encoder:
    """Number `stage` of the encoder's `stages`, its weights not yet filled. Raises `ConfigError` or `LayoutError`."""
    found = encoder_class(modality, hf_config)
    part: dict[str, Any] = {}
    if issubclass(found, StagedEncoder):
        part["stage"] = _cut(found, hf_config, language_hidden, stages)[stage]
    elif stages > 1:
        raise LayoutError(
            f"`layout.{modality}.pp` is {stages}, but the encoder {found.architecture!r} cannot be cut into pipeline "
            f"stages: set it to 1 and give its ranks to `layout.{modality}.tp` or to more lanes"
        )
    return found(
        hf_config,
        groups,
        language_hidden=language_hidden,
        dtype=dtype,
        device=device,
        activation_checkpointing=activation_checkpointing,
        **part,
    )


def _cut(encoder: type[StagedEncoder], hf_config: dict[str, Any], language_hidden: int, stages: int) -> list[Stage]:
    costs = encoder.layer_costs(hf_config, language_hidden)
    if len(costs) < stages:
        raise LayoutError(
            f"`layout.{encoder.modality}.pp` is {stages}, but {encoder.modality}_config has {len(costs)} layers, and "
            "every pipeline stage needs one: lower it"
        )
    bounds = cut_evenly(costs, stages)
    return [Stage(range(*ends), len(costs)) for ends in zip(bounds, bounds[1:], strict=False)]


def build_processor(modality: str, hf_config: dict[str, Any]) -> MediaProcessor:
    """The media processor of `modality`. Raises `ConfigError`."""
    return encoder_class(modality, hf_config).processor.from_config(hf_config)


def build_processors(modality: str, hf_config: dict[str, Any]) -> list[MediaProcessor]:
    """That of `modality`, and the one for videos' frames where encoder and model have videos. Raises `ConfigError`."""
    frames = encoder_class(modality, hf_config).frame_processor
    if frames is None or hf_config.get("video_token_id") is None:
        return [build_processor(modality, hf_config)]
    return [build_processor(modality, hf_config), frames.from_config(hf_config)]
