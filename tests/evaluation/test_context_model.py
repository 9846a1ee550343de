"""Context models against counts by hand and a loop over every code."""

import math

import pytest
import torch

from popgen.errors import ArgumentError
from popgen.evaluation import context_model
from popgen.evaluation.context_model import SMOOTHING, choose_smoothing, context_model_log_density, count_contexts


def random_codes(num_codes: int, *lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(num_codes, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_every_code_against_a_loop(order: int) -> None:
    num_codes, start, smoothing = 3, 1, 0.3
    seen, (scored,) = random_codes(num_codes, 40, 1, 25), random_codes(num_codes, 30)
    followed: dict[tuple, list[int]] = {}
    for sequence in seen:
        padded = [start] * order + sequence.tolist()
        for t in range(len(sequence)):
            followed.setdefault(tuple(padded[t : t + order]), []).append(padded[t + order])
    expected, padded = [], [start] * order + scored.tolist()
    for t in range(len(scored)):
        after = followed.get(tuple(padded[t : t + order]), [])
        found = after.count(padded[t + order])
        expected.append(math.log((found + smoothing) / (len(after) + smoothing * num_codes)))
    counts = count_contexts(seen, order, num_codes, start)
    assert counts.shape == (num_codes**order, num_codes) and counts.sum() == 66
    found = context_model_log_density(scored, counts, smoothing, start)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_probabilities_after_any_context_sum_to_one() -> None:
    counts = count_contexts(random_codes(4, 200), order=2, num_codes=4, start=0)
    total = sum(
        context_model_log_density(torch.tensor([2, 3, code]), counts, 0.1, start=0)[-1].exp() for code in range(4)
    )
    assert total.item() == pytest.approx(1.0)


def test_smoothing_is_chosen_by_what_it_predicts() -> None:
    """Random codes are best left alone with much smoothing, a pattern with little."""
    assert choose_smoothing(random_codes(50, *[30] * 20), order=1, num_codes=50, start=0) == 1.0
    assert choose_smoothing([torch.arange(60) % 3] * 20, order=1, num_codes=3, start=0) == 0.003


def test_smoothing_is_chosen_on_sequences_that_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, scored = [], []
    count, score = context_model.count_contexts, context_model.context_model_log_density
    monkeypatch.setattr(context_model, "count_contexts", lambda codes, *of: counted.extend(codes) or count(codes, *of))
    monkeypatch.setattr(
        context_model, "context_model_log_density", lambda codes, *rest: scored.append(codes) or score(codes, *rest)
    )
    sequences = [torch.full((10,), number) for number in range(30)]
    choose_smoothing(sequences, order=1, num_codes=30, start=0)
    assert {int(sequence[0]) for sequence in counted} == set(range(30)) - {0, 10, 20}
    assert all(set(codes.tolist()) == {0, 10, 20} for codes in scored) and len(scored) == len(SMOOTHING)


@pytest.mark.usefixtures("as_a_user")
def test_arguments() -> None:
    with pytest.raises(ArgumentError, match="order must be at most 2 with 256 codes, got 3"):
        count_contexts([torch.zeros(3, dtype=torch.int64)], order=3)
    with pytest.raises(ArgumentError, match="order must be an integer of at least 0, got -1"):
        count_contexts([torch.zeros(3, dtype=torch.int64)], order=-1)


def test_one_sequence_is_counted_and_scored() -> None:
    """There is no other to hold out."""
    assert choose_smoothing([torch.arange(100) % 2], order=1, num_codes=2, start=0) == min(SMOOTHING)
