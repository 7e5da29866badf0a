"""For awkward images, pixels, positions, soft tokens, ids and token types are those of transformers.

Grey images of 16 bits are scaled here, while transformers clips them to white: it is given the scaled image instead.
"""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.sample import parse_messages
from mimo_gemma4.data.tokenizer import load_tokenizer
from mimo_gemma4.encoders.gemma4_vision_processor import Gemma4ImageProcessor
from mimo_gemma4.media import MediaHeader, MediaTokens
from tests.hf_processor import PilProcessor, saved_processor

BUDGETS = (70, 140, 280, 560, 1120)
MODES = ("RGB", "RGBA", "L", "LA", "P", "P+transparency", "1", "I;16", "CMYK", *(f"EXIF {n}" for n in range(1, 9)))
AWKWARD = [(1, 1), (1, 4000), (4000, 1), (47, 49), (48, 48), (2, 3), (1, 500), (3001, 5)]
IMAGES = 60


def draw(generator: np.random.Generator, width: int, height: int, mode: str) -> bytes:
    """An encoded file of random pixels, coarse enough that interpolation matters."""
    if mode == "I;16":
        image = Image.fromarray(generator.integers(0, 65536, (height, width), dtype=np.uint16))
    else:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
        image = image.convert("RGB" if mode.startswith("EXIF") else mode.split("+")[0])
    options: dict = {}
    if mode.startswith("EXIF"):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = int(mode.split()[1])
    if mode == "P+transparency":
        options["transparency"] = 7
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if mode == "CMYK" or mode.startswith("EXIF") else "PNG", **options)
    return buffer.getvalue()


def files() -> list[tuple[bytes, int]]:
    """Encoded images and the soft-token budget for each: every mode and every budget occurs with several sizes."""
    generator, sizes = np.random.default_rng(0), random.Random(0)
    drawn = []
    for number in range(IMAGES):
        width, height = (int(2 ** sizes.uniform(0, 10)) for _ in range(2))
        if number < len(AWKWARD):
            width, height = AWKWARD[number]
        drawn.append((draw(generator, width, height, MODES[number % len(MODES)]), BUDGETS[number % len(BUDGETS)]))
    drawn += [(draw(generator, *size, "RGB"), budget) for size in AWKWARD[:3] for budget in BUDGETS]
    return drawn


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> PilProcessor:
    return saved_processor(tmp_path_factory.mktemp("model"))


FILES = files()


@pytest.mark.parametrize("part", range(5))
def test_pixels_positions_and_soft_tokens(reference: PilProcessor, part: int):
    for data, budget in FILES[part::5]:
        stored = Image.open(io.BytesIO(data))
        upright = ImageOps.exif_transpose(stored)  # transformers does this when it loads a file
        if stored.mode == "I;16":
            upright = Image.fromarray(np.rint(np.asarray(stored) / 257).astype(np.uint8))
        expected = reference.image_processor(upright, max_soft_tokens=budget, return_tensors="pt")
        processor = Gemma4ImageProcessor(max_soft_tokens=budget)
        inputs = processor.collate([processor.decode(data)])

        soft_tokens = int(expected["num_soft_tokens_per_image"][0])
        assert processor.soft_tokens(MediaHeader(width=stored.width, height=stored.height)) == soft_tokens
        x, y = inputs["positions"].T  # ordered by soft token here, by line of the image in transformers
        by_line = torch.argsort(y * 20_000 + x)
        patches = soft_tokens * 9
        assert torch.equal(inputs["positions"][by_line], expected["image_position_ids"][0, :patches])
        assert (expected["image_position_ids"][0, patches:] == -1).all()
        torch.testing.assert_close(
            inputs["pixel_values"][by_line], expected["pixel_values"][0, :patches], rtol=0, atol=1e-6
        )  # one rounding of x / 255 against x * (1 / 255)


@pytest.mark.parametrize("budget", BUDGETS)
def test_expanded_ids_and_token_types(tmp_path: Path, budget: int):
    reference = saved_processor(tmp_path, budget)
    processor = Gemma4ImageProcessor(max_soft_tokens=budget)
    encoder = ConversationEncoder(load_tokenizer(tmp_path), [processor], {"image": MediaTokens(5, 6, 7)})
    generator, sizes = np.random.default_rng(budget), random.Random(budget)
    for images in (0, 1, 2, 5):
        shapes = [tuple(int(2 ** sizes.uniform(0, 12)) for _ in range(2)) for _ in range(images)]
        words = ["".join(generator.choice(list("ab é\n<|"), 6)) for _ in range(images + 1)]
        parts = [{"type": "text", "text": words[0]}]
        for word in words[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": word}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Ja!"}]
        messages = parse_messages(json.dumps({"messages": messages}).encode())

        text = reference.tokenizer.apply_chat_template(messages, tokenize=False)
        pictures = [[Image.new("RGB", shape) for shape in shapes]] if images else None
        expected = reference(text=[text], images=pictures, add_special_tokens=False, return_tensors="np")
        counts = [processor.soft_tokens(MediaHeader(width=width, height=height)) for width, height in shapes]
        encoded = encoder.encode(messages, counts)
        np.testing.assert_array_equal(encoded.input_ids, expected["input_ids"][0])
        types = np.zeros(encoded.length, np.int64)
        for start, count in zip(encoded.media_starts, counts, strict=True):
            types[start : start + count] = 1
        np.testing.assert_array_equal(types, expected["mm_token_type_ids"][0])
        assert (encoded.labels[np.flatnonzero(types[1:])] == -100).all(), "soft tokens are no targets"
