"""Training FLOPs of Gemma 4 E4B equal an independent tabulation at three lengths, to the decimals it is given in."""

import pytest

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.flops import linear_parameters, peak_flops, text_flops
from mimo_gemma4.language.config import Gemma4TextConfig

E4B = Gemma4TextConfig.from_hf(
    {
        "vocab_size": 262_144,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 42,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 512,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262_144,
    }
)

# GFLOP per token of a training step: linear, head, sliding attention, full attention, total. Worked out by hand from
# the published sizes: 6 (P + h V) + 12 * sum over layers of heads * head_dim * mean keys seen.
TABLE = {
    4096: (23.84, 4.03, 0.41, 0.70, 28.98),
    16384: (23.84, 4.03, 0.43, 2.82, 31.12),
    65536: (23.84, 4.03, 0.44, 11.27, 39.58),
}


@pytest.mark.parametrize("length", TABLE)
def test_e4b_training_flops_per_token(length: int):
    flops = text_flops(E4B, [length])
    parts = [3 * part / length / 1e9 for part in (flops.linear, flops.head, flops.sliding, flops.full)]
    assert [*parts, flops.training() / length / 1e9] == pytest.approx(TABLE[length], abs=0.0051)


def test_e4b_linear_parameters():
    assert linear_parameters(E4B) / 1e9 == pytest.approx(3.973, abs=0.0005)


def test_of_experts_only_the_active_ones_count():
    """26B-A4B: published as 3.8 billion active parameters of 25.8, the output head included."""
    text = Gemma4TextConfig.from_hf(load_model_config(ModelConfig(preset="gemma4_26b_a4b")))
    head = text.vocab_size * text.hidden_size
    active = linear_parameters(text) + head
    assert active / 1e9 == pytest.approx(3.82, abs=0.005)
    idle = (text.num_experts - text.top_k_experts) * 3 * text.hidden_size * text.moe_intermediate_size
    vision, projector, norms = 0.5695e9, 1152 * text.hidden_size, 7 * text.num_hidden_layers * text.hidden_size
    total = active + idle * text.num_hidden_layers + vision + projector + norms
    assert total / 1e9 == pytest.approx(25.81, abs=0.005)


def test_packed_sequences_do_not_see_one_another():
    packed, apart = text_flops(E4B, [700, 300]), [text_flops(E4B, [700]), text_flops(E4B, [300])]
    assert packed.forward == sum(part.forward for part in apart)
    assert packed.forward < text_flops(E4B, [1000]).forward


def test_attention_pairs_equal_a_counted_mask():
    length, window = 37, 5
    text = Gemma4TextConfig.from_hf(
        {
            "num_hidden_layers": 6,
            "sliding_window": window,
            "head_dim": 4,
            "global_head_dim": 8,
            "num_attention_heads": 3,
        }
    )
    sliding = sum(1 for query in range(length) for key in range(length) if query - window < key <= query)
    full = sum(1 for query in range(length) for key in range(query + 1))
    flops = text_flops(text, [length])
    assert flops.sliding == 5 * 4 * 3 * 4 * sliding
    assert flops.full == 1 * 4 * 3 * 8 * full


def test_frozen_language_model_saves_the_weight_gradients_only():
    flops = text_flops(E4B, [4096])
    assert flops.training() - flops.training(frozen=True) == pytest.approx(flops.linear + flops.head)


def test_peak_is_known_for_gpus_only():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None
