"""Mixtures of Gaussians against torch.distributions and the textbook formula in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from popgen.distributions import DiagonalNormal, GaussianMixture


def make_mixture(
    num_components: int = 7, latent_dim: int = 3, weighted: bool = True, dtype: torch.dtype = torch.float64
) -> GaussianMixture:
    """Returns a random mixture, with random weights or with none."""
    logits = 2.0 * torch.randn(num_components, dtype=dtype)
    return GaussianMixture(
        mean=2.0 * torch.randn(num_components, latent_dim, dtype=dtype),
        log_var=torch.randn(num_components, latent_dim, dtype=dtype),
        log_weights=torch.log_softmax(logits, 0) if weighted else None,
    )


def oracle(mixture: GaussianMixture) -> MixtureSameFamily:
    """Returns the same distribution from torch.distributions."""
    log_weights = mixture.log_weights
    logits = torch.zeros_like(mixture.mean[:, 0]) if log_weights is None else log_weights
    components = Independent(Normal(mixture.mean, torch.exp(0.5 * mixture.log_var)), 1)
    return MixtureSameFamily(Categorical(logits=logits), components)


def textbook_log_density(z: Tensor, mean: Tensor, log_var: Tensor, log_weights: Tensor) -> Tensor:
    """Returns log Σ_k w_k N(z; μ_k, σ_k²) from all differences z - μ_k, points × components × latent."""
    squares = (z[:, None] - mean) ** 2 / torch.exp(log_var) + log_var + math.log(2.0 * math.pi)
    return torch.logsumexp(log_weights - 0.5 * squares.sum(-1), dim=1)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 5), (1, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_log_density_equals_torch(shape: tuple[int, ...], weighted: bool) -> None:
    """Any leading shape: none, one point, several axes."""
    mixture = make_mixture(weighted=weighted)
    z = 2.0 * torch.randn(*shape, 3, dtype=torch.float64)
    log_density = mixture.log_density(z)
    assert log_density.shape == shape
    torch.testing.assert_close(log_density, oracle(mixture).log_prob(z))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_points_have_no_densities(shape: tuple[int, ...]) -> None:
    """An empty batch is a batch."""
    mixture = make_mixture()
    noise, uniform = torch.empty(*shape, 3, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    assert mixture.log_density(noise).shape == shape
    assert mixture.sample(noise, uniform).shape == (*shape, 3)


@pytest.mark.parametrize("weighted", [False, True])
def test_component_log_densities_equal_torch(weighted: bool) -> None:
    """Weight and density of each component; as responsibilities they sum to one."""
    mixture = make_mixture(weighted=weighted)
    z = torch.randn(2, 5, 3, dtype=torch.float64)
    reference = oracle(mixture)
    expected = reference.component_distribution.log_prob(z[..., None, :]) + reference.mixture_distribution.logits
    log_densities = mixture.component_log_densities(z)
    torch.testing.assert_close(log_densities, expected)
    total = (log_densities - mixture.log_density(z)[..., None]).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_one_component_is_a_gaussian() -> None:
    """A mixture of one, and a mixture of one repeated, are that component."""
    normal = DiagonalNormal(torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64))
    z = torch.randn(5, 3, dtype=torch.float64)
    for copies in (1, 4):
        mixture = GaussianMixture(normal.mean.expand(copies, 3), normal.log_var.expand(copies, 3))
        torch.testing.assert_close(mixture.log_density(z), normal.log_density(z))


@pytest.mark.parametrize("low, high", [(-6.0, -6.0), (2.0, 2.0), (-6.0, 2.0)])
@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_float32_is_accurate_where_the_encoder_can_put_components(
    low: float, high: float, spread: float, weighted: bool
) -> None:
    """No point is off by 1e-3 nats, at the paper's size, over all log-variances in [-6, 2] and means up to 3."""
    mean = spread * (2.0 * torch.rand(500, 40) - 1.0)
    log_var = low + (high - low) * torch.rand(500, 40)
    log_weights = torch.log_softmax(torch.randn(500), 0) if weighted else None
    mixture = GaussianMixture(mean, log_var, log_weights)
    z = mixture.sample(noise=torch.randn(200, 40), uniform=torch.rand(200))
    log_density = mixture.log_density(z)
    assert log_density.dtype == torch.float32
    exact_weights = torch.full((500,), -math.log(500), dtype=torch.float64) if log_weights is None else log_weights
    exact = textbook_log_density(z.double(), mean.double(), log_var.double(), exact_weights.double())
    torch.testing.assert_close(log_density.double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("log_var", [-6.0, -4.0, -2.0, 0.0, 2.0])
@pytest.mark.parametrize("place", ["anywhere", "corners", "far away"])
def test_float32_error_at_the_paper_s_size(log_var: float, place: str) -> None:
    """500 components in 40 dimensions with means up to 3: below 1e-4 nats on average, 5e-3 nats for any point.

    Far from the origin and close together the components are as exact as around it, since they are centred; at the
    corners the constants' rounding has one sign, and is put right.
    """
    mean = 6.0 * torch.rand(500, 40) - 3.0
    if place == "corners":  # all coordinates alike, so that rounding errors add up instead of cancelling
        mean = 3.0 * torch.sign(mean)
    elif place == "far away":  # all components on one side of the origin
        mean = 3.0 - 0.1 * torch.rand(500, 40)
    variances, weights = torch.full((500, 40), log_var), torch.full((500,), -math.log(500.0))
    z = mean[torch.randint(500, (1_000,))] + math.exp(0.5 * log_var) * torch.randn(1_000, 40)
    exact = torch.cat(
        [textbook_log_density(part.double(), mean.double(), variances.double(), weights) for part in z.split(100)]
    )
    error = GaussianMixture(mean, variances).log_density(z).double() - exact
    mean_limit, limit = {"anywhere": (1e-4, 5e-3), "corners": (3e-5, 5e-3), "far away": (1e-5, 1e-4)}[place]
    assert error.mean().abs() < mean_limit and error.abs().max() < limit


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_log_sum_exp_equals_torch(spread: float) -> None:
    """Its value and gradient, with terms that underflow and a component of no weight, and under vmap."""
    mixture = make_mixture(weighted=True)
    weights = mixture.log_weights.clone()
    weights[2] = -math.inf
    mixture = GaussianMixture(spread * mixture.mean, mixture.log_var, weights)
    z = (spread * torch.randn(6, 3, dtype=torch.float64)).requires_grad_()
    found, expected = mixture.log_density(z), torch.logsumexp(mixture.component_log_densities(z), -1)
    torch.testing.assert_close(found, expected)
    gradient = torch.autograd.grad(expected.sum(), z)[0]
    torch.testing.assert_close(torch.autograd.grad(found.sum(), z)[0], gradient)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(mixture.log_density))(z.detach()), gradient)


def test_first_and_second_derivatives() -> None:
    mean, log_var, z = (torch.randn(count, 2, dtype=torch.float64, requires_grad=True) for count in (4, 4, 3))
    log_density = lambda mean, log_var, z: GaussianMixture(mean, log_var).log_density(z)  # noqa: E731
    assert torch.autograd.gradcheck(log_density, (mean, log_var, z))
    assert torch.autograd.gradgradcheck(log_density, (mean, log_var, z))
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(4, dtype=torch.float64)),
        torch.distributions.Independent(torch.distributions.Normal(mean, (0.5 * log_var).exp()), 1),
    )
    hessian = torch.func.jacrev(torch.func.jacrev(lambda z: log_density(mean, log_var, z)))(z[0])
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(density.log_prob, z[0]))


def test_gradients_equal_those_of_the_textbook() -> None:
    """With respect to the points, the means, the log-variances and the weights."""
    mixture = make_mixture()
    inputs = [torch.randn(5, 3, dtype=torch.float64), mixture.mean, mixture.log_var, mixture.log_weights]
    for tensor in inputs:
        tensor.requires_grad_()
    upstream = torch.randn(5, dtype=torch.float64)
    gradients = torch.autograd.grad(mixture.log_density(inputs[0]), inputs, upstream)
    expected = torch.autograd.grad(textbook_log_density(*inputs), inputs, upstream)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("weighted", [False, True])
def test_float32_gradients_are_accurate(weighted: bool) -> None:
    """Narrow components far from the origin, where a square expanded in float32 would cancel."""
    mean, log_var = 6.0 * torch.rand(50, 40) - 3.0, torch.full((50, 40), -6.0)
    log_weights = torch.log_softmax(torch.randn(50), 0) if weighted else torch.full((50,), -math.log(50))
    z = GaussianMixture(mean, log_var).sample(torch.randn(20, 40), torch.rand(20))
    leaves = [tensor.clone().requires_grad_() for tensor in (z, mean, log_var)]
    mixture = GaussianMixture(leaves[1], leaves[2], log_weights if weighted else None)
    gradients = torch.autograd.grad(mixture.log_density(leaves[0]).sum(), leaves)
    exact = [tensor.double().requires_grad_() for tensor in (z, mean, log_var)]
    expected = torch.autograd.grad(textbook_log_density(*exact, log_weights.double()).sum(), exact)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-3)


def chosen_components(mixture: GaussianMixture, uniform: Tensor) -> Tensor:
    """Returns which component each draw came from, told by the mean: without noise a draw is its mean."""
    noise = torch.zeros(*uniform.shape, mixture.mean.shape[1], dtype=mixture.mean.dtype)
    draws = mixture.sample(noise, uniform)
    matches = (draws[..., None, :] == mixture.mean).all(-1)
    assert (matches.sum(-1) == 1).all()
    return matches.int().argmax(-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_components_are_chosen_as_often_as_their_weights_say(weighted: bool, dtype: torch.dtype) -> None:
    """Uniform numbers on a grid hit each weight to within the grid's spacing."""
    mixture = make_mixture(weighted=weighted, dtype=dtype)
    uniform = (torch.arange(20_000, dtype=dtype) + 0.5) / 20_000
    frequencies = chosen_components(mixture, uniform).bincount(minlength=7) / 20_000
    torch.testing.assert_close(frequencies, oracle(mixture).mixture_distribution.probs.float(), rtol=0, atol=1e-4)


def test_draws_spread_as_their_component_does() -> None:
    """The noise is scaled and moved by the chosen component, for any leading shape."""
    mixture = make_mixture(weighted=False)
    noise, uniform = torch.randn(4, 5, 3, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    component = chosen_components(mixture, uniform)
    assert len(component.unique()) > 3
    draws = mixture.sample(noise, uniform)
    standardised = (draws - mixture.mean[component]) / mixture.log_var[component].exp().sqrt()
    torch.testing.assert_close(standardised, noise)
    alone = mixture.sample(noise[1, 2], uniform[1, 2])
    torch.testing.assert_close(alone, draws[1, 2])


def test_moments_of_draws() -> None:
    """Mean and variance of many draws are those of torch.distributions."""
    mixture = make_mixture()
    draws = mixture.sample(torch.randn(100_000, 3, dtype=torch.float64), torch.rand(100_000, dtype=torch.float64))
    reference = oracle(mixture)
    error = reference.variance.sqrt() / math.sqrt(100_000)
    assert ((draws.mean(0) - reference.mean).abs() < 5.0 * error).all()
    torch.testing.assert_close(draws.var(0), reference.variance, rtol=0.05, atol=0)


ENDS = {
    torch.float32: [0.0, 2.0**-149, 1.0 - 2.0**-24],
    torch.float64: [0.0, 5e-324, 1.0 - 2.0**-53],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_components", [1, 3, 500, 777])
def test_ends_of_the_uniform_noise_choose_first_and_last(dtype: torch.dtype, num_components: int) -> None:
    """Zero and the last number below one are safe, though the rounded weights may not sum to one."""
    mixture = make_mixture(num_components, weighted=False, dtype=dtype)
    chosen = chosen_components(mixture, torch.tensor(ENDS[dtype], dtype=dtype))
    assert chosen.tolist() == [0, 0, num_components - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [(0.0, 0.3, 0.0, 0.0, 0.7, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0), (0.1, 0.2, 0.3, 0.0)])
def test_component_without_weight_is_never_drawn(weights: tuple[float, ...], dtype: torch.dtype) -> None:
    """Wherever it stands, and at both ends of the uniform noise; its density leaves the others alone."""
    probabilities = torch.tensor(weights, dtype=dtype)
    probabilities = probabilities / probabilities.sum()
    mixture = GaussianMixture(torch.randn(len(weights), 3, dtype=dtype), torch.zeros(len(weights), 3, dtype=dtype))
    mixture = GaussianMixture(mixture.mean, mixture.log_var, probabilities.log())
    uniform = torch.cat([torch.tensor(ENDS[dtype], dtype=dtype), torch.rand(1000, dtype=dtype)])
    drawn = set(chosen_components(mixture, uniform).tolist())
    assert drawn == {index for index, weight in enumerate(weights) if weight > 0.0}

    kept = probabilities > 0.0
    without = GaussianMixture(mixture.mean[kept], mixture.log_var[kept], probabilities[kept].log())
    z = torch.randn(5, 3, dtype=dtype)
    torch.testing.assert_close(mixture.log_density(z), without.log_density(z))
