"""Linear probes against densities known in closed form, and that no recording is on both sides."""

import dataclasses
import math
import sys

import pytest
import torch
from torch import Tensor

from popgen.datasets.sequences import Sequences
from popgen.errors import ArgumentError, DataError, PopgenError
from popgen.evaluation import probe as probe_module
from popgen.evaluation.probe import Frames, evaluate_probe, fit_probe, frames_of, mean_over_recordings


def make_frames(recordings: int = 60, each: int = 10, classes: int = 3, distance: float = 2.0, seed: int = 0) -> Frames:
    """Returns frames around the corners of a simplex, the class of a recording being the rest of its index."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(recordings).repeat_interleave(each)
    targets = index % classes
    centres = distance * torch.eye(classes, 5)
    features = centres[targets] + torch.randn(len(index), 5, generator=generator)
    return Frames(features * torch.tensor([1.0, 10.0, 0.1, 1.0, 5.0]) + 3.0, index, {"class": targets})


def make_sequences(lengths: list[int]) -> Sequences:
    """Returns sequences whose steps are numbered from 0 through all of them."""
    values = torch.arange(float(sum(lengths)))
    return Sequences(values, torch.tensor(lengths), {"digit": torch.arange(len(lengths)) % 4})


def every_step(values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each step as a frame."""
    return values[..., None], torch.arange(values.shape[1]) < lengths[:, None]


def test_finds_the_classifier_of_equal_gaussians() -> None:
    """Its log-probabilities come near those of Bayes' rule, and its accuracy too."""
    train, test = make_frames(600, seed=1), make_frames(600, seed=2)
    probe = fit_probe(train.features, train.labels["class"], 3, train.recordings, strengths=(1e-4,))
    assert probe.converged and probe.held_out_accuracy is None
    scales = torch.tensor([1.0, 10.0, 0.1, 1.0, 5.0])
    points = (test.features - 3.0) / scales
    distances = (points[:, None] - 2.0 * torch.eye(3, 5)).square().sum(-1)
    bayes = (-0.5 * distances).log_softmax(-1)
    found = probe.log_probabilities(test.features)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(6_000))
    assert (found.exp() - bayes.exp()).abs().mean() < 0.02
    result = evaluate_probe(probe, test.features, test.labels["class"], test.recordings)
    best = (bayes.argmax(1) == test.labels["class"]).float().mean().item()
    assert abs(result.frame_accuracy - best) < 0.01
    assert result.recording_accuracy > 0.99 > result.frame_accuracy
    assert (result.num_frames, result.num_recordings) == (6_000, 600)


@pytest.mark.parametrize("classes", [2, 3])
def test_is_at_the_minimum_of_the_penalised_loss(classes: int) -> None:
    """The gradient of mean cross entropy + strength / 2 |weight|² vanishes, biases unpenalised."""
    frames, strength = make_frames(classes=classes), 0.03
    probe = fit_probe(frames.features, frames.labels["class"], classes, frames.recordings, strengths=(strength,))
    inputs = ((frames.features - probe.mean) / probe.std).double()
    weight, bias = (value.double().requires_grad_() for value in (probe.weight, probe.bias))
    loss = torch.nn.functional.cross_entropy(inputs @ weight + bias, frames.labels["class"])
    (alone,) = torch.autograd.grad(loss, weight, retain_graph=True)
    gradients = torch.autograd.grad(loss + 0.5 * strength * weight.square().sum(), (weight, bias))
    assert max(gradient.abs().max().item() for gradient in gradients) < 2e-3
    alone = torch.autograd.grad(
        torch.nn.functional.cross_entropy(inputs @ weight + bias, frames.labels["class"]), weight
    )
    assert alone[0].abs().max() > 0.005
    torch.testing.assert_close(inputs.mean(0), torch.zeros(5).double(), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(5).double(), atol=1e-5, rtol=0.0)


def test_scale_and_shift_of_features_do_not_matter() -> None:
    """They are standardised; constant features do no harm."""
    frames = make_frames()
    probe = fit_probe(frames.features, frames.labels["class"], 3, frames.recordings)
    moved = torch.cat([frames.features * 1000.0 - 7.0, torch.full((600, 1), 5.0)], dim=1)
    other = fit_probe(moved, frames.labels["class"], 3, frames.recordings)
    found, expected = other.log_probabilities(moved), probe.log_probabilities(frames.features)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    assert other.strength == probe.strength


def test_recordings_are_held_out_as_a_whole(monkeypatch) -> None:
    """Each fit but the last sees all frames of some recordings and none of the others, and each is left out once."""
    frames, seen = make_frames(40), []
    fit = probe_module._fit

    def watch(features: Tensor, *arguments):
        seen.append(features)
        return fit(features, *arguments)

    monkeypatch.setattr(probe_module, "_fit", watch)
    fit_probe(frames.features, frames.labels["class"], 3, frames.recordings, strengths=(0.01, 0.1), num_folds=4)
    assert [len(features) for features in seen] == [300] * 8 + [400]
    left_out = []
    for features in seen[:8:2]:
        known = {tuple(row) for row in features.tolist()}
        parts = [sum(tuple(row) in known for row in part.tolist()) for part in frames.features.split(10)]
        assert sorted(set(parts)) == [0, 10]
        left_out += [recording for recording, count in enumerate(parts) if count == 0]
    assert sorted(left_out) == list(range(40))
    seen.clear()
    speakers = frames.recordings % 3
    fit_probe(frames.features, frames.labels["class"] * 0 + frames.recordings // 3 % 2, 2, speakers, (0.01, 0.1))
    assert sorted(len(features) for features in seen) == [260, 260, 270, 270, 270, 270, 400], "three folds of speakers"


def test_the_strength_is_that_of_the_best_held_out_accuracy() -> None:
    """Of nothing but noise the frequencies of the classes are the best guess; clean frames need no penalty."""
    torch.manual_seed(3)
    recordings = torch.arange(400) // 4
    targets, noisy = (recordings % 5 == 0).long(), torch.randn(400, 150)
    probe = fit_probe(noisy, targets, 2, recordings, strengths=(1e-6, 3.0))
    assert probe.strength == 3.0
    held_out = [fit_probe(noisy, targets, 2, recordings, strengths=(s, s)).held_out_accuracy for s in (1e-6, 3.0)]
    assert probe.held_out_accuracy == max(held_out)
    clean = make_frames(400, classes=3, distance=1.0)
    assert fit_probe(clean.features, clean.labels["class"], 3, clean.recordings, (1e-4, 1e3)).strength == 1e-4
    easy = make_frames(400, classes=3, distance=50.0)
    assert fit_probe(easy.features, easy.labels["class"], 3, easy.recordings, (1e-3, 1e-2)).strength == 1e-2, (
        "of equals"
    )


def test_two_classes_and_classes_never_seen() -> None:
    """Two classes give probabilities that add to one; others have none, and count as wrong where they occur."""
    frames = make_frames(classes=2)
    both = fit_probe(frames.features, frames.labels["class"], 2, frames.recordings)
    gaps = fit_probe(frames.features, 2 * frames.labels["class"] + 1, 5, frames.recordings)
    expected, found = both.log_probabilities(frames.features).exp(), gaps.log_probabilities(frames.features).exp()
    assert (found[:, [0, 2, 4]] == 0.0).all()
    torch.testing.assert_close(found[:, [1, 3]], expected, atol=1e-3, rtol=1e-3)
    assert (expected.argmax(1) == frames.labels["class"]).float().mean() > 0.85
    result = evaluate_probe(gaps, frames.features, torch.zeros_like(frames.recordings), frames.recordings)
    assert result.frame_accuracy == result.recording_accuracy == 0.0
    three = make_frames(classes=3)
    more = fit_probe(three.features, three.labels["class"] + 2, 7, three.recordings)
    fewer = fit_probe(three.features, three.labels["class"], 3, three.recordings)
    torch.testing.assert_close(
        more.log_probabilities(three.features).exp()[:, 2:5],
        fewer.log_probabilities(three.features).exp(),
        atol=1e-3,
        rtol=1e-3,
    )


def test_results_by_hand() -> None:
    """Accuracies of frames, of means over recordings, and of summed log-probabilities, for a probe made by hand."""
    frames = make_frames()
    probe = dataclasses.replace(
        fit_probe(frames.features[:, :1], frames.labels["class"] % 2, 2, frames.recordings, (1.0,)),
        mean=torch.zeros(1),
        std=torch.ones(1),
        weight=torch.tensor([[-1.0, 1.0]]),
        bias=torch.zeros(2),
    )  # class 1 where the feature is above nought
    features = torch.tensor([[1.0], [1.0], [-5.0], [-1.0], [2.0], [-0.5]])
    targets, recordings = torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([4, 4, 4, 9, 9, 7])
    result = evaluate_probe(probe, features, targets, recordings)
    assert result.frame_accuracy == pytest.approx(4 / 6)
    assert result.mean_accuracy == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    spread = torch.tensor([2 / 3, 1 / 2, 1.0]).std().item() / math.sqrt(3)
    assert result.standard_error == pytest.approx(spread)
    assert result.recording_accuracy == pytest.approx(1 / 3)  # the sums are -3, 1 and -0.5
    assert (result.num_frames, result.num_recordings) == (6, 3)


def test_mean_over_recordings() -> None:
    """Against loops; one recording has no error that could be told."""
    values, recordings = torch.rand(50), torch.randint(0, 6, (50,))
    means = torch.stack([values[recordings == r].mean() for r in recordings.unique()]).double()
    mean, error = mean_over_recordings(values, recordings)
    assert mean == pytest.approx(means.mean().item())
    assert error == pytest.approx(means.std().item() / math.sqrt(len(means)))
    assert math.isnan(mean_over_recordings(values, torch.zeros(50).long())[1])


def test_frames_are_chosen_without_replacement_from_real_ones() -> None:
    """At most so many of each sequence, in order, with its labels, whatever the batches."""
    lengths = [5, 30, 1, 12, 8, 3]
    sequences = make_sequences(lengths)
    frames = frames_of(every_step, sequences, max_frames_per_sequence=8, seed=4)
    counts = [min(8, length) for length in lengths]
    assert torch.bincount(frames.recordings).tolist() == counts
    steps = frames.features[:, 0].long()
    assert (steps.diff() > 0).all()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    assert ((steps >= starts[frames.recordings]) & (steps < starts[frames.recordings + 1])).all()
    assert torch.equal(frames.labels["digit"], frames.recordings % 4)
    for batch_size in (1, 4):
        other = frames_of(every_step, sequences, 8, seed=4, batch_size=batch_size)
        assert torch.equal(other.features, frames.features) and torch.equal(other.recordings, frames.recordings)
    assert not torch.equal(frames_of(every_step, sequences, 8, seed=5).features, frames.features)


def test_all_representations_are_probed_on_the_same_frames() -> None:
    """The choice does not depend on the features, and uses no global randomness and no gradient."""
    sequences, state = make_sequences([20, 9, 14]), torch.get_rng_state()
    weight = torch.randn(1, 7, requires_grad=True)
    state = torch.get_rng_state()
    frames = frames_of(every_step, sequences, 5)
    other = frames_of(lambda v, n: (every_step(v, n)[0] @ weight, every_step(v, n)[1]), sequences, 5)
    torch.testing.assert_close(other.features, frames.features @ weight.detach())
    assert not other.features.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_chosen_frames_are_spread() -> None:
    """Every place of a sequence is chosen about equally often."""
    sequences = make_sequences([10] * 1_000)
    steps = frames_of(every_step, sequences, 3).features[:, 0].long() % 10
    counts = torch.bincount(steps, minlength=10)
    assert (counts - 300).abs().max() < 75


def test_sequences_without_frames_are_left_out() -> None:
    """And a split of nothing else is refused."""
    sequences = make_sequences([5, 2, 6])

    def late(values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features, mask = every_step(values, lengths)
        return features, mask & (torch.arange(values.shape[1]) >= 3)

    assert frames_of(late, sequences, 10).recordings.tolist() == [0, 0, 2, 2, 2]
    with pytest.raises(DataError, match="none of the 2 sequences has a frame"):
        frames_of(late, make_sequences([3, 2]), 10)


def test_a_missing_extra_is_one_line(monkeypatch) -> None:
    """That says what to install."""
    frames = make_frames()
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(PopgenError, match=r"^probes need scikit-learn: pip install scikit-learn$"):
        fit_probe(frames.features, frames.labels["class"], 3, frames.recordings)


def test_fits_that_do_not_converge_are_said(monkeypatch) -> None:
    """In the result, not in a warning."""
    frames = make_frames()
    monkeypatch.setattr(probe_module, "MAX_ITERATIONS", 1)
    assert not fit_probe(frames.features, frames.labels["class"], 3, frames.recordings).converged


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"targets": torch.zeros(599).long()}, ArgumentError, r"must have shapes .*, got \(600, 5\), \(599,\) and"),
        ({"targets": torch.zeros(600, 1).long()}, ArgumentError, r"must have .*, got \(600, 5\), \(600, 1\) and"),
        ({"features": torch.zeros(600)}, ArgumentError, r"must have shapes .*, got \(600,\), \(600,\) and"),
        ({"num_classes": 1}, ArgumentError, "num_classes must be an integer of at least 2, got 1"),
        ({"num_classes": 2}, ArgumentError, "targets must be from 0 to 1, got 0 to 2"),
        ({"targets": torch.full((600,), -1)}, ArgumentError, "targets must be from 0 to 2, got -1 to -1"),
        ({"targets": torch.ones(600).long()}, DataError, r"must be of at least 2 classes, got \[1\]"),
        ({"features": torch.full((600, 5), math.nan)}, DataError, "features must be finite"),
        ({"recordings": torch.zeros(600).long()}, DataError, "at least 2 recordings, of which one is held out, got 1"),
        ({"strengths": ()}, ArgumentError, "strengths must hold at least one number, got none"),
        ({"strengths": (0.1, 0.0)}, ArgumentError, "strengths must be above 0, got 0.0"),
        ({"num_folds": 1}, ArgumentError, "num_folds must be an integer of at least 2, got 1"),
    ],
)
def test_bad_arguments_are_named(as_a_user, arguments: dict, error: type, message: str) -> None:
    """The message names the argument and its value."""
    frames = make_frames()
    usual = {"features": frames.features, "targets": frames.labels["class"], "recordings": frames.recordings}
    with pytest.raises(error, match=message):
        fit_probe(**{**usual, "num_classes": 3, **arguments})


def test_bad_arguments_of_helpers_are_named(as_a_user) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ArgumentError, match=r"values and recordings .*, got \(3,\) and \(2,\)"):
        mean_over_recordings(torch.zeros(3), torch.zeros(2).long())
    with pytest.raises(ArgumentError, match="max_frames_per_sequence must be an integer of at least 1, got 0"):
        frames_of(every_step, make_sequences([3]), 0)
    with pytest.raises(ArgumentError, match="batch_size must be an integer of at least 1, got 0"):
        frames_of(every_step, make_sequences([3]), 1, batch_size=0)
