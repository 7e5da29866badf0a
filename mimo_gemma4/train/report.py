"""The report of a finished run: loss.png, samples.png and a table of the evaluation. Rank 0 only."""

import io
import json
import logging
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.encoders.gemma4_audio_processor import log_mel
from mimo_gemma4.encoders.waveform import read_waveform
from mimo_gemma4.errors import MissingPackageError
from mimo_gemma4.train.metrics import plot_loss, save_samples
from mimo_gemma4.train.trainer import Trainer

logger = logging.getLogger(__name__)

_HEIGHT, _WIDEST = 128, 512
"""Pixels of a picture in samples.png."""


def write_report(trainer: Trainer) -> None:
    """Draw the loss curve and some answers into the run's folder, and print the evaluation."""
    folder = Path(trainer.config.run.dir)
    pictures: list[str] = []
    try:
        if (folder / "metrics.jsonl").stat().st_size:
            plot_loss(folder / "metrics.jsonl", folder / "loss.png")
            pictures.append("loss.png")
        if draw_answers(trainer, folder / "samples.png"):
            pictures.append("samples.png")
    except MissingPackageError as error:  # the run itself has succeeded
        logger.warning("%s", error)
    if trainer.evaluator is not None and (folder / "eval.json").is_file():
        print(evaluation_table(json.loads((folder / "eval.json").read_text(encoding="utf-8"))), flush=True)
        print(f"results: {folder} ({', '.join(['metrics.jsonl', *pictures, 'checkpoints'])})", flush=True)


def draw_answers(trainer: Trainer, path: Path) -> bool:
    """Draw the first answers of the last evaluation that have a picture; whether there were any."""
    if trainer.evaluator is None:
        return False
    answered, dataset = trainer.evaluator.answered, trainer.evaluator.loader.dataset
    pictured = ((sample, sample_picture(dataset, sample.index)) for sample in answered)
    shown = list(islice(((sample, image) for sample, image in pictured if image), trainer.config.eval.pictures))
    if not shown:
        return False
    samples, images = zip(*shown, strict=True)
    save_samples(images, [sample.predicted for sample in samples], [sample.true for sample in samples], path)
    return True


def evaluation_table(result: Mapping[str, Any]) -> str:
    """The record of an evaluation as lines for a terminal."""
    lines = [f"held-out evaluation after step {result['step']}", f"  loss               {result['loss']:.4f}"]
    if result["accuracy"] is not None:
        lines.append(f"  exact match        {result['accuracy']:.1%} of {result['items']}")
        for kind, part in result["per_modality"].items():
            lines.append(f"    {kind:<16} {part['accuracy']:.1%} of {part['items']}")
    return "\n".join(lines)


def sample_picture(dataset: ShardDataset, index: int) -> Image.Image | None:
    """First image and first sound, as a spectrogram, of a sample side by side; None where it has neither."""
    first: dict[str, Image.Image] = {}
    for item in dataset.media(index):
        if item.media_type in _DRAWN and item.media_type not in first:
            data = read_range(item.shard, item.offset, item.size)
            first[item.media_type] = _DRAWN[item.media_type](data)
    if not first:
        return None
    parts = [_scaled(picture) for picture in first.values()]
    joined = Image.new("RGB", (sum(part.width for part in parts), _HEIGHT))
    left = 0
    for part in parts:
        joined.paste(part, (left, 0))
        left += part.width
    return joined


def _scaled(picture: Image.Image) -> Image.Image:
    width = round(picture.width * _HEIGHT / picture.height)
    return picture.resize((max(1, min(_WIDEST, width)), _HEIGHT))


def _image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _spectrogram(data: bytes) -> Image.Image:
    """A sound as a square: time to the right, mel bands upwards, brighter where louder."""
    bands = log_mel(read_waveform(data)).T[::-1]
    grey = (bands - bands.min()) * (255 / max(1e-6, bands.max() - bands.min()))
    return Image.fromarray(grey.astype(np.uint8)).resize((_HEIGHT, _HEIGHT)).convert("RGB")


_DRAWN: dict[str, Callable[[bytes], Image.Image]] = {"image": _image, "audio": _spectrogram}
