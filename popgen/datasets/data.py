"""What a dataset is to a run: a description that loads splits, and splits that give batches."""

import abc
import os
import pathlib
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from popgen.errors import ArgumentError, check_integer
from popgen.streams import make_generator

DOWNLOAD_TIMEOUT_SECONDS = 30.0


def data_folder(data_dir: str | os.PathLike | None) -> pathlib.Path:
    """Returns where a dataset's files are: `data_dir`, or else `$POPGEN_DATA` if it is set, or else `data`.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, POPGEN_DATA="/data"):
        ...     data_folder(None) == pathlib.Path("/data"), data_folder("mine") == pathlib.Path("mine")
        (True, True)
    """
    return pathlib.Path(data_dir or os.environ.get("POPGEN_DATA") or "data")


@runtime_checkable
class Batches(Protocol):
    """The training batches of a run; which examples belong to a step is a function of the seed and the step alone."""

    def indices(self, step: int) -> Tensor:
        """Returns the indices of the examples of a step, shape `(batch_size,)`."""

    def gather(self, indices: Tensor, generator: torch.Generator) -> Any:
        """Returns the batch of some examples, on their device, without waiting for it."""

    def draw(self, step: int, generator: torch.Generator) -> Any:
        """Returns the batch of a step."""


class ShuffledBatches(Batches, abc.ABC):
    """Batches that visit the examples in a new random order every epoch; the last ones, too few for one, are left out.

    Args:
        count: how many examples there are.
        batch_size: examples in a batch.
        seed: of the order.
        device: where the indices go.
        examples: what they are, for the error message.

    Raises:
        ArgumentError: if a batch is larger than the data.

    Example: `popgen.datasets.images.TrainBatches` is one.
    """

    def __init__(self, count: int, batch_size: int, seed: int, device: torch.device, examples: str) -> None:
        check_integer("batch_size", batch_size, minimum=1)
        if batch_size > count:
            raise ArgumentError(f"batch_size must be at most the {count} training {examples}, got {batch_size}")
        self.batch_size = batch_size
        self.steps_per_epoch = count // batch_size
        self._count, self._seed, self._device = count, seed, device
        self._epoch, self._order = -1, torch.empty(0)

    def indices(self, step: int) -> Tensor:
        """Returns the indices of the examples of a step, int64, shape `(batch_size,)`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = make_generator("cpu", self._seed, "data order", epoch)
            self._epoch, self._order = epoch, torch.randperm(self._count, generator=generator).to(self._device)
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]

    @abc.abstractmethod
    def gather(self, indices: Tensor, generator: torch.Generator) -> Any:
        """Returns the batch of some examples, on their device, without waiting for it."""

    def draw(self, step: int, generator: torch.Generator) -> Any:
        """Returns the batch of a step; what is random in it is drawn from `generator`."""
        return self.gather(self.indices(step), generator)


@runtime_checkable
class Data(Protocol):
    """What a dataset loads. A split has a length and can be sliced; what else it is, models and evaluators know.

    Attributes:
        train: the training split.
        test: the test split.
    """

    @property
    def train(self) -> Any:
        """The training split."""

    @property
    def test(self) -> Any:
        """The test split."""

    def split(self, name: str) -> Any:
        """Returns the split of that name.

        Raises:
            DataError: if there is none.
        """

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Data":
        """Returns the same data on a device, what is floating point as `dtype`."""

    def batches(self, batch_size: int, seed: int) -> Batches:
        """Returns the training batches.

        Raises:
            ArgumentError: if a batch is larger than the data.
        """

    def facts(self) -> dict[str, Any]:
        """Returns what a record of results has to say of the data."""


@runtime_checkable
class Dataset(Protocol):
    """A description of data, cheap to build and free of it; any class with such a `load()` is one."""

    def load(self) -> Data:
        """Reads or makes the data."""


def first_examples(data: Data, num_examples: int | None) -> Any:
    """Returns the first test examples; None for all.

    Raises:
        ArgumentError: if there are fewer.

    Example: `run` calls it.
    """
    if num_examples is None:
        return data.test
    check_integer("num_examples", num_examples, minimum=1)
    if num_examples > len(data.test):
        raise ArgumentError(f"num_examples must be at most the {len(data.test)} test examples, got {num_examples}")
    return data.test[:num_examples]
