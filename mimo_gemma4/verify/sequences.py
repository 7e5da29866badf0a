"""Sequences that both the configured layout and transformers compute, for a comparison."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from mimo_gemma4.data.collate import LanguageBatch
from mimo_gemma4.data.manifest import Microbatch
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.model.mimo_model import Media, MimoModel
from mimo_gemma4.partition import sequence_multiple
from mimo_gemma4.train.build import build_conversation_encoder, build_loader, open_dataset, prepare_shards
from mimo_gemma4.train.setup import RunSetup
from mimo_gemma4.train.step import StepRunner
from mimo_gemma4.verify.parity import Outputs


class Sequences(Protocol):
    """Sequences that every rank knows."""

    count: int
    """Number of sequences."""

    def reference_inputs(self, number: int) -> dict[str, torch.Tensor]:
        """Arguments of transformers' model for one sequence [1, S], on the host."""
        ...

    def run(self, model: MimoModel) -> list[Outputs]:
        """Outputs of the configured layout, on rank 0; empty elsewhere. Collective over all ranks."""
        ...


class RandomSequences:
    """Random token ids, equal on every rank; every language lane computes all sequences."""

    def __init__(self, setup: RunSetup, count: int, length: int) -> None:
        """`count` sequences of `length` tokens, rounded up to a length that the layout can cut."""
        self.count, self.setup = count, setup
        language = setup.layout.language
        multiple = sequence_multiple(language.cp, language.tp if language.sequence_parallel else 1)
        length = -(-length // multiple) * multiple
        text = Gemma4TextConfig.from_hf(setup.hf_config)
        generator = torch.Generator().manual_seed(setup.config.run.seed)
        self.ids = torch.randint(text.vocab_size, (count, length), generator=generator)
        for placeholder in text.placeholder_ids:
            self.ids.masked_fill_(self.ids == placeholder, text.pad_token_id)

    def reference_inputs(self, number: int) -> dict[str, torch.Tensor]:
        """The ids alone."""
        return {"input_ids": self.ids[number : number + 1]}

    def run(self, model: MimoModel) -> list[Outputs]:
        """One microbatch with all sequences."""
        parts: list[Part] = []
        if model.language is not None:
            lane = model.layout.language.coordinate(model.rank).dp
            sequences, length = self.ids.shape
            zeros = torch.zeros_like(self.ids)
            batch = LanguageBatch(self.ids, zeros, torch.arange(length).expand_as(zeros), zeros + 1, zeros)
            places = [Place(number, number, length) for number in range(sequences)]
            part = compute(model, batch, Microbatch(lane, 0, sequences, length, ()), [], places)
            parts = [part] if lane == 0 else []
        return gather(parts, self.setup.groups.host)


class DatasetSequences:
    """The first samples of `data.train`, media included, through the data pipeline and the encoders of the layout."""

    def __init__(self, setup: RunSetup, count: int) -> None:
        """Open the shards; collective."""
        prepare_shards(setup)
        self.encoder = build_conversation_encoder(setup)
        self.dataset = open_dataset(setup, "train", setup.config.data.train, self.encoder)
        self.count = min(count, len(self.dataset))
        one_batch = replace(setup.config.eval, samples=self.count, batch_size=self.count)
        self.setup = replace(setup, config=replace(setup.config, eval=one_batch))

    def reference_inputs(self, number: int) -> dict[str, torch.Tensor]:
        """Token ids and media inputs. Raises `ConfigError` for an encoder that transformers' Gemma 4 does not have."""
        inputs: dict[str, torch.Tensor] = {"input_ids": torch.from_numpy(self.dataset.encode(number).input_ids)[None]}
        items: dict[str, list[dict[str, torch.Tensor]]] = {}
        for media in self.dataset.media(number):
            data = read_range(media.shard, media.offset, media.size)
            items.setdefault(media.media_type, []).append(self.encoder.processors[media.media_type].decode(data))
        for media_type, decoded in items.items():
            processor: Any = self.encoder.processors[media_type]
            if not hasattr(processor, "transformers_inputs"):
                raise ConfigError(
                    f"layout.{processor.modality}: transformers' Gemma 4 has no such encoder to compare with; leave it "
                    "out of `layout` and use --random-tokens"
                )
            inputs |= processor.transformers_inputs(decoded)
        if "vision_config" in self.setup.hf_config:
            inputs["mm_token_type_ids"] = self._media_types(inputs["input_ids"])
        return inputs

    def run(self, model: MimoModel) -> list[Outputs]:
        """One evaluation batch, through loader, encoders, bridges and language lanes."""
        parts: list[Part] = []

        def observe(batch: LanguageBatch, microbatch: Microbatch, media: Media) -> None:
            if not microbatch.sequences:
                assert model.language is not None
                model.language.serve_experts()
                return
            places = [Place(planned.index, planned.sequence, planned.length) for planned in microbatch.samples]
            parts.append(compute(model, batch, microbatch, media, places))

        loader = build_loader(self.setup, self.dataset, train=False)
        StepRunner(model).run(loader.load(0), train=False, observe=observe)
        loader.close()
        return gather(parts, self.setup.groups.host)

    def _media_types(self, ids: torch.Tensor) -> torch.Tensor:
        """transformers' media types of the positions [1, S]: 1 image, 2 video, 3 audio, 0 text."""
        types = torch.zeros_like(ids)
        for number, name in enumerate(("image_token_id", "video_token_id", "audio_token_id"), start=1):
            types.masked_fill_(ids == self.setup.hf_config.get(name, -1), number)
        return types


class Place(NamedTuple):
    """Where a sequence lies in a microbatch."""

    number: int
    """Number of the sequence in the comparison."""
    sequence: int
    """Its place in the batch dimension."""
    length: int
    """Its tokens, without padding."""


@dataclass(frozen=True)
class Part:
    """One rank's outputs for a microbatch, on the host."""

    places: list[Place]
    """The sequences of the microbatch."""
    shape: tuple[int, int]
    """[B, S] of the whole microbatch."""
    hidden: dict[int, torch.Tensor]
    """Hidden states after each layer of this rank's stage, [positions (local), B, H]; empty where another
    tensor-parallel rank has them."""
    hidden_positions: torch.Tensor
    """The positions of `hidden`, in its order."""
    logits: torch.Tensor
    """[B, positions (local), vocabulary (local)]; an empty vocabulary on stages before the last."""
    logit_positions: torch.Tensor
    """The positions of `logits`, in its order."""
    vocabulary: slice
    """The token ids of `logits`."""


def compute(
    model: MimoModel,
    batch: LanguageBatch,
    microbatch: Microbatch,
    media: Media,
    places: list[Place],
) -> Part:
    """Run one microbatch on a language rank; collective over its lane and those that share its experts."""
    language, adapter = model.language, model.adapter
    assert language is not None and adapter is not None
    hidden: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        return lambda layer, arguments, output: hidden.update({number: output[0].cpu()})

    layers = zip(language.stage.layers, language.layers, strict=True)
    handles = [layer.register_forward_hook(keep(number)) for number, layer in layers]
    final = model.hidden(model.local_tokens(batch, microbatch), media)
    for handle in handles:
        handle.remove()
    index, tp = adapter.token_index(microbatch.seq_length), language.tp_group
    logits = torch.empty(microbatch.sequences, len(index), 0) if final is None else language.logits(final).cpu()
    hidden_positions = index.chunk(tp.size())[tp.rank()] if language.config.sequence_parallel else index
    if not language.config.sequence_parallel and tp.rank() > 0:
        hidden = {}
    first = tp.rank() * logits.shape[-1]
    return Part(
        places=places,
        shape=(microbatch.sequences, microbatch.seq_length),
        hidden=hidden,
        hidden_positions=hidden_positions,
        logits=logits,
        logit_positions=index,
        vocabulary=slice(first, first + logits.shape[-1]),
    )


def gather(parts: list[Part], host: dist.ProcessGroup) -> list[Outputs]:
    """Assemble the sequences from the parts of all ranks, by number, on rank 0; empty elsewhere. Collective."""
    everyone: list[list[Part]] | None = [[] for _ in range(host.size())] if host.rank() == 0 else None
    dist.gather_object(parts, everyone, dst=0, group=host)
    by_microbatch: dict[tuple[int, ...], list[Part]] = {}
    for part in (part for found in everyone or [] for part in found):
        by_microbatch.setdefault(tuple(place.number for place in part.places), []).append(part)
    outputs: dict[int, Outputs] = {}
    for same in by_microbatch.values():
        outputs |= _assemble(same)
    return [outputs[number] for number in sorted(outputs)]


def _assemble(parts: list[Part]) -> dict[int, Outputs]:
    """The sequences of one microbatch, by number, from the parts of a lane's ranks."""
    sequences, length = parts[0].shape
    hidden: list[torch.Tensor] = []
    for layer in sorted({layer for part in parts for layer in part.hidden}):
        states = [(part.hidden_positions, part.hidden[layer]) for part in parts if layer in part.hidden]
        whole = torch.empty(length, *states[0][1].shape[1:], dtype=states[0][1].dtype)
        for index, values in states:
            whole[index] = values
        hidden.append(whole)
    logits = torch.empty(sequences, length, max(part.vocabulary.stop for part in parts))
    for part in parts:
        logits[:, part.logit_positions, part.vocabulary] = part.logits
    return {
        place.number: Outputs(
            [states[: place.length, place.sequence] for states in hidden], logits[place.sequence, : place.length]
        )
        for place in parts[0].places
    }
