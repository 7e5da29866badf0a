"""Peak memory and speed of converting a model of a preset's real size from and to Hugging Face's form.

Run with:  python benchmarks/convert_memory.py [gemma4_e4b] [--folder DIR]

Needs disk space for the model twice. Each direction runs as the command a user would give; a third process that only
imports the command's modules tells what of its memory is Python's and torch's own.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.data.tokenizer import byte_tokenizer
from mimo_gemma4.weights.huggingface import HuggingFaceSource
from mimo_gemma4.weights.safetensors_rows import PIECE_BYTES, TensorEntry, split_into_files, write_tensor_file

CONVERT = [sys.executable, "-m", "mimo_gemma4.convert"]
SHIFTS = 10_000
IMPORTS = [sys.executable, "-c", "import mimo_gemma4.convert.conversion"]


def random_rows(entries: dict[str, TensorEntry], noise: torch.Tensor, name: str, start: int, stop: int) -> torch.Tensor:
    """A stretch of the noise that begins elsewhere for every tensor and piece."""
    shape = (stop - start, *entries[name].shape[1:])
    shift = zlib.crc32(f"{name}/{start}".encode()) % SHIFTS
    return noise[shift : shift + torch.Size(shape).numel()].view(shape)


def write_model(folder: Path, preset: str) -> int:
    """Random bf16 weights under the names and shapes of the preset, piece by piece; bytes of all tensors."""
    config = AutoConfig.for_model(**load_model_config(ModelConfig(preset=preset)))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    entries = {name: TensorEntry("BF16", tuple(tensor.shape)) for name, tensor in state.items()}
    folder.mkdir()
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(str(folder))
    noise = torch.randn(PIECE_BYTES // 2 + SHIFTS).bfloat16()
    files = split_into_files(entries, 5 * 10**9)
    listing: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        listing |= dict.fromkeys(names, path.name)

        held = {name: entries[name] for name in names}
        write_tensor_file(
            path, held, partial(random_rows, entries, noise), metadata={"format": "pt"}, advance=lambda count: None
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listing}))
    return sum(entry.bytes for entry in entries.values())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every tensor by name."""
    source = HuggingFaceSource(folder)
    found = {}
    for name, tensor in source.tensors.items():
        checksum = hashlib.sha256()
        for start, stop in tensor.entry.pieces():
            checksum.update(source.rows(name, start, stop).view(-1).view(torch.uint8).numpy())
        found[name] = checksum.hexdigest()
    return found


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MiB of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    """Write, convert both ways, compare, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="?", default="gemma4_e4b")
    parser.add_argument("--folder", type=Path, help="where there is space; default: the temporary folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    source, checkpoint, back = folder / "source", folder / "checkpoint", folder / "back"
    try:
        size = write_model(source, options.preset)
        before = digests(source)
        largest = max(tensor.entry.bytes for tensor in HuggingFaceSource(source).tensors.values())
        print(
            f"{options.preset}: {size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, files of at most 5 GB",
            flush=True,
        )
        base_seconds, base = measure(IMPORTS)
        for name, arguments in (("from-hf", [source, checkpoint]), ("to-hf", [checkpoint, back])):
            seconds, peak = measure([*CONVERT, name, *map(str, arguments)])
            rate = size / 1e9 / (seconds - base_seconds)
            print(
                f"{name:8} peak {peak:6.0f} MiB, {peak - base:5.0f} MiB over imports alone   {seconds:6.1f} s   "
                f"{rate:.2f} GB/s",
                flush=True,
            )
            if name == "from-hf":
                shutil.rmtree(source)
        print("bit-exact:", digests(back) == before)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
