"""Finds the classes that the files of a package define, so that adding one is adding a file."""

import importlib
import inspect
import pkgutil
from types import ModuleType


def classes_in[Base](package: ModuleType, base: type[Base]) -> list[type[Base]]:
    """Every concrete subclass of `base` that is written in a file of `package`."""
    found: list[type[Base]] = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for _, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, base) and member.__module__ == module.__name__ and not inspect.isabstract(member):
                found.append(member)
    return found
