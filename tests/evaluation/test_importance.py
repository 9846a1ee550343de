"""What importance weights say of an estimate: laws, closed forms, and distributions whose tails are known."""

import math

import pytest
import torch

from popgen.errors import ArgumentError
from popgen.evaluation.importance import (
    effective_sample_size,
    monte_carlo_error,
    nested_bounds,
    nested_group_sizes,
    pareto_shape,
    reliable_pareto_shape,
)
from popgen.losses import iwae


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 10, 50, 99, 100, 1_000, 5_000, 12_000])
def test_groups_nest(num_samples: int) -> None:
    sizes = nested_group_sizes(num_samples)
    assert sizes[0] == 1 and sizes[-1] == num_samples and len(set(sizes)) == len(sizes)
    assert all(larger % smaller == 0 for smaller, larger in zip(sizes, sizes[1:], strict=False))


def test_bounds_are_means_over_disjoint_groups_of_all_draws() -> None:
    log_w = 5.0 * torch.randn(600, 7, generator=generator(), dtype=torch.float64)
    bounds = nested_bounds(log_w, (1, 10, 200, 600))
    assert list(bounds) == [1, 10, 200, 600]
    for size, bound in bounds.items():
        groups = [iwae(log_w[first : first + size]) for first in range(0, 600, size)]
        torch.testing.assert_close(bound, torch.stack(groups).mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 100.0])
def test_bounds_never_fall(scale: float) -> None:
    """For any weights, not only on average."""
    log_w = scale * torch.randn(5_000, 20, generator=generator(1), dtype=torch.float64).abs().pow(1.5) - 90.0
    bounds = torch.stack(list(nested_bounds(log_w, nested_group_sizes(5_000)).values()))
    assert bool((bounds.diff(dim=0) >= -1e-9).all())
    assert scale == 0.0 or bool((bounds.diff(dim=0) > 0.0).all())
    single = torch.stack(list(nested_bounds(log_w.float() - 1e4, nested_group_sizes(5_000)).values()))
    assert bool((single.diff(dim=0) >= 0.0).all()), "nor in float32, however large the numbers"


def test_effective_sample_size() -> None:
    """All samples if weights are equal, one if one has all the weight, and whatever their scale."""
    log_w = torch.randn(200, 5, generator=generator(2), dtype=torch.float64)
    w = log_w.exp()
    expected = w.sum(0).square() / w.square().sum(0)
    torch.testing.assert_close(effective_sample_size(log_w), expected)
    torch.testing.assert_close(effective_sample_size(log_w - 2_000.0), expected)
    assert effective_sample_size(torch.full((50, 1), -7.0)).item() == pytest.approx(50.0, rel=1e-5)
    assert effective_sample_size(torch.tensor([[0.0], [-500.0], [-800.0]])).item() == 1.0
    assert effective_sample_size(torch.full((5_000, 1), -1e5)).item() == pytest.approx(5_000.0, rel=1e-6)


def test_monte_carlo_error_is_that_of_repeated_estimates() -> None:
    """Of log-normal weights, whose mean is known: the spread over 4,000 repetitions, and its bias."""
    log_w = 0.8 * torch.randn(500, 4_000, generator=generator(3), dtype=torch.float64) - 0.32 - 100.0
    estimates = iwae(log_w)
    assert estimates.std().item() == pytest.approx(monte_carlo_error(log_w).mean().item(), rel=0.05)
    relative_variance = math.exp(0.64) - 1.0
    assert monte_carlo_error(log_w).mean().item() == pytest.approx(math.sqrt(relative_variance / 500), rel=0.05)
    assert (estimates + 100.0).mean().item() == pytest.approx(-relative_variance / 1_000, abs=2e-3)
    assert monte_carlo_error(log_w[:1]).isnan().all()
    two = monte_carlo_error(torch.tensor([[1.0], [3.0]]).log())  # weights of 1 and 3: mean 2, variance 2
    assert two.item() == pytest.approx(math.sqrt(2.0 / 2) / 2.0)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.7, 1.0, 1.5])
def test_the_shape_of_pareto_tails_is_found(shape: float) -> None:
    """Powers U^-k of uniform draws have a Pareto tail of shape k; the prior draws estimates a little towards 0.5."""
    uniform = torch.rand(5_000, 300, generator=generator(4), dtype=torch.float64)
    found = pareto_shape(-shape * uniform.log())
    tail = 213
    expected = (tail * shape + 5.0) / (tail + 10.0)
    assert found.mean().item() == pytest.approx(expected, abs=0.03)
    assert found.std().item() < 0.2
    torch.testing.assert_close(pareto_shape(-shape * uniform.log() - 1_000.0), found)


def test_light_tails_have_no_large_shape() -> None:
    """Exponential weights have shape 0, uniform ones -1."""
    uniform = torch.rand(5_000, 300, generator=generator(5), dtype=torch.float64)
    exponential, flat = pareto_shape((-uniform.log()).log()), pareto_shape(uniform.log())
    assert abs(exponential.mean().item()) < 0.08 and exponential.max().item() < 0.5
    assert flat.mean().item() < -0.7 and flat.max().item() < 0.0
    assert pareto_shape(torch.zeros(100, 2)).tolist() == [-math.inf, -math.inf]


def test_the_shape_is_that_of_a_maximum_likelihood_fit() -> None:
    """Without the prior it is near the fit that a fine grid of scales and shapes finds."""
    uniform = torch.rand(5_000, 1, generator=generator(6), dtype=torch.float64)
    log_w = -0.6 * uniform.log()
    largest = log_w[:, 0].exp().sort(descending=True).values[:214]
    excesses = largest[:-1] - largest[-1]
    shapes = torch.linspace(0.05, 1.5, 300, dtype=torch.float64)[:, None, None]
    scales = torch.linspace(0.1, 5.0, 300, dtype=torch.float64)[:, None] * excesses.median()
    log_p = (-scales.log() - (1.0 / shapes + 1.0) * torch.log1p(shapes * excesses / scales)).sum(-1)
    best = shapes[log_p.amax(1).argmax()].item()
    found = (pareto_shape(log_w).item() * 223.0 - 5.0) / 213.0
    assert found == pytest.approx(best, abs=0.03)


def test_the_shape_is_that_of_the_published_algorithm() -> None:
    """A transcription of Zhang and Stephens' estimator and of the prior of Vehtari et al., a number at a time."""
    log_w = 3.0 * torch.randn(5_000, 1, generator=generator(7), dtype=torch.float64)
    largest = sorted(log_w[:, 0].exp().tolist())[-214:]
    x = [value - largest[0] for value in largest[1:]]
    n, m = len(x), 30 + int(math.sqrt(len(x)))
    b = [1.0 / x[-1] + (1.0 - math.sqrt(m / (j - 0.5))) / (3.0 * x[int(n / 4.0 + 0.5) - 1]) for j in range(1, m + 1)]
    k = [math.fsum(math.log1p(-b_j * value) for value in x) / n for b_j in b]
    log_l = [n * (math.log(-b_j / k_j) - k_j - 1.0) for b_j, k_j in zip(b, k, strict=True)]
    weights = [1.0 / math.fsum(math.exp(other - one) for other in log_l) for one in log_l]
    mean = math.fsum(w * b_j for w, b_j in zip(weights, b, strict=True))
    shape = math.fsum(math.log1p(-mean * value) for value in x) / n
    assert pareto_shape(log_w).item() == pytest.approx((n * shape + 5.0) / (n + 10.0), abs=1e-9)


@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-4])
def test_weights_that_differ_by_rounding_alone_have_no_shape(spread: float) -> None:
    log_w = (spread * torch.randn(5_000, 20, generator=generator(8)) - 540.0).float()
    assert pareto_shape(log_w).tolist() == [-math.inf] * 20
    resolved = (0.1 * torch.randn(5_000, 20, generator=generator(8)) - 540.0).float()
    assert pareto_shape(resolved).abs().max() < 0.5


def test_a_shape_that_weights_do_not_tell_is_not_a_number() -> None:
    """Undefined, infinite and vanishing weights, and those whose rounding hides whether they are equal."""
    log_w = torch.zeros(100, 5)
    log_w[3, 0], log_w[3, 1], log_w[:, 2] = math.nan, math.inf, -math.inf
    log_w[:, 3] = 1e9
    assert pareto_shape(log_w).isnan().tolist() == [True, True, True, True, False]
    assert pareto_shape(torch.full((5_000, 2), -6e5)).tolist() == [-math.inf, -math.inf]
    assert pareto_shape(0.3 * torch.rand(5_000, 2, generator=generator(9)) - 6e5).tolist() == [-math.inf, -math.inf]


def test_heavy_tails_are_found_among_large_numbers() -> None:
    """Whose spacing is a sixteenth, or half."""
    log_w = -1.15 * torch.rand(5_000, 50, generator=generator(10), dtype=torch.float64).log()
    torch.testing.assert_close(pareto_shape((log_w - 6e5).float()).double(), pareto_shape(log_w), rtol=0.0, atol=0.2)
    assert not (pareto_shape((log_w - 8e6).float()) < 0.7).any()


@pytest.mark.parametrize("num_samples", [25, 50, 100, 1_000, 5_000])
def test_weights_without_a_mean_are_seldom_called_reliable(num_samples: int) -> None:
    """Exact Pareto weights of shape 1, however few: with 0.7 as the limit, half of them would be among 25 or 50."""
    log_w = -torch.rand(num_samples, 2_000, generator=generator(11), dtype=torch.float64).log()
    limit = reliable_pareto_shape(num_samples)
    assert (pareto_shape(log_w) < limit).double().mean() < 0.25
    assert limit == pytest.approx(min(0.7, 1.0 - math.log(10.0) / math.log(num_samples)))


@pytest.mark.usefixtures("as_a_user")
def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(ArgumentError, match="num_samples must be an integer of at least 25, got 24"):
        reliable_pareto_shape(24)
    with pytest.raises(ArgumentError, match=r"sizes must each divide the next and the 10 samples, got \(1, 3\)"):
        nested_bounds(torch.zeros(10, 1), (1, 3))
    with pytest.raises(ArgumentError, match="at least 25 samples for a fit to their tail, got 24"):
        pareto_shape(torch.zeros(24, 1))
    with pytest.raises(ArgumentError, match=r"log_w must have the shape \(samples, count\), got \(100,\)"):
        pareto_shape(torch.zeros(100))
    with pytest.raises(ArgumentError, match="num_samples must be an integer of at least 1, got 0"):
        nested_group_sizes(0)
