"""What a dataset is to a run: a description that loads splits, and splits that give batches."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Batches(Protocol):
    """The training batches of a run; which examples belong to a step is a function of the seed and the step alone."""

    def indices(self, step: int) -> Tensor:
        """Returns the indices of the examples of a step, shape `(batch_size,)`."""

    def gather(self, indices: Tensor, generator: torch.Generator) -> Any:
        """Returns the batch of some examples, on their device, without waiting for it."""

    def draw(self, step: int, generator: torch.Generator) -> Any:
        """Returns the batch of a step."""


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
