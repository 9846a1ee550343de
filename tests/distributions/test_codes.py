"""Densities of codes: total mass, torch.distributions, tails and gradients, and draws against the masses."""

import math

import pytest
import torch
import torch.distributions as D
from torch import Tensor

from popgen.distributions import CategoricalCodes, DiscretisedLogisticMixture
from popgen.distributions.codes import CategoricalOutput, CodeDensity, LogisticMixtureOutput
from popgen.errors import ArgumentError

KINDS = ("categorical", "mixture")
CODES = torch.arange(256)
LARGEST_BELOW_ONE = {torch.float32: 1.0 - 2.0**-24, torch.float64: 1.0 - 2.0**-53}


def make_density(kind: str, *batch: int, dtype: torch.dtype = torch.float64) -> CodeDensity:
    """Returns one that is far from uniform; some components of a mixture are narrow, some lie outside [-1, 1]."""
    if kind == "categorical":
        return CategoricalCodes(3.0 * torch.randn(*batch, 256, dtype=dtype))
    logits, means, log_scales = torch.randn(3, *batch, 4, dtype=dtype)
    return DiscretisedLogisticMixture(logits, means, (2.0 * log_scales - 3.0).clamp_min(-7.0))


def all_log_densities(density: CodeDensity, *batch: int) -> Tensor:
    """Returns log p of every code, shape `(*batch, 256)`."""
    columns = [density.log_density(torch.full(batch, code)) for code in range(256)]
    return torch.stack(columns, -1)


def mixture(mean: float, log_scale: float, dtype: torch.dtype = torch.float64, count: int = 256):
    """Returns one component, for as many codes."""
    parameters = (torch.full((count, 1), value, dtype=dtype) for value in (0.0, mean, log_scale))
    return DiscretisedLogisticMixture(*parameters)


def masses_by_torch(logits: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Returns the mass of each code, from the cumulative distribution of logistic distributions of torch."""
    uniform = D.Uniform(torch.zeros_like(means), torch.ones_like(means), validate_args=False)
    affine = D.AffineTransform(means, torch.exp(log_scales))
    logistic = D.TransformedDistribution(uniform, [D.SigmoidTransform().inv, affine])
    weights = logits.softmax(-1)
    below = [(weights * logistic.cdf(torch.tensor(-1.0 + i / 128.0).to(means))).sum(-1) for i in range(1, 256)]
    return torch.stack([torch.zeros_like(below[0]), *below, torch.ones_like(below[0])], -1).diff(dim=-1)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_masses_of_all_codes_sum_to_one(kind: str, batch: tuple[int, ...]) -> None:
    log_densities = all_log_densities(make_density(kind, *batch), *batch)
    torch.testing.assert_close(log_densities.logsumexp(-1), torch.zeros(batch, dtype=torch.float64))
    assert (log_densities.amax(-1) > math.log(2.0 / 256)).all(), "and are not all alike"


@pytest.mark.parametrize("mean", [-1000.0, -1.2, -1.0, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("log_scale", [-7.0, -4.8, -2.0, 1.5, 9.0, 40.0, 95.0])
def test_mass_of_a_mixture_is_one_whatever_its_parameters(mean: float, log_scale: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        total = mixture(mean, log_scale, dtype).log_density(CODES).logsumexp(0)
        assert abs(total.item()) < tolerance * max(1.0, 1e-3 * math.exp(min(-log_scale, 7.0)) * abs(mean))


def test_categorical_equals_torch() -> None:
    density, codes = make_density("categorical", 3, 50), torch.randint(256, (3, 50))
    torch.testing.assert_close(density.log_density(codes), D.Categorical(logits=density.logits).log_prob(codes))


def test_mixture_equals_differences_of_torchs_cumulative_distribution() -> None:
    """Wherever the difference of two float64 numbers near one another is still exact enough."""
    density = make_density("mixture", 40)
    expected = masses_by_torch(density.logits, density.means, density.log_scales)
    found = all_log_densities(density, 40).exp()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    assert (found > 1e-3).any(1).all()


@pytest.mark.parametrize("code, mean", [(0, 3.0), (1, 3.0), (100, 3.0), (100, -3.0), (254, -3.0), (255, -3.0)])
def test_tails_are_exact(code: int, mean: float) -> None:
    """Thousands of nats below, where the cumulative distribution is 0 or 1 to all digits, by its exponential tail."""
    scale, left = math.exp(-6.0), -1.0 + code / 128.0
    near = left if mean < 0 else left + 1.0 / 128.0  # the side of the interval that faces the mean
    bounded = 0.0 if code in (0, 255) else math.log1p(-math.exp(-1.0 / 128.0 / scale))
    expected = -abs(near - mean) / scale + bounded
    assert expected < -400.0
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = mixture(mean, -6.0, dtype, 1).log_density(torch.tensor([code])).item()
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("log_scale", [3.0, 10.0, 30.0, 80.0])
def test_mass_within_a_wide_logistic(log_scale: float) -> None:
    """To first order width / (4 scale) for inner codes, and half of all for each of the outermost."""
    for dtype in (torch.float64, torch.float32):
        found = mixture(0.0, log_scale, dtype).log_density(CODES)
        inner = torch.full((254,), math.log(1.0 / 128.0) - log_scale - math.log(4.0), dtype=dtype)
        torch.testing.assert_close(found[1:-1], inner, rtol=1e-6, atol=2e-3 if log_scale < 5 else 1e-6)
        expected = math.log(0.5) - (0.5 * (1.0 - 1.0 / 128.0)) * math.exp(-log_scale)
        assert found[0].item() == pytest.approx(expected, abs=1e-3 if log_scale < 5 else 1e-6)


@pytest.mark.parametrize("log_scale", [-8.0, -7.0, -5.0, 1.9, 2.0, 2.1, 60.0, 95.0])
@pytest.mark.parametrize("mean", [-1e4, -1.0, 0.0, 0.123, 1.0, 1e4])
def test_gradients_are_finite_everywhere(mean: float, log_scale: float) -> None:
    """In float32, for every code, at the widths where the formulas change and beyond any that a network reaches."""
    parameters = [torch.full((256, 2), value, requires_grad=True) for value in (0.5, mean, log_scale)]
    log_density = DiscretisedLogisticMixture(*parameters).log_density(CODES)
    gradients = torch.autograd.grad(log_density.sum(), parameters)
    assert log_density.isfinite().all() and (log_density <= 1e-6).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_are_exact() -> None:
    """By finite differences in float64: inner and outermost codes, on both sides of where the formulas change."""
    codes = torch.tensor([0, 1, 30, 128, 200, 254, 255]).repeat(4)
    logits = torch.randn(28, 3, dtype=torch.float64, requires_grad=True)
    means = torch.randn(28, 3, dtype=torch.float64, requires_grad=True)
    scales = torch.tensor([-5.0, -2.0, 0.5, 4.0]).double()[:, None, None] + 0.1 * torch.randn(4, 7, 3).double()
    log_scales = scales.view(28, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *parameters: DiscretisedLogisticMixture(*parameters).log_density(codes), (logits, means, log_scales)
    )


def test_a_scale_below_the_lowest_counts_as_it() -> None:
    """One code then holds up to 97 % of the mass."""
    low, lowest = (mixture(1.0 / 256.0, log_scale).log_density(CODES) for log_scale in (-50.0, -7.0))
    assert torch.equal(low, lowest)
    assert lowest.exp().max().item() == pytest.approx(math.tanh(math.exp(7.0) / 128.0 / 4.0), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_densities_are_formed_in_float32_at_least(kind: str, dtype: torch.dtype) -> None:
    """Those of rounded parameters, exactly."""
    exact = make_density(kind, 20)
    names = ("logits",) if kind == "categorical" else ("logits", "means", "log_scales")
    rounded = type(exact)(*(getattr(exact, name).to(dtype) for name in names))
    same = type(exact)(*(getattr(rounded, name).double() for name in names))
    codes, uniform = torch.randint(256, (20,)), torch.rand(20)
    found = rounded.log_density(codes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), same.log_density(codes), rtol=1e-4, atol=1e-5)
    assert (rounded.sample(uniform) - same.sample(uniform)).abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_draws_invert_the_cumulative_distribution(kind: str) -> None:
    """A grid of uniform values gives each code its share of the grid, in order."""
    density = make_density(kind, 3)
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    cumulative = all_log_densities(density, 3).exp().cumsum(-1)
    parameters = [value.expand(20_000, *value.shape) for value in vars(density).values()]
    drawn = type(density)(*parameters).sample(grid[:, None].expand(-1, 3))
    for column in range(3):
        expected = torch.searchsorted(cumulative[column].contiguous(), grid, right=True).clamp_max(255)
        assert torch.equal(drawn[:, column], expected)
        assert len(drawn[:, column].unique()) > 10


def test_a_value_on_an_edge_belongs_to_the_code_above() -> None:
    """The share of a code is half open, as the noise is."""
    edges = torch.arange(256) / 256
    assert torch.equal(CategoricalCodes(torch.zeros(256, 256)).sample(edges), CODES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_that_lies_outside_gives_the_outermost_codes(dtype: torch.dtype) -> None:
    """Although within [-1, 1] its cumulative distribution is 0, or 1, to all digits."""
    uniform = torch.rand(256, dtype=dtype)
    assert (mixture(-30.0, -7.0, dtype).sample(uniform) == 0).all()
    assert (mixture(30.0, -7.0, dtype).sample(uniform) == 255).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_uniform_values_give_codes_that_can_be(kind: str, dtype: torch.dtype) -> None:
    """A cumulative sum that ends above or below 1, codes without mass at either end, and 1 itself do no harm."""
    ends = torch.tensor([0.0, LARGEST_BELOW_ONE[dtype], 1.0], dtype=dtype)
    for first, last in ((0, 255), (3, 252), (77, 77)):
        if kind == "categorical":
            logits = torch.full((3, 256), -2e4, dtype=dtype)
            logits[:, first : last + 1] = torch.linspace(-1.0, 1.0, last + 1 - first, dtype=dtype)
            density: CodeDensity = CategoricalCodes(logits)
        else:
            means = torch.tensor([[(2 * first + 1) / 256 - 1.0, (2 * last + 1) / 256 - 1.0]], dtype=dtype).expand(3, 2)
            density = DiscretisedLogisticMixture(torch.zeros_like(means), means, torch.full_like(means, -7.0))
        drawn = density.sample(ends)
        log_density = density.log_density(drawn)
        assert (log_density > -40.0).all() and drawn[1] == drawn[2]
        reach = 0 if kind == "categorical" else 5  # the tails of the outermost components
        assert max(0, first - reach) <= drawn[0] <= first and last <= drawn[1] <= min(255, last + reach)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_their_noise_alone(kind: str) -> None:
    density, uniform = make_density(kind, 5, 7), torch.rand(5, 7)
    state = torch.get_rng_state()
    codes = density.sample(uniform)
    assert codes.shape == (5, 7) and codes.dtype == torch.int64
    assert torch.equal(codes, density.sample(uniform)) and torch.equal(torch.get_rng_state(), state)
    assert make_density(kind, 0).sample(torch.rand(0)).shape == (0,)
    assert make_density(kind, 0).log_density(torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("output", [CategoricalOutput(), LogisticMixtureOutput(5), LogisticMixtureOutput(1)], ids=str)
def test_outputs_start_nearly_uniform(output: CategoricalOutput | LogisticMixtureOutput) -> None:
    """The parameters are as many as they say, and what they start from spreads its mass over all codes."""
    bias = output.initial_bias()
    assert bias.shape == (output.num_parameters,)
    log_densities = all_log_densities(output.density(bias.expand(2, 3, -1)), 2, 3)
    assert log_densities.shape == (2, 3, 256)
    assert -log_densities.double().mean().item() < math.log(256) + 0.5
    assert log_densities[..., 1:-1].min() > math.log(0.2 / 256)


def test_codes_have_the_shape_of_their_logits(as_a_user) -> None:
    with pytest.raises(ArgumentError, match=r"codes must have the shape .*got \(2, 3\) for \(2, 5, 256\)"):
        CategoricalCodes(torch.zeros(2, 5, 256)).log_density(torch.zeros(2, 3).long())


def test_a_mixture_has_components(as_a_user) -> None:
    with pytest.raises(ArgumentError, match="LogisticMixtureOutput.num_components must be an integer of at least 1, g"):
        LogisticMixtureOutput(0)


@pytest.mark.parametrize("log_scale", [50.0, 103.0, 104.5, 120.0])
def test_the_widest_mixtures_are_drawn_at_both_ends(log_scale: float) -> None:
    """All mass lies beyond the outermost codes, half of it on either side."""
    mixture = DiscretisedLogisticMixture(torch.zeros(2, 1), torch.zeros(2, 1), torch.full((2, 1), log_scale))
    assert mixture.sample(torch.tensor([0.25, 0.75])).tolist() == [0, 255]
