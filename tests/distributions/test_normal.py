"""Diagonal Gaussians against torch.distributions."""

import pytest
import torch
from torch.distributions import Independent, Normal

from popgen.distributions import DiagonalNormal, StandardNormal

BATCH_SHAPES = [(), (1,), (3,), (2, 3)]
SAMPLE_SHAPES = [(), (1,), (5,), (4, 5)]


def make_normal(*batch_shape: int, latent_dim: int = 4, dtype: torch.dtype = torch.float64) -> DiagonalNormal:
    """Returns a Gaussian with random means and variances far from one."""
    shape = (*batch_shape, latent_dim)
    return DiagonalNormal(mean=3.0 * torch.randn(shape, dtype=dtype), log_var=2.0 * torch.randn(shape, dtype=dtype))


def oracle(normal: DiagonalNormal) -> Independent:
    """Returns the same distribution from torch.distributions."""
    return Independent(Normal(normal.mean, torch.exp(0.5 * normal.log_var)), 1)


@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
@pytest.mark.parametrize("sample_shape", SAMPLE_SHAPES)
def test_log_density_equals_torch(batch_shape: tuple[int, ...], sample_shape: tuple[int, ...]) -> None:
    """Any number of samples, any batch, a batch of one too."""
    normal = make_normal(*batch_shape)
    z = torch.randn(*sample_shape, *batch_shape, 4, dtype=torch.float64)
    log_density = normal.log_density(z)
    assert log_density.shape == (*sample_shape, *batch_shape)
    torch.testing.assert_close(log_density, oracle(normal).log_prob(z))


def test_log_density_broadcasts_points_against_many_means() -> None:
    """As a Gaussian likelihood it meets one observation with many samples of its mean."""
    likelihood = make_normal(5, 3)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(likelihood.log_density(x), oracle(likelihood).log_prob(x))


@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
@pytest.mark.parametrize("sample_shape", SAMPLE_SHAPES)
def test_sample_and_log_density_agree(batch_shape: tuple[int, ...], sample_shape: tuple[int, ...]) -> None:
    """The log density that comes with a sample is the log density at that sample."""
    normal = make_normal(*batch_shape)
    noise = torch.randn(*sample_shape, *batch_shape, 4, dtype=torch.float64)
    z, log_density = normal.sample_and_log_density(noise)
    torch.testing.assert_close(z, normal.sample(noise), rtol=0, atol=0)
    torch.testing.assert_close(log_density, oracle(normal).log_prob(z))


def test_sample_inverts_the_cumulative_distribution() -> None:
    """Standard normal noise keeps its quantile, so samples have the stated distribution."""
    normal = make_normal(3)
    noise = torch.randn(7, 3, 4, dtype=torch.float64)
    quantiles = oracle(normal).base_dist.cdf(normal.sample(noise))
    torch.testing.assert_close(quantiles, Normal(0.0, 1.0).cdf(noise), rtol=0, atol=1e-12)


def test_sample_is_reparameterised() -> None:
    """Gradients reach mean and log-variance: dz/dμ = 1 and dz/dlog σ² = (z - μ)/2."""
    normal = make_normal(3)
    normal.mean.requires_grad_()
    normal.log_var.requires_grad_()
    z = normal.sample(torch.randn(3, 4, dtype=torch.float64))
    by_mean, by_log_var = torch.autograd.grad(z.sum(), (normal.mean, normal.log_var))
    torch.testing.assert_close(by_mean, torch.ones_like(by_mean))
    torch.testing.assert_close(by_log_var, (0.5 * (z - normal.mean)).detach())


@pytest.mark.parametrize("log_var", [-6.0, 2.0])
def test_float32_is_accurate(log_var: float) -> None:
    """At the ends of the encoder's range of log-variances float32 loses no more than 1e-3 nats of 40 dimensions."""
    mean, noise = 3.0 * torch.randn(100, 40), torch.randn(100, 40)
    normal = DiagonalNormal(mean, torch.full_like(mean, log_var))
    z, log_density = normal.sample_and_log_density(noise)
    assert log_density.dtype == torch.float32
    exact = oracle(DiagonalNormal(mean.double(), normal.log_var.double())).log_prob(z.double())
    torch.testing.assert_close(normal.log_density(z).double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (2, 3, 4)])
def test_standard_normal_equals_torch(shape: tuple[int, ...]) -> None:
    """Any leading shape; the draw is the noise, whatever the uniform numbers say."""
    z = 3.0 * torch.randn(shape, dtype=torch.float64)
    log_density = StandardNormal().log_density(z)
    assert log_density.shape == shape[:-1]
    torch.testing.assert_close(log_density, Independent(Normal(torch.zeros_like(z), 1.0), 1).log_prob(z))
    assert torch.equal(StandardNormal().sample(noise=z, uniform=torch.rand(shape[:-1], dtype=torch.float64)), z)
