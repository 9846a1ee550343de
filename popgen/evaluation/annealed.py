"""Annealed importance sampling: an estimate of log p(x) that owes nothing to the encoder.

Chains go from the prior to the posterior along f_β(z) = p(z) p(x | z)^β, by Hamiltonian Monte Carlo at each temperature
(Neal 2001, https://arxiv.org/abs/physics/9803008; Wu et al. 2017, https://arxiv.org/abs/1611.04273). On data that the
model itself has drawn, a chain back from the exact posterior sample bounds log p(x) from above (BDMC, Grosse et al.
2015, https://arxiv.org/abs/1511.02543).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from popgen.datasets.images import as_values
from popgen.errors import ArgumentError, check_integer
from popgen.evaluation.likelihood import estimate_log_likelihood
from popgen.evaluation.statistics import standard_error
from popgen.losses import iwae
from popgen.models.model import Model
from popgen.models.vae import VAE
from popgen.streams import make_generator

TARGET_ACCEPTANCE = 0.65  # of proposals, for which step sizes are tuned (Neal 2011)
INITIAL_STEP_SIZE = 0.1
TUNING_RATE = 0.2  # acceptance is within [0, 1], so a temperature changes a step size by exp(-0.13) to exp(0.07)
SIGMOID_RANGE = 4.0

LogDensity = Callable[[Tensor], Tensor]


class Target(NamedTuple):
    """What is annealed: log p(z) and log p(x | z), functions of z of shape `(chains, count, latent)`.

    Example: `target_of` makes one of a VAE and images.
    """

    log_prior: LogDensity
    log_likelihood: LogDensity


class Chains(NamedTuple):
    """What chains have gathered.

    Attributes:
        log_w: of each chain; forward, the mean of exp(log_w) estimates p(x), and backward that of exp(-log_w) 1/p(x).
        z: where they ended.
        acceptance: of the proposals at each temperature, for each example.
        step_sizes: with which they were made.
    """

    log_w: Float[Tensor, "chains count"]
    z: Float[Tensor, "chains count latent"]
    acceptance: Float[Tensor, "temperatures count"]
    step_sizes: Float[Tensor, "temperatures count"]


def temperatures(number: int) -> Float[Tensor, " temperatures"]:
    """Returns β from 0 to 1, a sigmoid of equal steps: denser at both ends (Wu et al. 2017, section 5), float64.

    Args:
        number: of transitions; there is one value more.

    Raises:
        ArgumentError: if it is not an integer of at least 1.

    Example:
        >>> temperatures(4)
        tensor([0.0000, 0.1050, 0.5000, 0.8950, 1.0000], dtype=torch.float64)
    """
    check_integer("num_temperatures", number, minimum=1)
    values = torch.linspace(-SIGMOID_RANGE, SIGMOID_RANGE, number + 1, dtype=torch.float64).sigmoid()
    return (values - values[0]) / (values[-1] - values[0])


def anneal(
    target: Target,
    start: Float[Tensor, "chains count latent"],
    betas: Float[Tensor, " temperatures"],
    generator: torch.Generator,
    num_leapfrog_steps: int = 10,
    step_sizes: Float[Tensor, "transitions count"] | None = None,
    backward: bool = False,
) -> Chains:
    """Returns chains through all temperatures.

    A transition leaves the density of its temperature as it is. Forward, each weight is taken before the transition;
    backward the same steps are made in the opposite order, which is their exact reverse.

    Args:
        target: what is annealed.
        start: draws from the prior; backward, from the posterior.
        betas: from 0 to 1.
        generator: of momenta and acceptances.
        num_leapfrog_steps: of a proposal.
        step_sizes: of the leapfrog steps at each temperature but the first, for each example. None tunes them on the
            way: only chains with step sizes that were fixed before have unbiased weights.
        backward: whether to go from 1 to 0.

    Example:
        >>> flat = Target(lambda z: -0.5 * z.square().sum(-1), lambda z: torch.zeros(z.shape[:-1]))
        >>> anneal(flat, torch.randn(3, 2, 4), temperatures(5), torch.Generator()).log_w
        tensor([[0., 0.],
                [0., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    z, num_transitions = start, len(betas) - 1
    log_w = torch.zeros(start.shape[:2], device=start.device, dtype=torch.float64)
    tuned = torch.full((start.shape[1],), INITIAL_STEP_SIZE, device=start.device, dtype=start.dtype)
    sizes, acceptance = [tuned] * num_transitions, [tuned] * num_transitions
    for index in reversed(range(num_transitions)) if backward else range(num_transitions):
        beta, increase = betas[index + 1].item(), (betas[index + 1] - betas[index]).item()
        if not backward:
            log_w += increase * target.log_likelihood(z)
        sizes[index] = tuned if step_sizes is None else step_sizes[index]
        z, accepted = _transition(target, z, beta, sizes[index], num_leapfrog_steps, generator)
        acceptance[index] = accepted.mean(0)
        tuned = tuned * torch.exp(TUNING_RATE * (acceptance[index] - TARGET_ACCEPTANCE))
        if backward:
            log_w += increase * target.log_likelihood(z)
    return Chains(log_w, z, torch.stack(acceptance), torch.stack(sizes))


def _transition(
    target: Target, z: Tensor, beta: float, step_size: Tensor, num_steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns where a step of Hamiltonian Monte Carlo goes, and the probability of its acceptance, for each chain."""
    size = step_size[:, None]
    momentum = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
    log_density, gradient = _density_and_gradient(target, z, beta)
    before = log_density - 0.5 * momentum.square().sum(-1)
    place = z
    for _ in range(num_steps):
        momentum = momentum + 0.5 * size * gradient
        place = place + size * momentum
        log_density, gradient = _density_and_gradient(target, place, beta)
        momentum = momentum + 0.5 * size * gradient
    after = log_density - 0.5 * momentum.square().sum(-1)
    probability = (after - before).clamp_max(0.0).exp().nan_to_num(0.0)
    uniform = torch.rand(probability.shape, generator=generator, device=z.device, dtype=z.dtype)
    return torch.where((uniform < probability)[..., None], place, z), probability


def _density_and_gradient(target: Target, z: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        place = z.detach().requires_grad_()
        log_density = target.log_prior(place) + beta * target.log_likelihood(place)
        (gradient,) = torch.autograd.grad(log_density.sum(), place)
    return log_density.detach(), gradient


def target_of(model: VAE, x: Float[Tensor, "count input"]) -> Target:
    """Returns the prior of a VAE and its likelihood of some images.

    Example: `annealed_estimate` calls it.
    """
    prior = model.prior_density()
    return Target(prior.log_density, lambda z: model.decoder(z).log_density(x))


@torch.no_grad()
def annealed_estimate(
    model: VAE,
    images: Tensor,
    num_temperatures: int = 1_000,
    num_chains: int = 16,
    num_leapfrog_steps: int = 10,
    seed: int = 0,
) -> tuple[Float[Tensor, " count"], Chains]:
    """Returns log p(x) of images by annealed importance sampling, a lower bound in expectation, nats; and its chains.

    A first run with other noise tunes the step sizes.

    Args:
        model: the VAE, on the device of the images.
        images: uint8 levels of 0 and 255 or values in [0, 1], shape `(count, size)`.
        num_temperatures: transitions of a chain.
        num_chains: for each image.
        num_leapfrog_steps: of a transition.
        seed: of the noise.

    Raises:
        ArgumentError: if an argument is below 1.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> annealed_estimate(vae, torch.zeros(5, 16), num_temperatures=10, num_chains=3)[0].shape
        torch.Size([5])
    """
    check_integer("num_chains", num_chains, minimum=1)
    check_integer("num_leapfrog_steps", num_leapfrog_steps, minimum=1)
    betas, target = temperatures(num_temperatures), target_of(model, as_values(images, model.dtype))
    shape = (num_chains, len(images), model.latent_dim)
    step_sizes = None
    for purpose in ("tuning", "chains"):
        generator = make_generator(images.device, seed, "annealing", purpose)
        start = _prior_sample(model, shape, generator)
        chains = anneal(target, start, betas, generator, num_leapfrog_steps, step_sizes)
        step_sizes = chains.step_sizes
    return iwae(chains.log_w), chains


class Sandwich(NamedTuple):
    """Bounds on log p(x) of images that a model has drawn, nats, shape `(count,)`.

    Attributes:
        images: what was drawn.
        lower: by chains forward, below log p(x) in expectation.
        upper: by chains back from the latent points that the images were drawn from, above it in expectation.
    """

    images: Float[Tensor, "count input"]
    lower: Float[Tensor, " count"]
    upper: Float[Tensor, " count"]


@torch.no_grad()
def simulated_sandwich(
    model: VAE,
    count: int,
    num_temperatures: int = 1_000,
    num_chains: int = 16,
    num_leapfrog_steps: int = 10,
    seed: int = 0,
) -> Sandwich:
    """Returns bounds from both sides on log p(x) of images that the model draws (bidirectional Monte Carlo).

    The chain back is one for each image: there is one exact posterior sample, the latent point it was drawn from.

    Args:
        model: the VAE; its decoder gives a density with a `sample(uniform)`.
        count: of images.
        num_temperatures: transitions of a chain.
        num_chains: for each image, forward.
        num_leapfrog_steps: of a transition.
        seed: of the noise.

    Raises:
        ArgumentError: if an argument is below 1.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> simulated_sandwich(vae, count=3, num_temperatures=10, num_chains=2).upper.shape
        torch.Size([3])
    """
    check_integer("count", count, minimum=1)
    reference = next(model.parameters())
    generator = make_generator(reference.device, seed, "annealing", "simulation")
    z = _prior_sample(model, (1, count, model.latent_dim), generator)
    density = model.decoder(z[0])
    images = density.sample(torch.rand(density.mean.shape, generator=generator, device=z.device, dtype=z.dtype))
    lower, chains = annealed_estimate(model, images, num_temperatures, num_chains, num_leapfrog_steps, seed)
    back = anneal(
        target_of(model, images),
        z,
        temperatures(num_temperatures),
        make_generator(reference.device, seed, "annealing", "back"),
        num_leapfrog_steps,
        chains.step_sizes,
        backward=True,
    )
    return Sandwich(images, lower, -iwae(-back.log_w))


def _prior_sample(model: VAE, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    reference = next(model.parameters())
    noise = torch.randn(shape, generator=generator, device=reference.device, dtype=reference.dtype)
    uniform = torch.rand(shape[:2], generator=generator, device=reference.device, dtype=reference.dtype)
    return model.prior_density().sample(noise, uniform)


def check_can_anneal(model: Model, num_temperatures: int, num_chains: int) -> VAE:
    """Returns the model if `check_by_annealing` takes it and the numbers, before any work is done.

    Raises:
        ArgumentError: if the model is no VAE, or a number is below 1.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> check_can_anneal(vae, num_temperatures=10, num_chains=0)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: num_chains must be an integer of at least 1, got 0
    """
    if not isinstance(model, VAE):
        raise ArgumentError(f"annealing takes a VAE, and the model is a {type(model).__name__}")
    check_integer("num_temperatures", num_temperatures, minimum=1)
    check_integer("num_chains", num_chains, minimum=1)
    return model


def check_by_annealing(
    model: Model, images: Tensor, num_samples: int, num_temperatures: int, num_chains: int, seed: int = 0
) -> dict[str, float | int]:
    """Returns what annealed importance sampling says of the importance-weighted bound, means over images, nats.

    On the images both are lower bounds on log p(x) in expectation, by different ways; a difference shows that the lower
    one is not near it. On as many images that the model draws, the truth lies between `simulated_lower` and
    `simulated_upper`, up to the error of their difference, `simulated_gap`.

    Args:
        model: the VAE, on the device of the images.
        images: as for `annealed_estimate`.
        num_samples: of the importance-weighted bound.
        num_temperatures: transitions of a chain.
        num_chains: for each image.
        seed: of the noise.

    Raises:
        ArgumentError: if the model is no VAE, or an argument is below 1.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> found = check_by_annealing(vae, torch.zeros(5, 16), num_samples=50, num_temperatures=10, num_chains=3)
        >>> found["annealed_num_images"], found["annealed_log_p_x"] < 0.0
        (5, True)
    """
    vae = check_can_anneal(model, num_temperatures, num_chains)
    annealed, chains = annealed_estimate(vae, images, num_temperatures, num_chains, seed=seed)
    weighted = estimate_log_likelihood(vae, images, num_samples, seed)
    sandwich = simulated_sandwich(vae, len(images), num_temperatures, num_chains, seed=seed)
    difference, gap = annealed - weighted.double(), sandwich.upper - sandwich.lower
    return {
        "annealed_num_images": len(images),
        "annealed_num_temperatures": num_temperatures,
        "annealed_num_chains": num_chains,
        "annealed_acceptance": chains.acceptance.mean().item(),
        "annealed_log_p_x": annealed.mean().item(),
        "annealed_minus_importance": difference.mean().item(),
        "annealed_minus_importance_standard_error": standard_error(difference),
        "simulated_lower": sandwich.lower.mean().item(),
        "simulated_importance": estimate_log_likelihood(vae, sandwich.images, num_samples, seed).mean().item(),
        "simulated_upper": sandwich.upper.mean().item(),
        "simulated_gap": gap.mean().item(),
        "simulated_gap_standard_error": standard_error(gap),
    }


def describe_check(record: Mapping[str, Any]) -> str:
    """Returns the lines of a check.

    Example: `main` of launch.evaluate prints them.
    """
    return (
        f"annealing, first {record['annealed_num_images']} images: log p(x) {record['annealed_log_p_x']:.3f}, "
        f"which is {record['annealed_minus_importance']:+.3f} ± "
        f"{record['annealed_minus_importance_standard_error']:.3f} to the importance-weighted bound on them\n"
        f"simulated images: log p(x) between {record['simulated_lower']:.3f} and {record['simulated_upper']:.3f} "
        f"({record['simulated_gap']:+.3f} ± {record['simulated_gap_standard_error']:.3f}), "
        f"importance-weighted bound {record['simulated_importance']:.3f}"
    )
