"""The priors without an encoder, against torch.distributions."""

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from popgen.errors import ArgumentError
from popgen.nn.priors import GaussianMixturePrior, Prior, StandardNormalPrior


def test_standard_normal_prior() -> None:
    """N(0, I), without parameters and without pseudo-inputs."""
    prior = StandardNormalPrior()
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(prior().log_density(z), Independent(Normal(torch.zeros_like(z), 1.0), 1).log_prob(z))
    assert prior.pseudo_inputs() is None
    assert list(prior.parameters()) == []


@pytest.mark.parametrize("num_components", [1, 6])
def test_mixture_prior_equals_torch(num_components: int) -> None:
    """Learned means, variances and weights, the weights given by their logits up to a constant."""
    prior = GaussianMixturePrior(num_components, latent_dim=3).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    reference = MixtureSameFamily(
        Categorical(logits=prior.logits), Independent(Normal(prior.mean, torch.exp(0.5 * prior.log_var)), 1)
    )
    z = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(prior().log_density(z), reference.log_prob(z))
    with torch.no_grad():
        prior.logits += 3.0
    torch.testing.assert_close(prior().log_density(z), reference.log_prob(z))
    assert prior.pseudo_inputs() is None


def test_mixture_prior_starts_with_equal_weights_and_unit_variance() -> None:
    """The means are scattered with the standard deviation that was asked for."""
    prior = GaussianMixturePrior(num_components=2_000, latent_dim=5, initial_std=0.3)
    density = prior()
    torch.testing.assert_close(density.log_weights.exp(), torch.full((2_000,), 1 / 2_000))
    assert torch.equal(density.log_var, torch.zeros(2_000, 5))
    assert density.mean.std().item() == pytest.approx(0.3, rel=0.05)
    assert density.mean.mean().item() == pytest.approx(0.0, abs=0.02)
    assert torch.equal(GaussianMixturePrior(4, 5, initial_std=0.0).mean, torch.zeros(4, 5))


def test_every_parameter_of_the_mixture_prior_gets_a_gradient() -> None:
    """Means, log-variances and weights."""
    prior = GaussianMixturePrior(num_components=4, latent_dim=3)
    prior().log_density(torch.randn(5, 3)).sum().backward()
    assert {name for name, _ in prior.named_parameters()} == {"mean", "log_var", "logits"}
    assert all((parameter.grad != 0.0).all() for parameter in prior.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_components": 0}, "GaussianMixturePrior.num_components must be an integer of at least 1, got 0"),
        ({"latent_dim": -2}, "GaussianMixturePrior.latent_dim must be an integer of at least 1, got -2"),
        ({"initial_std": -1.0}, "GaussianMixturePrior.initial_std must be at least 0, got -1.0"),
        ({"initial_std": float("nan")}, "GaussianMixturePrior.initial_std must be a finite number, got nan"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ArgumentError, match=message):
        GaussianMixturePrior(**{"num_components": 4, "latent_dim": 3, **arguments})


def test_contract_is_abstract() -> None:
    """A prior without a density is none."""
    with pytest.raises(TypeError, match="abstract"):
        Prior()
