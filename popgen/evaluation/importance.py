"""What the importance weights of an estimate say of its worth.

log p(x) is estimated by the mean of K weights w_k = p(x, z_k) / q(z_k | x), z_k ~ q(z | x). Its logarithm is a bound in
expectation (Burda et al. 2016, https://arxiv.org/abs/1509.00519), whose gap and error depend on how uneven the weights
are. Everything here is a function of the logarithms of the weights alone, each example on its own.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from popgen.errors import ArgumentError, check_integer
from popgen.losses import iwae

MIN_PARETO_SAMPLES = 25  # of which a fifth are a tail to be fitted
# A tail that stretches over so many spacings of numbers or fewer may have the shape of its rounding: it is flat if its
# weights are known to differ by less than EQUAL nats. One that stretches farther than that has a shape all the same, if
# it stretches over more than COARSE spacings.
FLAT, COARSE, EQUAL = 100.0, 30.0, 1.0


def nested_group_sizes(num_samples: int) -> tuple[int, ...]:
    """Returns 1, 10, 100, ... as far as each divides the number of samples, and that number itself.

    Each size divides the next, so that groups of samples nest.

    Raises:
        ArgumentError: if `num_samples` is not an integer of at least 1.

    Example:
        >>> nested_group_sizes(5_000), nested_group_sizes(50), nested_group_sizes(7)
        ((1, 10, 100, 1000, 5000), (1, 10, 50), (1, 7))
    """
    check_integer("num_samples", num_samples, minimum=1)
    sizes = [1]
    while num_samples % (10 * sizes[-1]) == 0 and 10 * sizes[-1] < num_samples:
        sizes.append(10 * sizes[-1])
    return (*sizes, num_samples) if num_samples > 1 else (1,)


def nested_bounds(log_w: Float[Tensor, "samples count"], sizes: tuple[int, ...]) -> dict[int, Float[Tensor, " count"]]:
    """Returns the importance-weighted bound with each number of samples, a mean over disjoint groups of draws, nats.

    Since groups nest and the logarithm is concave, the bound never falls from one size to the next, for any weights.

    Args:
        log_w: logarithms of the weights.
        sizes: of the groups; each divides the next, and the last one the number of samples.

    Raises:
        ArgumentError: if the groups do not nest.

    Example:
        >>> {size: bound.item() for size, bound in nested_bounds(torch.tensor([[0.0], [0.0]]), (1, 2)).items()}
        {1: 0.0, 2: 0.0}
    """
    bounds, groups, size_before = {}, log_w.double(), 1
    for size in sizes:
        if size < size_before or size % size_before or len(log_w) % size:
            raise ArgumentError(f"sizes must each divide the next and the {len(log_w)} samples, got {sizes}")
        joined = size // size_before
        groups = groups.unflatten(0, (-1, joined)).logsumexp(1) - math.log(joined)
        bounds[size], size_before = groups.mean(0).to(log_w.dtype), size
    return bounds


def effective_sample_size(log_w: Float[Tensor, "samples count"]) -> Float[Tensor, " count"]:
    """Returns (Σ w)² / Σ w², between 1 and the number of samples (Kong 1992).

    Example:
        >>> effective_sample_size(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
        tensor([2., 1.])
    """
    exact = log_w.double()
    return (2.0 * exact.logsumexp(0) - (2.0 * exact).logsumexp(0)).exp().to(log_w.dtype)


def monte_carlo_error(log_w: Float[Tensor, "samples count"]) -> Float[Tensor, " count"]:
    """Returns the standard error of the logarithm of the mean weight, to first order, nats.

    It is the standard deviation of the weights over their mean and √K: believable only where the weights have a
    variance, which `pareto_shape` tells, and too small where that is above 0.5. It says nothing of the distance between
    the bound and log p(x). Not a number for a single sample.

    Example:
        >>> monte_carlo_error(torch.tensor([[1.0], [1.0], [1.0]]))
        tensor([0.])
    """
    if len(log_w) == 1:
        return torch.full_like(log_w[0], math.nan)
    relative = (log_w - iwae(log_w)).exp()  # weights over their mean
    return relative.std(0) / math.sqrt(len(log_w))


def reliable_pareto_shape(num_samples: int) -> float:
    """Returns the k̂ below which the mean of so many weights behaves, min(1 - 1 / log10 K, 0.7) (Vehtari et al. 2024).

    Few samples cannot tell a heavy tail: a k̂ that would do for 5,000 may be chance. It is 0.7 from 2,155 samples on.

    Args:
        num_samples: K, at least 25.

    Raises:
        ArgumentError: if there are fewer.

    Example:
        >>> [round(reliable_pareto_shape(num_samples), 2) for num_samples in (25, 100, 1_000, 5_000)]
        [0.28, 0.5, 0.67, 0.7]
    """
    check_integer("num_samples", num_samples, minimum=MIN_PARETO_SAMPLES)
    return min(1.0 - 1.0 / math.log10(num_samples), 0.7)


def pareto_shape(log_w: Float[Tensor, "samples count"]) -> Float[Tensor, " count"]:
    """Returns k̂, the shape of a generalised Pareto distribution fitted to the largest weights of each example.

    Weights have 1/k finite moments. Below 0.5 the error of the estimate goes as 1/√K, below `reliable_pareto_shape`
    the estimate is still reliable, above that it would take far more samples (Vehtari et al.,
    https://arxiv.org/abs/1507.02646, with the estimator of Zhang and Stephens 2009 and a weak prior). Minus infinity
    where the largest weights are equal, as far as the precision of `log_w` can tell. Not a number where it cannot tell
    whether they are, where a weight is infinite or not a number, and where all are zero.

    Args:
        log_w: logarithms of the weights, at least 25 of each example.

    Raises:
        ArgumentError: if there are fewer, or the shape is another.

    Example:
        >>> light = torch.rand(2_000, 1).log()
        >>> pareto_shape(light).item() < 0.0  # uniform weights have a largest one
        True
    """
    if log_w.ndim != 2:
        raise ArgumentError(f"log_w must have the shape (samples, count), got {tuple(log_w.shape)}")
    num_samples = len(log_w)
    if num_samples < MIN_PARETO_SAMPLES:
        raise ArgumentError(
            f"log_w must hold at least {MIN_PARETO_SAMPLES} samples for a fit to their tail, got {num_samples}"
        )
    num_tail = min(num_samples // 5, math.ceil(3.0 * math.sqrt(num_samples)))
    largest = log_w.double().topk(num_tail + 1, dim=0).values
    weights = (largest - largest[0]).exp()
    excesses = (weights[:-1] - weights[-1]).flip(0)
    shape = _generalised_pareto_shape(excesses)
    spread, spacing = largest[0] - largest[-1], torch.finfo(log_w.dtype).eps * largest[0].abs()
    shape = torch.where(spread > COARSE * spacing, shape, math.nan)
    flat = (spread <= FLAT * spacing) & (spread + spacing < EQUAL)
    return torch.where(flat, -math.inf, shape).to(log_w.dtype)


def _generalised_pareto_shape(excesses: Float[Tensor, "tail count"]) -> Float[Tensor, " count"]:
    """Returns the shape of excesses over a threshold, from the smallest to the largest.

    The posterior mean of θ = -k / σ under the prior of Zhang and Stephens, by quadrature over their grid; then k is the
    maximum of the likelihood given θ, drawn towards 0.5 as by ten more excesses.
    """
    count = len(excesses)
    num_points = 30 + math.floor(math.sqrt(count))
    places = torch.arange(1, num_points + 1, device=excesses.device, dtype=excesses.dtype)[:, None]
    quartile = excesses[math.floor(count / 4.0 + 0.5) - 1].clamp_min(torch.finfo(excesses.dtype).tiny)
    thetas = 1.0 / excesses[-1].clamp_min(torch.finfo(excesses.dtype).tiny) + (
        1.0 - (num_points / (places - 0.5)).sqrt()
    ) / (3.0 * quartile)
    shapes = torch.log1p(-thetas[:, None] * excesses).mean(1)
    log_likelihoods = count * ((-thetas / shapes).log() - shapes - 1.0)
    theta = (log_likelihoods.softmax(0) * thetas).sum(0)
    shape = torch.log1p(-theta * excesses).mean(0)
    return (count * shape + 10.0 * 0.5) / (count + 10.0)
