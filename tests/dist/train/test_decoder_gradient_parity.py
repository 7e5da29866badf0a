"""A decoder's loss and every gradient that it causes are those of one process, on whatever ranks it reads.

The reference is transformers' Gemma 4 with two `nn.Linear` of plain torch after its final norm, sample by sample.
`step_parity` has the tolerance.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma4ForConditionalGeneration

from mimo_gemma4.data.shards import read_range
from mimo_gemma4.weights.bindings import Constant, Normal, bind_replicated, initialise
from tests.dist.harness import run_ranks
from tests.dist.train.step_parity import (
    BATCH,
    PIXELS,
    SEED,
    SHARD,
    STEP,
    Case,
    Prepared,
    check,
    deviation,
    prepare,
    step_with_wrong_row,
    write_run,
)
from tests.vlm_reference import Reference, mean_loss, reference_planner, transformers_media

CASES = [
    Case(pixels=1, sequences=1),
    Case(pixels=2, sequences=3),
    Case(pixels=1, dp=2, sequences=1),
    Case(pixels=2, cp=2, packing=True),
    Case(pixels=2, tp=2, sp=True, packing=True),
    Case(pixels=1, pixels_tp=2, tp=2, sequences=3),
    Case(pixels=2, pp=2, sequences=1),
    Case(pixels=1, pixels_tp=2, pp=2, tp=2, sp=True, sequences=2),
    Case(pixels=2, dp=2, colocated=True),
    Case(pixels=4, dp=2, tp=2, sequences=1, colocated=True),
    Case(pixels=1, pixels_tp=2, pp=2, sequences=2, colocated=True),
    Case(pixels=1, pp=2, sequences=1, ranks=((1,), (0, 1), (0,))),
    Case(pixels=2, pp=2, sequences=1, ranks=((0,), (0, 1), (1, 2))),
    Case(vision=2, pixels=1, pixels_tp=2, tp=2, pp=2, sp=True, sequences=1, ranks=((1, 4), (0, 1, 2, 3), (2, 4))),
    Case(pixels=1, sequences=3, frozen=("language",)),
    Case(pixels=1, sequences=3, frozen=("pixels",)),
    Case(pixels=1, sequences=3, frozen=("vision", "language")),
]
"""Decoders on ranks of their own, on shared ranks and on partly shared ranks, also those of a stage that they do not
read; with fewer and more lanes than the language model; soft tokens held by one rank and by several. Two samples of the
step have no image."""


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("colours"), write_run, decoder_step)


def decoder_step(folder: Path) -> Reference:
    """The step as transformers and plain torch compute it."""
    model = Gemma4ForConditionalGeneration.from_pretrained(
        folder / "model", attn_implementation="eager", dtype=torch.float32
    )
    hf_config = json.loads((folder / "model" / "config.json").read_text())
    planner = reference_planner(hf_config, folder / SHARD, BATCH, SEED)
    dataset, width = planner.dataset, hf_config["text_config"]["hidden_size"]
    decoder = nn.ModuleDict({"fc1": nn.Linear(width, PIXELS["decoder_options.hidden_size"])})
    decoder["fc2"] = nn.Linear(decoder["fc1"].out_features, 3)
    decoder_names = {f"decoders.pixels.{name}": parameter for name, parameter in decoder.named_parameters()}
    for name, parameter in decoder_names.items():
        drawn = Constant(0.0) if parameter.ndim == 1 else Normal(parameter.shape[1] ** -0.5)
        initialise([bind_replicated(name, parameter, drawn)], SEED)
    normed: list[torch.Tensor] = []
    model.model.language_model.norm.register_forward_hook(lambda _module, _inputs, output: normed.append(output))
    squares: list[torch.Tensor] = []

    def logits(index: int, ids: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=ids, **transformers_media(dataset, index, ids)).logits[0]
        hidden = normed.pop()[0]
        for item in dataset.media(index):
            image = dataset.encoder.processors["image"].decode(read_range(item.shard, item.offset, item.size))
            colours = image["pixel_values"].view(item.soft_tokens, -1, 3).mean(dim=1)
            predicted = decoder["fc2"](F.gelu(decoder["fc1"](hidden[item.start : item.start + item.soft_tokens])))
            squares.append(0.5 * (predicted - colours).square().sum())
        return output

    loss, count = mean_loss(planner, STEP, logits)
    decoder_loss = torch.stack(squares).sum()
    (loss + PIXELS["loss_weight"] * decoder_loss / count).backward()
    parameters = dict(model.named_parameters()) | decoder_names
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    return Reference(loss.item(), count, gradients, (decoder_loss.item(),))


@pytest.mark.parametrize("world", sorted({case.world for case in CASES}))
def test_gradients_of_all_modules_are_those_of_one_process(world: int, colours: Prepared) -> None:
    check((case, colours) for case in CASES if case.world == world)


@pytest.mark.parametrize("factor", [0.0, 2.0], ids=["dropped", "counted twice"])
def test_one_wrong_gradient_of_a_hidden_state_is_caught(factor: float, colours: Prepared) -> None:
    case = Case(pixels=1, sequences=3)
    results = run_ranks(  # the decoder's rank returns gradients
        case.world, step_with_wrong_row, colours.folder, case.overrides, "post_to_language", factor
    )
    found = deviation(case, results, colours.reference)
    assert found is not None and "times its tolerance" in found
