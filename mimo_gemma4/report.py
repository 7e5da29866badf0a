"""What a finished run leaves for people: loss.png, samples.png and a table of the evaluation. Rank 0 only."""

import io
import json
from pathlib import Path

from PIL import Image

from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.evaluate import Reading
from mimo_gemma4.metrics import plot_loss, save_samples
from mimo_gemma4.trainer import Trainer


def write_report(trainer: Trainer) -> None:
    """Draw the loss curve and some answers into the run's folder, and print the evaluation."""
    folder = Path(trainer.config.run.dir)
    if (folder / "metrics.jsonl").stat().st_size:
        plot_loss(folder / "metrics.jsonl", folder / "loss.png")
    evaluator = trainer.evaluator
    if evaluator is None or not (folder / "eval.json").is_file():
        return
    result = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    pictured = [(reading, _first_image(evaluator.loader.dataset, reading)) for reading in evaluator.readings]
    shown = [(reading, image) for reading, image in pictured if image is not None][: trainer.config.eval.pictures]
    if shown:
        readings, images = zip(*shown, strict=True)
        save_samples(images, [r.predicted for r in readings], [r.true for r in readings], folder / "samples.png")
    print(evaluation_table(result), flush=True)
    print(f"results: {folder} (metrics.jsonl, loss.png{', samples.png' if shown else ''}, checkpoints)", flush=True)


def evaluation_table(result: dict) -> str:
    """The record of an evaluation as lines for a terminal."""
    lines = [f"held-out evaluation after step {result['step']}", f"  loss               {result['loss']:.4f}"]
    if result["accuracy"] is not None:
        lines.append(f"  exact match        {result['accuracy']:.1%} of {result['items']}")
        for kind, part in result["per_modality"].items():
            lines.append(f"    {kind:<16} {part['accuracy']:.1%} of {part['items']}")
    return "\n".join(lines)


def _first_image(dataset: ShardDataset, reading: Reading) -> Image.Image | None:
    """The first image of a sample; None where it has none."""
    for item in dataset.media(reading.index):
        if item.media_type == "image":
            return Image.open(io.BytesIO(read_range(item.shard, item.offset, item.size))).convert("RGB")
    return None
