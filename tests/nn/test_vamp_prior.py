"""The VampPrior against the explicit average of posteriors, and its initialisations."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from popgen.distributions import DiagonalNormal
from popgen.errors import ArgumentError
from popgen.nn.vamp_prior import DATA_MARGIN, VampPrior

INPUT_DIM, LATENT_DIM = 12, 3


class LinearEncoder(nn.Module):
    """A Gaussian whose mean and log-variance are linear in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUT_DIM, 2 * LATENT_DIM).double()

    def forward(self, x: Tensor) -> DiagonalNormal:
        return DiagonalNormal(*self.linear(x).chunk(2, dim=-1))


def make_prior(num_components: int = 6, initialisation: str = "uniform") -> VampPrior:
    """Returns a prior in float64."""
    return VampPrior(INPUT_DIM, num_components, initialisation).double()


def make_images(count: int = 20) -> Tensor:
    """Returns distinct images with pixels at both ends of the grey scale."""
    return torch.randint(-100, 356, (count, INPUT_DIM)).clamp(0, 255).double() / 255


@pytest.mark.parametrize("num_components", [1, 6])
def test_density_is_the_average_of_the_posteriors(num_components: int) -> None:
    """p(z) = 1/K Σ_k q(z|u_k), for any leading shape of z."""
    prior, encoder = make_prior(num_components), LinearEncoder()
    density = prior(encoder(prior.pseudo_inputs()))
    z = torch.randn(2, 5, LATENT_DIM, dtype=torch.float64)
    total = torch.zeros(2, 5, dtype=torch.float64)
    for u in torch.sigmoid(prior.logits):
        posterior = encoder(u)
        normal = Independent(Normal(posterior.mean, torch.exp(0.5 * posterior.log_var)), 1)
        total = total + normal.log_prob(z).exp() / num_components
    torch.testing.assert_close(density.log_density(z), total.log())


def test_pseudo_inputs_start_uniform_within_the_unit_interval() -> None:
    """Strictly between 0 and 1, and spread evenly."""
    u = VampPrior(100, num_components=100).pseudo_inputs().detach()
    assert u.shape == (100, 100)
    assert ((u > 0.0) & (u < 1.0)).all()
    quantiles = u.flatten().sort().values
    torch.testing.assert_close(quantiles, (torch.arange(10_000) + 0.5) / 10_000, rtol=0, atol=0.03)


def test_pseudo_inputs_stay_within_the_unit_interval() -> None:
    """However far an optimizer moves them; and they are what the state dictionary holds."""
    prior = make_prior()
    with torch.no_grad():
        prior.logits.mul_(3.0)
    u = prior.pseudo_inputs()
    assert ((u > 0.0) & (u < 1.0)).all()
    loaded = make_prior()
    loaded.load_state_dict(prior.state_dict())
    assert torch.equal(loaded.pseudo_inputs(), u)


def test_encoder_and_pseudo_inputs_get_gradients_through_the_prior() -> None:
    """The prior is made of the encoder's answers, and trains both."""
    prior, encoder = make_prior(), LinearEncoder()
    z = torch.randn(5, LATENT_DIM, dtype=torch.float64)
    prior(encoder(prior.pseudo_inputs())).log_density(z).sum().backward()
    for parameter in (prior.logits, encoder.linear.weight, encoder.linear.bias):
        assert parameter.grad.isfinite().all()
        assert (parameter.grad != 0.0).all()


@pytest.mark.parametrize("count", [6, 20])
def test_data_initialisation_takes_distinct_images(count: int) -> None:
    """Each pseudo-input is another training image, its grey levels kept off the ends by the margin."""
    prior, images = make_prior(initialisation="data"), make_images(count)
    prior.initialise_from_data(images, torch.Generator().manual_seed(0))
    u = prior.pseudo_inputs().detach()
    assert u.min() >= DATA_MARGIN - 1e-12
    assert u.max() <= 1.0 - DATA_MARGIN + 1e-12
    distance = (u[:, None] - images).abs().amax(-1)
    nearest = distance.min(dim=1)
    assert (nearest.values <= DATA_MARGIN + 1e-12).all()
    assert len(nearest.indices.unique()) == 6
    inside = (images[nearest.indices] > DATA_MARGIN) & (images[nearest.indices] < 1.0 - DATA_MARGIN)
    torch.testing.assert_close(u[inside], images[nearest.indices][inside])


def test_data_initialisation_is_reproducible() -> None:
    """The generator alone decides which images; the global random state is left alone."""
    images, chosen = make_images(), []
    state = torch.get_rng_state()
    for seed in (0, 0, 1):
        prior = make_prior(initialisation="data")
        torch.set_rng_state(state)
        prior.initialise_from_data(images, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), state)
        chosen.append(prior.pseudo_inputs())
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


def test_data_initialisation_keeps_the_parameter() -> None:
    """An optimizer that was built before keeps hold of it."""
    prior = make_prior(initialisation="data")
    parameter = prior.logits
    prior.initialise_from_data(make_images(), torch.Generator().manual_seed(0))
    assert prior.logits is parameter
    assert parameter.requires_grad
    assert parameter.isfinite().all()


def test_uniform_initialisation_ignores_the_data() -> None:
    """Even data that would not do."""
    prior = make_prior(initialisation="uniform")
    before = prior.pseudo_inputs()
    prior.initialise_from_data(make_images(2), torch.Generator())
    assert torch.equal(prior.pseudo_inputs(), before)


@pytest.mark.parametrize("shape", [(5, INPUT_DIM), (20, INPUT_DIM + 1)])
def test_data_initialisation_refuses_images_that_do_not_do(shape: tuple[int, int]) -> None:
    """Too few of them, or of another size; the message names what is needed and what came."""
    prior = make_prior(initialisation="data")
    with pytest.raises(ArgumentError, match="images must be at least 6 of 12 values") as error:
        prior.initialise_from_data(torch.rand(shape).double(), torch.Generator())
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("encoded, got", [(None, "None"), (5, "5 of them")])
def test_prior_needs_one_posterior_for_each_pseudo_input(encoded: int | None, got: str) -> None:
    """A prior called without its encoded pseudo-inputs says so."""
    posteriors = None if encoded is None else DiagonalNormal(torch.zeros(encoded, 3), torch.zeros(encoded, 3))
    with pytest.raises(ArgumentError, match=f"encoded must be the posteriors at the 6 pseudo-inputs, got {got}"):
        make_prior()(posteriors)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_dim": 0}, "VampPrior.input_dim must be an integer of at least 1, got 0"),
        ({"num_components": -1}, "VampPrior.num_components must be an integer of at least 1, got -1"),
        ({"initialisation": "mean"}, "VampPrior.initialisation must be one of uniform, data, got 'mean'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ArgumentError, match=message):
        VampPrior(**{"input_dim": 4, **arguments})


@pytest.mark.parametrize("images", [torch.full((9, INPUT_DIM), value) for value in (255.0, -0.1, float("nan"))])
def test_images_that_are_no_grey_levels_are_refused(images: Tensor) -> None:
    prior = VampPrior(INPUT_DIM, num_components=5, initialisation="data")
    with pytest.raises(ArgumentError, match=r"images must be .* floating point in \[0, 1\], got torch.float32 from"):
        prior.initialise_from_data(images, torch.Generator())


def test_levels_are_what_their_values_are() -> None:
    levels = torch.randint(0, 256, (20, INPUT_DIM), dtype=torch.uint8)
    priors = [make_prior(initialisation="data") for _ in "ab"]
    for prior, images in zip(priors, (levels, levels.double() / 255.0), strict=True):
        prior.initialise_from_data(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(priors[0].logits, priors[1].logits, rtol=1e-12, atol=0.0)


@pytest.mark.usefixtures("as_a_user")
def test_integers_that_are_no_grey_levels_are_refused() -> None:
    prior = VampPrior(INPUT_DIM, num_components=5, initialisation="data")
    with pytest.raises(ArgumentError, match="got torch.uint8 from 1 to 1"):
        prior.initialise_from_data(torch.ones(9, INPUT_DIM, dtype=torch.uint8), torch.Generator())
