"""Sequences of different lengths in memory: waveforms, or rows of images, their labels and the windows of a run.

All sequences of a split lie one after another in one tensor, on the training device, in the type in which they were
stored. A training batch cuts a window from each of its sequences in a handful of tensor operations whose shapes never
change and which never wait for the device, so that a CUDA graph can record them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from popgen.datasets.data import ShuffledBatches
from popgen.errors import ArgumentError, DataError, check_integer, check_number

SCALES = {torch.int16: 32_768.0, torch.uint8: 255.0}  # what integers are divided by: PCM samples and grey levels


class SequenceBatch(NamedTuple):
    """Sequences side by side, padded at their end.

    Attributes:
        values: shape `(batch, time)` for waveforms in [-1, 1], `(batch, time, features)` for rows of images in
            [0, 1]; zero beyond each length.
        lengths: how many of the steps are real, int64, shape `(batch,)`.
        labels: int64, each of shape `(batch,)`.
        starts: which step of its sequence is the first one here, int64, shape `(batch,)`; 0 for whole sequences.

    Example:
        >>> batch = SequenceBatch(torch.zeros(2, 4), torch.tensor([4, 3]), {}, starts=torch.tensor([0, 7]))
        >>> batch.predictable
        tensor([[ True,  True,  True,  True],
                [False,  True,  True, False]])
    """

    values: Tensor
    lengths: Tensor
    labels: dict[str, Tensor]
    starts: Tensor

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return self.values.device

    @property
    def real(self) -> Bool[Tensor, "batch time"]:
        """Which steps are no padding."""
        return torch.arange(self.values.shape[1], device=self.device) < self.lengths[:, None]

    @property
    def predictable(self) -> Bool[Tensor, "batch time"]:
        """Which real steps follow what is here, or begin their sequence; other first steps follow what is not here."""
        first = torch.arange(self.values.shape[1], device=self.device) == 0
        return self.real & ~(first & (self.starts > 0)[:, None])


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of a split, one after another.

    Floating-point values are used as they are. Integers stay as they are stored and become numbers in a batch: int16
    PCM samples divided by 32,768, uint8 grey levels divided by 255.

    Attributes:
        values: shape `(total,)` for waveforms, `(total, features)` for sequences of vectors.
        lengths: int64, shape `(count,)`; they sum to `total`.
        labels: int64, each of shape `(count,)`; none is negative.
        names: where each sequence came from, a file name for example; or empty.
        dtype: of the values of a batch; default that of floating-point values, float32 of others.

    Raises:
        DataError: if these do not fit together, a length is below 1 or a value is not finite.

    Example:
        >>> sequences = Sequences(torch.arange(5.0), torch.tensor([2, 3]), {"digit": torch.tensor([7, 1])})
        >>> sequences.padded(torch.tensor([0, 1])).values
        tensor([[0., 1., 0.],
                [2., 3., 4.]])
    """

    values: Tensor
    lengths: Tensor
    labels: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not self.values.is_floating_point() and self.values.dtype not in SCALES:
            raise DataError(f"values must be floating point, int16 or uint8, got {self.values.dtype}")
        if self.values.ndim == 0:
            raise DataError("values must have shape (total, ...), got ()")
        if self.lengths.ndim != 1 or self.lengths.dtype != torch.int64:
            raise DataError(
                f"lengths must be int64 of shape (count,), got {self.lengths.dtype} of {tuple(self.lengths.shape)}"
            )
        if len(self.lengths) and int(self.lengths.min()) < 1:
            raise DataError(f"lengths must be at least 1, got {int(self.lengths.min())}")
        if int(self.lengths.sum()) != len(self.values):
            raise DataError(f"lengths must sum to the {len(self.values)} values, got {int(self.lengths.sum())}")
        for name, label in self.labels.items():
            if label.dtype != torch.int64 or label.shape != self.lengths.shape:
                raise DataError(
                    f"the label {name!r} must be int64 of shape {tuple(self.lengths.shape)}, got {label.dtype} of "
                    f"{tuple(label.shape)}"
                )
            if len(label) and int(label.min()) < 0:
                raise DataError(f"the label {name!r} must be at least 0, got {int(label.min())}")
        if {tensor.device for tensor in (self.lengths, *self.labels.values())} != {self.values.device}:
            raise DataError(f"lengths and labels must be on the device of the values, {self.values.device}")
        if self.names and len(self.names) != len(self.lengths):
            raise DataError(f"names must be one for each of the {len(self.lengths)} sequences, got {len(self.names)}")
        if self.values.is_floating_point() and not bool(self.values.isfinite().all()):
            position = int((~self.values.isfinite()).nonzero()[0, 0])
            raise DataError(f"values must be finite, which they are not in {self._describe(position)}")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise DataError(f"dtype must be floating point, got {self.dtype}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, chosen: slice) -> "Sequences":
        """Returns the sequences of a slice."""
        if not isinstance(chosen, slice):
            raise ArgumentError(f"sequences are sliced, or chosen by select(indices), got {chosen!r}")
        return self.select(torch.arange(len(self), device=self.values.device)[chosen])

    @functools.cached_property
    def offsets(self) -> Tensor:
        """Where each sequence begins in the values, int64, shape `(count,)`."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def batch_dtype(self) -> torch.dtype:
        """The type of the values of a batch."""
        return self.dtype or (self.values.dtype if self.values.is_floating_point() else torch.float32)

    def as_values(self, values: Tensor) -> Tensor:
        """Returns stored values as those of a batch: of its type, integers divided by their scale."""
        scale = 1.0 if values.is_floating_point() else SCALES[values.dtype]
        return values.to(self.batch_dtype) / scale

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Sequences":
        """Returns the same sequences on a device; batches hold values of `dtype` if it is given.

        Integers stay integers until a batch is made.
        """
        return dataclasses.replace(
            self,
            values=self.values.to(device, dtype if self.values.is_floating_point() else None),
            lengths=self.lengths.to(device),
            labels={name: label.to(device) for name, label in self.labels.items()},
            dtype=dtype or self.dtype,
        )

    def select(self, indices: Tensor) -> "Sequences":
        """Returns some of the sequences, in the order of `indices`, int64, shape `(chosen,)`. Waits for the device.

        Raises:
            ArgumentError: if an index is not one of a sequence.
        """
        indices = self._check_indices(indices)
        lengths = self.lengths[indices]
        offsets = lengths.cumsum(0) - lengths
        shift = torch.repeat_interleave(self.offsets[indices] - offsets, lengths)
        positions = torch.arange(len(shift), device=shift.device) + shift
        return dataclasses.replace(
            self,
            values=self.values[positions],
            lengths=lengths,
            labels={name: label[indices] for name, label in self.labels.items()},
            names=tuple(self.names[index] for index in indices.tolist()) if self.names else (),
        )

    def padded(self, indices: Tensor, at_least: int = 0) -> SequenceBatch:
        """Returns whole sequences, padded to the longest of them. Waits for the device.

        Args:
            indices: int64, shape `(batch,)`.
            at_least: steps to which they are padded if the longest has fewer.

        Raises:
            ArgumentError: if an index is not one of a sequence.
        """
        indices = self._check_indices(indices)
        longest = int(self.lengths[indices].max()) if len(indices) else 0
        steps = torch.arange(max(longest, at_least), device=indices.device)
        return self.windows(indices, torch.zeros_like(indices), steps)

    def windows(
        self, indices: Int64[Tensor, " batch"], starts: Int64[Tensor, " batch"], steps: Int64[Tensor, " window"]
    ) -> SequenceBatch:
        """Returns a window of each sequence, zero beyond its end. Never waits for the device.

        Args:
            indices: of the sequences.
            starts: the first step of each window, below the length of its sequence.
            steps: 0, 1, … up to the size of the window.
        """
        lengths = (self.lengths.index_select(0, indices) - starts).clamp_max(len(steps))
        first = self.offsets.index_select(0, indices) + starts
        real = steps < lengths[:, None]
        positions = (first[:, None] + steps).masked_fill(~real, 0)
        values = self.as_values(self.values.index_select(0, positions.flatten()).unflatten(0, positions.shape))
        values = values.masked_fill(~real.view(*real.shape, *[1] * (values.ndim - 2)), 0.0)
        labels = {name: label.index_select(0, indices) for name, label in self.labels.items()}
        return SequenceBatch(values, lengths, labels, starts)

    def _check_indices(self, indices: Tensor) -> Tensor:
        """Returns the indices on the device of the values."""
        if indices.dtype != torch.int64 or indices.ndim != 1:
            raise ArgumentError(
                f"indices must be int64 of shape (batch,), got {indices.dtype} of {tuple(indices.shape)}"
            )
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            wrong = int(indices.min()) if int(indices.min()) < 0 else int(indices.max())
            raise ArgumentError(f"indices must be at least 0 and below the {len(self)} sequences, got {wrong}")
        return indices.to(self.values.device)

    def _describe(self, position: int) -> str:
        """Returns a word for the sequence that holds a position of the values."""
        index = int(torch.searchsorted(self.offsets, position, right=True)) - 1
        return self.names[index] if self.names else f"sequence {index}"


@dataclasses.dataclass(frozen=True)
class SequenceData:
    """The sequences of a dataset.

    Attributes:
        train: the training split.
        test: the test split.
        validation: like `test`, or None.
        window: steps of a training window.
        classes: for each label the names of its values, in the order of the integers.
        sample_rate: of audio, Hz; None for what is no audio.
        max_speed: at which training windows are played; see `WindowBatches`.

    Raises:
        ArgumentError: if `window` or `sample_rate` is not a positive integer, or `max_speed` is below 1.
        DataError: if a split is empty, or the splits do not fit together or do not fit `classes`.

    Example:
        >>> split = Sequences(torch.zeros(50), torch.tensor([20, 30]), {"digit": torch.tensor([0, 1])})
        >>> data = SequenceData(split, split, None, window=25, classes={"digit": ("nought", "one")}, sample_rate=8_000)
        >>> data.batches(2, seed=0).draw(0, torch.Generator()).values.shape
        torch.Size([2, 25])
    """

    train: Sequences
    test: Sequences
    validation: Sequences | None
    window: int
    classes: Mapping[str, tuple[str, ...]]
    sample_rate: int | None = None
    max_speed: float = 1.0

    def __post_init__(self) -> None:
        check_integer("window", self.window, minimum=1)
        check_number("max_speed", self.max_speed, minimum=1.0)
        if self.sample_rate is not None:
            check_integer("sample_rate", self.sample_rate, minimum=1)
        for name, split in self._splits().items():
            if len(split) == 0:
                raise DataError(f"the {name} split must hold at least one sequence, got none")
            if split.values.shape[1:] != self.train.values.shape[1:]:
                raise DataError(
                    f"the steps of the {name} sequences must have the shape of the training steps, "
                    f"{tuple(self.train.values.shape[1:])}, got {tuple(split.values.shape[1:])}"
                )
            if set(split.labels) != set(self.classes):
                raise DataError(
                    f"the {name} sequences must have the labels of classes, {sorted(self.classes)}, "
                    f"got {sorted(split.labels)}"
                )
            for label, values in split.labels.items():
                if int(values.max()) >= len(self.classes[label]):
                    raise DataError(
                        f"the label {label!r} of the {name} sequences must be below its {len(self.classes[label])} "
                        f"classes, got {int(values.max())}"
                    )

    def _splits(self) -> dict[str, Sequences]:
        splits = {"train": self.train, "test": self.test, "validation": self.validation}
        return {name: split for name, split in splits.items() if split is not None}

    def split(self, name: str) -> Sequences:
        """Returns the split of that name.

        Raises:
            DataError: if there is none.
        """
        splits = self._splits()
        if name not in splits:
            advice = ": let the dataset hold out training sequences for it" if name == "validation" else ""
            raise DataError(f"the dataset has no {name} split{advice}")
        return splits[name]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "SequenceData":
        """Returns the same data on a device; batches hold values of `dtype` if it is given."""
        validation = None if self.validation is None else self.validation.to(device, dtype)
        train, test = self.train.to(device, dtype), self.test.to(device, dtype)
        return dataclasses.replace(self, train=train, test=test, validation=validation)

    def batches(self, batch_size: int, seed: int) -> "WindowBatches":
        """Returns the training batches.

        Raises:
            ArgumentError: if a batch is larger than the data.
        """
        return WindowBatches(self.train, self.window, batch_size, seed, self.max_speed)

    def facts(self) -> dict[str, Any]:
        """Returns the sample rate of audio, the window and the numbers of sequences."""
        sizes = {f"num_{name}_recordings": len(split) for name, split in self._splits().items()}
        rate = {} if self.sample_rate is None else {"sample_rate": self.sample_rate}
        return {**rate, "window": self.window, "num_recordings": sum(sizes.values()), **sizes}


class WindowBatches(ShuffledBatches):
    """The training batches of a run, a window of each of some sequences, in random order.

    A window of W steps is laid over a sequence of L at one of its L + W - 1 places at random, and moved inside where it
    sticks out: all steps are seen about equally often, the first and last ones too, and a share of W / (L + W - 1) of
    the windows are the beginning. A shorter sequence is taken whole, and padded.

    With a `max_speed` s above 1 each window is played at a speed of its own, its logarithm uniform between -log s and
    log s, by linear interpolation (speed perturbation, Ko et al. 2015): a voice sounds higher or lower, and no longer
    gives away who speaks.

    Args:
        sequences: the training split.
        window: steps of a window.
        batch_size: sequences in a batch.
        seed: of the order.
        max_speed: of playing, and one over the lowest; 1 leaves sequences as they are.

    Raises:
        ArgumentError: if a batch is larger than the data, or another argument is outside its domain.

    Example:
        >>> sequences = Sequences(torch.rand(30), torch.tensor([20, 3, 7]))
        >>> batch = WindowBatches(sequences, window=5, batch_size=3, seed=0).draw(step=0, generator=torch.Generator())
        >>> batch.values.shape, sorted(batch.lengths.tolist())
        (torch.Size([3, 5]), [3, 5, 5])
    """

    def __init__(self, sequences: Sequences, window: int, batch_size: int, seed: int, max_speed: float = 1.0) -> None:
        check_integer("window", window, minimum=1)
        check_number("max_speed", max_speed, minimum=1.0)
        super().__init__(len(sequences), batch_size, seed, sequences.values.device, "sequences")
        self.sequences, self.window, self.max_speed = sequences, window, max_speed
        sequences.offsets  # noqa: B018 formed now, not inside a recording
        self._steps = torch.arange(math.ceil((window - 1) * max_speed) + 1, device=sequences.values.device)

    def gather(self, indices: Int64[Tensor, " batch"], generator: torch.Generator) -> SequenceBatch:
        """Returns a window of each of some sequences; `generator` draws where they begin, and their speeds."""
        noise = torch.empty(indices.shape, dtype=torch.int64, device=indices.device).random_(generator=generator)
        lengths = self.sequences.lengths.index_select(0, indices)
        if self.max_speed == 1.0:
            return self.sequences.windows(indices, _starts(noise, lengths, self.window), self._steps)
        uniform = torch.rand(indices.shape, generator=generator, device=indices.device, dtype=torch.float64)
        speeds = self.max_speed ** (2.0 * uniform - 1.0)
        spans = ((self.window - 1) * speeds).ceil().long() + 1
        starts = _starts(noise, lengths, spans)
        return play(self.sequences.windows(indices, starts, self._steps), speeds, self._steps[: self.window])


def _starts(noise: Tensor, lengths: Tensor, spans: Tensor | int) -> Tensor:
    """Returns where windows begin that cover so many steps."""
    # The remainder of 63 random bits is uniform to within 2^-63 times the number of places.
    places = noise % (lengths + spans - 1) - (spans - 1)
    return torch.minimum(places.clamp_min(0), (lengths - spans).clamp_min(0))


def play(batch: SequenceBatch, speeds: Float64[Tensor, " batch"], steps: Int64[Tensor, " window"]) -> SequenceBatch:
    """Returns sequences played at other speeds: step t is what was at t · speed, between two steps their interpolation.

    Args:
        batch: long enough for every speed; padded where a sequence ends.
        speeds: above zero.
        steps: 0, 1, ... up to the size of the new window.

    Example:
        >>> batch = SequenceBatch(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([4]), {}, torch.tensor([0]))
        >>> play(batch, torch.tensor([1.5], dtype=torch.float64), torch.arange(3)).values
        tensor([[0.0000, 1.5000, 3.0000]])
    """
    lengths = ((batch.lengths - 1) / speeds).long().clamp_max(len(steps) - 1) + 1
    real = steps < lengths[:, None]
    positions = torch.where(real, steps * speeds[:, None], 0.0)
    below = positions.long()
    above = torch.minimum(below + 1, batch.lengths[:, None] - 1)
    rows = torch.arange(len(speeds), device=speeds.device)[:, None]
    each = (*real.shape, *[1] * (batch.values.ndim - 2))  # for every feature of a step
    fractions = (positions - below).to(batch.values.dtype).view(each)
    values = torch.lerp(batch.values[rows, below], batch.values[rows, above], fractions)
    return SequenceBatch(values.masked_fill(~real.view(each), 0.0), lengths, batch.labels, batch.starts)
