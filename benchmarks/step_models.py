"""Models and documents of the benchmark of whole training steps (`step.py`), and its table of cases."""

import io
import json
import random
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from image_loads import LOADS, TINY_LOADS, Load, Operations, with_byte_tokens, write_shard
from random_checkpoint import BRANCH_SCALE, shortened

from mimo_gemma4.config import load_config
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.data.chat import IGNORE, EncodedConversation
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.data.tokenizer import BYTE_OFFSET
from mimo_gemma4.distributed.layout import build_layout
from mimo_gemma4.distributed.platform import Platform, ranks_per_host
from mimo_gemma4.distributed.process_groups import create_process_groups
from mimo_gemma4.flops import text_flops
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.train.build import build_conversation_encoder, open_dataset
from mimo_gemma4.train.setup import RunSetup
from mimo_gemma4.weights.bindings import Index

TOKENS = 16_384
"""Text tokens of a step on one GPU."""
LORA_RANK, LORA_ALPHA = 16, 32
LORA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATE = 1e-5
TINY = 16
"""How much shorter documents of `tiny-` cases are."""
DENSE = {
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "use_bidirectional_attention": "vision",
}
"""What makes the tiny model's text like that of the 31B."""


@dataclass(frozen=True)
class Case:
    """A model, how it trains, and the documents of a step on one GPU."""

    name: str
    about: str
    lengths: tuple[int, ...] = ()
    """Tokens of every text document; empty where `load` says what samples look like."""
    load: Load | None = None
    seq_length: int = 4096
    """Most tokens of one of our packs."""
    preset: str = "gemma4_e4b"
    layers: int | None = 12
    """Decoder layers; None: all of the preset's."""
    text: Mapping[str, Any] = field(default_factory=dict)
    """What replaces values of the preset's `text_config`."""
    lora: bool = False
    frozen_head: bool = False
    """The embedding, which is the head too, does not train."""
    recompute: bool = False
    """Every layer is computed again in the backward pass, in both implementations."""
    peer_sequences: tuple[int, ...] = (4, 2, 1)
    """Sequences of a microbatch that transformers may take, largest first."""
    precision: str = "bf16"


def odd_lengths(total: int, seed: int) -> tuple[int, ...]:
    """Random odd document lengths; the last document fills up to `total`."""
    generator = random.Random(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 4096:
        lengths.append(generator.randrange(513, 3072, 2))
    return (*lengths, left)


def tiny(case: Case) -> Case:
    """The case at sizes for a CPU, in fp32."""
    changes: dict[str, Any] = {"text": DENSE} if case.frozen_head else {}
    if case.load is not None:
        changes |= {"load": next(load for load in TINY_LOADS if load.name == case.load.name), "seq_length": 700}
    else:
        changes["lengths"] = tuple(length // TINY | length & 1 for length in case.lengths)
        changes["seq_length"] = case.seq_length // TINY
    return replace(
        case,
        name=f"tiny-{case.name}",
        about=f"{case.about}; gemma4_tiny, shorter documents",
        preset="gemma4_tiny",
        layers=None,
        precision="fp32",
        **changes,
    )


def _cases() -> dict[str, Case]:
    def text(sequences: int) -> dict[str, Any]:
        return {"lengths": (TOKENS // sequences,) * sequences, "seq_length": TOKENS // sequences}

    light, heavy = (replace(load, samples=samples) for load, samples in zip(LOADS, (28, 8), strict=True))
    dense: dict[str, Any] = {"preset": "gemma4_31b", "layers": 6, "frozen_head": True}
    cases = [
        Case("text", "E4B widths, 12 layers, 4 x 4,096 tokens", **text(4)),
        Case("text-16k", "E4B widths, 12 layers, 1 x 16,384 tokens", **text(1), peer_sequences=(1,)),
        Case("text-short", "E4B widths, 12 layers, 16 x 1,024 tokens", **text(16), peer_sequences=(8, 4)),
        Case(
            "packed", "E4B widths, 12 layers, 10 odd lengths", odd_lengths(TOKENS, 209), seq_length=8192,
            peer_sequences=(2,),  # every padded length is compiled by itself, which takes long
        ),
        Case("lora", "E4B, 42 layers, LoRA 16, 4 x 4,096 tokens", **text(4), layers=42, lora=True, recompute=True),
        Case(
            "images", "E4B widths, 12 layers, vision, 280 soft tokens", load=light, seq_length=5120,
            peer_sequences=(14, 7),
        ),
        Case("images-heavy", "as images, 4 x 1,120 soft tokens", load=heavy, seq_length=5120, peer_sequences=(1,)),
        Case("31b", "31B widths, 6 layers, head frozen, 4 x 4,096", **text(4), **dense, peer_sequences=(2, 1)),
        Case(
            "31b-16k", "31B widths, 6 layers, head frozen, 1 x 16,384", **text(1), **dense,
            recompute=True, peer_sequences=(1,),
        ),
    ]  # fmt: skip
    return {case.name: case for case in [*cases, *map(tiny, cases)]}


CASES = _cases()


class DrawnWeights:
    """Random weights by Hugging Face name, drawn on the device; a `TensorSource`, equal for every layout.

    Distributions as in `random_checkpoint.randomise`, which keep attention well conditioned.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Draw on `device` in `dtype`."""
        self.device, self.dtype = device, dtype

    def read(self, name: str, index: Index, shape: tuple[int, ...]) -> torch.Tensor:
        """The slice `index` of tensor `name` of full `shape`."""
        return self.whole(name, shape)[index]

    def whole(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(shape, device=self.device, dtype=self.dtype)
        if "norm" in name or name.endswith(("layer_scalar", "scale")):
            values.uniform_(0.7, 1.3, generator=generator)
            if "q_norm" in name or "k_norm" in name:
                values.mul_(shape[0] ** -0.25)
            if "post_" in name and "language_model" in name:
                values.mul_(BRANCH_SCALE)
            return values
        if name.endswith(("_min", "_max")):
            return values.fill_(8.0 if name.endswith("max") else -8.0)
        return values.normal_(0.0, 0.02 if "lora_B" in name else shape[-1] ** -0.5, generator=generator)


@dataclass(frozen=True)
class Document:
    """A sample as the peer sees it, on the host."""

    input_ids: torch.Tensor
    """[S]."""
    labels: torch.Tensor
    """[S], the id that each position predicts; -100 where there is no loss."""
    images: list[dict[str, torch.Tensor]]
    """What the image processor decoded."""


class Workload:
    """What both implementations train on: configuration, documents in real shards, weights, operations of a step."""

    def __init__(self, case: Case, platform: Platform, folder: Path, layout: str = "") -> None:
        """Write the shard and index it.

        Args:
            case: the model and the documents of one GPU; each data-parallel lane gets as many.
            platform: this rank's device.
            folder: where the shard and the runs go; the same on all ranks.
            layout: keys below `layout`, such as `language.tp=2`, separated by spaces.

        Collective over all ranks.
        """
        self.case, self.platform = case, platform
        file, shard = folder / f"rank-{platform.rank}.yaml", folder / "train-0.tar"
        file.write_text("data: {train: {}}\nlayout: {}\n")
        config = load_config([f"config={file}", *_run_options(case, folder, shard, layout)])
        hf_config = load_model_config(config.model, config.modules)
        hf_config = shortened(with_byte_tokens(hf_config), case.layers)
        self.hf_config = hf_config | {"text_config": hf_config["text_config"] | case.text}
        grids = build_layout(config.layout, dist.get_world_size(), ranks_per_host())
        self.lanes = grids.language.dp
        config.train.global_batch_size = self.lanes * (case.load.samples if case.load else len(case.lengths))
        groups = create_process_groups(grids, platform)
        self.setup = RunSetup(config, self.hf_config, grids, platform, groups)
        encoder = build_conversation_encoder(self.setup)
        if platform.rank == 0:
            if case.load is not None:
                write_shard(shard, replace(case.load, samples=config.train.global_batch_size))
            else:
                around = encoder.encode(_conversation(1)).length - 1  # tokens of the template; a byte is a token
                _write_documents(shard, [length - around for length in case.lengths] * self.lanes)
        dist.barrier(group=groups.host)
        self.dataset = open_dataset(self.setup, "train", config.data.train, encoder)
        self.distinct = len(self.dataset) // self.lanes
        vocabulary = self.hf_config["text_config"]["vocab_size"]
        self.dataset.encode = _spread(self.dataset.encode, self.distinct, vocabulary)  # type: ignore[method-assign]
        self.lengths = [int(length) for length in self.dataset.lengths]
        self.dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
        self.weights = DrawnWeights(platform.device, self.dtype)

    @property
    def tokens(self) -> int:
        """Tokens of a step, padding excluded."""
        return sum(self.lengths)

    @property
    def flops(self) -> float:
        """Useful operations of a step, forward and backward, without recomputation; adapters' are negligible."""
        case = self.case
        part = text_flops(Gemma4TextConfig.from_hf(self.hf_config), self.lengths)
        layers, head = 2 if case.lora else 3, 2 if case.lora or case.frozen_head else 3
        language = layers * part.linear + head * part.head + 3 * (part.sliding + part.full)
        if case.load is None:
            return language
        return language + 3 * len(self.dataset) * Operations.of(self.hf_config, case.load).vision

    def documents(self) -> list[Document]:
        """The documents of one lane's step."""
        return [self._document(index) for index in range(self.distinct)]

    def _document(self, index: int) -> Document:
        encoded, processors = self.dataset.encode(index), self.dataset.encoder.processors
        images = [
            processors[item.media_type].decode(read_range(item.shard, item.offset, item.size))
            for item in self.dataset.media(index)
        ]
        return Document(torch.from_numpy(encoded.input_ids), torch.from_numpy(encoded.labels), images)


def _run_options(case: Case, folder: Path, shard: Path, layout: str) -> list[str]:
    """Arguments of our run; the number of samples is filled in later."""
    options = [
        f"run.dir={folder}/run",
        f"model.preset={case.preset}",
        f"model.precision={case.precision}",
        f"data.train.shards={shard}",
        f"data.seq_length={case.seq_length}",
        f"data.workers={4 if case.load else 0}",
        "train.steps=1000000",
        f"train.activation_checkpointing={'full' if case.recompute else 'none'}",
        f"optim.lr={LEARNING_RATE}",
        "logging.every=1000000",
        "logging.tensorboard=false",
        "layout.language={}",
    ]
    if case.load is not None:
        options += ["layout.vision={}", "layout.placement=colocated"]
        options += [f"modules.vision.processor={{max_soft_tokens: {case.load.soft_tokens}}}"]
    if case.lora:
        targets = ", ".join(f"'*.{linear}'" for linear in LORA_LINEARS)
        options += [f"modules.language.lora={{targets: [{targets}], rank: {LORA_RANK}, alpha: {LORA_ALPHA}}}"]
    if case.frozen_head:
        options += ["modules.language.freeze=['*.embed_tokens.weight']"]
    return options + [f"layout.{option}" for option in layout.split()]


def _conversation(answer_bytes: int) -> list[dict[str, Any]]:
    question, answer = ({"type": "text", "text": text} for text in ("a", "b" * answer_bytes))
    return [{"role": "user", "content": [question]}, {"role": "assistant", "content": [answer]}]


def _write_documents(path: Path, answers: list[int]) -> None:
    """A shard of text documents whose answers have so many bytes."""
    with tarfile.open(path, "w") as tar:
        for number, answer in enumerate(answers):
            data = json.dumps({"messages": _conversation(answer)}).encode()
            member = tarfile.TarInfo(f"{number:05}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _spread(
    encode: Callable[[int], EncodedConversation], distinct: int, vocabulary: int
) -> Callable[[int], EncodedConversation]:
    """`encode` with random ids of the whole vocabulary in place of bytes, as many as a real tokenizer would use.

    Sample i has the ids of sample i mod `distinct`. The highest sixteenth of the ids, where presets have the tokens of
    media, is left out.
    """

    def spread(index: int) -> EncodedConversation:
        encoded = encode(index)
        drawn = np.random.default_rng(index % distinct).integers(
            BYTE_OFFSET, vocabulary - vocabulary // 16, len(encoded.input_ids)
        )
        ids = np.where(encoded.input_ids < BYTE_OFFSET, encoded.input_ids, drawn)
        labels = np.where(encoded.labels == IGNORE, IGNORE, np.append(ids[1:], IGNORE))
        return replace(encoded, input_ids=ids, labels=labels)

    return spread
