"""Runs the commands around a training.

    mimo COMMAND [ARGUMENT …]
    mimo COMMAND --help

Training itself is `mimo-train`, which torchrun starts: `mimo-train --help`.
"""

import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command, imported only when it runs."""

    module: str
    """The module whose `main(arguments)` runs it and returns the exit code."""
    help: str
    """What it does, in one line."""


COMMANDS = {
    "convert": Command("mimo_gemma4.convert.__main__", "weights from and to Hugging Face directories"),
    "data convert": Command("mimo_gemma4.data.convert.__main__", "make shards of a data set on disk"),
    "data index": Command("mimo_gemma4.data.index", "index shards before training and report what is in them"),
    "data inspect": Command("mimo_gemma4.data.inspect", "show samples of shards as a model sees them"),
    "timeline": Command("mimo_gemma4.timeline", "draw a profiled training step: what each rank did when"),
    "verify": Command(
        "mimo_gemma4.verify.__main__",
        "compare a layout with transformers; torchrun starts it: torchrun … --no-python mimo verify …",
    ),
}
"""By the words that name them."""
HELP = {"-h", "--help"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments (default: those of the command line) begin with and return its exit code.

    2 where there is no such command.
    """
    words = sys.argv[1:] if arguments is None else arguments
    for count in (1, 2):
        command = COMMANDS.get(" ".join(words[:count]))
        if command is not None:
            return int(importlib.import_module(command.module).main(words[count:]))
    first = words[0] if words else ""
    family = [name for name in COMMANDS if name.startswith(f"{first} ")]
    rest = words[1:] if family else words
    if not rest or rest[0] in HELP:
        listing = describe(family) if family else f"{__doc__}\n{describe(COMMANDS)}"
        print(listing, file=sys.stdout if rest else sys.stderr)
        return 0 if rest else 2
    from mimo_gemma4.config.structured import did_you_mean

    name = f"{first} {rest[0]}" if family else first
    print(f"mimo: there is no command `{name}`{did_you_mean(name, COMMANDS)}", file=sys.stderr)
    return 2


def describe(names: Iterable[str]) -> str:
    """The commands of these names and their help, one on a line."""
    width = max(map(len, COMMANDS))
    return "\n".join(f"  mimo {name:<{width}}  {COMMANDS[name].help}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
