"""Linear probes: how well a linear classifier tells classes apart from single frames of a representation.

(Section 3.1 of van den Oord et al. 2018, https://arxiv.org/abs/1807.03748.) Frames of one recording are alike, so they
are never split between training and held-out data, and errors are those of means over recordings.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from popgen.errors import ArgumentError, DataError, PopgenError, check_integer, check_number
from popgen.evaluation.statistics import standard_error
from popgen.streams import stream_seed

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the penalty, that are tried
MAX_ITERATIONS = 300
TOLERANCE = 1e-3  # of the gradient, at which a fit has converged

Represent = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Frames:
    """Single frames of some sequences.

    Attributes:
        features: shape `(count, dim)`.
        recordings: the index of the sequence that each comes from, shape `(count,)`.
        labels: of each frame, those of its sequence, by name.

    Example: `frames_of` makes them.
    """

    features: Float[Tensor, "count dim"]
    recordings: Int64[Tensor, " count"]
    labels: Mapping[str, Int64[Tensor, " count"]]


@torch.no_grad()
def frames_of(
    represent: Represent, sequences: Any, max_frames_per_sequence: int = 20, seed: int = 0, batch_size: int = 50
) -> Frames:
    """Returns frames of every sequence of a split, chosen at random without replacement, in order.

    What is chosen depends on the seed, on the place of a sequence in the split and on how many frames it has, not on
    what represents it: representations of equal frames are probed on the same ones.

    Args:
        represent: returns features, shape `(batch, frames, dim)`, of values and lengths, and which of them to use,
            boolean, shape `(batch, frames)`.
        sequences: a split; has a length, and `padded(indices)` with values, lengths and labels.
        max_frames_per_sequence: of a sequence that has fewer, all are taken.
        seed: of the choice.
        batch_size: sequences that are represented together.

    Raises:
        ArgumentError: if an argument is outside its domain.
        DataError: if no sequence has a frame.

    Example:
        >>> from types import SimpleNamespace
        >>> class Split:
        ...     def __len__(self):
        ...         return 3
        ...     def padded(self, indices):
        ...         lengths, labels = torch.full((len(indices),), 8), {"digit": indices}
        ...         return SimpleNamespace(values=torch.zeros(len(indices), 8, 2), lengths=lengths, labels=labels)
        >>> frames = frames_of(lambda values, lengths: (values, values[..., 0] == 0.0), Split(), 4)
        >>> frames.features.shape, frames.labels["digit"]
        (torch.Size([12, 2]), tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]))
    """
    check_integer("max_frames_per_sequence", max_frames_per_sequence, minimum=1)
    check_integer("batch_size", batch_size, minimum=1)
    generator = torch.Generator()
    features, recordings, labels = [], [], []
    for indices in torch.arange(len(sequences)).split(batch_size):
        batch = sequences.padded(indices)
        found, mask = represent(batch.values, batch.lengths)
        places = []
        for row, index in enumerate(indices.tolist()):
            usable = mask[row].nonzero()[:, 0].cpu()
            generator.manual_seed(stream_seed(seed, "probe", index))
            chosen = torch.randperm(len(usable), generator=generator)[:max_frames_per_sequence].sort().values
            places.append(usable[chosen] + row * mask.shape[1])
        counts = torch.tensor([len(chosen) for chosen in places])
        features.append(found.flatten(0, 1)[torch.cat(places).to(found.device)].float().cpu())
        recordings.append(indices.repeat_interleave(counts))
        labels.append({name: label.cpu().repeat_interleave(counts) for name, label in batch.labels.items()})
    if sum(map(len, features)) == 0:
        raise DataError(f"none of the {len(sequences)} sequences has a frame: they are shorter than the encoder sees")
    together = {name: torch.cat([label[name] for label in labels]) for name in labels[0]}
    return Frames(torch.cat(features), torch.cat(recordings), together)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear classifier of standardised features.

    Attributes:
        mean: of each feature, shape `(dim,)`.
        std: of each feature; 1 where it is constant.
        weight: shape `(dim, classes)`.
        bias: shape `(classes,)`; minus infinity for classes of which nothing was seen.
        strength: of the penalty that was chosen.
        held_out_accuracy: the mean over folds of that of frames held out, by the fit to the others; None if only one
            strength was given.
        converged: whether the final fit met its tolerance.

    Example: `fit_probe` makes one.
    """

    mean: Float[Tensor, " dim"]
    std: Float[Tensor, " dim"]
    weight: Float[Tensor, "dim classes"]
    bias: Float[Tensor, " classes"]
    strength: float
    held_out_accuracy: float | None
    converged: bool

    def log_probabilities(self, features: Float[Tensor, "count dim"]) -> Float[Tensor, "count classes"]:
        """Returns log p(class | frame), nats."""
        return (((features - self.mean) / self.std) @ self.weight + self.bias).log_softmax(-1)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """How well a probe does on frames that it has not seen.

    Attributes:
        frame_accuracy: the part of all frames that are classified rightly.
        mean_accuracy: the mean over recordings of the part of each one's frames.
        standard_error: of that mean, over recordings; not a number for a single one.
        recording_accuracy: the part of recordings whose summed log-probabilities are highest for their class.
        num_frames: that were classified.
        num_recordings: that they come from.

    Example: `evaluate_probe` makes one.
    """

    frame_accuracy: float
    mean_accuracy: float
    standard_error: float
    recording_accuracy: float
    num_frames: int
    num_recordings: int


def fit_probe(
    features: Float[Tensor, "count dim"],
    targets: Int64[Tensor, " count"],
    num_classes: int,
    recordings: Int64[Tensor, " count"],
    strengths: tuple[float, ...] = STRENGTHS,
    num_folds: int = 5,
    seed: int = 0,
) -> Probe:
    """Returns multinomial logistic regression of standardised features, fitted by L-BFGS.

    It minimises the mean of -log p(target | frame) + strength / 2 · |weight|². If several strengths are given, the one
    with the best accuracy in cross-validation is fitted to all frames.

    Args:
        features: of the training frames.
        targets: their classes, from 0.
        num_classes: how many there may be.
        recordings: which recording each frame comes from, or which speaker; one is held out as a whole.
        strengths: of the penalty.
        num_folds: parts of the recordings, each of which is held out in turn; no more than there are recordings.
        seed: of which recordings make a part.

    Raises:
        ArgumentError: if an argument is outside its domain, or the shapes do not fit.
        DataError: if features are not finite, or there are fewer than two classes or too few recordings.
        PopgenError: if scikit-learn is missing.

    Example:
        >>> features = torch.randn(1_000, 3)
        >>> probe = fit_probe(features, (features[:, 1] > 0.0).long(), 2, recordings=torch.arange(1_000) // 10)
        >>> probe.held_out_accuracy > 0.95
        True
    """
    _check_frames(features, targets, num_classes, recordings)
    if not strengths:
        raise ArgumentError("strengths must hold at least one number, got none")
    for strength in strengths:
        check_number("strengths", strength, above=0.0)
    check_integer("num_folds", num_folds, minimum=2)
    strength, accuracy, start = strengths[0], None, None
    if len(strengths) > 1:
        folds = _folds(recordings, num_folds, seed)
        accuracies = dict.fromkeys(sorted(strengths, reverse=True), 0.0)
        for hidden in folds:
            start = None
            for candidate in accuracies:  # each fit starts from that of a stronger penalty
                start = _fit(features[~hidden], targets[~hidden], num_classes, candidate, start)
                right = start.log_probabilities(features[hidden]).argmax(-1) == targets[hidden]
                accuracies[candidate] += right.double().mean().item() / len(folds)
        strength = max(accuracies, key=lambda candidate: accuracies[candidate])  # the strongest of equals
        accuracy = accuracies[strength]
    return dataclasses.replace(_fit(features, targets, num_classes, strength, start), held_out_accuracy=accuracy)


def evaluate_probe(
    probe: Probe,
    features: Float[Tensor, "count dim"],
    targets: Int64[Tensor, " count"],
    recordings: Int64[Tensor, " count"],
) -> ProbeResult:
    """Returns how well a probe does on frames, and on the recordings that they come from.

    Args:
        probe: fitted to other recordings.
        features: of the test frames.
        targets: their classes, the same for all frames of a recording.
        recordings: which recording each frame comes from.

    Raises:
        ArgumentError: if the shapes do not fit.

    Example:
        >>> train, test = torch.randn(1_000, 3), torch.randn(100, 3)
        >>> recordings = torch.arange(1_000) // 10
        >>> probe = fit_probe(train, (train[:, 1] > 0.0).long(), 2, recordings)
        >>> result = evaluate_probe(probe, test, (test[:, 1] > 0.0).long(), recordings[:100])
        >>> result.frame_accuracy > 0.9, result.num_recordings
        (True, 10)
    """
    _check_frames(features, targets, probe.weight.shape[1], recordings)
    log_p = probe.log_probabilities(features)
    right = (log_p.argmax(-1) == targets).double()
    mean, error = mean_over_recordings(right, recordings)
    _, places, counts = recordings.unique(return_inverse=True, return_counts=True)
    totals = log_p.new_zeros(len(counts), log_p.shape[1]).index_add_(0, places, log_p)
    classes = torch.zeros_like(counts).index_copy_(0, places, targets)
    return ProbeResult(
        frame_accuracy=right.mean().item(),
        mean_accuracy=mean,
        standard_error=error,
        recording_accuracy=(totals.argmax(-1) == classes).double().mean().item(),
        num_frames=len(features),
        num_recordings=len(counts),
    )


def mean_over_recordings(values: Float[Tensor, " count"], recordings: Int64[Tensor, " count"]) -> tuple[float, float]:
    """Returns the mean over recordings of the mean of each one's frames, and the standard error of it.

    The error of a mean over frames would be far too small, since frames of one recording are alike. It is not a
    number for a single recording.

    Args:
        values: of frames.
        recordings: which recording each comes from.

    Raises:
        ArgumentError: if there are no values, or the shapes differ.

    Example:
        >>> mean_over_recordings(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([7, 7, 7, 9]))
        (0.5, 0.5)
    """
    if len(values) == 0 or values.shape != recordings.shape:
        raise ArgumentError(
            f"values and recordings must have one shape (count,) of at least 1, got {tuple(values.shape)} and "
            f"{tuple(recordings.shape)}"
        )
    _, places, counts = recordings.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), dtype=torch.float64, device=values.device)
    means = means.index_add_(0, places, values.double()) / counts
    return means.mean().item(), standard_error(means)


def _check_frames(features: Tensor, targets: Tensor, num_classes: int, recordings: Tensor) -> None:
    check_integer("num_classes", num_classes, minimum=2)
    count = features.shape[:1]
    if features.ndim != 2 or len(features) == 0 or not count == targets.shape == recordings.shape:
        raise ArgumentError(
            "features, targets and recordings must have shapes (count, dim), (count,) and (count,) with a count of at "
            f"least 1, got {tuple(features.shape)}, {tuple(targets.shape)} and {tuple(recordings.shape)}"
        )
    lowest, highest = targets.min().item(), targets.max().item()
    if lowest < 0 or highest >= num_classes:
        raise ArgumentError(f"targets must be from 0 to {num_classes - 1}, got {lowest} to {highest}")
    if not bool(features.isfinite().all()):
        raise DataError("features must be finite, got infinite or undefined ones: has training diverged?")


def _folds(recordings: Tensor, num_folds: int, seed: int) -> list[Bool[Tensor, " count"]]:
    """Returns which frames are of the recordings of each part."""
    names = recordings.unique()
    if len(names) < 2:
        raise DataError("there must be at least 2 recordings, of which one is held out, got 1")
    generator = torch.Generator().manual_seed(stream_seed(seed, "probe", "folds"))
    order = names[torch.randperm(len(names), generator=generator)]
    return [torch.isin(recordings, part) for part in order.tensor_split(min(num_folds, len(names)))]


def _fit(features: Tensor, targets: Tensor, num_classes: int, strength: float, start: Probe | None = None) -> Probe:
    """Returns the fit to frames, with the class of each, at one strength."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise PopgenError("probes need scikit-learn: pip install scikit-learn") from error
    seen = targets.unique()
    if len(seen) < 2:
        raise DataError(f"the frames that a probe is fitted to must be of at least 2 classes, got {seen.tolist()}")
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 1e-6 * (1.0 + mean.abs()), std, torch.ones_like(std))
    inputs = ((features - mean) / std).float().numpy()
    # scikit-learn's C multiplies the sum of losses over frames. Of two classes it finds one score, whose weight w is
    # the difference of theirs: |w|²/2 is what theirs come to together.
    penalty = strength / 2.0 if len(seen) == 2 else strength
    regression = LogisticRegression(
        C=1.0 / (penalty * len(targets)), tol=TOLERANCE, max_iter=MAX_ITERATIONS, warm_start=True
    )
    if start is not None and len(seen) > 2 and bool(start.bias[seen].isfinite().all()):
        regression.coef_ = start.weight[:, seen].T.contiguous().numpy()
        regression.intercept_ = start.bias[seen].numpy().copy()
        regression.classes_ = seen.numpy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(inputs, targets.numpy())
    coefficients, intercepts = torch.from_numpy(regression.coef_), torch.from_numpy(regression.intercept_)
    if len(seen) == 2:  # one score of two: half of it for the one class, minus half for the other
        coefficients = torch.cat([-coefficients, coefficients]) / 2.0
        intercepts = torch.cat([-intercepts, intercepts]) / 2.0
    weight = torch.zeros(features.shape[1], num_classes, dtype=features.dtype)
    bias = torch.full((num_classes,), -math.inf, dtype=features.dtype)
    weight[:, seen], bias[seen] = coefficients.T.to(features.dtype), intercepts.to(features.dtype)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return Probe(mean, std, weight, bias, strength, held_out_accuracy=None, converged=converged)
