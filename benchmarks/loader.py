"""Speed and memory of the data pipeline, compared with a plain webdataset pipeline that decodes the same, in one run.

Run with:  python benchmarks/loader.py [--samples 10000] [--folder /tmp/loader_benchmark]

Both read the same shards, decode with the same image processor, tokenise with the same encoder and collate batches of
the same size, with one decoding thread. Rates are per second of processor time over all threads, that is per core, so
that other processes on the machine do not count; the pipelines take turns, and each rate is the median of its turns.
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Generator, Iterator
from itertools import batched, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image

from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.data.sample import parse_messages
from mimo_gemma4.data.tokenizer import byte_tokenizer
from mimo_gemma4.encoders.gemma4_vision_processor import Gemma4ImageProcessor
from mimo_gemma4.media import MediaHeader, MediaTokens

SAMPLES_PER_SHARD = 1000
BATCH = 16
TURN = 20
"""Batches that one pipeline loads before the other one's turn."""
TURNS = 7
SIZES = ((640, 480), (480, 640), (512, 512), (800, 300))


def write_shards(folder: Path, samples: int) -> list[str]:
    """Shards whose samples are one photograph-sized JPEG and a short conversation; written once."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_picture(number) for number in range(64)]
    paths = []
    for shard in range(-(-samples // SAMPLES_PER_SHARD)):
        path = folder / f"bench-{shard:04}.tar"
        paths.append(str(path))
        if path.exists():
            continue
        partial = path.with_suffix(".partial")
        with webdataset.TarWriter(str(partial)) as writer:
            for number in range(shard * SAMPLES_PER_SHARD, min(samples, (shard + 1) * SAMPLES_PER_SHARD)):
                question = [{"type": "image"}, {"type": "text", "text": f"What is in picture {number}?"}]
                answer = [{"type": "text", "text": "A pattern of colours. " * (1 + number % 6)}]
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                writer.write(
                    {"__key__": f"{number:08}", "json": {"messages": messages}, "0.jpg": pictures[number % 64]}
                )
        partial.rename(path)
    return paths


def _picture(number: int) -> bytes:
    """A JPEG with as much detail as a photograph: smooth noise, about 60 kB."""
    generator = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    coarse = Image.fromarray(generator.integers(0, 255, (height // 8, width // 8, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def our_batches(dataset: ShardDataset, prefetch: int) -> Generator[int]:
    """Tokens of every batch of the project's loader."""
    planner = StepPlanner(
        dataset, global_batch_size=BATCH, microbatch_size=1, seed=1, language_lanes=1, encoder_lanes={"vision": 1},
        packing=True,
    )  # fmt: skip
    loader = StepLoader(planner, language_lane=0, encoder_lanes={"vision": 0}, prefetch=prefetch, workers=1)
    try:
        step = 0
        while True:
            data = loader.load(step)
            yield sum(int((batch.segments > 0).sum()) for batch in data.language.values())
            step += 1
    finally:
        loader.close()


def webdataset_batches(paths: list[str], encoder: ConversationEncoder) -> Iterator[int]:
    """Tokens of every batch of the plain pipeline: sequential shards, a shuffle buffer, decode, collate."""
    processor = encoder.processors["image"]

    def decode(sample: dict[str, Any]) -> dict[str, Any]:
        with Image.open(io.BytesIO(sample["0.jpg"])) as image:
            soft_tokens = processor.soft_tokens(MediaHeader(width=image.width, height=image.height))
        conversation = encoder.encode(parse_messages(sample["json"]), [soft_tokens])
        return {"conversation": conversation, "image": processor.decode(sample["0.jpg"])}

    samples = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).shuffle(100).map(decode)
    loader = webdataset.WebLoader(samples.repeat(), batch_size=None, num_workers=0)
    for batch in batched(loader, BATCH):
        ids = [torch.from_numpy(sample["conversation"].input_ids) for sample in batch]
        labels = [torch.from_numpy(sample["conversation"].labels) for sample in batch]
        torch.cat(ids), torch.cat(labels)
        processor.collate([sample["image"] for sample in batch])
        yield sum(len(part) for part in ids)


def rate(batches: Iterator[int]) -> tuple[float, float]:
    """Images and tokens per second of processor time over one turn."""
    started = time.process_time()
    tokens = sum(islice(batches, TURN))
    seconds = time.process_time() - started
    return TURN * BATCH / seconds, tokens / seconds


def memory(dataset: ShardDataset, samples: int) -> None:
    """Print the resident memory of this process after a tenth, half and all of `samples`."""
    process = psutil.Process()
    batches = our_batches(dataset, prefetch=1)
    marks = sorted({samples // 10, samples // 2, samples})
    done = 0
    for mark in marks:
        for _ in range((mark - done) // BATCH):
            next(batches)
        done = mark
        print(f"resident memory after {done:>6} samples  {process.memory_info().rss / 2**20:7.0f} MiB", flush=True)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/loader_benchmark"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(arguments.folder / "cache")
    paths = write_shards(arguments.folder, arguments.samples)
    processor = Gemma4ImageProcessor(max_soft_tokens=70)
    encoder = ConversationEncoder(byte_tokenizer(), [processor], {"image": MediaTokens(5, 6, 7)})
    started = time.perf_counter()
    dataset = ShardDataset.open(paths, encoder, seq_length=4096)
    print(f"opened {len(dataset)} samples in {time.perf_counter() - started:.1f} s", flush=True)
    # Without reading ahead, the work of a turn is done in that turn.
    ours, plain = our_batches(dataset, prefetch=0), webdataset_batches(paths, encoder)
    rates: dict[str, list[tuple[float, float]]] = {"this project": [], "webdataset": []}
    for _ in range(2):  # both warm
        rate(ours), rate(plain)
    for _ in range(TURNS):
        rates["this project"].append(rate(ours))
        rates["webdataset"].append(rate(plain))
    ours.close()
    medians = {
        name: [statistics.median(column) for column in zip(*turns, strict=True)] for name, turns in rates.items()
    }
    print("pipeline          images/s per core   tokens/s per core")
    for name, (images, tokens) in medians.items():
        print(f"{name:<16}  {images:17.1f}   {tokens:17.0f}")
    ratios = [mine / theirs for mine, theirs in zip(*medians.values(), strict=True)]
    print(f"{'ratio':<16}  {ratios[0]:17.2f}   {ratios[1]:17.2f}", flush=True)
    memory(dataset, arguments.samples)


if __name__ == "__main__":
    main()
