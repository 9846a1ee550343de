"""Laws of the bounds, and a linear-Gaussian model whose log-likelihood has a closed form."""

import dataclasses
import inspect
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from popgen.errors import ArgumentError
from popgen.losses import elbo, iwae

# The shape checks of the bounds themselves, below the type checker that the tests put in front of them.
unchecked_elbo = inspect.unwrap(elbo)


def make_terms(samples: int, batch: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Returns random log p(x|z), log p(z) and log q(z|x)."""
    scales = torch.tensor([90.0, 10.0, 5.0], dtype=dtype)[:, None, None]
    return tuple((scales * torch.randn(3, samples, batch, dtype=dtype) - scales).unbind())


@pytest.mark.parametrize("batch", [1, 5])
def test_iwae_with_one_sample_is_the_elbo(batch: int) -> None:
    """To the last bit that the order of additions allows."""
    log_p_x_given_z, log_p_z, log_q_z_given_x = make_terms(samples=1, batch=batch)
    bound = elbo(log_p_x_given_z, log_p_z, log_q_z_given_x)
    assert bound.shape == (batch,)
    torch.testing.assert_close(iwae(log_p_x_given_z + log_p_z - log_q_z_given_x), bound, rtol=0, atol=1e-12)


def test_elbo_is_the_mean_over_its_samples() -> None:
    """Each sample's own bound, averaged: samples are the first axis, examples the second."""
    terms = make_terms(samples=4)
    alone = [elbo(*(term[k : k + 1] for term in terms)) for k in range(4)]
    torch.testing.assert_close(elbo(*terms), torch.stack(alone).mean(0))


def test_beta_weighs_the_divergence_alone() -> None:
    """The bound is a straight line in β, from the reconstruction at 0 with the negative divergence as its slope."""
    log_p_x_given_z, log_p_z, log_q_z_given_x = make_terms(samples=3)
    reconstruction = log_p_x_given_z.mean(0)
    divergence = log_q_z_given_x.mean(0) - log_p_z.mean(0)
    for beta in (0.0, 0.3, 1.0, 4.0):
        bound = elbo(log_p_x_given_z, log_p_z, log_q_z_given_x, beta)
        torch.testing.assert_close(bound, reconstruction - beta * divergence)
    torch.testing.assert_close(elbo(log_p_x_given_z, log_p_z, log_q_z_given_x), reconstruction - divergence)


def group_bound(log_w: Tensor, size: int) -> Tensor:
    """Returns the importance-weighted bound averaged over disjoint groups of samples."""
    return torch.stack([iwae(group) for group in log_w.split(size)]).mean(0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_iwae_does_not_fall_with_more_samples(scale: float) -> None:
    """Groups of the same draws merged into larger ones never lower the average bound (Jensen's inequality)."""
    log_w = scale * torch.randn(24, 50, dtype=torch.float64) - 90.0
    bounds = {size: group_bound(log_w, size) for size in (1, 2, 3, 4, 6, 8, 12, 24)}
    torch.testing.assert_close(bounds[1], log_w.mean(0))
    for small, low in bounds.items():
        for large, high in bounds.items():
            if large > small and large % small == 0:
                assert (high >= low - 1e-12).all(), (small, large)
                assert (high > low).any(), (small, large)


def test_iwae_is_the_logarithm_of_the_mean_weight() -> None:
    """The formula, where the weights themselves fit into float64."""
    log_w = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(iwae(log_w), log_w.exp().mean(0).log())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.float64, 1e-9)])
def test_iwae_does_not_overflow(dtype: torch.dtype, tolerance: float) -> None:
    """Adding a constant to all log weights adds it to the bound, however large; a weight of zero is no trouble."""
    log_w = torch.randn(7, 5, dtype=dtype)
    log_w[3] = -math.inf
    for constant in (-1e4, 1e4):
        torch.testing.assert_close(iwae(log_w + constant), iwae(log_w) + constant, rtol=0, atol=tolerance)


def test_gradient_of_iwae_is_the_normalised_weight() -> None:
    """Equation 14 of Burda et al.: each sample counts by its share of the total weight."""
    log_w = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(iwae(log_w).sum(), log_w)
    weights = log_w.detach().exp()
    torch.testing.assert_close(gradient, weights / weights.sum(0))


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_elbo_refuses_terms_of_different_shapes(wrong: int) -> None:
    """Terms that would broadcast silently are refused, and all three shapes are named."""
    terms = [torch.zeros(2, 3) for _ in range(3)]
    terms[wrong] = torch.zeros(1, 3)
    with pytest.raises(ArgumentError, match=r"\(2, 3\).*") as error:
        unchecked_elbo(*terms)
    assert "(1, 3)" in str(error.value)
    assert all(name in str(error.value) for name in ("log_p_x_given_z", "log_p_z", "log_q_z_given_x"))


def test_iwae_refuses_no_samples() -> None:
    """The bound of no samples does not exist."""
    with pytest.raises(ArgumentError, match=r"log_w must hold at least one sample, got shape \(0, 3\)"):
        iwae(torch.zeros(0, 3))


@dataclasses.dataclass(frozen=True)
class LinearGaussian:
    """p(z) = N(0, I), p(x|z) = N(W z + b, s² I), for a batch of observations, in float64."""

    weight: Tensor
    bias: Tensor
    std: float
    x: Tensor

    @property
    def prior(self) -> MultivariateNormal:
        return MultivariateNormal(torch.zeros(self.latent_dim).double(), torch.eye(self.latent_dim).double())

    @property
    def latent_dim(self) -> int:
        return self.weight.shape[1]

    def likelihood(self, z: Tensor) -> MultivariateNormal:
        """Returns p(x|z)."""
        return MultivariateNormal(z @ self.weight.T + self.bias, self.std**2 * torch.eye(len(self.bias)).double())

    def log_p_x(self) -> Tensor:
        """Returns log p(x) of each observation: x is Gaussian with covariance W Wᵀ + s² I."""
        covariance = self.weight @ self.weight.T + self.std**2 * torch.eye(len(self.bias)).double()
        return MultivariateNormal(self.bias, covariance).log_prob(self.x)

    def posterior(self) -> MultivariateNormal:
        """Returns p(z|x), by conditioning the joint Gaussian of (z, x)."""
        gain = self.weight.T @ torch.linalg.inv(
            self.weight @ self.weight.T + self.std**2 * torch.eye(len(self.bias)).double()
        )
        covariance = torch.eye(self.latent_dim).double() - gain @ self.weight
        return MultivariateNormal((self.x - self.bias) @ gain.T, 0.5 * (covariance + covariance.T))

    def terms(self, q: MultivariateNormal, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log p(x|z), log p(z) and log q(z|x) at draws from q."""
        z = q.sample((samples,))
        return self.likelihood(z).log_prob(self.x), self.prior.log_prob(z), q.log_prob(z)


@pytest.fixture
def model() -> LinearGaussian:
    """Two latent and four observed dimensions, three observations."""
    weight, bias = torch.randn(4, 2).double(), torch.randn(4).double()
    return LinearGaussian(weight, bias, std=0.5, x=2.0 * torch.randn(3, 4).double())


def test_exact_posterior_makes_both_bounds_tight(model: LinearGaussian) -> None:
    """Every single sample gives log p(x): no bias and no variance."""
    terms = model.terms(model.posterior(), samples=50)
    for sample in range(50):
        bound = elbo(*(term[sample : sample + 1] for term in terms))
        torch.testing.assert_close(bound, model.log_p_x(), rtol=0, atol=1e-9)
    log_w = terms[0] + terms[1] - terms[2]
    for samples in (1, 3, 50):
        torch.testing.assert_close(iwae(log_w[:samples]), model.log_p_x(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shift, stretch", [(0.1, 1.2), (0.0, 1.5), (-0.2, 1.3)])
def test_wrong_posterior_costs_its_divergence(model: LinearGaussian, shift: float, stretch: float) -> None:
    """The ELBO is below log p(x) by KL(q ‖ p(z|x)); many importance samples make that good."""
    exact = model.posterior()
    q = MultivariateNormal(exact.mean + shift, stretch**2 * exact.covariance_matrix)
    terms = model.terms(q, samples=40_000)
    log_w = terms[0] + terms[1] - terms[2]
    error = log_w.std(0) / math.sqrt(len(log_w))
    gap = kl_divergence(q, exact)
    assert (gap > 10.0 * error).all()
    assert ((elbo(*terms) - (model.log_p_x() - gap)).abs() < 5.0 * error).all()
    torch.testing.assert_close(iwae(log_w), model.log_p_x(), rtol=0, atol=0.02)
