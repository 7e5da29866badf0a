"""Converts data sets on disk to shards.

    python -m mimo_gemma4.data.convert SOURCE… --out FOLDER

SOURCE is a LLaVA or ShareGPT file (.json, .jsonl), a Hugging Face data set (parquet or arrow files, or the folder that
holds them), or a folder of images and sounds beside .txt or .json files of the same name. Every sample is checked as
training will read it, and all media are decoded once; rows that fail are dropped and listed in FOLDER/report.json, and
what the rows say besides and nothing uses is counted. The same command continues an interrupted conversion, and
verifies a finished one.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from mimo_gemma4.data.convert.columns import COLUMNS
from mimo_gemma4.data.convert.conversation import ConversationReader
from mimo_gemma4.data.convert.conversion import Conversion
from mimo_gemma4.data.convert.sources import open_sources
from mimo_gemma4.errors import MimoError


def main(arguments: list[str] | None = None) -> int:
    """Run the command. The exit code is 1 if there is no sample, 2 for a wrong source or option."""
    options = command_parser().parse_args(arguments)
    folder = options.media or (options.sources[0] if options.sources[0].is_dir() else options.sources[0].parent)
    try:
        conversion = Conversion(
            sources=open_sources(options.sources, options.split),
            output=options.out,
            media_folder=folder,
            reader=ConversationReader(dict(options.column), options.prompt, frozenset(options.ignore)),
            shard_samples=options.shard_samples,
            valid_fraction=options.valid,
            strict=options.strict,
        )
        if conversion.is_finished:
            print(f"{options.out} is converted; verifying its shards and the media of its rows", flush=True)
        report = conversion.run(options.workers)
    except (MimoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130
    report.print(Console(width=None if sys.stdout.isatty() else 240, highlight=False))
    return 0 if any(report.samples.values()) else 1


def command_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m mimo_gemma4.data.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a new folder for the shards")
    parser.add_argument(
        "--media", type=Path, metavar="FOLDER", help="folder of relative media paths (default: the folder of SOURCE)"
    )
    parser.add_argument("--split", metavar="WORD", help="the split to convert, if a data set has several")
    parser.add_argument(
        "--column", action="append", default=[], type=_pair, metavar="MEANING=NAME",
        help=f"name of the column with a meaning ({', '.join(COLUMNS)}), if it is not a usual name",
    )  # fmt: skip
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="NAME",
        help="a column, or a part of one as in messages.name, to read as if it were not there and not to report",
    )  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="fail if the rows say what nothing uses")
    parser.add_argument("--prompt", metavar="TEXT", help="the user's message before a caption; may be empty")
    parser.add_argument(
        "--shard-samples", type=_positive, default=1000, metavar="N", help="rows per shard (default: %(default)s)"
    )
    parser.add_argument(
        "--valid", type=_fraction, default=0.0, metavar="FRACTION",
        help="fraction of the samples held out in valid-*.tar; samples with the same first image go to the same split",
    )  # fmt: skip
    parser.add_argument(
        "--workers",
        type=_positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per core)",
    )
    return parser


def _pair(text: str) -> tuple[str, str]:
    meaning, separator, name = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not MEANING=NAME")
    return meaning, name


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to below 1")
    return fraction


if __name__ == "__main__":
    sys.exit(main())
