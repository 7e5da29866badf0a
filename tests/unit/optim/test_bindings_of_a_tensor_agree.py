"""Every binding names known groups for the sum of its gradient, and all bindings of a tensor name the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mimo_gemma4.optim.module_optimizer import binding_by_tensor
from mimo_gemma4.weights.bindings import Binding, bind_replicated, bind_sharded, part_of


def fused(**second: Any) -> list[Binding]:
    """Two weights in one tensor and one in another; `second` changes the second binding."""
    weight = torch.zeros(6, 4)
    first = bind_sharded("q_proj.weight", weight, 0, None, at=slice(0, 4), gradient_sum=("tp", "pp"))
    other = bind_sharded("k_proj.weight", weight, 0, None, at=slice(4, 6), gradient_sum=("pp", "tp"))
    return [first, replace(other, **second), bind_replicated("norm.weight", torch.zeros(4))]


def test_one_binding_stands_for_each_tensor():
    bindings = fused()
    assert list(binding_by_tensor(bindings).values()) == [bindings[0], bindings[2]]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"gradient_sum": ("tp",)},
            r"q_proj.weight: gradient_sum=\('tp', 'pp'\).*; k_proj.weight: gradient_sum=\('tp',\)",
        ),
        ({"replicas": "expt_dp"}, r"q_proj.weight: .*replicas='dp_cp'; k_proj.weight: .*replicas='expt_dp'"),
    ],
)
def test_bindings_of_one_tensor_that_disagree_are_refused(second: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        binding_by_tensor(fused(**second))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"gradient_sum": ("tpp",)},
            r"norm.weight: gradient_sum=\('tpp',\), replicas='dp_cp'; known are \('tp', 'embd'",
        ),
        ({"gradient_sum": "tp"}, "norm.weight: gradient_sum='tp'"),
        ({"replicas": "dp"}, r"norm.weight: gradient_sum=\(\), replicas='dp'; known are .*\('dp_cp', 'expt_dp'\)"),
        ({"gradient_sum": ("embd", "pp")}, "`pp` includes the ranks of `embd`"),
    ],
)
def test_an_unknown_group_is_refused(groups: dict[str, Any], message: str):
    binding = bind_replicated("norm.weight", torch.zeros(4))
    with pytest.raises(ValueError, match=message):
        replace(binding, **groups)


def test_a_part_of_a_tensor_keeps_its_groups():
    tables = bind_sharded("table", torch.zeros(6, 4), 0, None, gradient_sum=("embd",))
    experts = bind_sharded("experts", torch.zeros(6, 4), 0, None, replicas="expt_dp")
    assert part_of(tables, 1, 0, 8).gradient_sum == ("embd",) and part_of(experts, 1, 0, 8).replicas == "expt_dp"
