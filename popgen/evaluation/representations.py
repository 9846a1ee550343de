"""What of a trained CPC is probed, and beside what: plain features of its frames, and the same network untrained."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from popgen.datasets.sequences import SequenceData
from popgen.errors import ArgumentError, DataError, check_choice, check_integer
from popgen.evaluation.log_mel import LogMel, stack_frames
from popgen.evaluation.probe import Represent, evaluate_probe, fit_probe, frames_of
from popgen.models.cpc import CPC
from popgen.nn.cpc import FrameEncoder


@dataclasses.dataclass(frozen=True)
class ProbeRow:
    """How well a linear probe tells classes apart from single frames of one representation.

    Attributes:
        representation: what the features are.
        dim: how many features a frame has.
        accuracy: on frames of test recordings of whose kind there are training recordings, the mean over recordings.
        standard_error: of it, over recordings; not a number for a single one.
        recording_accuracy: of whole recordings, by the sum of their frames' log-probabilities.
        unseen_accuracy: like `accuracy`, on test recordings that have another label of which nothing was trained on,
            such as a speaker never heard; None if there are none.
        unseen_standard_error: of it.
        unseen_recording_accuracy: like `recording_accuracy`.
        strength: of the penalty, chosen among training recordings.
        converged: whether the fit met its tolerance.
        num_frames: that the probe was fitted to.

    Example: `probe_rows` returns them.
    """

    representation: str
    dim: int
    accuracy: float
    standard_error: float
    recording_accuracy: float
    unseen_accuracy: float | None
    unseen_standard_error: float | None
    unseen_recording_accuracy: float | None
    strength: float
    converged: bool
    num_frames: int


def unseen_labels(data: SequenceData) -> dict[str, Tensor]:
    """Returns, for each label, which test sequences have a value of it that no training sequence has.

    Example:
        >>> from popgen.datasets.sequences import Sequences
        >>> train = Sequences(torch.zeros(2), torch.tensor([1, 1]), {"speaker": torch.tensor([0, 1])})
        >>> test = Sequences(torch.zeros(2), torch.tensor([1, 1]), {"speaker": torch.tensor([1, 2])})
        >>> unseen_labels(SequenceData(train, test, None, window=1, classes={"speaker": ("ann", "ben", "eve")}))
        {'speaker': tensor([False,  True])}
    """
    return {name: ~torch.isin(data.test.labels[name], data.train.labels[name]) for name in data.classes}


def representations(
    model: CPC, untrained: CPC, data: SequenceData, stacked: tuple[int, ...] = (12, 24)
) -> dict[str, Represent]:
    """Returns what gives features of frames, by name: of the model, of plain features and of the model untrained.

    The plain features of a frame are those of the very steps that an encoding sees: log-mel energies of a waveform, or
    the steps themselves; and these together with those of the frames before it, as a context sees them.

    Args:
        model: as trained.
        untrained: the same network with its first weights.
        data: says whether sequences are audio.
        stacked: how many frames are put together; those that cover the context's receptive field are the comparison.

    Raises:
        ArgumentError: if `stacked` holds what is no integer of at least 1.

    Example: `probe_rows` takes them.
    """
    for count in stacked:
        check_integer("stacked", count, minimum=1)
    encoder = model.encoder
    kind, plain = "steps", _steps_of(encoder)
    if data.sample_rate is not None:
        log_mel = LogMel(data.sample_rate, encoder.receptive_field, encoder.hop)
        kind, plain = "log-mel", log_mel.to(data.train.lengths.device)

    def of(features: Callable[[Tensor, Tensor], Tensor]) -> Represent:
        def represent(values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            found = features(values, lengths)
            return found, torch.arange(found.shape[1], device=found.device) < model.num_frames(lengths)[:, None]

        return represent

    def stack(count: int) -> Represent:
        return of(lambda values, lengths: stack_frames(plain(values), count))

    return {
        "context": of(model.represent),
        "encoding": of(lambda values, lengths: model.encode(values)),
        f"{kind}, 1 frame": stack(1),
        **{f"{kind}, {count} frames": stack(count) for count in stacked if count > 1},
        "context, untrained": of(untrained.represent),
        "encoding, untrained": of(lambda values, lengths: untrained.encode(values)),
    }


def _steps_of(encoder: FrameEncoder) -> Callable[[Tensor], Tensor]:
    """Returns what puts the steps together that each frame of an encoder sees.

    Sequences shorter than one frame are padded with zeros to one, as the encoder pads them.
    """

    def steps(values: Tensor) -> Tensor:
        x = F.pad(values.flatten(2), (0, 0, 0, max(0, encoder.receptive_field - values.shape[1])))
        return x.unfold(1, encoder.receptive_field, encoder.hop).flatten(2)

    return lambda values: steps(values if values.ndim > 2 else values[..., None])


def probe_rows(
    chosen: dict[str, Represent], data: SequenceData, target: str, max_frames_per_recording: int = 20, seed: int = 0
) -> Iterator[ProbeRow]:
    """Yields the row of each representation: a probe is fitted to training frames and evaluated on test frames.

    The penalty is chosen by cross-validation over training sequences; or, where test sequences have another label that
    was not trained on, over the values of that label, as the question is how a probe carries over to a new one.

    Args:
        chosen: representations by name.
        data: every representation is probed on the same frames of it.
        target: the label that is told from a frame.
        max_frames_per_recording: of each sequence, chosen at random.
        seed: of the choice of frames.

    Raises:
        ArgumentError: if there is no such label.
        DataError: if no test sequence has a class that was trained on, or `fit_probe` or `frames_of` finds fault.
        PopgenError: if scikit-learn is missing.

    Example:
        >>> from popgen.datasets.plucked_strings import PluckedStrings
        >>> from popgen.nn.cpc import GRUContext, LinearPredictors, StridedConvEncoder
        >>> data = PluckedStrings(num_train=40, num_test=8, seconds=0.3, window=1_000).load()
        >>> encoder = StridedConvEncoder(16, kernel_sizes=(10, 8, 4, 4), strides=(5, 4, 2, 2))
        >>> model = CPC(encoder, GRUContext(16, 8), LinearPredictors(8, 16, num_steps=2))
        >>> rows = probe_rows(representations(model, model, data, stacked=(2,)), data, "chord")
        >>> [(row.representation, row.dim) for row in rows][:4]
        [('context', 8), ('encoding', 16), ('log-mel, 1 frame', 40), ('log-mel, 2 frames', 80)]
    """
    check_choice("target", target, tuple(data.classes))
    unseen = {name: mask.cpu() for name, mask in unseen_labels(data).items()}
    known = ~unseen.pop(target)
    carried_over = torch.zeros_like(known)
    for mask in unseen.values():
        carried_over |= mask
    groups = next((name for name, mask in unseen.items() if bool((mask & known).any())), None)
    if not bool((known & ~carried_over).any()):
        raise DataError(f"no test sequence has a {target} that training sequences have: nothing can be told")
    for name, represent in chosen.items():
        train = frames_of(represent, data.train, max_frames_per_recording, seed)
        probe = fit_probe(
            train.features,
            train.labels[target],
            len(data.classes[target]),
            train.recordings if groups is None else train.labels[groups],
            seed=seed,
        )
        test = frames_of(represent, data.test, max_frames_per_recording, seed)
        results = []
        for wanted in (known & ~carried_over, known & carried_over):
            part = wanted[test.recordings]
            found = (test.features[part], test.labels[target][part], test.recordings[part])
            results.append(evaluate_probe(probe, *found) if bool(part.any()) else None)
        seen, other = results
        if seen is None:
            raise DataError("no test sequence of a kind that was trained on has a frame: they are too short")
        yield ProbeRow(
            representation=name,
            dim=train.features.shape[1],
            accuracy=seen.mean_accuracy,
            standard_error=seen.standard_error,
            recording_accuracy=seen.recording_accuracy,
            unseen_accuracy=None if other is None else other.mean_accuracy,
            unseen_standard_error=None if other is None else other.standard_error,
            unseen_recording_accuracy=None if other is None else other.recording_accuracy,
            strength=probe.strength,
            converged=probe.converged,
            num_frames=len(train.features),
        )


def describe_row(row: ProbeRow) -> str:
    """Returns the line of a row in a table; an error that cannot be known is left out.

    Example:
        >>> describe_row(ProbeRow("context", 128, 0.9, 0.01, 1.0, 0.5, 0.02, 0.6, 1e-3, True, 100))
        'context                  128   0.900 ± 0.010    0.500 ± 0.020'
    """
    line = f"{row.representation:<22}{row.dim:6d}   {_with_error(row.accuracy, row.standard_error)}"
    if row.unseen_accuracy is not None and row.unseen_standard_error is not None:
        line += f"    {_with_error(row.unseen_accuracy, row.unseen_standard_error)}"
    return line.rstrip() + ("" if row.converged else "   (not converged)")


def _with_error(mean: float, error: float) -> str:
    shown = f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"
    return f"{shown:<13}"


def check_can_be_probed(model: object, data: object) -> tuple[CPC, SequenceData]:
    """Returns a model that has representations of frames, and its sequences.

    Raises:
        ArgumentError: if they are of another kind.

    Example:
        >>> check_can_be_probed(torch.nn.Linear(1, 1), None)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: only a CPC can be probed, and the model of the run is a Linear
    """
    if not isinstance(model, CPC) or not isinstance(data, SequenceData):
        raise ArgumentError(f"only a CPC can be probed, and the model of the run is a {type(model).__name__}")
    return model, data
