"""Conversion of Hugging Face directories to checkpoints and back."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as `python -m mimo_gemma4.convert` does; returns its exit code."""
    from mimo_gemma4.convert.__main__ import main as run  # heavy, and not needed to import a part of this package

    return run(None if arguments is None else list(arguments))
