"""The Bernoulli likelihood of binary images."""

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from popgen.errors import DataError


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Independent Bernoulli variables given by their logits.

        log p(x) = Σ_i [x_i · logit_i - softplus(logit_i)]

    Attributes:
        logits: shape `(*sample, batch, event)`.

    Example:
        >>> likelihood = Bernoulli(logits=torch.zeros(5, 3, 784))
        >>> likelihood.log_density(torch.ones(3, 784)).shape  # -784 log 2 each
        torch.Size([5, 3])
    """

    logits: Float[Tensor, "*sample batch event"]

    def log_density(self, x: Float[Tensor, "batch event"]) -> Float[Tensor, "*sample batch"]:
        """Returns log p(x), nats, summed over the event axis, one value per sample and example.

        Args:
            x: values in [0, 1], shape `(batch, event)`, shared by all samples.
        """
        return torch.einsum("...be,be->...b", self.logits, x) - F.softplus(self.logits).sum(-1)

    @property
    def mean(self) -> Float[Tensor, "*sample batch event"]:
        """The probability of a one."""
        return torch.sigmoid(self.logits)

    def sample(self, uniform: Float[Tensor, "*sample batch event"]) -> Float[Tensor, "*sample batch event"]:
        """Returns binary draws, one where the uniform noise falls below the mean."""
        return (uniform < self.mean).to(self.logits.dtype)

    @staticmethod
    def check_support(images: Tensor) -> None:
        """Checks that images can have come from this likelihood; uint8 grey levels stand for level / 255.

        Raises:
            DataError: if a value is outside [0, 1] or not a number.
        """
        if images.dtype == torch.uint8:
            return
        lowest, highest = images.min().item(), images.max().item()
        if not (lowest >= 0.0 and highest <= 1.0):
            raise DataError(
                f"the images have values from {lowest:.4g} to {highest:.4g}, but a Bernoulli likelihood needs them "
                "within [0, 1]: rescale them, or use a decoder with another likelihood"
            )
