"""The language model holds just the tensors of transformers' models at published sizes, and trains the right ones."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, Gemma4ForConditionalGeneration
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedForConditionalGeneration

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.model import Gemma4LanguageModel
from tests.dist.harness import run_ranks
from tests.dist.language.language_ranks import language_groups

Shapes = dict[str, tuple[int, ...]]

# Parameters in billions, towers and projectors included; that of 12B follows from its published sizes.
PUBLISHED = {"gemma4_e2b": 5.104, "gemma4_e4b": 7.941, "gemma4_12b": 11.960, "gemma4_31b": 31.273}


def huggingface_shapes(hf_config: dict[str, Any]) -> tuple[float, Shapes]:
    """Billions of parameters of the whole model, and the shapes of its language model's tensors."""
    unified = hf_config["model_type"] == "gemma4_unified"
    with torch.device("meta"):
        model_class = Gemma4UnifiedForConditionalGeneration if unified else Gemma4ForConditionalGeneration
        model = model_class(AutoConfig.for_model(**hf_config))
    count = sum(parameter.numel() for parameter in model.parameters())
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if ".language_model." in name}
    return count / 1e9, tensors


def held(rank: int, hf_config: dict[str, Any]) -> tuple[Shapes, Shapes]:
    """Shapes of trained and of fixed tensors of our language model."""
    text = Gemma4TextConfig.from_hf(hf_config)
    groups = language_groups(rank, tp=1, cp=1)
    meta = torch.device("meta")
    with meta:
        model = Gemma4LanguageModel(text, groups, sequence_parallel=False, dtype=torch.bfloat16, device=meta)
    trained: Shapes = {}
    fixed: Shapes = {}
    for binding in model.bindings():
        (trained if isinstance(binding.tensor, torch.nn.Parameter) else fixed)[binding.name] = binding.shape
    return trained, fixed


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_tensors_of_transformers(preset: str) -> None:
    hf_config = load_model_config(ModelConfig(preset=preset))
    billions, expected = huggingface_shapes(hf_config)
    ((trained, fixed),) = run_ranks(1, held, hf_config)
    assert billions == pytest.approx(PUBLISHED[preset], abs=0.001)
    assert trained | fixed == expected
    # the scalar of every layer is loaded, saved and exported, but never trained
    layers = len(hf_config["text_config"]["layer_types"])
    assert fixed == {f"model.language_model.layers.{layer}.layer_scalar": (1,) for layer in range(layers)}


def test_layers_with_shared_keys_and_values_have_none_of_their_own() -> None:
    hf_config = load_model_config(ModelConfig(preset="gemma4_e2b"))
    ((trained, _),) = run_ranks(1, held, hf_config)
    own = {
        int(name.split(".")[3]) for name in trained if ".k_proj." in name or ".v_proj." in name or ".k_norm." in name
    }
    assert own == set(range(15))
