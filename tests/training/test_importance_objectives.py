"""Importance-weighted objectives and path derivatives: each estimator's mean gradient is that of its bound."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from popgen.errors import ArgumentError
from popgen.losses import doubly_reparameterised_weights
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import Bijection, HouseholderSylvesterFlow, PlanarFlow, PosteriorFlow
from popgen.nn.priors import GaussianMixturePrior, Prior, StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior
from popgen.optim.schedules import Constant, LinearAnnealing
from popgen.training.importance_objectives import (
    DoublyReparameterisedIWAE,
    NegativeIWAE,
    StickingTheLanding,
    weights_of,
)
from popgen.training.objectives import AnnealedObjective, NegativeELBO, Objective

INPUT_DIM, LATENT_DIM, HIDDEN_DIM = 6, 2, 3
IMAGES = torch.tensor([[1.0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 0, 1]], dtype=torch.float64)
GROUPS, REPEATS = 40, 250  # of noise, so many draws for each image

PRIORS = {
    "standard": StandardNormalPrior,
    "mixture": lambda: GaussianMixturePrior(3, LATENT_DIM),
    "vamp": lambda: VampPrior(INPUT_DIM, num_components=3),
}
FLOWS = {
    "none": lambda: None,
    "sylvester": lambda: HouseholderSylvesterFlow(LATENT_DIM, HIDDEN_DIM, num_flows=2, num_reflections=2),
    "planar": lambda: PlanarFlow(LATENT_DIM, HIDDEN_DIM, num_flows=2),
}


def make_vae(prior: Prior, flow: PosteriorFlow | None) -> VAE:
    """Returns a small VAE whose parts are far from their start, in float64."""
    encoder = GaussianEncoder(INPUT_DIM, LATENT_DIM, HIDDEN_DIM)
    vae = VAE(encoder, BernoulliDecoder(LATENT_DIM, INPUT_DIM, HIDDEN_DIM), prior, flow).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(0.8 * torch.randn_like(parameter))
    return vae


def gradient(vae: VAE, objective: Objective, x: Tensor, noise: Tensor, beta: float = 1.0) -> Tensor:
    """Returns the gradient of the loss with respect to all parameters, as one vector."""
    loss, _, _ = objective(vae, x, noise, {"beta": torch.tensor(beta, dtype=x.dtype)}, {})
    parameters = list(vae.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients, strict=True)]
    )


def standardised_differences(vae: VAE, one: Objective, other: Objective, num_samples: int, beta: float) -> Tensor:
    """Returns the mean difference of two gradients on the same noise over its standard error, for each parameter."""
    x = IMAGES.repeat(REPEATS, 1)
    differences = []
    for _ in range(GROUPS):
        noise = torch.randn(num_samples, len(x), LATENT_DIM, dtype=x.dtype)
        differences.append(gradient(vae, one, x, noise, beta) - gradient(vae, other, x, noise, beta))
    stacked = torch.stack(differences)
    error = stacked.std(0) / GROUPS**0.5
    moving = error > 1e-12  # where both estimators give the same, as for the decoder, there is nothing to standardise
    torch.testing.assert_close(stacked[:, ~moving], torch.zeros_like(stacked[:, ~moving]), rtol=0, atol=1e-10)
    return stacked.mean(0)[moving] / error[moving]


@dataclasses.dataclass(frozen=True)
class PathAlone(NegativeIWAE):
    """The importance-weighted bound without its score function, which is biased for more than one sample."""

    def terms(self, forward, batch, noise, beta):
        return forward(batch, noise, torch.ones_like(noise[..., 0]))


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(
    "path, plain, beta",
    [
        (StickingTheLanding(num_samples=2), NegativeELBO(num_samples=2), 1.0),
        (StickingTheLanding(num_samples=2), NegativeELBO(num_samples=2), 0.3),
        (DoublyReparameterisedIWAE(num_samples=4), NegativeIWAE(num_samples=4), 1.0),
        (DoublyReparameterisedIWAE(num_samples=4), NegativeIWAE(num_samples=4), 0.3),
    ],
    ids=["STL", "STL, beta 0.3", "DReG", "DReG, beta 0.3"],
)
def test_mean_gradient_is_that_of_the_bound(path: Objective, plain: Objective, beta: float, prior, flow) -> None:
    """The two differ in every draw and agree on average, encoder, flow, decoder and pseudo-inputs alike."""
    vae = make_vae(PRIORS[prior](), FLOWS[flow]())
    z = standardised_differences(vae, path, plain, path.num_samples, beta)
    assert len(z) > 20
    assert z.abs().max() < 5.0


def test_the_test_would_find_a_biased_estimator() -> None:
    """The path derivative of an importance-weighted bound with weights that are not squared."""
    vae = make_vae(VampPrior(INPUT_DIM, num_components=3), FLOWS["sylvester"]())
    z = standardised_differences(vae, PathAlone(num_samples=4), NegativeIWAE(num_samples=4), 4, beta=1.0)
    assert z.abs().max() > 20.0


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_values_are_those_of_the_plain_terms(flow: str, beta: float) -> None:
    """A path derivative changes gradients alone."""
    vae, noise = make_vae(VampPrior(INPUT_DIM, num_components=3), FLOWS[flow]()), torch.randn(4, 3, LATENT_DIM).double()
    settings = {"beta": torch.tensor(beta, dtype=torch.float64)}
    for path, plain in (
        (StickingTheLanding(num_samples=4), NegativeELBO(num_samples=4)),
        (DoublyReparameterisedIWAE(num_samples=4), NegativeIWAE(num_samples=4)),
    ):
        _, expected, _ = plain(vae, IMAGES, noise, settings, {})
        _, found, _ = path(vae, IMAGES, noise, settings, {})
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.item() == pytest.approx(expected[name].item(), abs=1e-12), name


def test_importance_weighted_loss_by_hand() -> None:
    """The mean of the weights themselves, in float64 and without a logarithm of a sum."""
    vae, noise = make_vae(StandardNormalPrior(), None), torch.randn(7, 3, LATENT_DIM).double()
    terms = vae(IMAGES, noise)
    beta = torch.tensor(0.5, dtype=torch.float64)
    weights = terms.log_p_x_given_z.exp() * (terms.log_p_z.exp() / terms.log_q_z_given_x.exp()).sqrt()
    loss, metrics, changes = NegativeIWAE(num_samples=7)(vae, IMAGES, noise, {"beta": beta}, {})
    assert changes == {}
    assert loss.item() == pytest.approx(-weights.mean(0).log().mean().item())
    assert metrics["iwae"].item() == pytest.approx(terms.log_w.exp().mean(0).log().mean().item())
    assert metrics["iwae"] > metrics["elbo"]
    torch.testing.assert_close(weights_of(terms, beta), weights.log())


@pytest.mark.parametrize("flow", FLOWS)
def test_with_one_sample_bounds_and_estimators_are_the_same(flow: str) -> None:
    vae, noise = make_vae(VampPrior(INPUT_DIM, num_components=3), FLOWS[flow]()), torch.randn(1, 3, LATENT_DIM).double()
    for one, other in ((NegativeIWAE, NegativeELBO), (DoublyReparameterisedIWAE, StickingTheLanding)):
        found, expected = (gradient(vae, objective(num_samples=1), IMAGES, noise) for objective in (one, other))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_weights_of_doubly_reparameterised_gradients() -> None:
    """They are the normalised weights at β = 1, one at β = 0, and those of each image alone."""
    log_w = torch.tensor([[0.0, 5.0], [torch.log(torch.tensor(3.0)), 5.0]])
    expected = torch.tensor([[0.25, 0.5], [0.75, 0.5]])
    torch.testing.assert_close(doubly_reparameterised_weights(log_w), expected)
    torch.testing.assert_close(doubly_reparameterised_weights(log_w, beta=0.0), torch.ones(2, 2))
    torch.testing.assert_close(doubly_reparameterised_weights(log_w, beta=0.5), 0.5 + 0.5 * expected)


def test_beta_is_that_of_the_step() -> None:
    assert NegativeIWAE(LinearAnnealing(0.0, 1.0, num_steps=10)).settings(5) == {"beta": 0.5}


@pytest.mark.parametrize("objective", [StickingTheLanding, NegativeIWAE, DoublyReparameterisedIWAE])
def test_mistakes_are_named(objective: type[AnnealedObjective], as_a_user) -> None:
    name = objective.__name__
    with pytest.raises(ArgumentError, match=rf"{name}\.num_samples must be an integer of at least 1, got 0"):
        objective(num_samples=0)
    for wrong, shown in ((0.5, r"0\.5"), (Constant, "<class .*Constant'>")):
        with pytest.raises(ArgumentError, match=rf"{name}\.beta must be a schedule .*, got {shown}"):
            objective(beta=wrong)
    of = "models with a noise_dim and an ELBO, such as a VAE" if objective is NegativeIWAE else "a VAE"
    with pytest.raises(ArgumentError, match=f"{name} trains {of}, and the model is a Linear"):
        objective(Constant(1.0)).check_model(nn.Linear(2, 2))


class Shift(Bijection):
    """A map of one's own without a `push_score`."""

    def forward_and_log_det(self, z):
        return z + 1.0, torch.zeros_like(z[..., 0])

    def inverse(self, z):
        return z - 1.0


class ShiftFlow(PosteriorFlow):
    def forward(self, context):
        return Shift()


def test_a_flow_without_a_score_is_named() -> None:
    vae, noise = make_vae(StandardNormalPrior(), ShiftFlow()), torch.randn(2, 3, LATENT_DIM).double()
    assert gradient(vae, NegativeIWAE(num_samples=2), IMAGES, noise).isfinite().all()
    with pytest.raises(ArgumentError, match="Shift has no push_score"):
        gradient(vae, StickingTheLanding(num_samples=2), IMAGES, noise)


# Run in a process of its own, where nothing checks shapes at runtime and so nothing stands between the compiler and the
# code.
COMPILED = """
import copy
import torch
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.vamp_prior import VampPrior
from popgen.training.importance_objectives import DoublyReparameterisedIWAE
from popgen.training.state import initial_state
from popgen.training.step import make_train_step
torch.manual_seed(0)
vae = VAE(GaussianEncoder(16, 3, 8), BernoulliDecoder(3, 16, 8), VampPrior(16, 5), HouseholderSylvesterFlow(3, 8, 2, 2))
batch = torch.rand(10, 16).round()
losses = []
for compiled in (False, True):
    step = make_train_step(vae, DoublyReparameterisedIWAE(num_samples=4), compiled=compiled)
    state = initial_state(copy.deepcopy(vae), lambda parameters: torch.optim.Adam(parameters, lr=1e-2), seed=0)
    for _ in range(5):
        state, metrics = step(state, batch)
    losses.append(metrics["loss"])
torch.testing.assert_close(*losses)
print("equal")
"""


@pytest.mark.slow
def test_compiled_step_equals_the_plain_one() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert "torch.compile is not used" not in done.stderr, done.stderr
    assert done.stdout == "equal\n", done.stderr
