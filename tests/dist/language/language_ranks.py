"""The language model on gloo ranks: process groups, a weight source, one rank's results, all ranks' put together."""

from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from mimo_gemma4.distributed.platform import Platform, install
from mimo_gemma4.language.attention_context import AttentionContext, attention_context
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.partition import cp_token_index
from mimo_gemma4.weights.bindings import Binding, Index, load, whole
from tests.dist.language.language_reference import LENGTH, Batch, Reference, huggingface_model


class StateDict:
    """Whole tensors by Hugging Face name."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> torch.Tensor | None:
        assert tuple(self.tensors[name].shape) == shape, name
        return self.tensors[name][index]


def language_groups(rank: int, tp: int, cp: int, ep: int = 1) -> ProcessGroupCollection:
    """Groups of a grid of tp * cp ranks, tp fastest, experts cut over `ep` of cp; megatron-core is made to run here."""
    install(Platform.detect())
    groups = ProcessGroupCollection()
    for c in range(cp):
        group = dist.new_group([c * tp + t for t in range(tp)])
        if rank // tp == c:
            groups.tp = group
    for t in range(tp):
        group = dist.new_group([c * tp + t for c in range(cp)])
        if rank % tp == t:
            groups.cp = group
    for t, first in product(range(tp), range(0, cp, ep)):
        members = [c * tp + t for c in range(first, first + ep)]
        group = dist.new_group(members)
        if rank in members:
            groups.ep = group
    return groups


@dataclass(frozen=True)
class Case:
    """A variant of the model and how it is cut and recomputed."""

    variant: str
    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    checkpointing: str = "none"
    ep: int = 1


@dataclass(frozen=True)
class GradientPart:
    """What one rank has of the gradient of one tensor."""

    name: str
    shape: tuple[int, ...]
    index: Index
    values: torch.Tensor
    summed: bool
    """Tensor-parallel ranks hold parts that add up, or slices of their own; else each holds all of it."""


@dataclass(frozen=True)
class RankResult:
    """What one rank computes."""

    tp_rank: int
    cp_rank: int
    loss: float
    logits: torch.Tensor
    """[B, LENGTH / cp, vocabulary / tp] (local)."""
    positions: torch.Tensor
    """Indices of these tokens in their sequences."""
    gradients: list[GradientPart]


def built_model(case: Case, groups: ProcessGroupCollection) -> tuple[Gemma4LanguageModel, list[Binding]]:
    """This rank's part of the model that transformers' random model of the variant is, and its bindings."""
    source = huggingface_model(case.variant)
    model = Gemma4LanguageModel(
        Gemma4TextConfig.from_hf(source.config.to_dict()),
        groups,
        sequence_parallel=case.sequence_parallel,
        dtype=torch.float32,
        device=torch.device("cpu"),
        activation_checkpointing=case.checkpointing,
    )
    weights = {name: tensor for name, tensor in source.state_dict().items() if name != "lm_head.weight"}
    bindings = model.bindings()
    assert {binding.name for binding in bindings} == set(weights)
    load(bindings, StateDict(weights), "the test")
    return model, bindings


def local_context(
    model: Gemma4LanguageModel, groups: ProcessGroupCollection, batch: Batch, held: list[torch.Tensor]
) -> AttentionContext:
    """Metadata of this rank's tokens; `held`: the tokens of every context-parallel rank."""
    metadata = (batch.positions, batch.segments, batch.groups)
    return attention_context(model.text, *metadata, held=held, cp_group=groups.cp, put=torch.clone)


def rank_result(rank: int, case: Case) -> RankResult:
    """Loss, logits and gradients of one forward and backward pass of the packed batch on this rank."""
    tp_rank, cp_rank = rank % case.tp, rank // case.tp
    groups = language_groups(rank, case.tp, case.cp, case.ep)
    model, bindings = built_model(case, groups)
    batch = Batch(case.variant)
    held = [cp_token_index(LENGTH, case.cp, other) for other in range(case.cp)]
    mine = held[cp_rank]
    media_mine = mine.chunk(case.tp)[tp_rank] if case.sequence_parallel else mine
    soft_tokens = batch.media_soft_tokens.clone().requires_grad_()

    embeddings = model.embed(batch.input_ids[:, mine])
    media = batch.media[:, media_mine].t().unsqueeze(-1)
    embeddings = torch.where(media, soft_tokens[:, media_mine].transpose(0, 1), embeddings)
    inputs = model.first_inputs(embeddings)
    hidden = model(inputs, batch.input_ids[:, mine], local_context(model, groups, batch, held)).hidden
    loss = model.loss(hidden, batch.labels[:, mine])
    loss.backward()
    with torch.no_grad():
        logits = model.logits(hidden)

    parts = []
    for bound in bindings:
        if bound.tensor.requires_grad:
            gradient = bound.view(bound.tensor.grad)
            parts.append(GradientPart(bound.name, bound.shape, bound.index, gradient, gradient_is_part(bound)))
    shape, gradient = tuple(soft_tokens.shape), soft_tokens.grad
    parts.append(GradientPart("soft tokens", shape, whole(shape), gradient, case.sequence_parallel))
    return RankResult(tp_rank, cp_rank, loss.item(), logits, mine, parts)


def gradient_is_part(binding: Binding) -> bool:
    """Whether tensor-parallel ranks hold slices or terms of the gradient; else each has all of it."""
    sliced = getattr(binding.tensor, "tensor_model_parallel", False)  # megatron-core's mark
    return sliced or "tp" in binding.gradient_sum or binding.replicas == "expt_dp"


def assembled_gradients(results: list[RankResult]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Parts summed over ranks, what tensor-parallel ranks hold complete counted once; and where they do not agree."""
    gradients: dict[str, torch.Tensor] = {}
    complete: dict[tuple[str, int], torch.Tensor] = {}
    disagreements = []
    for result in results:
        for part in result.gradients:
            whole = gradients.setdefault(part.name, torch.zeros(part.shape))
            if part.summed or result.tp_rank == 0:
                whole[part.index] += part.values
            if not part.summed:
                other = complete.setdefault((part.name, result.cp_rank), part.values)
                if not (part.values - other).norm() <= 1e-5 * other.norm():
                    disagreements.append(f"{part.name}: tensor-parallel rank {result.tp_rank} has another gradient")
    return gradients, disagreements


def deviations(case: Case, results: list[RankResult], expected: Reference) -> list[str]:
    """What of the ranks' logits, loss and gradients is not transformers' to 1e-5, in words."""
    found = []
    losses = {(result.tp_rank, result.cp_rank): result.loss for result in results}
    loss = sum(losses[0, cp] for cp in range(case.cp))
    if abs(loss - expected.loss) > 1e-5 * expected.loss or any(losses[0, c] != own for (_, c), own in losses.items()):
        found.append(f"losses {losses}, expected {expected.loss}")

    logits = torch.zeros_like(expected.logits)
    vocabulary = logits.shape[-1] // case.tp
    for result in results:
        columns = slice(result.tp_rank * vocabulary, (result.tp_rank + 1) * vocabulary)
        logits[:, result.positions, columns] = result.logits
    real = Batch(case.variant).segments > 0
    error = (logits - expected.logits)[real].abs().max().item()
    if not error <= 1e-5:
        found.append(f"logits: off by {error:.1e}")

    # 1e-5 of each gradient, plus 1e-7 of all for those that almost vanish: the rounding of fp32 sums of this depth
    gradients, disagreements = assembled_gradients(results)
    found += disagreements
    found += [f"{name}: no gradient on one side" for name in set(gradients) ^ set(expected.gradients)]
    overall = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    for name in sorted(set(gradients) & set(expected.gradients)):
        gradient = expected.gradients[name]
        error, allowed = (gradients[name] - gradient).norm(), 1e-5 * gradient.norm() + 1e-7 * overall
        if not (gradient.norm() > 0 and error <= allowed):
            found.append(f"{name}: off by {error:.1e}, allowed {allowed:.1e}")
    return [f"{case}: {deviation}" for deviation in found]
