"""What every model offers to a run."""

import abc
import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from popgen.errors import ArgumentError, PopgenError, reason_of
from popgen.precision import matrix_products

LIBRARY = Path(__file__).resolve().parents[1]


class Model(nn.Module, abc.ABC):
    """A model that can be trained: a module that says whether data fits it.

    Example: `popgen.models.image_model.ImageModel` is one.
    """

    @abc.abstractmethod
    def check_examples(self, examples: Any) -> None:
        """Checks that the examples of a split fit the model.

        Raises:
            DataError: if they do not.
        """

    def check_parts(self, examples: Any) -> None:
        """Checks on a few examples, which fit, that the parts of the model fit each other; nothing unless defined.

        Raises:
            ArgumentError: if they do not.
        """


def check_equal(owner: str, name: str, size: Any, other: str, wanted: Any) -> None:
    """Checks that two parts of a model state the same size; a part of one's own need not state it, which is None.

    Raises:
        ArgumentError: if they do not.

    Example:
        >>> check_equal("VAE", "decoder.latent_dim", 40, "encoder.latent_dim", 30)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: VAE: decoder.latent_dim is 40, but encoder.latent_dim is 30; the two must be equal
    """
    if size is not None and wanted is not None and size != wanted:
        raise ArgumentError(f"{owner}: {name} is {size}, but {other} is {wanted}; the two must be equal")


@contextlib.contextmanager
def tried(model: nn.Module, doing: str) -> Iterator[None]:
    """Tries a model out as an evaluation would, at full precision; an error in a part of it becomes one line.

    Args:
        model: whose parts may be anyone's.
        doing: what is tried.

    Raises:
        ArgumentError: in place of what is not the project's error.

    Example:
        >>> with tried(nn.Linear(2, 1), "Linear cannot be applied to text"):
        ...     nn.Linear(2, 1)("text")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: Linear cannot be applied to text: linear(): argument 'input' ...
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), matrix_products("fp32", next(model.parameters()).device):
            model.eval()
            yield
    except PopgenError:
        raise
    except Exception as error:
        raise ArgumentError(f"{doing}: {reason_of(error)}{_place(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _place(error: Exception) -> str:
    """Returns the innermost line that an error passed, of code that is neither popgen's nor an installed package's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and "site-packages" not in path.parts and LIBRARY not in path.parents:
            return f" ({path}, line {frame.lineno})"
    return ""
