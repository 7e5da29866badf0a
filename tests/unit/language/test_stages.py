"""The language model is cut into stages of about equal cost, and layers stay with the keys and values they share."""

from functools import cache
from itertools import combinations

import pytest

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.errors import LayoutError
from mimo_gemma4.flops import head_flops, layer_flops
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.stages import cut_stages

LENGTH = 4096


@cache
def text_of(preset: str) -> Gemma4TextConfig:
    return Gemma4TextConfig.from_hf(load_model_config(ModelConfig(preset=preset)))


def costliest(text: Gemma4TextConfig, bounds: list[list[int]]) -> list[float]:
    """For each of these cuts, the cost of the costliest stage."""
    costs = [layer_flops(text, layer, LENGTH) for layer in text.layers]
    costs[-1] += head_flops(text, LENGTH)
    return [max(sum(costs[a:b]) for a, b in zip(cut, cut[1:], strict=False)) for cut in bounds]


@pytest.mark.parametrize("preset", ["gemma4_e2b", "gemma4_e4b", "gemma4_31b", "gemma4_26b_a4b"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
def test_stages_hold_every_layer_once_and_shared_keys_and_values_are_not_parted(preset: str, stages: int) -> None:
    text = text_of(preset)
    cut = cut_stages(text, stages, sequence_length=LENGTH)
    assert [number for stage in cut for number in stage.layers] == list(range(text.num_hidden_layers))
    assert len(cut) == stages and all(len(stage.layers) for stage in cut)
    assert [stage.first for stage in cut] == [True] + [False] * (stages - 1)
    assert [stage.last for stage in cut] == [False] * (stages - 1) + [True]
    layers = text.layers
    for stage in cut:
        assert stage.received == stage.sent == ()
        assert all(layers[number].key_value_source in stage.layers for number in stage.layers)


@pytest.mark.parametrize("preset", ["gemma4_e4b", "gemma4_31b", "gemma4_tiny"])
@pytest.mark.parametrize("stages", [2, 3])
def test_the_costliest_stage_is_as_cheap_as_any_cut_makes_it(preset: str, stages: int) -> None:
    text = text_of(preset)
    count = text.num_hidden_layers
    cut = cut_stages(text, stages, sequence_length=LENGTH, part_shared_key_values=True)
    every = [[0, *inner, count] for inner in combinations(range(1, count), stages - 1)]
    assert costliest(text, [[0, *(stage.layers.stop for stage in cut)]]) == pytest.approx([min(costliest(text, every))])


def test_the_head_counts_as_layers() -> None:
    text = text_of("gemma4_31b")
    sizes = [len(stage.layers) for stage in cut_stages(text, 4, sequence_length=LENGTH)]
    assert sizes[-1] < min(sizes[:-1])


def test_a_forced_tail_leaves_the_rest_even() -> None:
    text = text_of("gemma4_e2b")
    cut = cut_stages(text, 4, sequence_length=LENGTH)
    assert cut[-1].layers.start == 13  # the sources of the 20 shared layers are 13 and 14
    assert sorted(len(stage.layers) for stage in cut[:-1]) == [4, 4, 5]


def test_parted_keys_and_values_travel_from_their_source_to_their_last_reader() -> None:
    text = text_of("gemma4_e4b")
    cut = cut_stages(text, 4, sequence_length=LENGTH, part_shared_key_values=True)
    for before, after in zip(cut, cut[1:], strict=False):
        assert before.sent == after.received
    readers = {layer.key_value_source: layer.index for layer in text.layers if not layer.owns_key_values}
    assert set(readers) == {22, 23}
    for source, reader in readers.items():
        for stage in cut:
            assert (source in stage.sent) == (source < stage.layers.stop <= reader)
    assert any(stage.sent and stage.received for stage in cut)


@pytest.mark.parametrize(
    ("preset", "stages", "part", "words"),
    [
        (
            "gemma4_tiny",
            3,
            False,
            ["`layout.language.pp` is 3", "6 layers", "2 at most", "last 3", "part_shared_key_values"],
        ),
        ("gemma4_tiny", 7, True, ["`layout.language.pp` is 7", "6 at most", "lower it"]),
        ("gemma4_31b", 61, False, ["`layout.language.pp` is 61", "60 at most", "lower it"]),
    ],
)
def test_too_many_stages_are_refused(preset: str, stages: int, part: bool, words: list[str]) -> None:
    with pytest.raises(LayoutError) as caught:
        cut_stages(text_of(preset), stages, sequence_length=LENGTH, part_shared_key_values=part)
    for word in words:
        assert word in str(caught.value)
