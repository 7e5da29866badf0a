"""Typed errors for mistakes that a user can correct: messages name what is wrong, the values, and the key to change."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 10.0
"""Seconds that the other ranks of a host wait for local rank 0 to report the error."""


class MimoError(Exception):
    """Base of every error that a user can correct (bugs raise `AssertionError` or whatever Python raises)."""


class ConfigError(MimoError):
    """A key, value or file of the configuration is wrong."""


class LayoutError(MimoError):
    """The modules cannot be placed on the ranks, or a sequence cannot be cut, as the layout asks."""


class DataError(MimoError):
    """A shard, sample or media file cannot be used; the message names shard and `__key__`."""


class CheckpointError(MimoError):
    """A checkpoint or Hugging Face directory is missing, incomplete or does not fit the model."""


class NumericsError(MimoError):
    """A loss or gradient is not finite; the message names the module and the step."""


class MissingPackageError(MimoError):
    """An optional package is not installed; the message names the package and how to install it."""


@contextmanager
def optional_import(package: str, *, extra: str, purpose: str) -> Iterator[None]:
    """Put around the import of a package that not every installation has. Raises `MissingPackageError`.

    Args:
        package: name by which it is installed.
        extra: extra of this project that installs it.
        purpose: what needs it, for the error message.
    """
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}): install it with "
            f"`pip install 'mimo-gemma4[{extra}]'`"
        ) from error


def report_error(error: MimoError) -> None:
    """Print the error that ends this rank, once per host: local rank 0 at once, others after `PATIENCE` seconds.

    Ranks mostly fail with the same error, and torchrun ends the others as soon as one has exited. If a rank still runs
    after that time, local rank 0 has not failed and the rank must print its error itself.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)
    print(f"\n{type(error).__name__}: {error}\n", file=sys.stderr, flush=True)
