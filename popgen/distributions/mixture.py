"""The density of a mixture of diagonal Gaussians, by one matrix product."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from popgen.distributions.normal import LOG_TWO_PI


@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    """A mixture of diagonal Gaussians, p(z) = Σ_k w_k N(z; mean_k, diag(exp(log_var_k))).

    The square is expanded, so that all pairs of points and components come out of one matrix product and no
    `(components, batch, latent)` tensor is ever formed:

        log N(z; μ_k, σ_k²) = [z², z] · [-1/(2σ_k²), μ_k/σ_k²] - 1/2 Σ_i [μ_ki²/σ_ki² + log σ_ki² + log 2π]

    The expansion cancels badly in float32 (whole hundredths of a nat at log-variance -6), so the product and the
    constant are formed in float64 and the result is rounded once, where it is of the size of the answer.

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
        """Returns log w_k + log N(z; mean_k, σ_k²) for every point and component, nats."""
        points, mean, log_var = z.double(), self.mean.double(), self.log_var.double()
        precision = torch.exp(-log_var)
        constant = -0.5 * (mean.square() * precision + log_var + LOG_TWO_PI).sum(-1)
        constant = constant + self._log_weights().double()
        coefficients = torch.cat([-0.5 * precision, mean * precision], dim=-1)
        features = torch.cat([points.square(), points], dim=-1).reshape(-1, coefficients.shape[1])
        log_densities = torch.addmm(constant, features, coefficients.T)
        return log_densities.to(z.dtype).reshape(*z.shape[:-1], len(self.mean))

    def log_density(self, z: Float[Tensor, "*sample latent"]) -> Float[Tensor, "*sample"]:
        """Returns log p(z), nats, for any leading shape."""
        return torch.logsumexp(self.component_log_densities(z), dim=-1)

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
        return self.mean[component] + torch.exp(0.5 * self.log_var[component]) * noise

    def _log_weights(self) -> Float[Tensor, " components"]:
        if self.log_weights is not None:
            return self.log_weights
        return self.mean.new_full((len(self.mean),), -math.log(len(self.mean)))
