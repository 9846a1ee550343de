"""How VQ-VAEs are evaluated: the bound, the use of the codes, and what a prior that knows no neighbours would give."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from popgen.datasets.images import ImageData, as_values, bernoulli_thresholds, binarise, draw_bits
from popgen.errors import ArgumentError
from popgen.evaluation.evaluator import EvaluationSettings, ImageEvaluator, Results
from popgen.evaluation.likelihood import evaluate_elbo
from popgen.evaluation.pictures import COLUMNS, originals
from popgen.evaluation.shown import Shown
from popgen.models.vqvae import VQVAE, VQVAEWithPrior
from popgen.nn.vqvae import CodeUsage
from popgen.precision import matrix_products
from popgen.streams import make_generator
from popgen.summaries import image_grid

BATCH_SIZE = 1_000


@torch.no_grad()
def codes_of_images(model: VQVAE, images: Tensor, seed: int = 0) -> Int64[Tensor, "count height width ..."]:
    """Returns the codes of all images, in order; grey levels are binarised with a seeded draw first.

    Args:
        model: on the device of the images.
        images: uint8 levels or values in [0, 1], shape `(count, size)`.
        seed: of the binarisation.

    Example:
        >>> from popgen.models.vqvae import ConvolutionalDecoder, ConvolutionalEncoder
        >>> from popgen.nn.vqvae import MovingAverageQuantiser
        >>> vqvae = VQVAE(ConvolutionalEncoder(8), MovingAverageQuantiser(16, 8), ConvolutionalDecoder(8))
        >>> codes_of_images(vqvae, torch.zeros(5, 784)).shape
        torch.Size([5, 7, 7])
    """
    generator = make_generator(images.device, seed, "codes")
    codes = []
    for part in images.split(BATCH_SIZE):
        if not part.is_floating_point():
            part = binarise(bernoulli_thresholds(part), draw_bits(tuple(part.shape), generator))
        codes.append(model.encode(part.to(model.dtype)))
    return torch.cat(codes)


def positionwise_log_prior(
    codes: Int64[Tensor, "count ..."], seen: Int64[Tensor, "seen ..."], num_codes: int
) -> Float[Tensor, " count"]:
    """Returns log p of each map under one categorical distribution for each position, nats.

    The probabilities are those of other maps, with one added to every count.

    Args:
        codes: the maps.
        seen: the maps whose counts are taken.
        num_codes: K.

    Example:
        >>> seen = torch.tensor([[0, 1], [0, 1]])
        >>> positionwise_log_prior(torch.tensor([[0, 1]]), seen, num_codes=2).exp()  # (3/4)²
        tensor([0.5625])
    """
    codes, seen = codes.flatten(1), seen.flatten(1)
    num_positions = seen.shape[1]
    places = num_codes * torch.arange(num_positions, device=seen.device)
    counts = torch.bincount((seen + places).flatten(), minlength=num_positions * num_codes).view(num_positions, -1) + 1
    log_probabilities = counts.double().log() - counts.sum(1, keepdim=True).double().log()
    return log_probabilities.flatten()[codes + places].sum(1).float()


@dataclasses.dataclass(frozen=True)
class VQVAEEvaluator(ImageEvaluator):
    """Evaluates a VQ-VAE: its bound under a uniform prior, and how many of the codes it uses.

    `codes_used` and `perplexity` are those of a whole pass over the images, whatever the batches. Of several codebooks
    the codes used are summed, the perplexity is the geometric mean, and `codes_used_of_codebook_n` and
    `perplexity_of_codebook_n` are those of codebook n = 1, 2, ...

    Example:
        >>> VQVAEEvaluator().default_num_samples
        1
    """

    model_type: ClassVar[type] = VQVAE
    headline: ClassVar[tuple[str, ...]] = (*ImageEvaluator.headline, "codes_used", "perplexity")
    bound_name: ClassVar[str] = "ELBO, the posterior is a point"
    statistic_names: ClassVar[tuple[str, ...]] = (
        "codes_used",
        "perplexity",
        "kl_of_positionwise_prior",
        "elbo_of_positionwise_prior",
    )
    default_num_samples: ClassVar[int] = 1

    def check_num_samples(self, name: str, num_samples: int) -> None:
        """One sample is the answer.

        Raises:
            ArgumentError: if there are more, or none.
        """
        if num_samples != 1:
            raise ArgumentError(
                f"{name} must be 1 for a VQ-VAE, got {num_samples}: its posterior is a point, and more samples are "
                "all the same"
            )

    def curves(self, model: VQVAE, examples: Tensor) -> Results:
        """Returns the use of the codes on all images."""
        return _usage(model, codes_of_images(model, examples))

    def bounds(
        self, model: VQVAE | VQVAEWithPrior, settings: EvaluationSettings
    ) -> Callable[[Tensor, Mapping[str, Tensor], int], dict[str, Tensor]]:
        """Returns what finds the evidence lower bound of every image, which one sample gives exactly.

        Raises:
            ArgumentError: if `num_samples` is not 1.
        """
        self.check_num_samples("num_samples", settings.num_samples)

        def columns(images: Tensor, parts: Mapping[str, Tensor], first_image: int) -> dict[str, Tensor]:
            bound = parts["elbo"]
            if settings.precision != "fp32":
                with matrix_products(settings.precision, images.device):
                    bound = evaluate_elbo(model, images, settings.seed)["elbo"]
            if settings.progress is not None:
                settings.progress(bound)
            return {"log_p_x": bound}

        return columns

    def statistics(self, model: VQVAE, data: ImageData, images: Tensor, parts: Mapping[str, Tensor]) -> Results:
        """Returns the use of the codes, and the bound under a categorical prior for each position."""
        codes, seen = codes_of_images(model, images), codes_of_images(model, data.train)
        kl = -positionwise_log_prior(codes, seen, model.quantiser.num_codes).double().mean().item()
        reconstruction = parts["reconstruction"].double().mean().item()
        return {
            **_usage(model, codes),
            "kl_of_positionwise_prior": kl,
            "elbo_of_positionwise_prior": reconstruction - kl,
        }

    def show(self, model: VQVAE, data: ImageData, num_samples: int, generator: torch.Generator) -> dict[str, Shown]:
        """Returns pictures of test images, and the same each beside what its codes decode to."""
        some = data.test[:num_samples]
        x = as_values(some, model.dtype)
        with torch.no_grad():
            pairs = torch.stack([x, model.decode(model.encode(x)).mean], dim=1).flatten(0, 1)
        return {
            "originals": originals(some, data.image_shape),
            "reconstructions": image_grid(pairs, data.image_shape, columns=COLUMNS),
        }


@dataclasses.dataclass(frozen=True)
class VQVAEWithPriorEvaluator(VQVAEEvaluator):
    """Evaluates a VQ-VAE with a learned prior over its codes.

    Example:
        >>> VQVAEWithPriorEvaluator().default_num_samples
        1
    """

    model_type: ClassVar[type] = VQVAEWithPrior

    def curves(self, model: Any, examples: Tensor) -> Results:
        """Returns nothing: the codes stay as they are."""
        return {}

    def statistics(self, model: Any, data: ImageData, images: Tensor, parts: Mapping[str, Tensor]) -> Results:
        """Returns those of the autoencoder: the same codes under a categorical prior for each position."""
        return super().statistics(model.autoencoder, data, images, parts)

    def show(self, model: Any, data: ImageData, num_samples: int, generator: torch.Generator) -> dict[str, Shown]:
        """Returns pictures of draws from prior and decoder, and those of the autoencoder."""
        uniform = torch.rand(num_samples, *model.autoencoder.map_shape, generator=generator, device=generator.device)
        samples = image_grid(model.sample(uniform), data.image_shape, columns=COLUMNS)
        return {"prior_samples": samples, **super().show(model.autoencoder, data, num_samples, generator)}


def _usage(model: VQVAE, codes: Tensor) -> Results:
    """Returns the use of the codes; of several codebooks together and of each."""
    num_codes, num_codebooks = model.quantiser.num_codes, model.quantiser.num_codebooks
    books = codes.reshape(-1, num_codebooks).unbind(1)
    usages = [CodeUsage.of(book, num_codes) for book in books]
    used, perplexities = [usage.num_used for usage in usages], [usage.perplexity for usage in usages]
    results: Results = {"codes_used": sum(used), "perplexity": math.prod(perplexities) ** (1.0 / num_codebooks)}
    if num_codebooks > 1:
        results |= {f"codes_used_of_codebook_{n}": count for n, count in enumerate(used, start=1)}
        results |= {f"perplexity_of_codebook_{n}": perplexity for n, perplexity in enumerate(perplexities, start=1)}
    return results
