"""In bf16, everything around the layers is bit for bit as in transformers: all roundings are in its order."""

import pytest
import torch
from transformers import Gemma4ForCausalLM
from transformers import Gemma4TextConfig as HuggingFaceTextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.weights.bindings import load
from tests.dist.harness import run_ranks
from tests.dist.language.language_ranks import StateDict, language_groups

# sqrt(hidden_size) and sqrt(12) are not bf16 numbers, so that an unrounded factor would show
ARCHITECTURE = dict(
    vocab_size=64,
    vocab_size_per_layer_input=64,
    hidden_size=80,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    global_head_dim=16,
    hidden_size_per_layer_input=12,
    pad_token_id=0,
)


def deviations(rank: int, tp: int) -> list[float]:
    torch.manual_seed(0)
    source = Gemma4ForCausalLM(HuggingFaceTextConfig(**ARCHITECTURE)).bfloat16()
    groups = language_groups(rank, tp, cp=1)
    model = Gemma4LanguageModel(
        Gemma4TextConfig.from_hf(source.config.to_dict()),
        groups,
        sequence_parallel=tp > 1,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        prefix="model.",
    )
    load(model.bindings(), StateDict(source.state_dict()), "the test")
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        embeddings = model.embed(ids)
        inputs = torch.stack(model.per_layer_embedding(embeddings, ids), dim=2)
        expected = source.model.embed_tokens(ids)
        identity = source.model.get_per_layer_inputs(ids, None)
        expected_inputs = source.model.project_per_layer_inputs(expected, identity)
    mine = slice(rank * 16 // tp, (rank + 1) * 16 // tp)
    pairs = [(embeddings, expected), (inputs, expected_inputs)]
    return [(ours - theirs[:, mine].transpose(0, 1)).abs().max().item() for ours, theirs in pairs]


@pytest.mark.parametrize("tp", [1, 2])
def test_embeddings_round_like_transformers(tp: int) -> None:
    assert run_ranks(tp, deviations, tp) == [[0.0, 0.0]] * tp


def frequencies_after_a_cast(rank: int) -> dict[str, torch.Tensor]:
    model = Gemma4LanguageModel(
        Gemma4TextConfig.from_hf(HuggingFaceTextConfig(**ARCHITECTURE).to_dict()),
        language_groups(rank, tp=1, cp=1),
        sequence_parallel=False,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return model.to(torch.bfloat16).frequencies


def test_rotary_frequencies_stay_fp32_through_a_cast_of_the_model() -> None:
    """Rounded to bf16, positions beyond some hundred would turn by other angles."""
    expected = Gemma4TextRotaryEmbedding(HuggingFaceTextConfig(**ARCHITECTURE))
    (found,) = run_ranks(1, frequencies_after_a_cast)
    assert set(found) == {"sliding_attention", "full_attention"}
    for attention, frequencies in found.items():
        assert frequencies.dtype == torch.float32
        assert torch.equal(frequencies, getattr(expected, f"{attention}_inv_freq"))
