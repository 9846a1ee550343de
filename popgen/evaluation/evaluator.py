"""What an evaluation reports of a model: one class for each kind of model."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from popgen.datasets.images import ImageData
from popgen.errors import check_integer
from popgen.evaluation.likelihood import (
    Progress,
    count_active_units,
    estimate_log_likelihood,
    evaluate_elbo,
    standard_error,
)
from popgen.evaluation.pictures import Picture, all_pictures
from popgen.evaluation.shown import Shown
from popgen.models.image_model import ImageModel
from popgen.models.vae import VAE

CURVE_IMAGES = 1_000  # that the active_units curves look at; an evaluation looks at all

Results = dict[str, float | int]


@runtime_checkable
class Evaluator(Protocol):
    """How a kind of model is evaluated.

    Attributes:
        model_type: what it evaluates.
        default_num_samples: samples of an evaluation for each example, where a command is told nothing else.
        num_shown: samples that are drawn to be seen or heard, where a command is told nothing else.
        headline: names of the results that TensorBoard shows, and by which its HParams tab compares runs.
        progress_text: says what the mean of the values given to `progress` is; it has one field to format.
    """

    model_type: ClassVar[type]
    default_num_samples: ClassVar[int]
    num_shown: ClassVar[int]
    headline: ClassVar[tuple[str, ...]]
    progress_text: ClassVar[str]

    def check_num_samples(self, name: str, num_samples: int) -> None:
        """Raises ArgumentError, with the name of an argument, if `evaluate` does not take so many samples."""

    def validate(self, model: Any, examples: Any, seed: int) -> Results:
        """Returns the curves of a split on which nothing is trained; the lowest `loss` is the best checkpoint."""

    def curves(self, model: Any, examples: Any) -> Results:
        """Returns further numbers for the curves of any split, cheap enough for a curve."""

    def evaluate(
        self,
        model: Any,
        data: Any,
        examples: Any,
        num_samples: int,
        seed: int,
        progress: Progress | None = None,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> Results:
        """Returns the results of an evaluation on some of the test examples."""

    def describe(self, record: Mapping[str, Any]) -> str:
        """Returns lines that show the results in the record of an evaluation."""

    def show(self, model: Any, data: Any, num_samples: int, generator: torch.Generator) -> dict[str, Shown]:
        """Returns pictures and sounds by name; the generator is on the model's device."""


class ImageEvaluator(Evaluator, abc.ABC):
    """What evaluations of image models share: the ELBO in parts, and a bound on log p(x) that subclasses form.

    Example: `VAEEvaluator` is one.
    """

    num_shown: ClassVar[int] = 64
    headline: ClassVar[tuple[str, ...]] = ("log_p_x", "log_p_x_standard_error", "elbo", "reconstruction", "kl")
    progress_text: ClassVar[str] = "log p(x) {:.2f} nats"
    bound_name: ClassVar[str]
    statistic_names: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def bound(
        self,
        model: Any,
        images: Tensor,
        parts: Mapping[str, Tensor],
        num_samples: int,
        seed: int,
        progress: Progress | None,
        precision: str,
        compiled: bool,
    ) -> Tensor:
        """Returns the tightest bound on log p(x) of every image, shape `(count,)`, nats.

        `parts` are those of the ELBO of the images, at full precision.
        """

    @abc.abstractmethod
    def statistics(self, model: Any, data: ImageData, images: Tensor, parts: Mapping[str, Tensor]) -> Results:
        """Returns the results named in `statistic_names`, on some of the test images with these parts of the ELBO."""

    def validate(self, model: ImageModel, examples: Tensor, seed: int) -> Results:
        """Returns the mean ELBO at β = 1 and its parts, nats, and the loss, which is its negative."""
        parts = evaluate_elbo(model, examples, seed)
        means = {name: part.double().mean().item() for name, part in parts.items()}
        return {**means, "loss": -means["elbo"], "beta": 1.0}

    def evaluate(
        self,
        model: ImageModel,
        data: ImageData,
        examples: Tensor,
        num_samples: int,
        seed: int,
        progress: Progress | None = None,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> Results:
        """Returns the mean bound on log p(x), the ELBO and its parts, nats, and the statistics.

        The bound is formed at `precision`; the ELBO always at full.
        """
        parts = evaluate_elbo(model, examples, seed)
        log_p_x = self.bound(model, examples, parts, num_samples, seed, progress, precision, compiled)
        return {
            "log_p_x": log_p_x.double().mean().item(),
            "log_p_x_standard_error": standard_error(log_p_x),
            **{name: part.double().mean().item() for name, part in parts.items()},
            "elbo_standard_error": standard_error(parts["elbo"]),
            **self.statistics(model, data, examples, parts),
        }

    def describe(self, record: Mapping[str, Any]) -> str:
        """Returns a line for the bound, the ELBO, each part of it and each statistic."""
        return "\n".join(
            [
                f"log p(x)        {record['log_p_x']:9.3f} ± {record['log_p_x_standard_error']:.3f} nats "
                f"({self.bound_name}, {record['num_samples']} samples, {record['num_examples']} test images)",
                f"ELBO            {record['elbo']:9.3f} ± {record['elbo_standard_error']:.3f}",
                f"reconstruction  {record['reconstruction']:9.3f}",
                f"KL              {record['kl']:9.3f}",
                *(f"{name.replace('_', ' '):<28}{record[name]:9.6g}" for name in self.statistic_names),
            ]
        )


@dataclasses.dataclass(frozen=True)
class VAEEvaluator(ImageEvaluator):
    """Evaluates a VAE: the importance-weighted bound, active units, and pictures of what it has learned.

    Example:
        >>> VAEEvaluator().default_num_samples
        5000
    """

    model_type: ClassVar[type] = VAE
    bound_name: ClassVar[str] = "IWAE"
    statistic_names: ClassVar[tuple[str, ...]] = ("active_units",)
    default_num_samples: ClassVar[int] = 5_000

    def check_num_samples(self, name: str, num_samples: int) -> None:
        """Any positive number will do."""
        check_integer(name, num_samples, minimum=1)

    def curves(self, model: VAE, examples: Tensor) -> Results:
        """Returns the number of active units on the first images."""
        return {"active_units": count_active_units(model, examples[:CURVE_IMAGES])}

    def bound(
        self,
        model: VAE,
        images: Tensor,
        parts: Mapping[str, Tensor],
        num_samples: int,
        seed: int,
        progress: Progress | None = None,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> Tensor:
        """Returns the importance-weighted bound of every image."""
        return estimate_log_likelihood(model, images, num_samples, seed, progress, precision, compiled)

    def statistics(self, model: VAE, data: ImageData, images: Tensor, parts: Mapping[str, Tensor]) -> Results:
        """Returns the number of active units."""
        return {"active_units": count_active_units(model, images)}

    def show(self, model: VAE, data: ImageData, num_samples: int, generator: torch.Generator) -> dict[str, Shown]:
        """Returns pictures of prior samples, reconstructions, interpolations and pseudo-inputs."""
        pictures: dict[str, Picture] = all_pictures(model, data.test, data.image_shape, num_samples, generator)
        return dict(pictures)
