"""The contract of a prior, and the two priors that need no encoder.

A prior is a module that returns a density over the latent space. Some priors (the VampPrior) are made of the
encoder's answers to inputs of their own; they name those inputs, and whoever owns the encoder encodes them, in one
batch with its data, and hands the result back:

    inputs = prior.pseudo_inputs()                                    # None where there are none
    density = prior(None if inputs is None else encoder(inputs)[0])   # a `GaussianEncoder` also returns its context
    density.log_density(z); density.sample(noise, uniform)
"""

import abc

import torch
from jaxtyping import Float
from torch import Tensor, nn

from popgen.distributions import DiagonalNormal, GaussianMixture, StandardNormal
from popgen.errors import check_integer, check_number

LOWEST_LOG_VAR = -6.0  # of an encoder, and so of a component


class Prior(nn.Module, abc.ABC):
    """A density over the latent space, perhaps made of encoded pseudo-inputs.

    Subclasses implement `forward`, and `pseudo_inputs` if they have any. The density that `forward` returns has
    `log_density(z)` of points of shape `(..., latent)`, and `sample(noise, uniform)` with standard normal noise of that
    shape and uniform noise of the shape `(...)`, which it need not use; both may pass gradients.

    Example:
        >>> class LearnedNormal(torch.nn.Module):
        ...     def __init__(self, mean, log_var):
        ...         super().__init__()
        ...         self.mean, self.log_var = mean, log_var
        ...     def log_density(self, z):
        ...         return DiagonalNormal(self.mean, self.log_var).log_density(z)
        ...     def sample(self, noise, uniform):
        ...         return DiagonalNormal(self.mean, self.log_var).sample(noise)
        >>> class LearnedNormalPrior(Prior):
        ...     def __init__(self, latent_dim):
        ...         super().__init__()
        ...         self.mean, self.log_var = (nn.Parameter(torch.zeros(latent_dim)) for _ in range(2))
        ...     def forward(self, encoded=None):
        ...         return LearnedNormal(self.mean, self.log_var)
        >>> LearnedNormalPrior(40)().log_density(torch.zeros(3, 40)).shape
        torch.Size([3])
    """

    def pseudo_inputs(self) -> Float[Tensor, "components input"] | None:
        """Returns the inputs that the encoder shall encode for `forward`, or None."""
        return None

    @abc.abstractmethod
    def forward(self, encoded: DiagonalNormal | None = None) -> StandardNormal | GaussianMixture:
        """Returns the density, given the encoder's posteriors at the pseudo-inputs."""


class StandardNormalPrior(Prior):
    """The standard Gaussian prior N(z; 0, I).

    Example:
        >>> StandardNormalPrior()().log_density(torch.zeros(3, 40)).shape
        torch.Size([3])
    """

    def forward(self, encoded: DiagonalNormal | None = None) -> StandardNormal:
        """Returns N(0, I)."""
        return StandardNormal()


class GaussianMixturePrior(Prior):
    """A mixture of Gaussians with learned means, variances and weights.

    The baseline "MoG" prior of Tomczak and Welling 2018, https://arxiv.org/abs/1705.07120, section 4. A log-variance
    below -6, the least of `GaussianEncoder`, counts as -6: float32 does not resolve much narrower components.

    Args:
        num_components: number of Gaussians.
        latent_dim: size of the latent space.
        initial_std: standard deviation of the initial means; the components start with unit variance.

    Example:
        >>> prior = GaussianMixturePrior(num_components=10, latent_dim=40)
        >>> prior().sample(noise=torch.randn(3, 40), uniform=torch.rand(3)).shape
        torch.Size([3, 40])
    """

    def __init__(self, num_components: int, latent_dim: int, initial_std: float = 1.0) -> None:
        super().__init__()
        check_integer("GaussianMixturePrior.num_components", num_components, minimum=1)
        self.latent_dim = check_integer("GaussianMixturePrior.latent_dim", latent_dim, minimum=1)
        check_number("GaussianMixturePrior.initial_std", initial_std, minimum=0.0)
        self.mean = nn.Parameter(initial_std * torch.randn(num_components, latent_dim))
        self.log_var = nn.Parameter(torch.zeros(num_components, latent_dim))
        self.logits = nn.Parameter(torch.zeros(num_components))

    def forward(self, encoded: DiagonalNormal | None = None) -> GaussianMixture:
        """Returns the mixture."""
        log_var = self.log_var.clamp_min(LOWEST_LOG_VAR)
        return GaussianMixture(self.mean, log_var, torch.log_softmax(self.logits, dim=0))
