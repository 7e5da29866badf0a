"""The comparison with transformers distinguishes rounding, near ties and faults."""

import pytest
import torch

from mimo_gemma4.errors import NumericsError
from mimo_gemma4.verify.parity import Deviation, GreedyAgreement, Outputs, deviation


def outputs(logits: list[list[float]], hidden: float = 1.0) -> Outputs:
    return Outputs([torch.full((len(logits), 2), hidden)], torch.tensor(logits))


TRUTH = outputs([[5.0, 1.0, 0.0], [5.0, 4.9, 0.0], [5.0, 4.0, 0.0]])


def test_errors_are_relative_to_the_truth_over_all_sequences() -> None:
    found = Deviation.join([deviation(outputs([[0.0, 1.0]], hidden=1.5), outputs([[0.0, 2.0]], hidden=1.0))] * 3)
    assert found.layers == pytest.approx([0.5])
    assert found.logits == pytest.approx(0.5)


def test_a_disagreement_is_a_near_tie_within_twice_the_noise_and_a_fault_beyond_it() -> None:
    peer = deviation(outputs([[5.1, 1.0, 0.0], [5.1, 4.9, 0.0], [5.1, 4.0, 0.0]]), TRUTH)  # noise 0.1
    ours = deviation(outputs([[5.0, 1.0, 0.0], [4.9, 4.95, 0.0], [4.0, 4.1, 0.0]]), TRUTH)
    judged = GreedyAgreement.of(ours, peer)
    assert judged.decided.tolist() == [True, False, True]
    assert judged.near_ties.tolist() == [1]
    assert judged.faults.tolist() == [2]


def test_a_choice_below_the_second_best_is_judged_by_what_it_gives_away() -> None:
    peer = deviation(outputs([[5.0, 5.1, 0.0]]), outputs([[5.0, 4.95, 0.0]]))
    ours = deviation(outputs([[5.0, 4.95, 6.0]]), outputs([[5.0, 4.95, 0.0]]))
    judged = GreedyAgreement.of(ours, peer)
    assert judged.faults.tolist() == [0] and not judged.decided.any()


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericsError, match="1 of 3 positions"):
        deviation(outputs([[float("nan"), 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]), TRUTH)
