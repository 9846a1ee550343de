"""Gaussian densities with a diagonal covariance."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from popgen.precision import at_least_float32

LOG_TWO_PI = math.log(2.0 * math.pi)


@dataclasses.dataclass(frozen=True)
class DiagonalNormal:
    """A Gaussian with independent coordinates, N(z; mean, diag(exp(log_var))).

        log N(z) = -1/2 Σ_i [log 2π + log_var_i + (z_i - mean_i)² / exp(log_var_i)]

    Whatever the type of the network that made its parameters, values are formed in float32 at least.

    Attributes:
        mean: shape `(*batch, latent)`.
        log_var: shape `(*batch, latent)`, the logarithm of the variance.

    Example:
        >>> posterior = DiagonalNormal(mean=torch.zeros(3, 2), log_var=torch.zeros(3, 2))
        >>> z = posterior.sample(noise=torch.randn(5, 3, 2))
        >>> posterior.log_density(z).shape
        torch.Size([5, 3])
    """

    mean: Float[Tensor, "*batch latent"]
    log_var: Float[Tensor, "*batch latent"]

    def log_density(self, z: Float[Tensor, "*sample latent"]) -> Float[Tensor, "*broadcast"]:
        """Returns log N(z), nats, summed over the last axis; leading axes broadcast."""
        mean, log_var = at_least_float32(self.mean), at_least_float32(self.log_var)
        standardised = (z - mean) * torch.exp(-0.5 * log_var)
        return -0.5 * (standardised.square() + log_var + LOG_TWO_PI).sum(-1)

    def sample(self, noise: Float[Tensor, "*sample latent"]) -> Float[Tensor, "*sample latent"]:
        """Returns mean + exp(log_var / 2) · noise for standard normal noise (reparameterised)."""
        return at_least_float32(self.mean) + torch.exp(0.5 * at_least_float32(self.log_var)) * noise

    def sample_and_log_density(
        self, noise: Float[Tensor, "*sample latent"]
    ) -> tuple[Float[Tensor, "*sample latent"], Float[Tensor, "*sample"]]:
        """Returns a sample and its log density, which the noise gives without undoing the sampling."""
        log_density = -0.5 * (at_least_float32(noise).square() + at_least_float32(self.log_var) + LOG_TWO_PI).sum(-1)
        return self.sample(noise), log_density


@dataclasses.dataclass(frozen=True)
class StandardNormal:
    """The standard Gaussian N(z; 0, I).

    Example:
        >>> prior = StandardNormal()
        >>> round(prior.log_density(torch.zeros(1, 2)).item(), 4)  # -log 2π
        -1.8379
    """

    def log_density(self, z: Float[Tensor, "*sample latent"]) -> Float[Tensor, "*sample"]:
        """Returns log N(z; 0, I), nats, summed over the last axis."""
        return -0.5 * (at_least_float32(z).square() + LOG_TWO_PI).sum(-1)

    def sample(
        self, noise: Float[Tensor, "*sample latent"], uniform: Float[Tensor, "*sample"]
    ) -> Float[Tensor, "*sample latent"]:
        """Returns the noise itself; `uniform` would choose a component, and there is only one."""
        return noise
