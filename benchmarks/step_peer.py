"""Whole training steps of Hugging Face transformers, the peer of the benchmark `step.py`.

The peer trains as its users do: SDPA attention, bf16 weights, fused AdamW whose state is bf16 too, no gradient
clipping, and the loss that transformers computes. Documents are sorted by length and padded to the longest of their
microbatch, on the right: behind causal attention no mask is needed for that, which leaves SDPA its faster kernels.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from step_models import LEARNING_RATE, LORA_ALPHA, LORA_LINEARS, LORA_RANK, Case, Document, Workload

from mimo_gemma4.data.chat import IGNORE

PAD_TO = 8
"""What padded lengths are multiples of: mask rows of SDPA's kernels are aligned then."""
COMPILED_LAYERS = ("Gemma4TextDecoderLayer", "Gemma4VisionEncoderLayer")
GRAPHS = 256
"""Graphs that torch.compile may keep of a layer's code: kinds of layers times shapes of microbatches."""


@dataclass(frozen=True)
class Setting:
    """How the peer spends its memory."""

    sequences: int
    """Sequences of a microbatch."""
    recompute: bool
    """Compute every layer again in the backward pass."""

    def __str__(self) -> str:
        """As the table has it."""
        return f"{self.sequences} at a time{', recomputing' if self.recompute else ''}"


@dataclass(frozen=True)
class _Batch:
    """A microbatch on the device."""

    inputs: dict[str, torch.Tensor]
    share: float
    """Its share of the loss tokens of the step."""


class Peer:
    """transformers' Gemma 4 with the workload's weights and documents."""

    def __init__(self, workload: Workload, setting: Setting, compiled: bool) -> None:
        """Build the model on the device; `compiled`: torch.compile every layer, on a GPU."""
        self.workload, device = workload, workload.platform.device
        compiled = compiled and device.type == "cuda"
        self.model = _model(workload)
        if setting.recompute:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if workload.case.frozen_head:
            self.model.get_input_embeddings().weight.requires_grad_(False)
        if workload.case.lora:
            self.model = _with_adapters(self.model)
        _fill(self.model, workload)
        self.model.train()
        if compiled:
            for module in self.model.modules():
                if type(module).__name__ in COMPILED_LAYERS:
                    module.compile(dynamic=False)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.batches = _batches(workload, setting.sequences)
        self._compiling = _many_graphs if compiled else nullcontext

    def step(self) -> torch.Tensor:
        """One optimizer step; the mean loss of its tokens."""
        loss = torch.zeros((), device=self.workload.platform.device)
        with self._compiling():
            for batch in self.batches:
                part = self.model(**batch.inputs, use_cache=False).loss * batch.share
                part.backward()
                loss += part.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def close(self) -> None:
        """Nothing to stop."""


def settings(case: Case) -> list[list[Setting]]:
    """What to try, largest microbatch first; the next list only where nothing of the one before fits."""
    choices = [case.recompute] if case.recompute else [False, True]
    return [[Setting(sequences, recompute) for sequences in case.peer_sequences] for recompute in choices]


def hf_name(name: str, text_only: bool) -> str:
    """The name in Hugging Face files, text under `model.language_model.`, of a tensor of the peer's `state_dict`."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
    return name.replace("model.", "model.language_model.", 1) if text_only else name


def _many_graphs() -> AbstractContextManager[Any]:
    """torch.compile gives up on a layer after 8 graphs otherwise."""
    return torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=16 * GRAPHS)


def _model(workload: Workload) -> Any:
    """The architecture on the device, with transformers' own random weights."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma4Config, Gemma4TextConfig

    hf_config, kind, config = workload.hf_config, AutoModelForCausalLM, None
    if workload.case.load is None:
        config = Gemma4TextConfig(**hf_config["text_config"])
    else:
        kind = AutoModelForImageTextToText
        config = Gemma4Config(**{key: hf_config[key] for key in hf_config if key != "vision_processor"})
        config.audio_config = None
    with torch.device(workload.platform.device):
        return kind.from_config(config, dtype=workload.dtype, attn_implementation="sdpa")


def _with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = rf".*\.({'|'.join(LORA_LINEARS)})$"
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=targets)
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


@torch.no_grad()
def _fill(model: Any, workload: Workload) -> None:
    """The workload's weights."""
    text_only = workload.case.load is None
    for name, tensor in model.state_dict().items():
        if not name.endswith("lm_head.weight"):  # the embedding, once more
            tensor.copy_(workload.weights.whole(hf_name(name, text_only), tuple(tensor.shape)))


def _batches(workload: Workload, sequences: int) -> list[_Batch]:
    """Documents of about the same length together, the longest first."""
    documents = sorted(workload.documents(), key=lambda document: -len(document.input_ids))
    total = sum(int((document.labels != IGNORE).sum()) for document in documents)
    groups = [documents[first : first + sequences] for first in range(0, len(documents), sequences)]
    return [_batch(workload, group, total) for group in groups]


def _batch(workload: Workload, documents: list[Document], total: int) -> _Batch:
    device, text = workload.platform.device, workload.hf_config["text_config"]
    length = -(-max(len(document.input_ids) for document in documents) // PAD_TO) * PAD_TO
    ids = torch.full((len(documents), length), text["pad_token_id"])
    labels = torch.full_like(ids, IGNORE)
    for sequence, document in enumerate(documents):
        end = len(document.input_ids)
        ids[sequence, :end] = document.input_ids
        labels[sequence, 1:end] = document.labels[:-1]  # transformers shifts them itself
    inputs = {"input_ids": ids, "labels": labels}
    images = [image for document in documents for image in document.images]
    if images:
        processor: Any = workload.dataset.encoder.processors["image"]
        inputs |= processor.transformers_inputs(images)
        inputs["pixel_values"] = inputs["pixel_values"].to(workload.dtype)
        inputs["mm_token_type_ids"] = (ids == workload.hf_config["image_token_id"]).long()
    share = int((labels != IGNORE).sum()) / total
    return _Batch({name: tensor.to(device) for name, tensor in inputs.items()}, share)
