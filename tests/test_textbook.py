"""popgen's fast formulations against the textbook's: densities, gradients, the training step, the evaluation."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from popgen.evaluation.likelihood import NOISE_BLOCK, estimate_log_likelihood, image_noise
from popgen.losses import elbo
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow, PlanarFlow
from popgen.nn.priors import GaussianMixturePrior, StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior
from popgen.streams import make_generator
from popgen.training.objectives import NegativeELBO
from popgen.training.state import initial_state, model_with_weights
from popgen.training.step import make_train_step
from tests import textbook


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model."""

    input_dim: int
    latent_dim: int
    hidden_dim: int
    num_components: int
    num_flows: int
    num_reflections: int


SMALL = Sizes(input_dim=16, latent_dim=4, hidden_dim=12, num_components=5, num_flows=2, num_reflections=3)
REAL = Sizes(input_dim=784, latent_dim=40, hidden_dim=300, num_components=500, num_flows=4, num_reflections=8)
TERMS = ("log_p_x_given_z", "log_p_z", "log_q_z_given_x")
every_model = pytest.mark.parametrize(
    "prior, num_reflections",
    [("normal", 0), ("vamp", 0), ("normal", 3), ("vamp", 3), ("vamp", 6)],
    ids=["normal", "vamp", "normal, flow", "vamp, flow", "vamp, flow of more reflections than dimensions"],
)


def make_vae(prior: str, num_reflections: int, sizes: Sizes = SMALL, scale: float = 2.5) -> VAE:
    """Returns a VAE, without a flow for 0 reflections, whose weights are large enough for every part to matter."""
    flow = HouseholderSylvesterFlow(sizes.latent_dim, sizes.hidden_dim, sizes.num_flows, max(num_reflections, 1))
    vae = VAE(
        encoder=GaussianEncoder(sizes.input_dim, sizes.latent_dim, sizes.hidden_dim),
        decoder=BernoulliDecoder(sizes.latent_dim, sizes.input_dim, sizes.hidden_dim),
        prior=VampPrior(sizes.input_dim, sizes.num_components) if prior == "vamp" else StandardNormalPrior(),
        flow=flow if num_reflections else None,
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter *= scale
    return vae


def make_small(prior: str, num_reflections: int) -> VAE:
    """Returns a small VAE in float64."""
    return make_vae(prior, num_reflections).double()


def make_inputs(samples: int, batch: int, sizes: Sizes = SMALL, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Returns binary images and posterior noise."""
    x = torch.randint(2, (batch, sizes.input_dim)).to(dtype)
    return x, torch.randn(samples, batch, sizes.latent_dim, dtype=dtype)


@every_model
def test_densities_agree(prior: str, num_reflections: int) -> None:
    vae = make_small(prior, num_reflections)
    x, noise = make_inputs(samples=3, batch=7)
    fast, slow = vae(x, noise), textbook.Textbook.like(vae).log_densities(x, noise)
    for name, expected in zip(TERMS, slow, strict=True):
        assert expected.shape == (3, 7)
        torch.testing.assert_close(getattr(fast, name), expected, rtol=1e-9, atol=0.0)


@every_model
def test_gradients_agree(prior: str, num_reflections: int) -> None:
    """Of the negative ELBO, in every parameter: `like` carries popgen's gradients over as it does the parameters."""
    vae = make_small(prior, num_reflections)
    model = textbook.Textbook.like(vae)
    x, noise = make_inputs(samples=2, batch=5)
    terms = vae(x, noise)
    (-elbo(terms.log_p_x_given_z, terms.log_p_z, terms.log_q_z_given_x).mean()).backward()
    log_p_x_given_z, log_p_z, log_q_z_given_x = model.log_densities(x, noise)
    (-(log_p_x_given_z + log_p_z - log_q_z_given_x).mean()).backward()

    gradients = copy.deepcopy(vae)
    with torch.no_grad():
        for target, source in zip(gradients.parameters(), vae.parameters(), strict=True):
            target.copy_(source.grad)
    expected = dict(model.named_parameters())
    assert ("pseudo_input_logits" in expected) == (prior == "vamp")
    for name, gradient in textbook.Textbook.like(gradients).named_parameters():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-8, atol=1e-11)


@every_model
def test_bounds_agree(prior: str, num_reflections: int) -> None:
    """IWAE over two of popgen's noise blocks and several of the textbook's chunks, which do not line up."""
    vae, num_samples = make_small(prior, num_reflections), NOISE_BLOCK + 170
    images, _ = make_inputs(samples=1, batch=5)
    blocks = [
        image_noise(range(5), size, SMALL.latent_dim, block, seed=3) for block, size in enumerate((NOISE_BLOCK, 170))
    ]
    noise = torch.cat(blocks).double()
    expected = textbook.iwae(textbook.Textbook.like(vae), images, num_samples, chunk=400, noise=noise)
    found = estimate_log_likelihood(vae, images, num_samples, seed=3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0.0)


def test_iwae_draws_its_own_noise() -> None:
    """With many samples, whatever the noise, it comes close to the same value; with one, it is the ELBO."""
    model = textbook.Textbook.like(make_vae("vamp", 3, scale=1.0).double())
    images, noise = make_inputs(samples=1, batch=3)
    first, second = (textbook.iwae(model, images, 2_000) for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.1)
    log_p_x_given_z, log_p_z, log_q_z_given_x = model.log_densities(images, noise)
    expected = (log_p_x_given_z + log_p_z - log_q_z_given_x)[0].detach()
    torch.testing.assert_close(textbook.iwae(model, images, 1, noise=noise), expected)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_densities_agree_at_the_real_sizes_in_float32(scale: float) -> None:
    vae = make_vae("vamp", REAL.num_reflections, REAL, scale)
    x, noise = make_inputs(samples=1, batch=20, sizes=REAL, dtype=torch.float32)
    with torch.no_grad():
        fast, slow = vae(x, noise), textbook.Textbook.like(vae).log_densities(x, noise)
    for name, expected in zip(TERMS, slow, strict=True):
        difference = (getattr(fast, name) - expected).abs()
        assert difference.max() < 1e-2, name
        assert difference.mean() < 1e-3, name


@pytest.mark.parametrize(
    "dtype, fused, max_gradient_norm, tolerance",
    [
        (torch.float64, True, None, 1e-10),
        (torch.float64, True, 1.0, 1e-8),
        (torch.float64, False, 1.0, 1e-8),  # clip_grad_norm_ adds 1e-6 to the norm
        (torch.float32, True, 1.0, 1e-4),
    ],
)
def test_training_steps_agree(
    dtype: torch.dtype, fused: bool, max_gradient_norm: float | None, tolerance: float
) -> None:
    """Loss, parameters and weight average after some steps on the same images and noise."""
    vae, objective, rate, decay = make_vae("vamp", 3).to(dtype), NegativeELBO(), 1e-3, 0.4
    levels = torch.zeros(8, SMALL.input_dim, dtype=torch.uint8)
    trainer = textbook.TextbookTrainer(textbook.Textbook.like(vae), levels, 8, rate, max_gradient_norm, decay)
    state = initial_state(vae, lambda parameters: torch.optim.Adam(parameters, lr=rate, fused=fused), seed=0)
    step = make_train_step(vae, objective, weight_average_decay=decay, max_gradient_norm=max_gradient_norm)
    generator = make_generator("cpu", 0, "posterior noise")
    for _ in range(6):
        x, _ = make_inputs(samples=1, batch=8, dtype=dtype)
        state, metrics = step(state, x)
        loss = trainer.update(x, objective.draw_noise(vae, x, generator))
        assert loss == pytest.approx(metrics["loss"].item(), rel=tolerance)

    average = state.weight_average
    assert average is not None
    for found, wanted in ((trainer.model.parameters(), state.parameters), (trainer.weight_average, average)):
        expected = textbook.Textbook.like(model_with_weights(vae, wanted, state.buffers)).parameters()
        torch.testing.assert_close(list(found), list(expected), rtol=0.0, atol=tolerance)


def test_trainer_lowers_its_loss() -> None:
    model = textbook.Textbook.like(make_vae("vamp", 3, scale=1.0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    levels = torch.randint(80, (110, SMALL.input_dim), dtype=torch.uint8)
    trainer = textbook.TextbookTrainer(model, levels, 25, 1e-2, max_gradient_norm=10.0, weight_average_decay=0.9)
    losses = [trainer.step() for _ in range(60)]  # 15 epochs
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0]
    for old, new, average in zip(before, model.parameters(), trainer.weight_average, strict=True):
        assert not torch.equal(old, new)
        assert not torch.equal(average, new)


def test_trainer_stops_at_a_loss_that_is_not_finite() -> None:
    model = textbook.Textbook.like(make_vae("normal", 0))
    trainer = textbook.TextbookTrainer(model, torch.zeros(4, SMALL.input_dim, dtype=torch.uint8), batch_size=4)
    with torch.no_grad():
        model.encoder.mean.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        trainer.step()


def test_trainer_refuses_fewer_images_than_a_batch_holds() -> None:
    model = textbook.Textbook.like(make_vae("normal", 0))
    with pytest.raises(ValueError, match="at most the 4 images, got 5"):
        textbook.TextbookTrainer(model, torch.zeros(4, SMALL.input_dim, dtype=torch.uint8), batch_size=5)


def test_images_are_binarised_anew_at_each_visit() -> None:
    levels = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    images = textbook.BinarisedImages(levels)
    draws = torch.stack([images[0] for _ in range(2_000)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(draws.mean(0), torch.tensor([0.0, 0.2, 1.0]), rtol=0.0, atol=0.05)


@pytest.mark.parametrize("part", ["prior", "flow"])
def test_parts_without_a_textbook_formulation_are_refused(part: str) -> None:
    vae = make_vae("normal", 0)
    other = {"prior": GaussianMixturePrior(5, SMALL.latent_dim), "flow": PlanarFlow(SMALL.latent_dim, SMALL.hidden_dim)}
    setattr(vae, part, other[part])
    with pytest.raises(TypeError, match="no textbook formulation"):
        textbook.Textbook.like(vae)
