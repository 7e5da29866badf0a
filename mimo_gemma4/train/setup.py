"""The setup of a run: options, model configuration, layout, device and process groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mimo_gemma4.config import Config
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.distributed.layout import Layout, build_layout
from mimo_gemma4.distributed.platform import Platform, create_platform, ranks_per_host
from mimo_gemma4.distributed.process_groups import ProcessGroups, create_process_groups
from mimo_gemma4.errors import ConfigError


@dataclass(frozen=True)
class RunSetup:
    """What all parts of a run are built from."""

    config: Config
    hf_config: dict[str, Any]
    layout: Layout
    platform: Platform
    groups: ProcessGroups


def set_up_run(config: Config) -> RunSetup:
    """Join the other ranks, place the modules and create their groups. Collective over all ranks."""
    hf_config = load_model_config(config.model, config.modules)
    platform = create_platform(
        deterministic=config.run.deterministic, timeout=timedelta(seconds=config.run.timeout_seconds)
    )
    layout = build_layout(config.layout, dist.get_world_size(), ranks_per_host())
    check_decoder_names(layout, hf_config)
    torch.manual_seed(config.run.seed)  # on all devices; a checkpoint keeps the generators' states
    return RunSetup(config, hf_config, layout, platform, create_process_groups(layout, platform))


def check_decoder_names(layout: Layout, hf_config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where a decoder has the name of one of the model's encoders."""
    for name in layout.decoders:
        if hf_config.get(f"{name}_config"):
            raise ConfigError(
                f"`layout.{name}` has `reads`, which makes it a decoder, but the model has an encoder called {name}: "
                "give the decoder another name"
            )
