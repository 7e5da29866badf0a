"""How a run gets its options: one YAML file, then `key=value` arguments, read and checked together."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mimo_gemma4.config.options import (
    Config,
    LoraConfig,
    ModuleConfig,
    ModuleLayout,
    ShardsConfig,
)
from mimo_gemma4.config.structured import Origin, build, did_you_mean, dump
from mimo_gemma4.errors import ConfigError

CONFIGS = (Path(__file__).parents[1] / "configs").resolve()
"""Folder of the shipped configuration files: `configs/` of a checkout, `mimo_gemma4/configs` where it is installed."""


def load_config(arguments: Sequence[str]) -> Config:
    """The options given by `config=FILE.yaml key=value …`; later arguments win.

    Raises `ConfigError` for a missing file, an unknown or missing key, or a value that is wrong by itself or together
    with others; the message names the file or argument that set it.
    """
    path: Path | None = None
    overrides: list[str] = []
    for argument in (text.removeprefix("--") for text in arguments):
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"argument `{argument}` is not of the form key=value")
        if key == "config":
            path = find_config(value)
        else:
            overrides.append(argument)
    if path is None:
        raise ConfigError("no configuration file: give config=NAME.yaml, for example config=quickstart.yaml")
    tree = _read_yaml(path)
    for argument in overrides:
        tree = _merge(tree, argument)
    origin = _origin(path, overrides)
    config = build(Config, _plain(tree, str(path)), origin)
    config.run.dir = config.run.dir.replace("{name}", path.stem)
    validate(config, origin)
    return config


def find_config(name: str) -> Path:
    """The configuration file `name`: as given, else in `configs/` of the working directory, else a shipped one.

    Raises `ConfigError` where there is none.
    """
    folders = (Path("configs"), CONFIGS)
    for candidate in (Path(name), *(folder / name for folder in folders)):
        if candidate.is_file():
            return candidate
    known = sorted({path.name for folder in folders for path in folder.glob("*.yaml")})
    hint = did_you_mean(name, known)
    raise ConfigError(f"configuration file `{name}` not found, neither as given nor in configs/ or {CONFIGS}{hint}")


def save_config(config: Config, path: str | Path) -> None:
    """Write all options as YAML; `load_config(["config=<path>"])` gives an equal `Config`."""
    Path(path).write_text(format_config(config), encoding="utf-8")


def format_config(config: Config) -> str:
    """All options as YAML, in the order of their definition."""
    return OmegaConf.to_yaml(OmegaConf.create(dump(config)))


def print_config(config: Config) -> None:
    """Print all options, in colour where standard output is a terminal."""
    text = format_config(config)
    if not sys.stdout.isatty():
        print(text, flush=True)
        return
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(text, "yaml", background_color="default"))


def validate(config: Config, origin: Origin) -> None:
    """Raise `ConfigError` where values do not go together, or one is not supported."""
    modules = list(config.layout.modules)
    if not modules:
        raise ConfigError(f"`layout` names no module; it needs at least `language` ({origin('layout')})")
    if "language" not in modules:
        raise ConfigError(f"`layout` lacks `language`; it names {', '.join(modules)} ({origin('layout')})")
    for name in config.modules:
        if name not in modules:
            key = f"modules.{name}"
            raise ConfigError(f"`{key}`: no such module in `layout` ({origin(key)}){did_you_mean(name, modules)}")
    for name, module in config.modules.items():
        if module.lora is not None:
            _check_lora(f"modules.{name}", module, module.lora, origin)
    for option in ("hf_path", "processor"):
        if getattr(config.module("language"), option) is not None:
            key = f"modules.language.{option}"
            raise ConfigError(f"`{key}` is for encoders; the language model comes from `model.hf_path` ({origin(key)})")
    for name, layout in config.layout.modules.items():
        _check_role(name, layout, config.module(name), origin)
    if config.model.precision == "fp8":
        raise ConfigError(f"`model.precision` fp8 is not available yet; use bf16 or fp32 ({origin('model.precision')})")
    for key, shards in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        if shards is not None:
            _check_shards(key, shards, origin)
    if config.data.valid is not None:
        _check_held_out(config.data.valid, config.eval.samples, origin)
    if config.data.quickstart is not None:
        _check_quickstart(config.data.train.shards, origin)
    _check_profile(config, origin)


def _check_role(name: str, layout: ModuleLayout, module: ModuleConfig, origin: Origin) -> None:
    """Raise where options of a decoder are given to another module, or the other way round."""
    key, defaults = f"modules.{name}", ModuleConfig()
    if layout.reads is not None:
        if module.decoder is None:
            raise ConfigError(
                f"`{key}.decoder` is missing: `layout.{name}.reads` makes {name} a decoder ({origin(f'layout.{name}')})"
            )
        for option in ("hf_path", "processor", "lora"):
            if getattr(module, option) is not None:
                raise ConfigError(f"`{key}.{option}` is not for decoders ({origin(f'{key}.{option}')})")
    if (layout.reads is not None or name == "language") and module.run_ahead != defaults.run_ahead:
        raise ConfigError(f"`{key}.run_ahead` is for encoders ({origin(f'{key}.run_ahead')})")
    if layout.reads is not None:
        return
    for option in ("decoder", "decoder_options", "loss_weight"):
        if getattr(module, option) != getattr(defaults, option):
            raise ConfigError(
                f"`{key}.{option}` is for decoders; name the encoder whose tokens {name} reads in "
                f"`layout.{name}.reads`, or leave it out ({origin(f'{key}.{option}')})"
            )


def _check_lora(key: str, module: ModuleConfig, lora: LoraConfig, origin: Origin) -> None:
    if not lora.targets:
        raise ConfigError(f"`{key}.lora.targets` names no linear ({origin(key + '.lora.targets')})")
    if module.freeze is False:
        raise ConfigError(
            f"`{key}.freeze` false would train all weights beside their adapters; leave it out, or list what stays "
            f"frozen ({origin(key + '.freeze')})"
        )


def _check_shards(key: str, shards: ShardsConfig, origin: Origin) -> None:
    if shards.shards is None and not shards.sources:
        raise ConfigError(f"`{key}.shards` is missing ({origin(f'{key}.shards')})")
    if shards.shards is not None and shards.sources:
        names = ", ".join(f"`{key}.{name}`" for name in shards.sources)
        raise ConfigError(f"`{key}` has both `shards` and the sets {names}; it takes one or the others ({origin(key)})")


def _check_held_out(valid: ShardsConfig, samples: int | None, origin: Origin) -> None:
    """Raise where held-out sets have weights, or `eval.samples` is too small to take of every set."""
    for name, source in valid.sources.items():
        if source.weight != 1:
            key = f"data.valid.{name}.weight"
            raise ConfigError(
                f"`{key}` is {source.weight}, but held-out sets have no weights: every sample is evaluated once, and "
                f"`eval.samples` takes of each set by its size; leave it out ({origin(key)})"
            )
    if samples is not None and samples < len(valid.sources):
        raise ConfigError(
            f"`eval.samples` {samples} must be at least {len(valid.sources)}, to take one of each of the "
            f"{len(valid.sources)} sets of `data.valid` ({origin('eval.samples')})"
        )


def _check_quickstart(shards: str | list[str] | None, origin: Origin) -> None:
    """Raise where `data.train.shards` does not name the files that `data.quickstart` writes."""
    if shards is None:
        where = origin("data.quickstart")
        raise ConfigError(f"`data.quickstart` writes the files of `data.train.shards`, which is missing ({where})")
    if isinstance(shards, str) and "://" not in shards and Path(shards).name.startswith("train-"):
        return
    raise ConfigError(
        "`data.quickstart` writes train-000000.tar … into the folder of `data.train.shards`, so that takes a path such "
        f"as data/digits/train-{{000000..000003}}.tar, not {shards!r}; for shards of your own set `data.quickstart` to "
        f"null ({origin('data.train.shards')})"
    )


def _check_profile(config: Config, origin: Origin) -> None:
    given, where = config.profile.steps, origin("profile.steps")
    try:
        numbers = config.profile.numbers
    except ValueError as error:
        raise ConfigError(f"`profile.steps` {given!r} is no range like 20-22 ({where})") from error
    if given is not None and not numbers:
        raise ConfigError(f"`profile.steps` {given!r} names no step ({where})")
    if numbers and not 1 <= numbers[0] <= numbers[-1] <= config.train.steps:
        raise ConfigError(
            f"`profile.steps` names the steps {numbers[0]} to {numbers[-1]}, but `train.steps` runs from 1 to "
            f"{config.train.steps} ({where})"
        )


def _read_yaml(path: Path) -> DictConfig:
    try:
        tree = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path} must hold a mapping of sections (run, model, layout, data, …)")
    return tree


def _merge(tree: DictConfig, argument: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist([argument]))
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"argument `{argument}` cannot be applied: {error}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _plain(tree: DictConfig, source: str) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _origin(path: Path, overrides: Sequence[str]) -> Origin:
    """From a dotted key to the last argument that set it, a key inside it or one around it; else to the file."""

    def origin(key: str) -> str:
        wanted = key.partition("[")[0] + "."
        for argument in reversed(overrides):
            given = argument.partition("=")[0] + "."
            if wanted.startswith(given) or given.startswith(wanted):
                return f"argument `{argument}`"
        return str(path)

    return origin
