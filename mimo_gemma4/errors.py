"""Typed errors for mistakes a user can mend: each message says what is wrong, the values, and the key to change."""


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
