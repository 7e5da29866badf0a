"""The padding row gets its gradient from the head alone, and media placeholders count as padding in both tables."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from mimo_gemma4.language.model import Gemma4LanguageModel
from tests.dist.harness import run_ranks
from tests.dist.language.language_ranks import Case, built_model, language_groups, local_context
from tests.dist.language.language_reference import AUDIO, IMAGE, LENGTH, VIDEO, Batch

PADDING = 3  # of this variant
VARIANT = "per layer embeddings without sharing"


def hidden_states(
    model: Gemma4LanguageModel, groups: ProcessGroupCollection, batch: Batch, input_ids: torch.Tensor
) -> torch.Tensor:
    context = local_context(model, groups, batch, [torch.arange(LENGTH)])
    return model(model.first_inputs(model.embed(input_ids)), input_ids, context).hidden


def row_gradients(rank: int, tp: int) -> dict[str, torch.Tensor]:
    """Norm of the gradient of every row of both tables that this rank holds, from embedding and from the head."""
    groups = language_groups(rank, tp, 1)
    model, bindings = built_model(Case(VARIANT, tp), groups)
    tables = {b.name.split(".")[-2]: b for b in bindings if ".embed_tokens" in b.name}
    batch = Batch(VARIANT)
    hidden = hidden_states(model, groups, batch, batch.input_ids)

    def rows() -> dict[str, torch.Tensor]:
        found = {}
        for name, table in tables.items():
            found[name] = torch.zeros(table.shape[0])
            if table.tensor.grad is not None:
                found[name][table.index[0]] = table.view(table.tensor.grad).norm(dim=1)
        model.zero_grad(set_to_none=True)
        return found

    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    embedding = rows()
    model.loss(hidden.detach().requires_grad_(), batch.labels).backward()
    return embedding | {"head": rows()["embed_tokens"]}


@pytest.mark.parametrize("tp", [1, 2])
def test_padding_row_gets_its_gradient_from_the_head_alone(tp: int) -> None:
    ranks = run_ranks(tp, row_gradients, tp)
    norms = {name: sum(result[name] for result in ranks) for name in ranks[0]}
    for table in ("embed_tokens", "embed_tokens_per_layer"):
        assert norms[table][PADDING] == 0
        assert norms[table][[IMAGE, VIDEO, AUDIO]].sum() == 0  # they were looked up as padding
        assert (norms[table] > 0).any()
    assert norms["head"][PADDING] > 0


def placeholders_as_padding(rank: int) -> bool:
    groups = language_groups(rank, 1, 1)
    model, _ = built_model(Case(VARIANT), groups)
    batch = Batch(VARIANT)
    assert (batch.types > 0).any()
    replaced = batch.input_ids.masked_fill(batch.types > 0, PADDING)
    with torch.no_grad():
        return torch.equal(
            hidden_states(model, groups, batch, batch.input_ids), hidden_states(model, groups, batch, replaced)
        )


def test_placeholders_count_as_padding() -> None:
    assert run_ranks(1, placeholders_as_padding) == [True]
