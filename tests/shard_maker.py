"""Small WebDataset shards and a media processor without an encoder, for tests of the data pipeline."""

import io
import json
import tarfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.tokenizer import byte_tokenizer
from mimo_gemma4.media import MediaHeader, MediaTokens

MEDIA_TOKENS = {"image": MediaTokens(5, 6, 7), "audio": MediaTokens(8, 9, 10)}


class TileProcessor:
    """One row per 8x8 tile of an image; an item is its tiles [rows, 64]."""

    modality, content_type = "vision", "image"

    def soft_tokens(self, header: MediaHeader) -> int:
        return (header.width // 8) * (header.height // 8)

    def cost(self, header: MediaHeader) -> float:
        return float(self.soft_tokens(header))

    def decode(self, data: bytes) -> dict[str, torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("L")
        down, across = image.height // 8, image.width // 8
        tiles = torch.from_numpy(np.array(image)[: down * 8, : across * 8]).float().view(down, 8, across, 8)
        return {"tiles": tiles.transpose(1, 2).reshape(down * across, 64)}

    def placeholder(self, header: MediaHeader) -> dict[str, torch.Tensor]:
        return {"tiles": torch.zeros(self.soft_tokens(header), 64)}

    def collate(self, items: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        return {"tiles": torch.cat([item["tiles"] for item in items])}


class SoundProcessor:
    """One row per 100 samples of sound."""

    modality, content_type = "audio", "audio"

    def soft_tokens(self, header: MediaHeader) -> int:
        return header.samples // 100

    def cost(self, header: MediaHeader) -> float:
        return float(self.soft_tokens(header))

    def decode(self, data: bytes) -> dict[str, torch.Tensor]:
        with wave.open(io.BytesIO(data)) as sound:
            samples = torch.frombuffer(bytearray(sound.readframes(sound.getnframes())), dtype=torch.int16)
        return {"samples": samples}

    def placeholder(self, header: MediaHeader) -> dict[str, torch.Tensor]:
        return {"samples": torch.zeros(header.samples, dtype=torch.int16)}

    def collate(self, items: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        return {"samples": torch.cat([item["samples"] for item in items])}


def jpeg(width: int, height: int, shade: int = 128, **options: Any) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(shade).integers(0, 255, (height, width, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, "jpeg", quality=95, **options)
    return buffer.getvalue()


def png(width: int, height: int, shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), shade).save(buffer, "png")
    return buffer.getvalue()


def wav(samples: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(np.arange(samples, dtype=np.int16).tobytes())
    return buffer.getvalue()


def sound(samples: int, seed: int, rate: int = 16_000, format: str = "WAV") -> bytes:
    """A tone with noise, as 16 bit samples of one channel."""
    generator = np.random.default_rng(seed)
    tone = 0.3 * np.sin(np.arange(samples) * generator.uniform(0.1, 1.0))
    buffer = io.BytesIO()
    soundfile.write(buffer, tone + generator.normal(0, 0.05, samples), rate, format=format, subtype="PCM_16")
    return buffer.getvalue()


def chat(question: str, answer: str, *media: str) -> bytes:
    parts = [{"type": media_type} for media_type in media] + [{"type": "text", "text": question}]
    reply = [{"type": "text", "text": answer}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": reply}]
    return json.dumps({"messages": messages}).encode()


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, its text parts joined."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of the members, in order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def mixed_shard(path: Path, first: int, count: int) -> Path:
    """Samples s<number> of varied length: every third is text only, every fourth of the others has two images."""
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        images = 0 if number % 3 == 0 else 2 if number % 4 == 0 else 1
        members[f"s{number}.json"] = chat("q" * (1 + number * 7 % 23), f"answer {number}", *["image"] * images)
        for ordinal in range(images):
            members[f"s{number}.{ordinal}.png"] = png(8 * (1 + number % 3), 16, number * 10 % 250 + ordinal)
    return write_shard(path, members)


def byte_encoder(*processors: Any) -> ConversationEncoder:
    return ConversationEncoder(byte_tokenizer(), processors or (TileProcessor(),), MEDIA_TOKENS)


def open_dataset(shards: Any, *processors: Any, seq_length: int = 256, **options: Any) -> ShardDataset:
    return ShardDataset.open(shards, byte_encoder(*processors), seq_length=seq_length, **options)
