"""What an evaluation reports of a model beside its bound: one class for each kind of model."""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from popgen.datasets.images import ImageData
from popgen.errors import check_integer
from popgen.evaluation.likelihood import Progress, count_active_units, estimate_log_likelihood
from popgen.evaluation.pictures import Picture, all_pictures
from popgen.models.vae import VAE

CURVE_IMAGES = 1_000  # that the active_units curves look at; an evaluation looks at all


@runtime_checkable
class Evaluator(Protocol):
    """How a kind of model is evaluated. The ELBO and its parts are the same for all; the rest is here."""

    model_type: ClassVar[type]
    bound_name: ClassVar[str]
    default_num_samples: ClassVar[int]

    def check_num_samples(self, name: str, num_samples: int) -> None:
        """Raises ArgumentError, with the name of an argument, if `bound` does not take so many samples."""

    def curves(self, model: Any, images: Tensor) -> dict[str, float | int]:
        """Returns numbers that say how the latent space is used on some images, cheap enough for a curve."""

    def bound(
        self,
        model: Any,
        images: Tensor,
        num_samples: int,
        seed: int,
        progress: Progress | None,
        precision: str,
        compiled: bool,
    ) -> Tensor:
        """Returns the tightest bound on log p(x) of every image, shape `(count,)`, nats."""

    def statistics(self, model: Any, data: ImageData, images: Tensor) -> dict[str, float | int]:
        """Returns further numbers for the record of an evaluation on some of the test images."""

    def pictures(self, model: Any, data: ImageData, num_samples: int, generator: torch.Generator) -> dict[str, Picture]:
        """Returns pictures by name."""


@dataclasses.dataclass(frozen=True)
class VAEEvaluator:
    """Evaluates a VAE: the importance-weighted bound, active units, and pictures of what it has learned.

    Example:
        >>> VAEEvaluator().default_num_samples
        5000
    """

    model_type: ClassVar[type] = VAE
    bound_name: ClassVar[str] = "IWAE"
    default_num_samples: ClassVar[int] = 5_000

    def check_num_samples(self, name: str, num_samples: int) -> None:
        """Any positive number will do."""
        check_integer(name, num_samples, minimum=1)

    def curves(self, model: VAE, images: Tensor) -> dict[str, float | int]:
        """Returns the number of active units on the first images."""
        return {"active_units": count_active_units(model, images[:CURVE_IMAGES])}

    def bound(
        self,
        model: VAE,
        images: Tensor,
        num_samples: int,
        seed: int,
        progress: Progress | None = None,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> Tensor:
        """Returns the importance-weighted bound of every image."""
        return estimate_log_likelihood(model, images, num_samples, seed, progress, precision, compiled)

    def statistics(self, model: VAE, data: ImageData, images: Tensor) -> dict[str, float | int]:
        """Returns the number of active units."""
        return {"active_units": count_active_units(model, images)}

    def pictures(self, model: VAE, data: ImageData, num_samples: int, generator: torch.Generator) -> dict[str, Picture]:
        """Returns prior samples, reconstructions, interpolations and pseudo-inputs."""
        return all_pictures(model, data.test, data.image_shape, num_samples, generator)
