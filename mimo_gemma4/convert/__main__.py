"""Convert weights from and to Hugging Face directories.

    python -m mimo_gemma4.convert from-hf HF_DIR CHECKPOINT       a checkpoint that any layout can start from
    python -m mimo_gemma4.convert to-hf RUN_OR_CHECKPOINT HF_DIR  a directory that transformers and model.hf_path load

A model need not be converted to be trained: `model.hf_path` reads a Hugging Face directory straight into any layout.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mimo_gemma4.errors import MimoError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `500MB` or `2GiB`. Raises `argparse.ArgumentTypeError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 500MB or 2GiB")
    return int(float(match[1]) * UNITS[match[2]])


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar of bytes on standard error, if that is a terminal; yields the function to advance it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(description), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    introduction = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m mimo_gemma4.convert", description=introduction)
    commands = parser.add_subparsers(dest="command", required=True)
    incoming = commands.add_parser("from-hf", help="Hugging Face directory → checkpoint of weights")
    incoming.add_argument(
        "source", type=Path, metavar="HF_DIR", help="directory with config.json and safetensors files"
    )
    incoming.add_argument("output", type=Path, metavar="CHECKPOINT", help="folder to write; must not exist")
    outgoing = commands.add_parser("to-hf", help="checkpoint → Hugging Face directory")
    outgoing.add_argument(
        "checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT", help="run.dir or one of its checkpoints"
    )
    outgoing.add_argument("output", type=Path, metavar="HF_DIR", help="folder to write; must not exist")
    outgoing.add_argument(
        "--source",
        type=Path,
        metavar="HF_DIR",
        help="the directory that training started from, if it has moved or the checkpoint was taken out of its run",
    )
    outgoing.add_argument(
        "--dtype",
        choices=("source", "bf16", "fp32"),
        default="source",
        help="element type: as in the model that training started from, or as trained if there was none (default), "
        "bf16, or fp32, which takes the main weights",
    )
    outgoing.add_argument(
        "--lora",
        choices=("merge", "adapter"),
        default="merge",
        help="low-rank adapters: added to the weights that they adapt (default), or alone, in the format of PEFT",
    )
    for command in (incoming, outgoing):
        command.add_argument(
            "--max-shard-size", type=parse_size, default=UNITS["GB"] * 5, metavar="SIZE", help="of a file; default 5GB"
        )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says; returns the exit code, 1 where that fails."""
    options = parse(arguments)
    from mimo_gemma4.config.presets import foreign_encoders, read_config
    from mimo_gemma4.convert.conversion import from_hf, to_adapter, to_hf

    try:
        if options.command == "from-hf":
            total = from_hf(options.source, options.output, file_bytes=options.max_shard_size, bar=progress_bar)
        elif options.lora == "adapter":
            total = to_adapter(options.checkpoint, options.output, source=options.source)
        else:
            total = to_hf(
                options.checkpoint,
                options.output,
                source=options.source,
                dtype=None if options.dtype == "source" else options.dtype,
                file_bytes=options.max_shard_size,
                bar=progress_bar,
            )
    except MimoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {total / UNITS['GB']:.2f} GB of weights")
    if options.command == "from-hf":
        print(f"train with  model.hf_path={options.output}/huggingface checkpoint.init_from={options.output}")
    elif options.lora == "adapter":
        print(f"load with  peft.PeftModel.from_pretrained(model, {str(options.output)!r})")
    else:
        print(f"train with  model.hf_path={options.output}")
        for name, architecture in foreign_encoders(read_config(options.output)).items():
            print(f"transformers cannot load it: it has no Gemma 4 with {architecture} as {name} encoder")
    return 0


if __name__ == "__main__":
    sys.exit(main())
