"""The language model has the logits, loss and every gradient of transformers' Gemma 4, however it is cut over ranks."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM
from transformers import Gemma4TextConfig as HuggingFaceTextConfig

from mimo_gemma4.language.attention_context import AttentionContext
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.weights import load
from tests.dist.harness import run_ranks
from tests.dist.language_ranks import StateDict, language_groups

# Every structural feature of E2B and E4B, with a window shorter than a document.
BASE = dict(
    vocab_size=96,
    vocab_size_per_layer_input=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    global_head_dim=16,
    sliding_window=5,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=3,
    use_double_wide_mlp=True,
    final_logit_softcapping=3.0,
    initializer_range=0.05,
)
VARIANTS = {
    "e4b": {},
    "e2b": dict(num_key_value_heads=1),
    "31b": dict(
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        use_double_wide_mlp=False,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        final_logit_softcapping=None,
    ),
}
PLACEHOLDER = 6
SEGMENTS = [[12, 9], [27]]  # lengths of the packed documents of each row of LENGTH tokens; the rest is padding
LENGTH = 32


@dataclass
class Layout:
    tp: int
    cp: int
    sequence_parallel: bool = False
    zigzag: bool = False
    checkpointing: str = "none"

    def order(self) -> torch.Tensor:
        """Global positions of all CP ranks' tokens, in the order in which their keys are concatenated."""
        if not self.zigzag:
            return torch.arange(LENGTH)
        chunks = torch.arange(LENGTH).chunk(2 * self.cp)
        return torch.cat([torch.cat((chunks[rank], chunks[2 * self.cp - 1 - rank])) for rank in range(self.cp)])


class Batch:
    """Random packed rows with padding, ignored labels, media rows over placeholders, and a genuine token 0."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = (len(SEGMENTS), LENGTH)
        self.ids = torch.randint(7, BASE["vocab_size"], shape, generator=generator)
        self.ids[:, 3:6] = PLACEHOLDER
        self.ids[0, 8] = 0
        self.labels = torch.randint(0, BASE["vocab_size"], shape, generator=generator)
        self.labels[torch.rand(shape, generator=generator) < 0.3] = -100
        self.positions = torch.zeros(shape, dtype=torch.long)
        self.segments = torch.zeros(shape, dtype=torch.long)
        for row, lengths in enumerate(SEGMENTS):
            ends = torch.tensor(lengths).cumsum(0).tolist()
            for number, (length, end) in enumerate(zip(lengths, ends, strict=True), start=1):
                self.positions[row, end - length : end] = torch.arange(length)
                self.segments[row, end - length : end] = number
            self.ids[row, ends[-1] :], self.labels[row, ends[-1] :] = 0, -100
        self.media = self.ids == PLACEHOLDER
        self.rows = torch.randn(*shape, BASE["hidden_size"], generator=generator)


def huggingface_model(variant: str) -> Gemma4ForCausalLM:
    """A random model whose norms and layer scalars are not trivial, and whose attention is well conditioned."""
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(HuggingFaceTextConfig(**BASE | VARIANTS[variant], attn_implementation="eager"))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or name.endswith("layer_scalar"):
                tensor.uniform_(0.7, 1.3)
            if "q_norm" in name or "k_norm" in name:
                tensor.mul_(tensor.shape[0] ** -0.25)
    return model


def reference(rank: int, variant: str) -> dict[str, Any]:
    """Every document by itself through transformers: its own masks, no padding, no packing."""
    model, batch = huggingface_model(variant), Batch()
    rows = batch.rows.clone().requires_grad_()
    logits = torch.zeros(*batch.ids.shape, BASE["vocab_size"])
    loss = torch.zeros(())
    for row, lengths in enumerate(SEGMENTS):
        for number in range(1, len(lengths) + 1):
            here = batch.segments[row] == number
            ids = batch.ids[row, here].masked_fill(batch.media[row, here], 0)[None]
            embeddings = model.model.embed_tokens(ids)
            embeddings = torch.where(batch.media[row, here][None, :, None], rows[row, here][None], embeddings)
            identity = None
            if model.config.hidden_size_per_layer_input:
                identity = model.model.get_per_layer_inputs(ids, None)
            output = model(inputs_embeds=embeddings, per_layer_inputs=identity, use_cache=False).logits[0]
            logits[row, here] = output.detach()
            labels = batch.labels[row, here]
            loss = loss + torch.nn.functional.cross_entropy(output, labels, ignore_index=-100, reduction="sum")
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits, "loss": loss.item(), "gradients": gradients | {"rows": rows.grad}}


def local_context(batch: Batch, layout: Layout, mine: torch.Tensor) -> AttentionContext:
    order = layout.order()
    return AttentionContext(
        batch.positions[:, mine], batch.segments[:, mine], batch.positions[:, order], batch.segments[:, order]
    )


def partial_results(rank: int, variant: str, layout: Layout) -> dict[str, Any]:
    """What one rank computes: its slices of logits and gradients, and how they combine over ranks."""
    groups = language_groups(rank, layout.tp, layout.cp)
    tp_rank, cp_rank = rank % layout.tp, rank // layout.tp
    source = huggingface_model(variant)
    text = source.config.to_dict() | {"image_token_id": PLACEHOLDER}
    model = Gemma4LanguageModel(
        Gemma4TextConfig.from_hf(text),
        groups,
        sequence_parallel=layout.sequence_parallel,
        dtype=torch.float32,
        device=torch.device("cpu"),
        activation_checkpointing=layout.checkpointing,
        prefix="model.",
    )
    weights = {name: tensor for name, tensor in source.state_dict().items() if name != "lm_head.weight"}
    bindings = model.bindings()
    assert {binding.name for binding in bindings} == set(weights)
    load(bindings, StateDict(weights), "the test")

    batch = Batch()
    mine = layout.order().chunk(layout.cp)[cp_rank]
    rows_mine = mine.chunk(layout.tp)[tp_rank] if layout.sequence_parallel else mine
    rows = batch.rows.clone().requires_grad_()
    embeddings = model.embed(batch.ids[:, mine])
    media = batch.media[:, rows_mine].t().unsqueeze(-1)
    embeddings = torch.where(media, rows[:, rows_mine].transpose(0, 1), embeddings)
    hidden = model(embeddings, batch.ids[:, mine], local_context(batch, layout, mine))
    loss = model.loss(hidden, batch.labels[:, mine])
    loss.backward()
    with torch.no_grad():
        logits = model.logits(hidden)
    slices = []
    for binding in bindings:
        if binding.tensor.requires_grad:
            summed = getattr(binding.tensor, "tensor_model_parallel", False) or getattr(
                binding.tensor, "tp_gradient_partial", False
            )
            slices.append((binding.name, binding.shape, binding.index, binding.view(binding.tensor.grad), summed))
    everything = tuple(slice(0, size) for size in rows.shape)
    slices.append(("rows", tuple(rows.shape), everything, rows.grad, layout.sequence_parallel))
    return {
        "loss": loss.item(),
        "logits": logits,
        "positions": mine,
        "coordinate": (tp_rank, cp_rank),
        "slices": slices,
    }


def assembled(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Parts summed over ranks; what tensor parallel ranks hold complete must agree and counts once."""
    gradients: dict[str, torch.Tensor] = {}
    complete: dict[tuple[str, int], torch.Tensor] = {}
    for result in results:
        tp_rank, cp_rank = result["coordinate"]
        for name, shape, index, part, summed in result["slices"]:
            whole = gradients.setdefault(name, torch.zeros(shape))
            if summed or tp_rank == 0:
                whole[index] += part
            if not summed:
                other = complete.setdefault((name, cp_rank), part)
                assert (part - other).norm() <= 1e-5 * other.norm(), f"{name} differs between tensor parallel ranks"
    return gradients


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    return {variant: run_ranks(1, reference, variant)[0] for variant in VARIANTS}


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("e4b", Layout(tp=1, cp=1)),
        ("e4b", Layout(tp=2, cp=1)),
        ("e4b", Layout(tp=2, cp=1, sequence_parallel=True)),
        ("e4b", Layout(tp=1, cp=2)),
        ("e4b", Layout(tp=1, cp=2, zigzag=True)),
        ("e4b", Layout(tp=2, cp=2, sequence_parallel=True, zigzag=True, checkpointing="full")),
        ("e2b", Layout(tp=4, cp=1, sequence_parallel=True)),
        ("e2b", Layout(tp=2, cp=1, checkpointing="selective")),
        ("31b", Layout(tp=1, cp=1)),
        ("31b", Layout(tp=2, cp=2, sequence_parallel=True, zigzag=True)),
    ],
    ids=str,
)
def test_matches_transformers(variant: str, layout: Layout, references: dict[str, dict[str, Any]]) -> None:
    expected = references[variant]
    results = run_ranks(layout.tp * layout.cp, partial_results, variant, layout)

    # fp32: loss and logits agree to a few units in the last place of sums of some hundred terms
    losses = {result["coordinate"]: result["loss"] for result in results}
    assert all(loss == pytest.approx(losses[0, cp]) for (_, cp), loss in losses.items())
    assert sum(losses[0, cp] for cp in range(layout.cp)) == pytest.approx(expected["loss"], rel=1e-5)
    real = Batch().segments > 0
    logits = torch.zeros_like(expected["logits"])
    vocabulary = BASE["vocab_size"] // layout.tp
    for result in results:
        columns = slice(result["coordinate"][0] * vocabulary, (result["coordinate"][0] + 1) * vocabulary)
        logits[:, result["positions"], columns] = result["logits"]
    torch.testing.assert_close(logits[real], expected["logits"][real], rtol=1e-5, atol=1e-5)

    # 1e-5 of each gradient, plus 1e-7 of all for those that almost vanish: the rounding of fp32 sums of this depth
    gradients = assembled(results)
    assert set(gradients) == set(expected["gradients"])
    overall = torch.stack([gradient.norm() for gradient in expected["gradients"].values()]).norm()
    for name, gradient in expected["gradients"].items():
        deviation, allowed = (gradients[name] - gradient).norm(), 1e-5 * gradient.norm() + 1e-7 * overall
        assert gradient.norm() > 0 and deviation <= allowed, f"{name}: off by {deviation:.2e}, allowed {allowed:.2e}"
