"""A tiny random Gemma 4 as a Hugging Face directory, shards for it, and one step as transformers computes it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.data.tokenizer import byte_tokenizer, media_tokens
from mimo_gemma4.encoders.registry import build_processors
from tests import REPOSITORY
from tests.random_weights import vary_norms
from tests.shard_maker import chat, jpeg, sound, write_shard

SIZES = [(48, 48), (96, 48), (130, 60), (40, 90), (300, 40)]
SECONDS = [0.05, 0.4, 0.75, 0.011, 1.2]
IMAGES = [("image",) * count for count in (2, 1, 0, 0, 1, 3, 1, 0, 2, 1)]
"""Media of the samples of a shard, in message order; two in a row have none."""
SOUNDS = [("audio",) * count for count in (1, 2, 0, 0, 3, 1, 1, 0, 2, 1)]
SOUNDS_AND_IMAGES = [
    ("image",), ("audio",), (), ("image",), (),
    ("audio", "image", "audio"), ("image", "image"), ("audio", "audio"), ("audio",), ("image", "audio"),
]  # fmt: skip
SAMPLES = len(IMAGES)


@dataclass(frozen=True)
class Reference:
    """One global step as one process computes it: token mean loss, N, and the gradient of every parameter by name."""

    loss: float
    loss_tokens: int
    gradients: dict[str, torch.Tensor]
    decoder_losses: tuple[float, ...] = ()
    """Loss of each decoder, summed over its rows."""

    @cached_property
    def norm(self) -> float:
        return math.sqrt(sum(float(g.double().square().sum()) for g in self.gradients.values()))


def write_model(folder: Path, audio: bool = False, vision: Mapping[str, Any] | None = None, **text: Any) -> Path:
    """`gemma4_tiny` with random norms, scalars and clip bounds, and attention that is well conditioned.

    `audio`: it has an audio tower; `vision` and `text` replace values of its `vision_config` and `text_config`.
    """
    hf_config = yaml.safe_load((REPOSITORY / "configs/model/gemma4_tiny.yaml").read_text())
    if not audio:
        hf_config.pop("audio_config")
    hf_config["vision_processor"]["max_soft_tokens"] = 6
    hf_config["vision_config"] |= vision or {}
    hf_config["text_config"] |= text
    torch.manual_seed(0)
    options = {key: value for key, value in hf_config.items() if key != "vision_processor"}
    model = Gemma4ForConditionalGeneration(Gemma4Config(**options, attn_implementation="eager"))
    vary_norms(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("per_dim_scale", "std_scale")):
                tensor.uniform_(0.7, 1.3)
            if "position_embedding_table" in name or name.endswith("std_bias"):
                tensor.normal_(0.0, 0.1)
            if name.endswith(("input_max", "output_max")):
                tensor.fill_(1.5)
            if name.endswith(("input_min", "output_min")):
                tensor.fill_(-1.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"vision_processor": hf_config["vision_processor"]}))
    return folder


def write_shards(folder: Path, media: Sequence[tuple[str, ...]] = IMAGES) -> Path:
    """A sample of ragged text for each element of `media`, with files of those types in several sizes and formats."""
    generator = np.random.default_rng(5)
    members: dict[str, bytes] = {}
    for number, types in enumerate(media):
        question = "".join(generator.choice(list("abcdef "), generator.integers(3, 30)))
        answer = "".join(generator.choice(list("0123456789"), generator.integers(1, 9)))
        members[f"s{number}.json"] = chat(question, answer, *types)
        for ordinal, media_type in enumerate(types):
            extension, data = _file(media_type, number + ordinal, number * 10 + ordinal)
            members[f"s{number}.{ordinal}.{extension}"] = data
    return write_shard(folder / "train-000000.tar", members)


def _file(media_type: str, size: int, seed: int) -> tuple[str, bytes]:
    """Extension and bytes of a random file."""
    if media_type == "image":
        return "jpg", jpeg(*SIZES[size % len(SIZES)], shade=seed)
    extension, rate = (("wav", 16_000), ("flac", 22_050))[size % 2]
    return extension, sound(round(SECONDS[size % len(SECONDS)] * rate), seed, rate, extension.upper())


def reference_planner(hf_config: dict[str, Any], shard: Path, batch_size: int, seed: int) -> StepPlanner:
    """The order of the samples, and their dataset, with all encoders of the model."""
    modalities = [name for name in ("vision", "audio") if hf_config.get(f"{name}_config")]
    processors = [processor for name in modalities for processor in build_processors(name, hf_config)]
    encoder = ConversationEncoder(byte_tokenizer(), processors, media_tokens(hf_config))
    return StepPlanner(
        ShardDataset.open(str(shard), encoder, seq_length=512),
        global_batch_size=batch_size,
        microbatch_size=1,
        seed=seed,
        language_lanes=1,
        encoder_lanes=dict.fromkeys(modalities, 1),
        packing=False,
    )


def huggingface_step(
    model_folder: Path, shard: Path, step: int, batch_size: int, seed: int, adapter: Path | None = None
) -> Reference:
    """Loss and gradients of global step `step`, sample by sample, without padding, packing or any parallelism.

    With `adapter`, a PEFT adapter's folder, the gradients are those of its A and B.
    """
    model = Gemma4ForConditionalGeneration.from_pretrained(
        model_folder, attn_implementation="eager", dtype=torch.float32
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    hf_config = json.loads((model_folder / "config.json").read_text())
    planner = reference_planner(hf_config, shard, batch_size, seed)

    def logits(index: int, ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, **transformers_media(planner.dataset, index, ids)).logits[0]

    loss, count = mean_loss(planner, step, logits)
    loss.backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Reference(loss.item(), count, gradients)


def mean_loss(
    planner: StepPlanner, step: int, logits: Callable[[int, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, int]:
    """Loss of a token and number of tokens of a global step, from `logits(sample, its ids [1, S])` [S, vocabulary]."""
    loss, count = torch.zeros(()), 0
    for index in planner.samples(step):
        encoded = planner.dataset.encode(index)
        labels = torch.from_numpy(encoded.labels)
        output = logits(index, torch.from_numpy(encoded.input_ids)[None])
        loss = loss + F.cross_entropy(output.float(), labels, reduction="sum", ignore_index=-100)
        count += int((labels != -100).sum())
    return loss / count, count


def transformers_media(dataset: ShardDataset, index: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """transformers' inputs for the media of one sample."""
    inputs: dict[str, torch.Tensor] = {}
    for media_type, processor in dataset.encoder.processors.items():
        media = [item for item in dataset.media(index) if item.media_type == media_type]
        items = [processor.decode(read_range(item.shard, item.offset, item.size)) for item in media]
        inputs |= processor.transformers_inputs(items) if items else {}
    types = (ids == 6).long() + 2 * (ids == 11).long() + 3 * (ids == 9).long()
    return inputs | {"mm_token_type_ids": types} if inputs else {}
