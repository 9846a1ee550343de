"""The Bernoulli likelihood against binary cross entropy and torch.distributions."""

import pytest
import torch
import torch.nn.functional as F

from popgen.distributions import Bernoulli
from popgen.errors import DataError


@pytest.mark.parametrize("sample_shape", [(), (1,), (5,), (2, 5)])
@pytest.mark.parametrize("batch", [1, 3])
def test_log_density_equals_torch(sample_shape: tuple[int, ...], batch: int) -> None:
    """One value for each sample and example, for binary images."""
    logits = 4.0 * torch.randn(*sample_shape, batch, 6, dtype=torch.float64)
    x = torch.randint(2, (batch, 6)).double()
    log_density = Bernoulli(logits).log_density(x)
    assert log_density.shape == (*sample_shape, batch)
    torch.testing.assert_close(log_density, torch.distributions.Bernoulli(logits=logits).log_prob(x).sum(-1))


def test_log_density_of_grey_levels_is_the_negative_cross_entropy() -> None:
    """Values between zero and one are taken as probabilities."""
    logits, x = torch.randn(5, 3, 6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    torch.testing.assert_close(Bernoulli(logits).log_density(x), -cross_entropy)


def test_probabilities_of_all_images_sum_to_one() -> None:
    """Over the 2⁶ binary images of six pixels."""
    logits = 2.0 * torch.randn(6, dtype=torch.float64)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 6)
    total = Bernoulli(logits.expand(64, 6)).log_density(images).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total))


def test_gradients_are_exact() -> None:
    """In the logits, x - sigmoid(l), and in x, l; second derivatives too, and under vmap."""
    logits = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    x = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    log_density = lambda logits, x: Bernoulli(logits).log_density(x)  # noqa: E731
    assert torch.autograd.gradcheck(log_density, (logits, x))
    assert torch.autograd.gradgradcheck(log_density, (logits, x))
    mapped = torch.func.vmap(torch.func.grad(lambda logits, x: log_density(logits, x).sum()), in_dims=(0, None))
    torch.testing.assert_close(mapped(logits, x), (x - torch.sigmoid(logits)).detach())
    hessian = torch.func.jacrev(torch.func.jacrev(lambda logits: log_density(logits, x).sum()))(logits)
    slopes = torch.sigmoid(logits) * torch.sigmoid(-logits)
    torch.testing.assert_close(hessian.flatten(3).flatten(0, 2), -torch.diag(slopes.flatten()))


def test_float32_is_accurate_at_every_size_of_logit() -> None:
    """784 pixels of logits from 1e-4 to 60 either way: within 1e-4 nats a hundred nats, of float64."""
    sizes = torch.logspace(-4, 1.78, 784, dtype=torch.float64)
    logits = sizes[None] * torch.sign(torch.randn(50, 784, dtype=torch.float64))
    x = torch.rand(50, 784, dtype=torch.float64).round()
    exact = Bernoulli(logits).log_density(x)
    found = Bernoulli(logits.float()).log_density(x.float()).double()
    assert ((found - exact).abs() <= 1e-6 * exact.abs() + 1e-6).all()


def test_grey_levels_are_not_taken_for_ones() -> None:
    with pytest.raises(DataError, match="integers in x must be 0 or 1: divide grey levels by 255"):
        Bernoulli(torch.zeros(2, 6)).log_density(torch.full((2, 6), 255, dtype=torch.uint8))


@pytest.mark.parametrize("logit", [80.0, -80.0])
def test_extreme_logits_stay_finite(logit: float) -> None:
    """A pixel that is missed costs |logit| nats, one that is hit costs none, and gradients are 0 or ±1."""
    logits = torch.full((1, 1), logit, requires_grad=True)
    hit, miss = torch.tensor([[float(logit > 0)]]), torch.tensor([[float(logit < 0)]])
    likelihood = Bernoulli(logits)
    for x, cost, slope in ((hit, 0.0, 0.0), (miss, -80.0, 1.0 if logit < 0 else -1.0)):
        log_density = likelihood.log_density(x)
        assert log_density.item() == pytest.approx(cost, abs=1e-6)
        assert torch.autograd.grad(log_density.sum(), logits)[0].item() == pytest.approx(slope, abs=1e-6)


def test_mean_is_the_frequency_of_ones() -> None:
    """Uniform noise on a grid hits each mean to within its spacing."""
    logits = torch.tensor([[-8.0, -1.0, 0.0, 0.5, 8.0]], dtype=torch.float64)
    likelihood = Bernoulli(logits.expand(10_000, 1, 5))
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    draws = likelihood.sample(grid[:, None, None].expand(-1, 1, 5))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    probability = torch.distributions.Bernoulli(logits=logits).probs
    torch.testing.assert_close(likelihood.mean[0], probability)
    torch.testing.assert_close(draws.mean(0), probability, rtol=0, atol=1e-4)


def test_certain_pixels_are_drawn_with_certainty() -> None:
    """Probability zero is never a one, probability one always is, at both ends of the uniform noise."""
    uniform = torch.tensor([0.0, 1.0 - 2.0**-24]).reshape(2, 1, 1)
    assert Bernoulli(torch.full((2, 1, 1), -200.0)).sample(uniform).sum() == 0
    assert Bernoulli(torch.full((2, 1, 1), 80.0)).sample(uniform).sum() == 2


@pytest.mark.parametrize("value", [1.2, -0.1, float("nan"), float("inf")])
def test_check_support_refuses_other_values(value: float) -> None:
    """One bad pixel is enough, and the message tells the range that was found."""
    images = torch.rand(3, 6)
    images[1, 2] = value
    with pytest.raises(DataError, match="Bernoulli") as error:
        Bernoulli.check_support(images)
    assert f"{value:.4g}" in str(error.value)


@pytest.mark.parametrize(
    "images",
    [torch.tensor([[0.0, 0.3, 1.0]]), torch.tensor([[0, 128, 255]], dtype=torch.uint8), torch.zeros(1, 3).double()],
)
def test_check_support_accepts_images(images: torch.Tensor) -> None:
    """Values in [0, 1], the ends included, and uint8 grey levels."""
    Bernoulli.check_support(images)
