"""The Bernoulli likelihood of binary images."""

import dataclasses

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from popgen.errors import ArgumentError, DataError
from popgen.tensors import can_be_read

HALVINGS = 4  # of the factors of a logarithm: up to sixteen in one


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Independent Bernoulli variables given by their logits.

        log p(x) = Σ_i [x_i · logit_i - softplus(logit_i)]

    Whatever the types of logits and images, values are formed in float32 at least.

    Derivatives are those of reverse mode alone, of any order: `torch.func.jacrev` twice makes a Hessian, where
    `torch.func.hessian` needs forward mode, with which torch.compile could not trace the density.

    Attributes:
        logits: shape `(*sample, batch, event)`.

    Example:
        >>> likelihood = Bernoulli(logits=torch.zeros(5, 3, 784))
        >>> likelihood.log_density(torch.ones(3, 784)).shape  # -784 log 2 each
        torch.Size([5, 3])
    """

    logits: Float[Tensor, "*sample batch event"]

    def log_density(self, x: Shaped[Tensor, "batch event"]) -> Float[Tensor, "*sample batch"]:
        """Returns log p(x), nats, summed over the event axis, one value per sample and example.

        Args:
            x: values in [0, 1], shape `(batch, event)`, shared by all samples; integers and booleans are 0 or 1.

        Raises:
            DataError: if an integer is neither, as far as that is known without waiting for a GPU.
            ArgumentError: if images and logits are not of one size.
        """
        if x.shape[-1] != self.logits.shape[-1]:
            raise ArgumentError(f"x has events of size {x.shape[-1]}, and the logits of size {self.logits.shape[-1]}")
        if not x.is_floating_point() and can_be_read(x) and not bool(((x == 0) | (x == 1)).all()):
            raise DataError("integers in x must be 0 or 1: divide grey levels by 255")
        dtype = torch.promote_types(torch.promote_types(self.logits.dtype, x.dtype), torch.float32)
        return _LogDensity.apply(self.logits.to(dtype), x.to(dtype))

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


class _LogDensity(torch.autograd.Function):
    """Σ_i [x_i l_i - softplus(l_i)], whose gradient in l is x - sigmoid(l).

    softplus(l) is taken as relu(l) + log(1 + exp(-|l|)). What stands in the logarithm is between 1 and 2, so up to
    sixteen factors are multiplied before one logarithm is taken of them: their product is at most 2^16, and as exact as
    the sum of their logarithms.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, x: Tensor) -> Tensor:
        factors = logits.abs().neg_().exp_().add_(1.0)
        for _ in range(HALVINGS):
            if factors.shape[-1] % 2 == 0:
                first, second = factors.chunk(2, dim=-1)
                factors = first * second
        return (x * logits).sub_(logits.relu()).sum(-1) - factors.log_().sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        logits, x = ctx.saved_tensors
        gradient = gradient[..., None]
        x_gradient = (gradient * logits).sum_to_size(x.shape) if ctx.needs_input_grad[1] else None
        return (x - torch.sigmoid(logits)) * gradient, x_gradient
