"""What every model offers to a run."""

import abc
from typing import Any

from torch import nn


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
