"""The contract of a posterior flow, and the scalar equation that inverts flows of the Sylvester kind.

A `PosteriorFlow` is called once per image with the encoder's context and returns a `Bijection`, which can then be
applied to any number of samples: what depends on the image alone is computed once. Shapes are `(samples, batch,
latent)` for points and `(samples, batch)` for log-determinants, natural logarithms.
"""

import abc

import torch
from jaxtyping import Float
from torch import Tensor, nn

from popgen.errors import ArgumentError


class Bijection(abc.ABC):
    """An invertible map of the latent space, one for each example of a batch."""

    @abc.abstractmethod
    def forward_and_log_det(
        self, z: Float[Tensor, "samples batch latent"]
    ) -> tuple[Float[Tensor, "samples batch latent"], Float[Tensor, "samples batch"]]:
        """Returns f(z) and log |det ∂f/∂z|."""

    @abc.abstractmethod
    def inverse(self, z: Float[Tensor, "samples batch latent"]) -> Float[Tensor, "samples batch latent"]:
        """Returns the point that `forward_and_log_det` maps to `z`."""

    def push_score(
        self, z: Float[Tensor, "samples batch latent"], score: Float[Tensor, "samples batch latent"]
    ) -> Float[Tensor, "samples batch latent"]:
        """Returns the gradient of the log density of f(z) at f(z), where that of z is `score` at z.

            ∇ log q(f(z)) = J⁻ᵀ (∇ log q(z) - ∇ log |det J|),   J = ∂f/∂z

        which path-derivative gradients take (Vaitl et al. 2022, https://arxiv.org/abs/2207.08219); the parameters of
        the map are held, and no gradient passes through the result. A map without it trains by other objectives.

        Raises:
            ArgumentError: if the map has no such method.
        """
        raise ArgumentError(f"{type(self).__name__} has no push_score, which objectives with a path derivative need")


class PosteriorFlow(nn.Module, abc.ABC):
    """A module that returns a `Bijection` for a context, shape `(batch, context)`."""

    @abc.abstractmethod
    def forward(self, context: Float[Tensor, "batch context"]) -> Bijection:
        """Returns the bijections of a batch."""


def check_points(z: Tensor, batch: int, latent_dim: int) -> None:
    """Checks the shape of points, where another might be broadcast without a word.

    Raises:
        ArgumentError: if it is not `(samples, batch, latent)`.

    Example:
        >>> check_points(torch.zeros(7, 40), batch=7, latent_dim=40)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: z must have shape (samples, 7, 40), got (7, 40)
    """
    if z.ndim != 3 or tuple(z.shape[1:]) != (batch, latent_dim):
        raise ArgumentError(f"z must have shape (samples, {batch}, {latent_dim}), got {tuple(z.shape)}")


def solve_residual_tanh(target: Tensor, outer: Tensor, inner: Tensor, shift: Tensor) -> Tensor:
    """Returns the solution u of u + outer · tanh(inner · u + shift) = target, elementwise.

    With outer · inner > -1 the left side rises in u, and since |tanh| < 1 its root lies within |outer| of the
    target. Bisection finds it to the rounding of numbers as large as target and outer, whatever the slope; there is no
    step size to fail. The gradient is that of the solution, by the implicit function theorem.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> u = solve_residual_tanh(target=one, outer=0.5 * one, inner=one, shift=0 * one)
        >>> (u + 0.5 * torch.tanh(u)).item()
        1.0
    """
    u, slope = _bisected(target, outer, inner, shift)
    if not torch.is_grad_enabled():
        return u
    residual = u + outer * torch.tanh(inner * u + shift) - target
    return u - (residual - residual.detach()) / slope


@torch.no_grad()
def _bisected(target: Tensor, outer: Tensor, inner: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the solution, and the slope of the left side there."""
    lower, upper = target - outer.abs(), target + outer.abs()
    halvings = 2 - int(torch.log2(torch.tensor(torch.finfo(target.dtype).eps)).item())
    for _ in range(halvings):
        middle = 0.5 * (lower + upper)
        above = middle + outer * torch.tanh(inner * middle + shift) > target
        lower, upper = torch.where(above, lower, middle), torch.where(above, middle, upper)
    u = 0.5 * (lower + upper)
    return u, 1.0 + outer * inner * (1.0 - torch.tanh(inner * u + shift).square())
