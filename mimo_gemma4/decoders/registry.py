"""Finds decoders by their `architecture` among the files of this package: adding a decoder is adding a file.

Other distributions register theirs by entry points of the group `mimo_gemma4.decoders`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from mimo_gemma4 import decoders
from mimo_gemma4.config.structured import build, did_you_mean
from mimo_gemma4.decoders.base import Decoder, TargetProcessor
from mimo_gemma4.discovery import classes_in
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.media import MediaProcessor


def registered_decoders() -> dict[str, type[Decoder]]:
    """All decoder classes, of this package and of entry points, by architecture.

    Raises `ConfigError` where two have the same, and for an entry point that cannot be loaded.
    """
    found: dict[str, type[Decoder]] = {}
    for decoder in classes_in(decoders, Decoder):
        other = found.setdefault(decoder.architecture, decoder)
        if other is not decoder:
            raise ConfigError(
                f"two decoders are registered as {decoder.architecture!r}: {other} and {decoder}; rename one"
            )
    return found


def decoder_class(name: str, architecture: str | None) -> type[Decoder]:
    """The class that `modules.<name>.decoder` names. Raises `ConfigError` if it names none."""
    known = registered_decoders()
    if architecture not in known:
        hint = did_you_mean(str(architecture), known)
        raise ConfigError(f"`modules.{name}.decoder` is {architecture!r}: there is no such decoder{hint}")
    return known[architecture]


def build_decoder(
    name: str, architecture: str | None, options: Mapping[str, Any] | None, context: ModuleContext
) -> Decoder:
    """The decoder `name` of the layout, its weights not yet filled. Raises `ConfigError` or `LayoutError`."""
    kind = decoder_class(name, architecture)
    return kind(name, _options(name, kind, options), context)


def build_target_processors(
    name: str, architecture: str | None, options: Mapping[str, Any] | None, media: Iterable[MediaProcessor]
) -> dict[str, TargetProcessor]:
    """Target processors of decoder `name`, one by content type for each of `media`. Raises `ConfigError`."""
    kind = decoder_class(name, architecture)
    given = _options(name, kind, options)
    try:
        return {processor.content_type: kind.processor.for_media(processor, given) for processor in media}
    except ConfigError as error:
        raise ConfigError(f"`modules.{name}.decoder` {architecture}: {error}") from error


def _options(name: str, kind: type[Decoder], options: Mapping[str, Any] | None) -> Any:
    key = f"modules.{name}.decoder_options"
    return build(kind.options, options or {}, lambda _: f"options of decoder {kind.architecture}", f"{key}.")
