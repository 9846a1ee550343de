"""The objective on numbers that can be worked out by hand."""

import pytest
import torch
from torch import Tensor

from popgen.distributions.codes import CategoricalOutput
from popgen.errors import ArgumentError
from popgen.evaluation.evaluator import Evaluator
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder, LogDensities
from popgen.models.vqvae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder, VQVAEWithPrior
from popgen.models.wavenet import WaveNet
from popgen.nn.pixelcnn import GatedPixelCNN
from popgen.nn.priors import StandardNormalPrior
from popgen.nn.vqvae import MovingAverageQuantiser
from popgen.optim.geco import GECO
from popgen.optim.schedules import Constant, LinearAnnealing
from popgen.training.objectives import ConstrainedELBO, ELBOObjective, NegativeELBO, Objective

# Two samples of two images. Means: log p(x|z) -10, log p(z) -4, log q(z|x) -1, log det 0.5.
TERMS = LogDensities(
    log_p_x_given_z=torch.tensor([[-4.0, -8.0], [-12.0, -16.0]]),
    log_p_z=torch.tensor([[-1.0, -3.0], [-5.0, -7.0]]),
    log_q_z_given_x=torch.tensor([[-4.0, 2.0], [-2.0, 0.0]]),
    log_det=torch.tensor([[0.0, 0.5], [0.5, 1.0]]),
)


def forward(batch: Tensor, noise: Tensor) -> LogDensities:
    return TERMS


@pytest.mark.parametrize("beta, loss", [(1.0, 13.0), (0.0, 10.0), (0.5, 11.5), (4.0, 22.0)])
def test_loss_and_metrics_by_hand(beta: float, loss: float) -> None:
    """The loss is 10 + 3 β whatever β is; the ELBO and its parts do not depend on it."""
    found, metrics, _ = NegativeELBO(Constant(beta), num_samples=2)(
        forward, torch.zeros(2, 4), torch.zeros(2, 2, 3), {"beta": torch.tensor(beta)}, {}
    )
    assert found.shape == () and found.item() == pytest.approx(loss)
    expected = {"loss": loss, "elbo": -13.0, "reconstruction": -10.0, "kl": 3.0}
    expected |= {"log_q_z_given_x": -1.0, "log_p_z": -4.0, "log_det": 0.5, "beta": beta}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


@pytest.mark.parametrize("step, beta", [(0, 0.0), (5, 0.5), (10, 1.0), (1_000, 1.0)])
def test_beta_is_that_of_the_step(step: int, beta: float) -> None:
    objective = NegativeELBO(LinearAnnealing(0.0, 1.0, num_steps=10))
    settings = {name: torch.tensor(value) for name, value in objective.settings(step).items()}
    loss, metrics, _ = objective(forward, torch.zeros(2, 4), torch.zeros(1, 2, 3), settings, {})
    assert loss.item() == pytest.approx(10.0 + 3.0 * beta) and metrics["beta"].item() == pytest.approx(beta)


def test_a_user_schedule_is_any_function_of_the_step() -> None:
    assert NegativeELBO(lambda step: step / 7).settings(14) == {"beta": 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_comes_from_the_generator_alone(dtype: torch.dtype) -> None:
    vae = VAE(GaussianEncoder(4, 3, 5), BernoulliDecoder(3, 4, 5), StandardNormalPrior())
    objective, batch = NegativeELBO(num_samples=400), torch.zeros(20, 4, dtype=dtype)
    before = torch.get_rng_state()
    first, same, other = (objective.draw_noise(vae, batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert first.shape == (400, 20, 3) and first.dtype == dtype
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.mean().abs() < 5 / 24_000**0.5 and first.var().item() == pytest.approx(1.0, abs=0.05)
    generator = torch.Generator().manual_seed(1)
    draws = [objective.draw_noise(vae, batch, generator) for _ in range(2)]
    assert not torch.equal(*draws), "every step must meet new noise"


@pytest.mark.parametrize(
    "objective", [NegativeELBO(), ConstrainedELBO(GECO(rate=0.1), "kl", 1.0)], ids=["plain", "constrained"]
)
def test_models_without_an_elbo_are_refused_in_one_line(objective: ELBOObjective) -> None:
    model = WaveNet(CategoricalOutput(), 4, 4, num_layers=2, dilation_cycle=2)
    with pytest.raises(ArgumentError, match="trains models with a noise_dim and an ELBO, such as a VAE, .* a WaveNet"):
        objective.check_model(model)


def test_what_cannot_be_constrained_is_refused() -> None:
    """A likelihood that cannot reach the target, and a model of whose two terms one is fixed."""
    geco = GECO(rate=0.1)
    vae = VAE(GaussianEncoder(8, 3, 5), BernoulliDecoder(3, 8, 5), StandardNormalPrior())
    with pytest.raises(ArgumentError, match=r"target must be at most 0 for a Bernoulli likelihood, .* got 72.0"):
        ConstrainedELBO(geco, "reconstruction", 72.0).check_model(vae)
    ConstrainedELBO(geco, "kl", 72.0).check_model(vae)
    parts = (part(3, (8, 8), 4, 0) for part in (ConvolutionalEncoder, ConvolutionalDecoder))
    encoder, decoder = parts
    vqvae = VQVAE(encoder, MovingAverageQuantiser(4, 3), decoder)
    with pytest.raises(ArgumentError, match="that of a VQVAEWithPrior is fixed: use NegativeELBO"):
        ConstrainedELBO(geco, "kl", 1.0).check_model(VQVAEWithPrior(vqvae, GatedPixelCNN(4, (2, 2), 8, 1)))


def test_the_loss_that_chooses_a_checkpoint_by_hand() -> None:
    """What is minimised, and 50 times what is missing; an evaluator that does not find the terms is named."""
    geco, results = GECO(rate=0.1, max_multiplier=50.0), {"loss": 99.0, "reconstruction": -80.0, "kl": 20.0}
    assert NegativeELBO().selection_loss(results) == 99.0
    for constraint, target, loss in (
        ("reconstruction", -80.5, 20.0),
        ("reconstruction", -79.5, 45.0),
        ("kl", 20.5, 80.0),
        ("kl", 19.0, 130.0),
    ):
        assert ConstrainedELBO(geco, constraint, target).selection_loss(results) == pytest.approx(loss)
    with pytest.raises(ArgumentError, match="validate of an evaluator must return kl for a ConstrainedELBO"):
        ConstrainedELBO(geco, "kl", 19.0).selection_loss({"loss": 1.0, "reconstruction": 1.0})


def test_a_model_of_no_images_needs_a_blank_batch_of_its_own() -> None:
    with pytest.raises(ArgumentError, match=r"^NegativeELBO must define blank_batch\(.*: Linear has no input_dim"):
        NegativeELBO().blank_batch(torch.nn.Linear(2, 2), batch_size=3)


def test_what_a_subclass_must_define_is_asked_for_when_it_is_made() -> None:
    class Silent(Objective):
        """Says nothing of noise or of a loss."""

    class Blind(Evaluator):
        """Evaluates nothing."""

    with pytest.raises(TypeError, match="abstract methods? '?__call__'?, '?draw_noise"):
        Silent()
    with pytest.raises(TypeError, match="abstract methods? '?check_num_samples'?, '?describe'?, '?evaluate"):
        Blind()
