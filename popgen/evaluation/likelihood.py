"""Bounds on log p(x) over a set of images, in nats.

Evaluation has its own noise, keyed by the seed and, for importance samples, by the image's index, in blocks of fixed
size. So it never disturbs training, two checkpoints meet the same noise, and the answer does not depend on how the work
is cut up. The noise is drawn on the device of the images, and kinds of devices draw different numbers.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from popgen.compilation import compile_or_fall_back
from popgen.datasets.images import as_values
from popgen.distributions import StandardNormal
from popgen.errors import ArgumentError, check_integer
from popgen.evaluation.importance import (
    MIN_PARETO_SAMPLES,
    effective_sample_size,
    monte_carlo_error,
    nested_bounds,
    nested_group_sizes,
    pareto_shape,
)
from popgen.evaluation.progress import Progress
from popgen.losses import elbo
from popgen.models.image_model import ImageModel
from popgen.models.vae import VAE
from popgen.precision import matrix_products
from popgen.streams import make_generator, stream_seed

ACTIVE_UNIT_VARIANCE = 0.01
BLOCKS_OF_IMAGE = 4_096  # seeds that are set apart for each image, one for each block
NOISE_BLOCK = 1_000  # samples of one image, or single samples of so many images, whose noise is drawn together
MAX_SAMPLES = BLOCKS_OF_IMAGE * NOISE_BLOCK  # of an image: more would be those of the next one
# (image, sample) pairs that pass through the decoder together: on a CPU they fill the cores and fit the cache, on a GPU
# they make each launch worth its while.
ROWS_IN_FLIGHT = {"cpu": 4_000, "cuda": 128_000}


def image_noise(
    indices: range, num_samples: int, noise_dim: int, block: int, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns standard normal noise for some images, shape `(num_samples, images, noise_dim)`.

    Args:
        indices: of the images in their data set.
        num_samples: draws for each.
        noise_dim: numbers that a draw takes.
        block: which block of samples this is.
        seed: of the evaluation.
        device: where it is drawn.

    Example:
        >>> both = image_noise(range(5, 7), num_samples=3, noise_dim=2, block=0, seed=0)
        >>> torch.equal(both[:, 1:], image_noise(range(6, 7), num_samples=3, noise_dim=2, block=0, seed=0))
        True
    """
    generator, first = torch.Generator(device), stream_seed(seed, "evaluation")
    noise = torch.empty(len(indices), num_samples, noise_dim, device=device)
    for row, index in enumerate(indices):
        # No two blocks of a million images share a seed, as hashes of 32 bits would here and there.
        generator.manual_seed((first + BLOCKS_OF_IMAGE * index + block) % 2**32)
        noise[row].normal_(generator=generator)
    return noise.transpose(0, 1).contiguous()


def check_samples(name: str, num_samples: int) -> int:
    """Returns a number of samples of each image if there is noise for so many.

    Raises:
        ArgumentError: if there is not.

    Example:
        >>> check_samples("num_samples", 5_000_000)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: num_samples must be at most 4,096,000, got 5000000
    """
    if check_integer(name, num_samples, minimum=1) > MAX_SAMPLES:
        raise ArgumentError(f"{name} must be at most {MAX_SAMPLES:,}, got {num_samples}")
    return num_samples


def check_has_samples(model: ImageModel) -> None:
    """Checks that a model can be weighed by importance: that its posterior is no point.

    Raises:
        ArgumentError: if it is one.

    Example: `importance_estimate` calls it.
    """
    if not model.noise_dim:
        raise ArgumentError(
            f"importance weights need a posterior to draw from, and that of {type(model).__name__} is a point "
            "(noise_dim is 0): all samples of an image would be the same"
        )


@torch.no_grad()
def evaluate_elbo(
    model: ImageModel, images: Tensor, seed: int = 0, batch_size: int = 500, first_image: int = 0
) -> dict[str, Tensor]:
    """Returns the ELBO of every image at β = 1 and its parts, from one sample each.

    Args:
        model: on the device of the images.
        images: uint8 levels of 0 and 255 or values in [0, 1], shape `(count, size)`.
        seed: of the noise.
        batch_size: images at a time; it does not change the answer.
        first_image: index in the data set of the first of these images, to which their noise belongs.

    Returns:
        `elbo`, `reconstruction` (log p(x|z)), `kl` (log q(z|x) - log p(z)), `log_q_z_given_x`, `log_p_z` and
        `log_det`, each of shape `(count,)`, nats.

    Raises:
        ArgumentError: if there is no image.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> evaluate_elbo(vae, torch.zeros(5, 16))["elbo"].shape
        torch.Size([5])
    """
    check_integer("the number of images", len(images), minimum=1)
    indices = range(first_image, first_image + len(images))
    noise = _elbo_noise(indices, model.noise_dim, seed, images.device)
    parts: list[dict[str, Tensor]] = []
    for chunk, chunk_noise in zip(images.split(batch_size), noise.split(batch_size), strict=True):
        x = as_values(chunk, model.dtype)
        terms = model(x, chunk_noise[None].to(x))
        bound = elbo(terms.log_p_x_given_z, terms.log_p_z, terms.log_q_z_given_x)
        parts.append(
            {
                "elbo": bound,
                "reconstruction": terms.log_p_x_given_z[0],
                "kl": (terms.log_q_z_given_x - terms.log_p_z)[0],
                "log_q_z_given_x": terms.log_q_z_given_x[0],
                "log_p_z": terms.log_p_z[0],
                "log_det": terms.log_det[0],
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _elbo_noise(indices: range, noise_dim: int, seed: int, device: torch.device) -> Tensor:
    """Returns one draw for each image; whole blocks are drawn, so that it does not depend on which others there are."""
    first_block = indices.start // NOISE_BLOCK
    blocks = [
        torch.randn(NOISE_BLOCK, noise_dim, generator=make_generator(device, seed, "ELBO", block), device=device)
        for block in range(first_block, math.ceil(indices.stop / NOISE_BLOCK))
    ]
    start = indices.start - first_block * NOISE_BLOCK
    return torch.cat(blocks)[start : start + len(indices)]


@dataclasses.dataclass(frozen=True)
class LikelihoodEstimate:
    """The importance-weighted bound on log p(x) of every image, and what its weights say of it; see `importance`.

    Attributes:
        bounds: number of samples to the bound with so many, nats, shape `(count,)`; means over groups of all draws.
        monte_carlo_error: standard error of the last bound as an estimate of log p(x), nats; not a number for a single
            sample.
        effective_sample_size: of all samples.
        pareto_shape: k̂; not a number for fewer than 25 samples.

    Example: `importance_estimate` returns one.
    """

    bounds: Mapping[int, Float[Tensor, " count"]]
    monte_carlo_error: Float[Tensor, " count"]
    effective_sample_size: Float[Tensor, " count"]
    pareto_shape: Float[Tensor, " count"]

    @property
    def log_p_x(self) -> Float[Tensor, " count"]:
        """The bound with all samples."""
        return self.bounds[max(self.bounds)]

    @classmethod
    def of(cls, log_w: Float[Tensor, "samples count"]) -> "LikelihoodEstimate":
        """Returns what the logarithms of the weights say."""
        few = len(log_w) < MIN_PARETO_SAMPLES
        return cls(
            nested_bounds(log_w, nested_group_sizes(len(log_w))),
            monte_carlo_error(log_w),
            effective_sample_size(log_w),
            torch.full_like(log_w[0], math.nan) if few else pareto_shape(log_w),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["LikelihoodEstimate"]) -> "LikelihoodEstimate":
        """Returns the estimates of all images of several parts."""
        return cls(
            {size: torch.cat([part.bounds[size] for part in parts]) for size in parts[0].bounds},
            torch.cat([part.monte_carlo_error for part in parts]),
            torch.cat([part.effective_sample_size for part in parts]),
            torch.cat([part.pareto_shape for part in parts]),
        )


def name_of_bound(num_samples: int) -> str:
    """Returns the name that a bound with so many samples has in records and tables.

    Example:
        >>> name_of_bound(100)
        'log_p_x_of_100_samples'
    """
    return f"log_p_x_of_{num_samples}_samples"


def bounds_by_size(values: Mapping[str, Any]) -> dict[int, Any]:
    """Returns what is found under each `name_of_bound`, by the number of samples.

    Example:
        >>> bounds_by_size({"log_p_x": -8.0, "log_p_x_of_1_samples": -9.0, "log_p_x_of_50_samples": -8.0})
        {1: -9.0, 50: -8.0}
    """
    matches = {name: re.fullmatch(r"log_p_x_of_(\d+)_samples", name) for name in values}
    return {int(found[1]): values[name] for name, found in matches.items() if found}


def estimate_log_likelihood(
    model: ImageModel,
    images: Tensor,
    num_samples: int = 5_000,
    seed: int = 0,
    progress: Progress | None = None,
    precision: str = "fp32",
    compiled: bool = False,
) -> Float[Tensor, " count"]:
    """Returns the importance-weighted bound on log p(x) of every image, nats: `importance_estimate` without the rest.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> estimate_log_likelihood(vae, torch.zeros(5, 16), num_samples=50).shape
        torch.Size([5])
    """
    log_weights = log_weight_function(model, compiled)
    return importance_estimate(model, images, num_samples, seed, progress, precision, log_weights).log_p_x


LogWeights = Callable[[Tensor, Any, Tensor], Tensor]


def log_weight_function(model: ImageModel, compiled: bool = False) -> LogWeights:
    """Returns the function of images, what they are encoded to, and noise that gives the logarithms of their weights.

    Args:
        model: whose samples they weigh.
        compiled: whether torch.compile fuses what is done to the samples.

    Example: `estimate_log_likelihood` calls it.
    """

    def log_weights(x: Tensor, encoded: Any, noise: Tensor) -> Tensor:
        log_w: Tensor = model.log_densities(x, encoded, noise).log_w
        return log_w

    return compile_or_fall_back(log_weights) if compiled else log_weights


@torch.no_grad()
def importance_estimate(
    model: ImageModel,
    images: Tensor,
    num_samples: int = 5_000,
    seed: int = 0,
    progress: Progress | None = None,
    precision: str = "fp32",
    log_weights: LogWeights | None = None,
    first_image: int = 0,
) -> LikelihoodEstimate:
    """Returns the importance-weighted bound on log p(x) of every image, nats (Burda et al. 2016, eq. 8), and its worth.

    What the model's `encode` does (of a VAE: encoder, flow parameters, pseudo-inputs) is done once for each image, and
    the decoder sees a bounded number of samples at a time, so that memory grows with `num_samples` by one number for
    each sample of a few images.

    Args:
        model: on the device of the images; its posterior is no point.
        images: uint8 levels of 0 and 255 or values in [0, 1], shape `(count, size)`.
        num_samples: importance samples K for each image.
        seed: of the noise.
        progress: called with the bounds of the images that have been finished since the last call.
        precision: of the matrix products; see `popgen.precision.matrix_products`.
        log_weights: what `log_weight_function` returned; None for that of plain code.
        first_image: index in the data set of the first of these images, to which their noise belongs.

    Raises:
        ArgumentError: if `num_samples` is below 1, there is no image, or all samples of an image are the same.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> list(importance_estimate(vae, torch.zeros(5, 16), num_samples=200).bounds)
        [1, 10, 100, 200]
    """
    check_samples("num_samples", num_samples)
    check_integer("the number of images", len(images), minimum=1)
    check_has_samples(model)
    log_weights = log_weight_function(model) if log_weights is None else log_weights
    samples_at_once = min(num_samples, NOISE_BLOCK)
    images_at_once = max(1, ROWS_IN_FLIGHT.get(images.device.type, ROWS_IN_FLIGHT["cpu"]) // samples_at_once)
    estimates = []
    for start in range(0, len(images), images_at_once):
        x = as_values(images[start : start + images_at_once], model.dtype)
        indices = range(first_image + start, first_image + start + len(x))
        blocks = []
        with matrix_products(precision, x.device):
            encoded = model.encode(x)
            for block, first in enumerate(range(0, num_samples, samples_at_once)):
                size = min(samples_at_once, num_samples - first)
                noise = image_noise(indices, size, model.noise_dim, block, seed, x.device).to(x)
                blocks.append(log_weights(x, encoded, noise))
        estimates.append(LikelihoodEstimate.of(torch.cat(blocks)))
        if progress is not None:
            progress(estimates[-1].log_p_x)
    return LikelihoodEstimate.concatenate(estimates)


@torch.no_grad()
def count_active_units(model: VAE, images: Tensor, batch_size: int = 1_000) -> int:
    """Returns the number of latent units whose code varies with the image.

    A unit is active if the variance of its code over the images exceeds 0.01 (Burda et al. 2016, section 5.2). The code
    is the posterior mean, moved by the flow.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> count_active_units(vae, torch.zeros(5, 16))
        0
    """
    codes = torch.cat([model.latent_code(as_values(chunk, model.dtype)) for chunk in images.split(batch_size)])
    return int((codes.var(dim=0, correction=0) > ACTIVE_UNIT_VARIANCE).sum())


@torch.no_grad()
def kl_of_dimensions(model: VAE, images: Tensor, batch_size: int = 1_000) -> Float[Tensor, " latent"] | None:
    """Returns KL(q(z_i|x) | p(z_i)) of each latent dimension in closed form, a mean over images, nats.

    None where posterior or prior does not factorise: there is a flow, or the prior is not the standard normal.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> kl_of_dimensions(vae, torch.zeros(5, 16)).shape
        torch.Size([2])
    """
    if model.flow is not None or type(model.prior_density()) is not StandardNormal:  # a subclass may be another density
        return None
    total = torch.zeros(model.latent_dim, dtype=torch.float64, device=images.device)
    for chunk in images.split(batch_size):
        posterior = model.encode(as_values(chunk, model.dtype)).posterior
        mean, log_var = posterior.mean.double(), posterior.log_var.double()
        total += 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).sum(0)
    return total / len(images)
