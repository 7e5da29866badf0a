"""Typed errors for mistakes a user can mend: each message says what is wrong, the values, and the key to change."""

import os
import sys
import time

PATIENCE = 10.0
"""Seconds in which the first rank of a host has said what all its ranks have to say."""


class MimoError(Exception):
    """Base of every error that is the user's to mend (bugs raise `AssertionError` or whatever Python raises)."""


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


def tell(error: MimoError) -> None:
    """Print what ended this rank, once a host: a file may be missing on one host alone.

    Ranks mostly fail alike, and torchrun ends the others as soon as one has left. So the first of a host speaks and
    leaves, and another speaks only if it is still there after a while: then the first has not failed.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)
    print(f"\n{type(error).__name__}: {error}\n", file=sys.stderr, flush=True)
