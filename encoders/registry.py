"""Finds the encoder and media processor of a model configuration among the files of this package.

Every concrete `Encoder` subclass written in a file of this package is registered, under its `modality` and
`architecture`; adding an encoder is adding a file. Other distributions register theirs by entry points of the group
`mimo_gemma4.encoders`.
"""

from typing import Any

from mimo_gemma4 import encoders
from mimo_gemma4.discovery import classes_in
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.base import Encoder, StagedEncoder
from mimo_gemma4.errors import ConfigError, LayoutError
from mimo_gemma4.media import MediaProcessor


def registered_encoders() -> dict[tuple[str, str], type[Encoder]]:
    """All encoder classes, of this package and of entry points, by (modality, architecture).

    Raises `ConfigError` where two have the same, and for an entry point that cannot be loaded.
    """
    found: dict[tuple[str, str], type[Encoder]] = {}
    for encoder in classes_in(encoders, Encoder):
        key = (encoder.modality, encoder.architecture)
        other = found.setdefault(key, encoder)
        if other is not encoder:
            raise ConfigError(f"two encoders are registered for {key}: {other} and {encoder}; rename one")
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


def build_encoder(modality: str, hf_config: dict[str, Any], context: ModuleContext) -> Encoder:
    """This rank's stage of the encoder, its weights not yet filled. Raises `ConfigError` or `LayoutError`."""
    found = encoder_class(modality, hf_config)
    if context.pp_size > 1 and not issubclass(found, StagedEncoder):
        raise LayoutError(
            f"`layout.{modality}.pp` is {context.pp_size}, but the encoder {found.architecture!r} cannot be cut into "
            f"pipeline stages: set it to 1 and give its ranks to `layout.{modality}.tp` or to more lanes"
        )
    return found(hf_config, context)


def build_processor(modality: str, hf_config: dict[str, Any]) -> MediaProcessor:
    """The media processor of `modality`. Raises `ConfigError`."""
    return encoder_class(modality, hf_config).processor.from_config(hf_config)


def build_processors(modality: str, hf_config: dict[str, Any]) -> list[MediaProcessor]:
    """The media processor of `modality`, and that for videos if encoder and model take them. Raises `ConfigError`."""
    frames = encoder_class(modality, hf_config).frame_processor
    if frames is None or hf_config.get("video_token_id") is None:
        return [build_processor(modality, hf_config)]
    return [build_processor(modality, hf_config), frames.from_config(hf_config)]
