"""The density of a mixture of diagonal Gaussians, by one matrix product."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from popgen.distributions.normal import LOG_TWO_PI, DiagonalNormal
from popgen.errors import ArgumentError
from popgen.precision import at_least_float32, full_precision
from popgen.products import linear


@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    """A mixture of diagonal Gaussians, p(z) = Σ_k w_k N(z; mean_k, diag(exp(log_var_k))).

    The square is expanded, so that all pairs of points and components come out of one matrix product and no
    `(components, batch, latent)` tensor is ever formed. With the mean of all means as origin,

        log N(z; μ_k, σ_k²) = Σ_i [-1/(2σ_ki²), μ_ki/σ_ki², -μ_ki²/(2σ_ki²)] · [z_i², z_i, 1] - 1/2 Σ_i log 2πσ_ki²

    The three terms of a coordinate cancel, so they lie side by side in the product, where the partial sums stay as
    small as the answer. Coefficients are rounded so that each square vanishes at its own mean, and what the rounding of
    the third one leaves is added to the constant in float64. In float32, for means up to 3 and log-variances of -6 or
    more, the error of draws from the mixture has a mean below 1e-4 nats and a size below 5e-3. It grows with the
    squared distance from the origin in units of the variance: narrower components, and points far from all, need
    float64. Log-variances below -80 have no reciprocal in float32.

    Derivatives are those of reverse mode alone, of any order: `torch.func.jacrev` twice makes a Hessian, where
    `torch.func.hessian` needs forward mode, with which torch.compile could not trace the density.

    Attributes:
        mean: shape `(components, latent)`.
        log_var: shape `(components, latent)`.
        log_weights: shape `(components,)`, normalised; None means equal weights.

    Example:
        >>> mixture = GaussianMixture(mean=torch.randn(500, 40), log_var=torch.zeros(500, 40))
        >>> mixture.log_density(torch.randn(2, 7, 40)).shape
        torch.Size([2, 7])
    """

    mean: Float[Tensor, "components latent"]
    log_var: Float[Tensor, "components latent"]
    log_weights: Float[Tensor, " components"] | None = None

    def component_log_densities(self, z: Float[Tensor, "*sample latent"]) -> Float[Tensor, "*sample components"]:
        """Returns log w_k + log N(z; mean_k, σ_k²) for every point and component, nats.

        Raises:
            ArgumentError: if points and means are not of one size.
        """
        if z.shape[-1] != self.mean.shape[-1]:
            raise ArgumentError(f"z has points of size {z.shape[-1]}, and the means are of size {self.mean.shape[-1]}")
        z = at_least_float32(z)
        dtype, origin = z.dtype, self.mean.to(z.dtype).mean(0)
        mean, log_var = self.mean.double() - origin.double(), self.log_var.double()
        quadratic = -0.5 * torch.exp(-log_var).to(dtype).double()
        linear_term = (-2.0 * quadratic * mean).to(dtype).double()
        exact = -(quadratic * mean + linear_term) * mean
        constant = exact.to(dtype)
        offset = (exact - constant - 0.5 * (log_var + LOG_TWO_PI)).sum(-1) + self._log_weights()
        coefficients = torch.stack([quadratic.to(dtype), linear_term.to(dtype), constant], dim=-1).flatten(-2)
        points = z - origin
        features = torch.stack([points.square(), points, torch.ones_like(points)], dim=-1).flatten(-2)
        log_densities = _Product.apply(offset.to(dtype), features.reshape(-1, coefficients.shape[1]), coefficients)
        return log_densities.reshape(*z.shape[:-1], len(mean))

    def log_density(self, z: Float[Tensor, "*sample latent"]) -> Float[Tensor, "*sample"]:
        """Returns log p(z), nats, for any leading shape."""
        return _LogSumExp.apply(self.component_log_densities(z))

    def sample(
        self, noise: Float[Tensor, "*sample latent"], uniform: Float[Tensor, "*sample"]
    ) -> Float[Tensor, "*sample latent"]:
        """Returns draws from the whole mixture.

        Args:
            noise: standard normal, shape `(*sample, latent)`.
            uniform: uniform on [0, 1), shape `(*sample,)`; it chooses the component by inverting the weights'
                cumulative sum.
        """
        cumulative = self._log_weights().double().exp().cumsum(0)
        component = torch.searchsorted(cumulative, uniform.double() * cumulative[-1], right=True)
        component = component.clamp(max=len(self.mean) - 1)
        return DiagonalNormal(self.mean[component], self.log_var[component]).sample(noise)

    def _log_weights(self) -> Float[Tensor, " components"]:
        if self.log_weights is not None:
            return self.log_weights
        return self.mean.new_full((len(self.mean),), -math.log(len(self.mean)), dtype=torch.float64)


class _Product(torch.autograd.Function):
    """offset + features · coefficientsᵀ at full precision, and its gradients too: their terms also cancel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(offset: Tensor, features: Tensor, coefficients: Tensor) -> Tensor:
        with full_precision(features.device):
            return linear(features, coefficients, offset)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, coefficients = ctx.saved_tensors
        with full_precision(features.device):
            return gradient.sum(0), linear(gradient, coefficients.T), linear(gradient.T, features.T)


class _LogSumExp(torch.autograd.Function):
    """log Σ_k exp(x_k) over the last axis, whose gradient is softmax(x); x is finite.

    The softmax at the largest x is exp(max x - log Σ exp(x)), at least 1/K. On a CPU torch.logsumexp takes far
    longer where most terms underflow, as they do for components far from a point.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.amax(-1) - torch.softmax(x, dim=-1).amax(-1).log_()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.softmax(ctx.saved_tensors[0], dim=-1) * gradient[..., None]
