"""The mixture-of-experts model has the logits, loss and gradients of transformers' however its experts are cut.

Lanes hold documents of different lengths, or none at all: they still serve their experts. Reference: each document by
itself in one process. fp32; gradients "to 1e-5": 1e-5 of each, plus 1e-7 of all for those that almost vanish.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from mimo_gemma4.distributed.layout import Layout, ModuleGrid
from mimo_gemma4.distributed.platform import create_platform
from mimo_gemma4.distributed.process_groups import create_process_groups
from mimo_gemma4.language.attention_context import attention_context
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.partition import cp_token_index, sequence_multiple
from mimo_gemma4.weights.bindings import load
from tests.dist.harness import in_turn, run_ranks
from tests.dist.language.language_ranks import StateDict, gradient_is_part
from tests.random_weights import vary_norms

VOCABULARY = 96
TEXT = dict(
    model_type="gemma4_text",
    vocab_size=VOCABULARY,
    hidden_size=36,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_global_key_value_heads=1,
    head_dim=6,
    global_head_dim=8,
    sliding_window=5,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] + ["full_attention"],
    hidden_size_per_layer_input=0,
    attention_k_eq_v=True,
    use_bidirectional_attention="vision",
    enable_moe_block=True,
    num_experts=8,
    top_k_experts=3,
    final_logit_softcapping=3.0,
    initializer_range=0.1,
)
# The second has experts of a width that the grouped kernel does not take.
VARIANTS = {"26b": {"moe_intermediate_size": 12}, "odd experts": {"moe_intermediate_size": 5, "num_experts": 12}}

# Text tokens and, as i, those of an image, which see one another: shorter and longer than the window.
DOCUMENTS = ["tttiiittt", "tiiiiiiiitttt", "tttttttttttttttttttiiitiiit"]


@dataclass(frozen=True)
class Case:
    """How the model is cut; lane d holds the documents d, d + dp, …, so some have none where dp is 4."""

    ep: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    checkpointing: str = "none"
    variant: str = "26b"

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.cp * self.tp


QUICK = [
    Case(),
    Case(tp=2),
    Case(ep=2, dp=2, variant="odd experts"),
    Case(ep=2, cp=2, checkpointing="full"),
    Case(ep=4, dp=4, checkpointing="full"),
    Case(ep=2, dp=4, tp=2, checkpointing="selective"),
    Case(ep=4, dp=2, cp=2, tp=2, sequence_parallel=True, checkpointing="full"),
    Case(ep=4, dp=4, tp=2, checkpointing="full", variant="odd experts"),
]
COMPLETE = [
    Case(ep, dp, cp, tp, sequence_parallel, checkpointing, variant)
    for ep in (1, 2, 4)
    for dp, cp in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2))
    for tp, sequence_parallel in ((1, False), (2, False), (2, True))
    for checkpointing in ("none", "full")
    for variant in VARIANTS
    if dp * cp % ep == 0
]


def document(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, labels, token types (1 in images) and image numbers of a document, [S] each."""
    kinds = DOCUMENTS[number]
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(9, VOCABULARY, (len(kinds),), generator=generator)
    labels = torch.randint(0, VOCABULARY, (len(kinds),), generator=generator)
    labels[torch.rand(len(kinds), generator=generator) < 0.3] = -100
    types = torch.tensor([int(kind == "i") for kind in kinds])
    begins = types.diff(prepend=types.new_zeros(1)).clamp(min=0)
    return ids, labels, types, begins.cumsum(0) * types


def huggingface_model(variant: str) -> Gemma4ForConditionalGeneration:
    """A random model in which nothing is trivial and attention is well conditioned."""
    torch.manual_seed(0)
    config = Gemma4Config(
        text_config=TEXT | VARIANTS[variant],
        vision_config=None,
        audio_config=None,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = Gemma4ForConditionalGeneration(config)
    vary_norms(model)
    return model


def reference(rank: int, variant: str) -> dict[str, Any]:
    model = huggingface_model(variant)
    logits, loss = [], torch.zeros(())
    for number in range(len(DOCUMENTS)):
        ids, labels, types, _ = document(number)
        output = model(input_ids=ids[None], mm_token_type_ids=types[None], use_cache=False).logits[0]
        loss = loss + torch.nn.functional.cross_entropy(output, labels, ignore_index=-100, reduction="sum")
        logits.append(output.detach())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits, "loss": loss.item(), "gradients": gradients}


def lane_batch(numbers: list[int], multiple: int) -> dict[str, torch.Tensor]:
    """The documents of a lane, padded on the right to one length: each tensor [B, S]."""
    longest = max(len(DOCUMENTS[number]) for number in numbers)
    length = -(-longest // multiple) * multiple
    names = ("ids", "labels", "positions", "segments", "groups")
    batch = {name: torch.zeros(len(numbers), length, dtype=torch.long) for name in names}
    batch["labels"].fill_(-100)
    for sequence, number in enumerate(numbers):
        ids, labels, _, groups = document(number)
        real = slice(0, len(ids))
        batch["ids"][sequence, real], batch["labels"][sequence, real] = ids, labels
        batch["groups"][sequence, real] = groups
        batch["positions"][sequence, real], batch["segments"][sequence, real] = torch.arange(len(ids)), 1
    return batch


def partial_results(rank: int, case: Case) -> dict[str, Any]:
    """What one rank computes: its part of the logits, loss and gradients."""
    grid = ModuleGrid(
        "language", tuple(range(case.world)), case.tp, case.cp, case.dp, 1, case.ep, case.sequence_parallel
    )
    groups = create_process_groups(Layout({"language": grid}, case.world, "disjoint"), create_platform())
    source, at = huggingface_model(case.variant), grid.coordinate(rank)
    model = Gemma4LanguageModel(
        Gemma4TextConfig.from_hf(source.config.to_dict()),
        groups.modules["language"],
        sequence_parallel=case.sequence_parallel,
        dtype=torch.float32,
        device=torch.device("cpu"),
        activation_checkpointing=case.checkpointing,
    )
    weights = {name: tensor for name, tensor in source.state_dict().items() if name != "lm_head.weight"}
    bindings = model.bindings()
    assert {binding.name for binding in bindings} == set(weights)
    load(bindings, StateDict(weights), "the test")

    numbers = list(range(len(DOCUMENTS)))[at.dp :: case.dp]
    result: dict[str, Any] = {"numbers": numbers, "loss": 0.0}
    if numbers:
        multiple = sequence_multiple(case.cp, case.tp if case.sequence_parallel else 1)
        result |= forward_and_backward(model, lane_batch(numbers, multiple), groups.modules["language"].cp)
    elif (served := model.serve_experts()) is not None:
        served.backward()
    result["vocabulary"] = at.tp
    result["loss"] *= at.tp == 0
    result["gradients"] = [
        (binding.name, binding.shape, binding.index, binding.view(gradient_of(binding.tensor)))
        for binding in bindings
        if binding.tensor.requires_grad and (at.tp == 0 or gradient_is_part(binding))
    ]
    groups.destroy()
    return result


def forward_and_backward(
    model: Gemma4LanguageModel, batch: dict[str, torch.Tensor], cp_group: dist.ProcessGroup
) -> dict[str, Any]:
    length = batch["ids"].shape[1]
    held = [cp_token_index(length, cp_group.size(), peer) for peer in range(cp_group.size())]
    mine = held[cp_group.rank()]
    metadata = (batch["positions"], batch["segments"], batch["groups"])
    context = attention_context(model.text, *metadata, held=held, cp_group=cp_group, put=torch.clone)
    ids = batch["ids"][:, mine]
    hidden = model(model.first_inputs(model.embed(ids)), ids, context).hidden
    loss = model.loss(hidden, batch["labels"][:, mine])
    loss.backward()
    with torch.no_grad():
        return {"loss": loss.item(), "logits": model.logits(hidden), "positions": mine}


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    """An idle lane has gradients of its experts only, and not even those where no token came."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def check(cases: list[Case], world: int, references: dict[str, dict[str, Any]], timeout: float) -> None:
    """Hold the cases of one number of ranks, started once, against transformers."""
    cases = [case for case in cases if case.world == world]
    ranks = run_ranks(world, in_turn, partial_results, [(case,) for case in cases], timeout=timeout)
    for case, *results in zip(cases, *ranks, strict=True):
        compare(case, results, references[case.variant])


def compare(case: Case, results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    assert sum(result["loss"] for result in results) == pytest.approx(expected["loss"], rel=1e-5), case
    logits = [torch.full_like(whole, float("nan")) for whole in expected["logits"]]
    width = VOCABULARY // case.tp
    for result in results:
        columns = slice(result["vocabulary"] * width, (result["vocabulary"] + 1) * width)
        for sequence, number in enumerate(result["numbers"]):
            real = result["positions"] < len(logits[number])
            logits[number][result["positions"][real], columns] = result["logits"][sequence, real]
    # a few units in the last place of sums of some hundred terms
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5, msg=lambda text: f"{case}: {text}")

    gradients = {name: torch.zeros_like(gradient) for name, gradient in expected["gradients"].items()}
    for name, shape, index, part in (entry for result in results for entry in result["gradients"]):
        assert tuple(gradients[name].shape) == shape
        gradients[name][index] += part
    overall = torch.stack([gradient.norm() for gradient in expected["gradients"].values()]).norm()
    for name, gradient in expected["gradients"].items():
        deviation, allowed = (gradients[name] - gradient).norm(), 1e-5 * gradient.norm() + 1e-7 * overall
        off = f"{case}: {name} is off by {deviation:.2e}, allowed {allowed:.2e}"
        assert gradient.norm() > 0 and deviation <= allowed, off


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    return {variant: run_ranks(1, reference, variant)[0] for variant in VARIANTS}


@pytest.mark.parametrize("world", sorted({case.world for case in QUICK}))
def test_matches_transformers(world: int, references: dict[str, dict[str, Any]]) -> None:
    check(QUICK, world, references, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", sorted({case.world for case in COMPLETE}))
def test_complete_table(world: int, references: dict[str, dict[str, Any]]) -> None:
    check(COMPLETE, world, references, timeout=3500)
