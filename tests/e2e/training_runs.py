"""Whole training runs for the end-to-end tests: small configuration files, and how a run ended on each rank."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_gemma4.errors import MimoError
from train_mimo import train

TIMED = ("tokens_per_second", "step_seconds", "modules")
"""Fields of `metrics.jsonl` that hold measured times and memory."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended on one rank."""

    error: type | None
    """Type of the typed error that ended it; None where it finished."""
    message: str
    warnings: tuple[str, ...]
    """What the project logged as a warning."""


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train_on_rank(rank: int, arguments: list[str]) -> Outcome:
    """Train as the command line would; any error that is not typed fails the test."""
    warnings = _Warnings()
    logging.getLogger("mimo_gemma4").addHandler(warnings)
    try:
        train(arguments)
    except MimoError as error:
        return Outcome(type(error), str(error), tuple(warnings.lines))
    return Outcome(None, "", tuple(warnings.lines))


def write_config(folder: Path, shards: Path, **sections: dict[str, Any]) -> str:
    """A configuration of two steps in fp32 on one vision and one language rank; the argument that names it.

    `sections` are merged into it key by key, but `layout`, which replaces its own.
    """
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "seed": 3, "timeout_seconds": 60},
        "model": {"preset": "gemma4_tiny", "precision": "fp32"},
        "layout": {"vision": {"ranks": 1}, "language": {"ranks": 1}},
        "data": {"train": {"shards": str(shards)}, "seq_length": 300, "packing": False},
        "train": {"steps": 2, "global_batch_size": 6, "microbatch_size": 3},
        "checkpoint": {"every": None},
        "logging": {"tensorboard": False},
    }
    for section, values in sections.items():
        tree[section] = values if section == "layout" else tree.get(section, {}) | values
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return f"config={path}"


def step_records(run_folder: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl` without measured times: what two equal runs have in common, bit for bit."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]
