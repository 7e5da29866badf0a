"""A tiny random Gemma 4 VLM as a Hugging Face directory, shards for it, and one step as transformers computes it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from encoders.registry import build_processors
from mimo_gemma4.config import REPOSITORY
from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.data.tokenizer import byte_tokenizer, media_tokens
from tests.random_weights import vary_norms
from tests.shard_maker import chat, jpeg, write_shard

SIZES = [(48, 48), (96, 48), (130, 60), (40, 90), (300, 40)]
SAMPLES = 10


@dataclass(frozen=True)
class Reference:
    """One global step as one process computes it: token mean loss, N, and the gradient of every parameter by name."""

    loss: float
    loss_tokens: int
    gradients: dict[str, torch.Tensor]

    @property
    def norm(self) -> float:
        return math.sqrt(sum(float(g.double().square().sum()) for g in self.gradients.values()))


def write_model(folder: Path, **text: Any) -> Path:
    """`gemma4_tiny` with random norms, scalars and clip bounds, and attention that is well conditioned.

    `text` replaces values of its `text_config`.
    """
    hf_config = yaml.safe_load((REPOSITORY / "configs/model/gemma4_tiny.yaml").read_text())
    hf_config.pop("audio_config", None)
    hf_config["vision_processor"]["max_soft_tokens"] = 6
    hf_config["text_config"] |= text
    torch.manual_seed(0)
    options = {key: value for key, value in hf_config.items() if key != "vision_processor"}
    model = Gemma4ForConditionalGeneration(Gemma4Config(**options, attn_implementation="eager"))
    vary_norms(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "position_embedding_table" in name:
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


def write_shards(folder: Path) -> Path:
    """Ten samples of ragged text with none to three images of several sizes; two in a row have none."""
    generator = np.random.default_rng(5)
    members: dict[str, bytes] = {}
    for number in range(SAMPLES):
        images = [1, 2, 0, 0, 3, 1, 1, 0, 2, 1][number]
        question = "".join(generator.choice(list("abcdef "), generator.integers(3, 30)))
        answer = "".join(generator.choice(list("0123456789"), generator.integers(1, 9)))
        members[f"s{number}.json"] = chat(question, answer, *["image"] * images)
        for ordinal in range(images):
            members[f"s{number}.{ordinal}.jpg"] = jpeg(
                *SIZES[(number + ordinal) % len(SIZES)], shade=number * 10 + ordinal
            )
    return write_shard(folder / "train-000000.tar", members)


def huggingface_step(
    model_folder: Path, shard: Path, step: int, batch_size: int, seed: int, adapter: Path | None = None
) -> Reference:
    """Loss and gradients of global step `step`, sample by sample, without padding, packing or any parallelism.

    With `adapter`, a PEFT adapter's folder, the gradients are those of its A and B.
    """
    hf_config = json.loads((model_folder / "config.json").read_text())
    processors = build_processors("vision", hf_config)
    encoder = ConversationEncoder(byte_tokenizer(), processors, media_tokens(hf_config))
    dataset = ShardDataset.open(str(shard), encoder, seq_length=512)
    planner = StepPlanner(
        dataset,
        global_batch_size=batch_size,
        microbatch_size=1,
        seed=seed,
        language_lanes=1,
        encoder_lanes={"vision": 1},
        packing=False,
    )
    model = Gemma4ForConditionalGeneration.from_pretrained(
        model_folder, attn_implementation="eager", dtype=torch.float32
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    loss, count = torch.zeros(()), 0
    for index in planner.samples(step):
        encoded = dataset.encode(index)
        labels = torch.from_numpy(encoded.labels)
        inputs: dict[str, torch.Tensor] = {}
        for processor in processors:
            media = [item for item in dataset.media(index) if item.media_type == processor.content_type]
            items = [processor.decode(read_range(item.shard, item.offset, item.size)) for item in media]
            inputs |= transformers_images(processor, items, encoded)
        logits = model(input_ids=torch.from_numpy(encoded.input_ids)[None], **inputs).logits[0]
        loss = loss + F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=-100)
        count += int((labels != -100).sum())
    (loss / count).backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Reference(loss.item() / count, count, gradients)


def transformers_images(processor, items, encoded) -> dict[str, torch.Tensor]:  # noqa: ANN001
    """transformers' inputs for the images, or videos' frames, of one sample: padded, with position -1 in padding."""
    if not items:
        return {}
    types = torch.from_numpy((encoded.input_ids == 6) + 2 * (encoded.input_ids == 11)).long()[None]
    return processor.transformers_inputs(items) | {"mm_token_type_ids": types}
