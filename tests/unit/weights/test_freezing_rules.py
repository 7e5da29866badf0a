"""Which parameters of the language model `modules.language.freeze` stops, and which rules it refuses."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.weights.freezing import FreezeRule, freeze
from tests.dist.harness import run_ranks
from tests.dist.language.language_ranks import language_groups

PREFIX = "model.language_model."
QUERY_KEY_VALUE = [f"layers.0.self_attn.{kind}_proj.weight" for kind in "qkv"]


@dataclass(frozen=True)
class Result:
    """What a rule did: names that trained before and after it, without the module's prefix, and its error."""

    before: set[str]
    after: set[str]
    error: str | None


def apply(rule: FreezeRule) -> Result:
    return run_ranks(1, apply_on_rank, rule)[0]


def apply_on_rank(rank: int, rule: FreezeRule) -> Result:
    text = Gemma4TextConfig.from_hf(load_model_config(ModelConfig(preset="gemma4_tiny")))
    language = Gemma4LanguageModel(
        text,
        language_groups(rank, tp=1, cp=1),
        sequence_parallel=False,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    before, error = trained(language), None
    try:
        freeze("language", language, rule)
    except ConfigError as raised:
        error = str(raised)
    return Result(before, trained(language), error)


def trained(language: Gemma4LanguageModel) -> set[str]:
    return {
        binding.name.removeprefix(PREFIX)
        for binding in language.bindings()
        if isinstance(binding.tensor, torch.nn.Parameter) and binding.tensor.requires_grad
    }


@pytest.mark.parametrize(
    ("rule", "frozen"),
    [
        (False, lambda name: False),
        (True, lambda name: True),
        ([f"{PREFIX}*"], lambda name: True),
        (["*.embed_tokens.weight"], lambda name: name == "embed_tokens.weight"),
        (["*.layers.1.*"], lambda name: name.startswith("layers.1.")),
        (["*norm*.weight", "*.layers.?.mlp.*"], lambda name: "norm" in name or ".mlp." in name),
        (["*.0.self_attn.[qkv]_proj.*"], lambda name: name in QUERY_KEY_VALUE),
        (["*.layers.[0-3].*"], lambda name: name.startswith(tuple(f"layers.{number}." for number in range(4)))),
        (["*", "!*.layers.5.*"], lambda name: not name.startswith("layers.5.")),
        (["*", "!*.layers.5.*", "*.mlp.*"], lambda name: not name.startswith("layers.5.") or ".mlp." in name),
    ],
    ids=str,
)
def test_a_rule_freezes_what_it_names_and_nothing_else(rule: FreezeRule, frozen: Callable[[str], bool]) -> None:
    result = apply(rule)
    assert result.error is None
    assert {"embed_tokens.weight", "norm.weight", "layers.0.self_attn.q_proj.weight"} <= result.before
    assert result.after == {name for name in result.before if not frozen(name)}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("tower", "modules.language.freeze is tower, but language has no projector"),
        (["*.layers.0.*", "*.layers.9.*"], f"no parameter matches '*.layers.9.*'; names look like '{PREFIX}"),
        (["*", "!*.layers.9.*"], "no parameter matches '!*.layers.9.*'"),
        (["*NORM*"], "modules.language.freeze: no parameter matches '*NORM*'"),
        # Query, key and value are one tensor: a pattern for one of them must not silently freeze the others.
        (
            ["*.layers.0.self_attn.k_proj.*"],
            f"matches ['{PREFIX}layers.0.self_attn.k_proj.weight'] but not ['{PREFIX}layers.0.self_attn.q_proj",
        ),
    ],
    ids=["tower", "one of two matches nothing", "exception", "case", "part of a fused parameter"],
)
def test_a_rule_that_cannot_be_followed_is_refused_and_changes_nothing(rule: FreezeRule, message: str) -> None:
    result = apply(rule)
    assert message in (result.error or "")
    assert result.after == result.before
