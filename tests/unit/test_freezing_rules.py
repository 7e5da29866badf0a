"""Which parameters of the language model `modules.language.freeze` stops, and which rules it refuses."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.freezing import freeze
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.presets import load_model_config
from tests.dist.language_ranks import language_groups

PREFIX = "model.language_model."


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A world of one, in this process: the language model takes process groups."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def language(one_rank: None) -> Gemma4LanguageModel:
    text = Gemma4TextConfig.from_hf(load_model_config(ModelConfig(preset="gemma4_tiny")))
    groups = language_groups(0, tp=1, cp=1)
    return Gemma4LanguageModel(text, groups, sequence_parallel=False, dtype=torch.float32, device=torch.device("cpu"))


def trained(module: Any) -> set[str]:
    """Hugging Face names that train, without the module's prefix."""
    return {
        binding.name.removeprefix(PREFIX)
        for binding in module.bindings()
        if isinstance(binding.tensor, torch.nn.Parameter) and binding.tensor.requires_grad
    }


def test_without_a_rule_every_parameter_trains(language: Gemma4LanguageModel) -> None:
    everything = trained(language)
    freeze("language", language, False)
    assert trained(language) == everything
    assert {"embed_tokens.weight", "norm.weight", "layers.0.self_attn.q_proj.weight"} <= everything


def test_true_freezes_everything(language: Gemma4LanguageModel) -> None:
    freeze("language", language, True)
    assert not trained(language)
    assert not any(parameter.requires_grad for parameter in language.parameters())


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["*.embed_tokens.weight"], lambda name: name == "embed_tokens.weight"),
        (["*.layers.1.*"], lambda name: name.startswith("layers.1.")),
        (["*norm*.weight", "*.layers.?.mlp.*"], lambda name: "norm" in name or ".mlp." in name),
        ([f"{PREFIX}*"], lambda name: True),
    ],
)
def test_patterns_freeze_what_they_match_and_nothing_else(
    language: Gemma4LanguageModel, patterns: list[str], frozen: Any
) -> None:
    everything = trained(language)
    freeze("language", language, patterns)
    assert trained(language) == {name for name in everything if not frozen(name)}


def test_patterns_are_matched_with_their_case(language: Gemma4LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"modules.language.freeze: no parameter matches '\*NORM\*'"):
        freeze("language", language, ["*NORM*"])


def test_tower_has_no_meaning_for_the_language_model(language: Gemma4LanguageModel) -> None:
    everything = trained(language)
    with pytest.raises(ConfigError, match="modules.language.freeze is tower, but language has no projector"):
        freeze("language", language, "tower")
    assert trained(language) == everything


def test_one_pattern_that_matches_nothing_refuses_all(language: Gemma4LanguageModel) -> None:
    everything = trained(language)
    with pytest.raises(ConfigError, match=r"no parameter matches '\*.layers.9.\*'; names look like 'model.language"):
        freeze("language", language, ["*.layers.0.*", "*.layers.9.*"])
    assert trained(language) == everything


def test_a_part_of_a_fused_parameter_cannot_be_frozen(language: Gemma4LanguageModel) -> None:
    """Query, key and value are one tensor: a pattern for one of them must not silently freeze the others."""
    projections = [f"{PREFIX}layers.0.self_attn.{kind}_proj.weight" for kind in "kqv"]
    with pytest.raises(ConfigError) as caught:
        freeze("language", language, ["*.layers.0.self_attn.k_proj.*"])
    assert f"matches {projections[:1]} but not {projections[1:]}" in str(caught.value)
    freeze("language", language, ["*.layers.0.self_attn.[qkv]_proj.*"])
    assert not any(f"{PREFIX}{name}" in projections for name in trained(language))
