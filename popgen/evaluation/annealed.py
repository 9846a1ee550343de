"""Annealed importance sampling: an estimate of log p(x) that does not use the encoder.

Chains go from the prior to the posterior along f_β(z) = p(z) p(x | z)^β, by Hamiltonian Monte Carlo at each temperature
(Neal 2001, https://arxiv.org/abs/physics/9803008; Wu et al. 2017, https://arxiv.org/abs/1611.04273). On data that the
model itself has drawn, a chain back from the exact posterior sample bounds log p(x) from above (BDMC, Grosse et al.
2015, https://arxiv.org/abs/1511.02543).

All noise is keyed by the seed and the image's index, or that of the simulated one, and step sizes are tuned for each
image on its own, so that the answer does not depend on how the work is cut up.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from popgen.datasets.images import as_values
from popgen.errors import ArgumentError, check_integer
from popgen.evaluation.evaluator import identity_of
from popgen.evaluation.image_table import ImageTable
from popgen.evaluation.likelihood import importance_estimate
from popgen.evaluation.statistics import standard_error
from popgen.losses import iwae
from popgen.models.model import Model
from popgen.models.vae import VAE
from popgen.streams import make_generator

TARGET_ACCEPTANCE = 0.65  # of proposals, for which step sizes are tuned (Neal 2011)
INITIAL_STEP_SIZE = 0.1
TUNING_RATE = 0.2  # acceptance is within [0, 1], so a temperature changes a step size by exp(-0.13) to exp(0.07)
TUNING_CHAINS = 4  # of an image, at most: they keep its step size within a few per cent of what it should be
SIGMOID_RANGE = 4.0
# Images whose chains go together: on a CPU they fill a core, on a GPU they make each launch worth its while. They are
# always as many, each at the same place, if need be beside copies: chains amplify rounding, which depends on that.
IMAGES_AT_ONCE = {"cpu": 10, "cuda": 100}
SIGNIFICANT = 2.0  # standard errors from which a difference is spoken of
ESTIMATOR_VERSION = 2  # raised with every change to what a row is made of: rows on file are used no more

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
    generators: Sequence[torch.Generator],
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
        generators: of momenta and acceptances, one for each example.
        num_leapfrog_steps: of a proposal.
        step_sizes: of the leapfrog steps at each temperature but the first, for each example. None tunes them on the
            way: only chains with step sizes that were fixed before have unbiased weights.
        backward: whether to go from 1 to 0.

    Example:
        >>> flat = Target(lambda z: -0.5 * z.square().sum(-1), lambda z: torch.zeros(z.shape[:-1]))
        >>> anneal(flat, torch.randn(3, 2, 4), temperatures(5), [torch.Generator(), torch.Generator()]).log_w
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
        z, accepted = _transition(target, z, beta, sizes[index], num_leapfrog_steps, generators)
        acceptance[index] = accepted.mean(0)
        tuned = tuned * torch.exp(TUNING_RATE * (acceptance[index] - TARGET_ACCEPTANCE))
        if backward:
            log_w += increase * target.log_likelihood(z)
    return Chains(log_w, z, torch.stack(acceptance), torch.stack(sizes))


def _transition(
    target: Target, z: Tensor, beta: float, step_size: Tensor, num_steps: int, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Returns where a step of Hamiltonian Monte Carlo goes, and the probability of its acceptance, for each chain."""
    size = step_size[:, None]
    momentum = _draw(torch.randn, generators, (len(z), z.shape[-1]), z)
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
    uniform = _draw(torch.rand, generators, (len(z),), z)
    return torch.where((uniform < probability)[..., None], place, z), probability


def _density_and_gradient(target: Target, z: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        place = z.detach().requires_grad_()
        log_density = target.log_prior(place) + beta * target.log_likelihood(place)
        (gradient,) = torch.autograd.grad(log_density.sum(), place)
    return log_density.detach(), gradient


def _draw(sample: Callable[..., Tensor], generators: Sequence[torch.Generator], shape: tuple, like: Tensor) -> Tensor:
    """Returns a draw of each generator, side by side along the second axis."""
    draws = [sample(shape, generator=generator, device=like.device, dtype=like.dtype) for generator in generators]
    return torch.stack(draws, dim=1)


def target_of(model: VAE, x: Float[Tensor, "count input"]) -> Target:
    """Returns the prior of a VAE and its likelihood of some images.

    Example: `annealed_estimate` calls it.
    """
    prior = model.prior_density()
    return Target(prior.log_density, lambda z: model.decode(z).log_density(x))


@torch.no_grad()
def annealed_estimate(
    model: VAE,
    images: Tensor,
    num_temperatures: int = 1_000,
    num_chains: int = 16,
    num_leapfrog_steps: int = 10,
    seed: int = 0,
    first_image: int = 0,
) -> tuple[Float[Tensor, " count"], Chains]:
    """Returns log p(x) of images by annealed importance sampling, a lower bound in expectation, nats; and its chains.

    A few chains with other noise tune the step sizes first. Memory grows with `num_chains`, for a few images at a time.

    Args:
        model: the VAE, on the device of the images.
        images: uint8 levels of 0 and 255 or values in [0, 1], shape `(count, size)`.
        num_temperatures: transitions of a chain.
        num_chains: for each image.
        num_leapfrog_steps: of a transition.
        seed: of the noise.
        first_image: index in the data set of the first of these images, to which their noise belongs.

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
    betas = temperatures(num_temperatures)
    parts = []
    groups, own = _groups(range(first_image, first_image + len(images)), images.device)
    for group in groups:
        places = (torch.arange(group.start, group.stop, device=images.device) - first_image).clamp(0, len(images) - 1)
        target, step_sizes = target_of(model, as_values(images[places], model.dtype)), None
        for purpose, number in (("tuning", min(num_chains, TUNING_CHAINS)), ("chains", num_chains)):
            generators = _generators(images.device, seed, purpose, group)
            start = _prior_sample(model, number, generators)
            chains = anneal(target, start, betas, generators, num_leapfrog_steps, step_sizes)
            step_sizes = chains.step_sizes
        parts.append(chains)
    chains = Chains(*(torch.cat(fields, dim=1)[:, own] for fields in zip(*parts, strict=True)))
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
    first_image: int = 0,
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
        first_image: index of the first of these images among all that the model draws with the seed.

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
    device, betas = next(model.parameters()).device, temperatures(num_temperatures)
    parts = []
    groups, own = _groups(range(first_image, first_image + count), device)
    for group in groups:
        generators = _generators(device, seed, "simulation", group)
        z = _prior_sample(model, 1, generators)
        density = model.decode(z)
        images = density.sample(_draw(torch.rand, generators, (1, model.input_dim), z))[0]
        lower, chains = annealed_estimate(
            model, images, num_temperatures, num_chains, num_leapfrog_steps, seed, group.start
        )
        generators = _generators(device, seed, "back", group)
        target, step_sizes = target_of(model, images), chains.step_sizes
        back = anneal(target, z, betas, generators, num_leapfrog_steps, step_sizes, backward=True)
        parts.append(Sandwich(images, lower, -iwae(-back.log_w)))
    return Sandwich(*(torch.cat(fields)[own] for fields in zip(*parts, strict=True)))


def _images_at_once(device: torch.device) -> int:
    return IMAGES_AT_ONCE.get(device.type, IMAGES_AT_ONCE["cpu"])


def _groups(indices: range, device: torch.device) -> tuple[list[range], slice]:
    """Returns the whole groups that some images belong to, and where in these groups side by side the images are."""
    size = _images_at_once(device)
    first = indices.start - indices.start % size
    groups = [range(start, start + size) for start in range(first, indices.stop, size)]
    return groups, slice(indices.start - first, indices.stop - first)


def _generators(device: torch.device, seed: int, purpose: str, group: range) -> list[torch.Generator]:
    """Returns a generator for each image of a group, at the start of a stream of its own."""
    return [make_generator(device, seed, "annealing", purpose, index) for index in group]


def _prior_sample(model: VAE, num_chains: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Returns draws from the prior, shape `(chains, count, latent)`."""
    reference = next(model.parameters())
    noise = _draw(torch.randn, generators, (num_chains, model.latent_dim), reference)
    return model.prior_density().sample(noise, _draw(torch.rand, generators, (num_chains,), reference))


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
    model: Model,
    images: Tensor,
    num_samples: int,
    num_temperatures: int,
    num_chains: int,
    num_leapfrog_steps: int = 10,
    seed: int = 0,
    table: ImageTable | None = None,
) -> dict[str, float | int]:
    """Returns what annealed importance sampling says of the importance-weighted bound, means over images, nats.

    On the images both are lower bounds on log p(x) in expectation, by different ways; a difference shows that the lower
    one is not near it. On as many images that the model draws, the truth lies between `simulated_lower` and
    `simulated_upper`, up to the error of their difference, `simulated_gap`; the importance-weighted bound is at most
    `simulated_importance_gap` below it, up to the error of that.

    Args:
        model: the VAE, on the device of the images.
        images: as for `annealed_estimate`.
        num_samples: of the importance-weighted bound.
        num_temperatures: transitions of a chain.
        num_chains: for each image.
        num_leapfrog_steps: of a transition.
        seed: of the noise.
        table: keeps what is found of every image, and of the simulated image of the same index.

    Raises:
        ArgumentError: if the model is no VAE, or an argument is below 1.
        UnfinishedEvaluationError: if the table's other shards are not finished.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> found = check_by_annealing(vae, torch.zeros(5, 16), num_samples=50, num_temperatures=10, num_chains=3)
        >>> found["annealed_num_images"], found["annealed_log_p_x"] < 0.0
        (5, True)
    """
    vae = check_can_anneal(model, num_temperatures, num_chains)
    settings = {
        "num_temperatures": num_temperatures,
        "num_chains": num_chains,
        "num_leapfrog_steps": num_leapfrog_steps,
    }

    def columns_of(indices: range) -> dict[str, Tensor]:
        own, first = images[indices.start : indices.stop], indices.start
        annealed, chains = annealed_estimate(vae, own, **settings, seed=seed, first_image=first)
        simulated = simulated_sandwich(vae, len(own), **settings, seed=seed, first_image=first)
        return {
            "annealed": annealed,
            "importance": importance_estimate(vae, own, num_samples, seed, first_image=first).log_p_x,
            "acceptance": chains.acceptance.mean(0),
            "simulated_lower": simulated.lower,
            "simulated_importance": importance_estimate(
                vae, simulated.images, num_samples, seed, first_image=first
            ).log_p_x,
            "simulated_upper": simulated.upper,
        }

    identity = identity_of(
        vae, images, **settings, num_samples=num_samples, seed=seed, estimator_version=ESTIMATOR_VERSION
    )
    chunk = _images_at_once(images.device)
    columns = (table or ImageTable()).fill(identity, len(images), columns_of, images_in_chunk=chunk)
    means = {name: column.mean().item() for name, column in columns.items()}
    difference = columns["annealed"] - columns["importance"]
    gap = columns["simulated_upper"] - columns["simulated_lower"]
    importance_gap = columns["simulated_upper"] - columns["simulated_importance"]
    return {
        "annealed_num_images": len(images),
        "annealed_estimator_version": ESTIMATOR_VERSION,
        **{f"annealed_{name}": value for name, value in settings.items()},
        "annealed_acceptance": means["acceptance"],
        "annealed_log_p_x": means["annealed"],
        "annealed_minus_importance": difference.mean().item(),
        "annealed_minus_importance_standard_error": standard_error(difference),
        **{name: mean for name, mean in means.items() if name.startswith("simulated_")},
        "simulated_gap": gap.mean().item(),
        "simulated_gap_standard_error": standard_error(gap),
        "simulated_importance_gap": importance_gap.mean().item(),
        "simulated_importance_gap_standard_error": standard_error(importance_gap),
    }


def describe_check(record: Mapping[str, Any]) -> str:
    """Returns the lines of a check, and a warning where annealing shows that the importance-weighted bound is too low.

    Example: `main` of launch.evaluate prints them.
    """
    lines = (
        f"annealing, first {record['annealed_num_images']} images: log p(x) {record['annealed_log_p_x']:.3f}, "
        f"which is {record['annealed_minus_importance']:+.3f} ± "
        f"{record['annealed_minus_importance_standard_error']:.3f} to the importance-weighted bound on them\n"
        f"simulated images: log p(x) between {record['simulated_lower']:.3f} and {record['simulated_upper']:.3f} "
        f"({record['simulated_gap']:+.3f} ± {record['simulated_gap_standard_error']:.3f}), "
        f"importance-weighted bound {record['simulated_importance']:.3f}"
    )
    if "simulated_importance_gap" in record:  # earlier records have none
        error = record["simulated_importance_gap_standard_error"]
        lines += f", which is at most {record['simulated_importance_gap']:.3f} ± {error:.3f} below log p(x)"
    if record["annealed_minus_importance"] > SIGNIFICANT * record["annealed_minus_importance_standard_error"]:
        lines += "\nwarning: annealing finds more than the importance-weighted bound, which is not near log p(x)"
    return lines
