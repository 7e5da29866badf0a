"""What a run records: `metrics.jsonl`, log lines, TensorBoard, Weights & Biases, and the pictures of a finished run.

Only global rank 0 makes a `MetricsLog`; it takes plain dicts. A step's record is
`{step, loss, losses: {<decoder>: mean}, grad_norm, lr, tokens, loss_tokens, tokens_per_second, step_seconds,
bad_samples: {<fault>: count}, imbalance: {<name>: {before, after}},
modules: {<name>: {lr, grad_norm, mfu, busy, wait, memory_gib}}}`:
loss is in nats per loss token, a decoder's per soft token and without its weight; grad_norm is before clipping, over
all modules and of each; lr is the language module's and each module's; busy and wait are shares of the step, mfu is a
share of the peak; unknown values are None. bad_samples counts the samples that were replaced in this step; imbalance is
the cost of a module's costliest lane over the mean of its lanes, before and after balancing. An evaluation's record is
`{step, loss, losses, accuracy, items, per_modality}`.
"""

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from mimo_gemma4.atomic import replace_file
from mimo_gemma4.config import Config
from mimo_gemma4.config.structured import dump
from mimo_gemma4.errors import MissingPackageError, optional_import

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]


class Sink(Protocol):
    """A place that step records and evaluations go to."""

    def step(self, record: Record) -> None:
        """Take the record of one training step."""

    def evaluation(self, record: Record) -> None:
        """Take the record of one evaluation."""

    def close(self) -> None:
        """Finish writing."""


class MetricsLog:
    """Hands every record to all sinks that the configuration asks for."""

    def __init__(self, config: Config, first_step: int = 1):
        """Open the sinks of `config.logging`; old records of `first_step` or later are dropped.

        Without the package tensorboard a warning is logged; without wandb `MissingPackageError` is raised.
        """
        directory = Path(config.run.dir)
        directory.mkdir(parents=True, exist_ok=True)
        self._bad_samples = BadSampleLines(directory, first_step)
        self.sinks: list[Sink] = [JsonLines(directory, first_step), LogLines(config, first_step)]
        if config.logging.tensorboard:
            try:
                self.sinks.append(TensorBoard(directory / "tensorboard", first_step))
            except MissingPackageError as error:  # on by default, so it must not end a run
                logger.warning("%s, or set logging.tensorboard=false", error)
        if config.logging.wandb:
            self.sinks.append(WeightsAndBiases(config))

    def step(self, record: Record) -> None:
        """Record one training step."""
        for sink in self.sinks:
            sink.step(record)

    def evaluation(self, record: Record) -> None:
        """Record one evaluation."""
        for sink in self.sinks:
            sink.evaluation(record)

    def bad_samples(self, records: Sequence[Record]) -> None:
        """Record samples that are not trained on: `{step, shard, key, fault, reason}`."""
        self._bad_samples.add(records)

    def close(self) -> None:
        """Finish writing."""
        for sink in self.sinks:
            sink.close()


class BadSampleLines:
    """`bad_samples.jsonl`, an object for every sample that is not trained on, once each."""

    def __init__(self, directory: Path, first_step: int):
        """Keep the samples found before `first_step`; every run records anew those that indexing found."""
        self.path = directory / "bad_samples.jsonl"
        kept = [record for record in read_records(self.path) if (record["step"] or first_step) < first_step]
        self.recorded = {(record["shard"], record["key"]) for record in kept}
        replace_file(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def add(self, records: Sequence[Record]) -> None:
        """Append the samples that are not in the file yet."""
        fresh = [record for record in records if (record["shard"], record["key"]) not in self.recorded]
        if fresh:
            self.recorded |= {(record["shard"], record["key"]) for record in fresh}
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in fresh)


class JsonLines:
    """`metrics.jsonl` and `evaluations.jsonl`, one object a line, and `eval.json`, the last evaluation."""

    def __init__(self, directory: Path, first_step: int):
        """Continue the files in `directory` at `first_step`."""
        self.directory = directory
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            kept = [record for record in read_records(directory / name) if record["step"] < first_step]
            replace_file(directory / name, "".join(json.dumps(record) + "\n" for record in kept))
        self.steps = (directory / "metrics.jsonl").open("a", encoding="utf-8")

    def step(self, record: Record) -> None:
        """Append to `metrics.jsonl`; readers see the line at once."""
        self.steps.write(json.dumps(_jsonable(record)) + "\n")
        self.steps.flush()

    def evaluation(self, record: Record) -> None:
        """Append to `evaluations.jsonl` and replace `eval.json`."""
        text = json.dumps(_jsonable(record))
        with (self.directory / "evaluations.jsonl").open("a", encoding="utf-8") as history:
            history.write(text + "\n")
        replace_file(self.directory / "eval.json", text + "\n")

    def close(self) -> None:
        """Close the file."""
        self.steps.close()


class LogLines:
    """One aligned line every `logging.every` steps; on a terminal also a progress bar."""

    def __init__(self, config: Config, first_step: int):
        """Start the bar where standard output is a terminal."""
        self.every, self.last_step, self.first_step = config.logging.every, config.train.steps, first_step
        self.seconds: list[float] = []
        self.tokens = 0
        self.bad_samples = 0
        self.bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            self.bar = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
            self.task = self.bar.add_task("", total=self.last_step, completed=first_step - 1)
            self.bar.start()

    def step(self, record: Record) -> None:
        """Print if a line is due; speed and ETA are means over the steps since the last line."""
        self.seconds.append(record["step_seconds"])
        self.tokens += record["tokens"]
        self.bad_samples += sum(record.get("bad_samples", {}).values())
        if self.bar is not None:
            self.bar.update(self.task, completed=record["step"])
        if record["step"] % self.every and record["step"] not in (self.first_step, self.last_step):
            return
        total = sum(self.seconds)
        mean = total / len(self.seconds)
        line = format_step(record, self.last_step, mean, self.tokens / total if total else 0.0)
        self._print(f"{line}  bad samples {self.bad_samples}" if self.bad_samples else line)
        self.seconds.clear()
        self.tokens = 0

    def evaluation(self, record: Record) -> None:
        """Print the evaluation."""
        accuracy = record.get("accuracy")
        shown = "" if accuracy is None else f"  accuracy {accuracy:.1%}"
        losses = "".join(f"  {part}" for part in _decoder_losses(record))
        self._print(f"eval {record['step']:>6}  loss {record['loss']:.4f}{losses}{shown}  items {record['items']}")

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()

    def _print(self, line: str) -> None:
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


class TensorBoard:
    """TensorBoard event files; keys are grouped by `/`."""

    def __init__(self, directory: Path, first_step: int):
        """Open an event file that hides what an interrupted run wrote of `first_step` and later.

        Raises `MissingPackageError`.
        """
        with optional_import("tensorboard", extra="tensorboard", purpose="`logging.tensorboard`"):
            from torch.utils.tensorboard import SummaryWriter
        self.writer: Any = SummaryWriter(str(directory), purge_step=first_step)

    def step(self, record: Record) -> None:
        """Write every number of the record."""
        for key, value in flatten({name: value for name, value in record.items() if name != "step"}).items():
            self.writer.add_scalar(f"train/{key}", value, record["step"])

    def evaluation(self, record: Record) -> None:
        """Write every number of the record."""
        for key, value in flatten({name: value for name, value in record.items() if name != "step"}).items():
            self.writer.add_scalar(f"eval/{key}", value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class WeightsAndBiases:
    """A Weights & Biases run."""

    def __init__(self, config: Config):
        """Start the run. Raises `MissingPackageError`."""
        with optional_import("wandb", extra="wandb", purpose="`logging.wandb`"):
            import wandb
        directory = Path(config.run.dir)
        self.run: Any = wandb.init(
            project=config.logging.wandb, name=directory.name, dir=str(directory), config=dump(config)
        )

    def step(self, record: Record) -> None:
        """Log every number of the record."""
        self.run.log({f"train/{key}": value for key, value in flatten(record).items()}, step=record["step"])

    def evaluation(self, record: Record) -> None:
        """Log every number of the record."""
        self.run.log({f"eval/{key}": value for key, value in flatten(record).items()}, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def mean_losses(sums: Mapping[str, float], soft_tokens: Mapping[str, int]) -> dict[str, float | None]:
    """Every decoder's loss per soft token, from the sums over its soft tokens; None where it had none."""
    return {name: total / soft_tokens[name] if soft_tokens[name] else None for name, total in sums.items()}


def format_step(record: Record, last_step: int, seconds_per_step: float, tokens_per_second: float) -> str:
    """The log line of one step; columns keep their width from line to line."""
    width = len(str(last_step))
    parts = [
        f"step {record['step']:>{width}}/{last_step}",
        f"loss {record['loss']:8.4f}",
        *_decoder_losses(record),
        f"grad_norm {record['grad_norm']:9.4f}",
        f"lr {record['lr']:.2e}",
        f"tok/s {tokens_per_second:>9,.0f}",
        f"ms {1000 * seconds_per_step:>8,.1f}",
    ]
    for name, module in record.get("modules", {}).items():
        busy, wait = (_percent(module.get(key)) for key in ("busy", "wait"))
        mfu = "" if module.get("mfu") is None else f" mfu {_percent(module['mfu'])}"
        parts.append(f"{name} busy {busy} wait {wait}{mfu}{_imbalance(record, name)}")
    remaining = timedelta(seconds=round((last_step - record["step"]) * seconds_per_step))
    return "  ".join([*parts, f"ETA {remaining}"])


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none where it does not exist. A line that a crash cut short is ignored."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def flatten(record: Record, prefix: str = "") -> dict[str, float]:
    """The numbers of a nested record, by path: `{"modules": {"vision": {"busy": 1}}}` gives `modules/vision/busy`."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = value
    return flat


def plot_loss(metrics_path: str | Path, out_path: str | Path) -> None:
    """Draw the losses of `metrics.jsonl` and of the evaluations beside it. Raises `MissingPackageError`."""
    with optional_import("matplotlib", extra="plots", purpose="drawing pictures"):
        from matplotlib.figure import Figure
    steps = read_records(Path(metrics_path))
    evaluations = read_records(Path(metrics_path).with_name("evaluations.jsonl"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    axes.plot([record["step"] for record in steps], [record["loss"] for record in steps], linewidth=1, label="training")
    if evaluations:
        points = [record["step"] for record in evaluations], [record["loss"] for record in evaluations]
        axes.plot(*points, "o", label="held out")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out_path, dpi=120)


def save_samples(
    images: Sequence[Any], predicted: Sequence[str], true: Sequence[str], path: str | Path, columns: int = 8
) -> None:
    """Draw a grid of images (PIL images or arrays [H, W] or [H, W, 3]) with the given answers, wrong ones in red.

    Raises `MissingPackageError`.
    """
    with optional_import("matplotlib", extra="plots", purpose="drawing pictures"):
        from matplotlib.figure import Figure
    columns = max(1, min(columns, len(images)))
    rows = max(1, math.ceil(len(images) / columns))
    figure = Figure(figsize=(1.4 * columns, 1.6 * rows), layout="constrained")
    for number, (image, answer, truth) in enumerate(zip(images, predicted, true, strict=True)):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(image, cmap="gray")
        axes.set_axis_off()
        right = answer == truth
        title = answer if right else f"{answer} ({truth})"
        axes.set_title(title, color="green" if right else "red", fontsize=10, parse_math=False)
    figure.savefig(path, dpi=120)


def _decoder_losses(record: Record) -> list[str]:
    """Every decoder's loss, in columns of constant width."""
    losses = record.get("losses", {})
    return [f"{name} {'       -' if loss is None else f'{loss:8.4f}'}" for name, loss in losses.items()]


def _imbalance(record: Record, module: str) -> str:
    """Imbalance of a module's lanes before and after balancing; nothing where it cannot be uneven."""
    imbalance = record.get("imbalance", {}).get(module)
    if imbalance is None or imbalance["before"] == imbalance["after"] == 1.0:
        return ""
    return f" uneven {imbalance['before']:.2f}>{imbalance['after']:.2f}"


def _percent(share: float | None) -> str:
    return "  - " if share is None else f"{share:4.0%}"


def _jsonable(value: Any) -> Any:
    """`value` with numbers that JSON cannot write (nan, infinity) as null."""
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
