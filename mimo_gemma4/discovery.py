"""Finds classes in the files of a package, and whatever other distributions register by entry points.

A class of this project needs only a file in `encoders/` or `decoders/`. Another distribution registers its classes in
its `pyproject.toml`, for example:

    [project.entry-points."mimo_gemma4.encoders"]
    depth = "my_package.depth:DepthEncoder"
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from mimo_gemma4.errors import ConfigError


def classes_in[Base](package: ModuleType, base: type[Base]) -> list[type[Base]]:
    """The concrete subclasses of `base` in the files of `package` and in the entry points of the group of its name.

    Raises `ConfigError` for an entry point that cannot be loaded or names anything else.
    """
    found: list[type[Base]] = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for _, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, base) and member.__module__ == module.__name__ and not inspect.isabstract(member):
                found.append(member)
    for point, loaded in load_entry_points(package.__name__):
        if not inspect.isclass(loaded) or not issubclass(loaded, base) or inspect.isabstract(loaded):
            raise ConfigError(f"{describe(point)} is not a concrete subclass of {base.__module__}.{base.__name__}")
        found.append(loaded)
    return found


def load_entry_points(group: str) -> Iterator[tuple[EntryPoint, Any]]:
    """Every entry point of a group, sorted by name, and the object that it names. Raises `ConfigError`."""
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        try:
            loaded = point.load()
        except Exception as error:  # whatever the module of a third party raises when it is imported
            raise ConfigError(
                f"{describe(point)} cannot be loaded: {type(error).__name__}: {error}; repair or uninstall it"
            ) from error
        yield point, loaded


def describe(point: EntryPoint) -> str:
    """An entry point in error messages: its name, what it names, and the distribution that registers it."""
    owner = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
    return f"entry point `{point.name} = {point.value}` ({point.group}) of {owner}"
