"""Which negatives are drawn, against loops over those that are allowed."""

import pytest
import torch

from popgen.errors import ArgumentError
from popgen.nn.negatives import independent_negatives, negative_indices


def draw(kind: str, num_frames: list[int], steps: int = 3, draws: int = 4_000, labels: list[int] | None = None):
    """Returns negatives for uniform noise on a grid, the same for all sequences."""
    uniform = ((torch.arange(draws) + 0.5) / draws).expand(len(num_frames), draws)
    given = None if labels is None else torch.tensor(labels)
    return negative_indices(kind, uniform, torch.tensor(num_frames), 10, steps, given)


def allowed(kind: str, num_frames: list[int], sequence: int, step: int, labels: list[int] | None) -> list[int]:
    """Returns the indices of the frames that may be drawn, by loops."""
    found = []
    for other, count in enumerate(num_frames):
        of_kind = {
            "batch": True,
            "sequence": other == sequence,
            "speaker": labels is not None and other != sequence and labels[other] == labels[sequence],
        }[kind]
        found += [10 * other + frame for frame in range(step, count) if of_kind]
    return found


@pytest.mark.parametrize("kind", ["batch", "sequence", "speaker"])
@pytest.mark.parametrize("num_frames", [[5, 10, 3, 0, 7], [2, 1, 9, 4, 4], [4, 4, 4, 4, 4]])
def test_negatives_are_uniform_over_what_is_allowed(kind: str, num_frames: list[int]) -> None:
    """Each allowed frame has its equal part of a grid of noise, to one draw; padding and early frames have none."""
    labels = [0, 1, 0, 1, 0]
    found = draw(kind, num_frames, labels=labels)
    for sequence in range(5):
        for step in (1, 2, 3):
            expected = allowed(kind, num_frames, sequence, step, labels)
            assert found.exist[sequence, step - 1].tolist() == [bool(expected)] * 4_000
            if expected:
                counts = torch.bincount(found.indices[sequence, step - 1], minlength=50)
                assert counts.nonzero()[:, 0].tolist() == expected
                assert (counts[expected] - 4_000 / len(expected)).abs().max() <= 1.0


@pytest.mark.parametrize("kind", ["batch", "sequence", "speaker"])
def test_indices_are_of_frames_whatever_the_noise(kind: str) -> None:
    """Noise rounded to 1, sequences without frames, and a batch of one keep within bounds."""
    for num_frames in ([3, 5], [0, 0], [1, 10], [10, 0]):
        uniform = torch.tensor([0.0, 1.0 - 2.0**-24, 1.0]).expand(2, 3)
        found = negative_indices(kind, uniform, torch.tensor(num_frames), 10, 4, torch.tensor([1, 1]))
        assert found.indices.shape == (2, 4, 3) and found.exist.shape == (2, 4, 3)
        assert found.indices.min() >= 0 and found.indices.max() < 20
        for sequence in range(2):
            for step in range(1, 5):
                expected = allowed(kind, num_frames, sequence, step, [1, 1])
                if expected:
                    assert found.indices[sequence, step - 1, 1:].tolist() == [expected[-1]] * 2
    one = negative_indices(kind, torch.rand(1, 5), torch.tensor([4]), 10, 1, torch.tensor([0]))
    assert one.exist.unique().tolist() == [kind != "speaker"]


def test_sequences_draw_from_their_own_noise() -> None:
    """Negatives of one sequence depend on its row of the noise, and for kind "sequence" on nothing else."""
    uniform, num_frames = torch.rand(3, 20), torch.tensor([9, 6, 8])
    found = negative_indices("sequence", uniform, num_frames, 10, 2).indices
    for i in range(3):
        alone = negative_indices("sequence", uniform[i : i + 1], num_frames[i : i + 1], 10, 2).indices
        assert torch.equal(alone[0] + 10 * i, found[i])


@pytest.mark.parametrize("num_frames", [[5, 10, 3, 0, 7], [2, 1, 9, 4, 4]])
def test_independent_negatives_are_uniform_over_each_other_sequence(num_frames: list[int]) -> None:
    """Column j holds frames of sequence j that can be k steps ahead, in equal parts of a grid of noise."""
    draws = 600
    grid = ((torch.arange(draws) + 0.5) / draws).tolist()
    found = [independent_negatives(torch.full((5, 5), value), torch.tensor(num_frames), 10, 3) for value in grid]
    indices, exist = (torch.stack([one[field] for one in found]) for field in (0, 1))
    for own in range(5):
        for step in (1, 2, 3):
            for other in range(5):
                expected = [] if own == other else list(range(10 * other + step, 10 * other + num_frames[other]))
                assert exist[:, own, step - 1, other].unique().tolist() == [bool(expected)]
                if expected:
                    counts = torch.bincount(indices[:, own, step - 1, other], minlength=50)
                    assert counts.nonzero()[:, 0].tolist() == expected
                    assert (counts[expected] - draws / len(expected)).abs().max() <= 1.0
    rounded = independent_negatives(torch.ones(5, 5), torch.tensor(num_frames), 10, 12)
    assert rounded.indices.min() >= 0 and rounded.indices.max() < 50


@pytest.mark.usefixtures("as_a_user")
def test_independent_negatives_ask_for_a_square_of_noise() -> None:
    with pytest.raises(ArgumentError, match=r"uniform \(batch, batch\), got \(2,\) and \(2, 3\)"):
        independent_negatives(torch.rand(2, 3), torch.tensor([3, 4]), 5, 2)
    with pytest.raises(ArgumentError, match="num_steps must be an integer of at least 1, got 0"):
        independent_negatives(torch.rand(2, 2), torch.tensor([3, 4]), 5, 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "hard"}, "kind must be one of batch, sequence, speaker, got 'hard'"),
        ({"kind": "speaker"}, r"labels must have shape \(2,\) for kind 'speaker', got none"),
        ({"kind": "speaker", "labels": torch.zeros(3).long()}, r"labels must have shape \(2,\) .*, got \(3,\)"),
        ({"uniform": torch.zeros(3, 4)}, r"num_frames must have shape .*, got \(2,\) and \(3, 4\)"),
        ({"max_frames": 0}, "max_frames must be an integer of at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_of_negatives_are_named(as_a_user, arguments: dict, message: str) -> None:
    """The message names the argument and its value."""
    usual = {"kind": "batch", "uniform": torch.rand(2, 4), "num_frames": torch.tensor([3, 4]), "max_frames": 5}
    with pytest.raises(ArgumentError, match=message):
        negative_indices(**{**usual, "num_steps": 2, **arguments})
