"""What an evaluation reports of a model: one class for each kind of model."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from popgen.datasets.images import ImageData
from popgen.errors import check_integer
from popgen.evaluation.importance import MIN_PARETO_SAMPLES, RELIABLE_PARETO_SHAPE
from popgen.evaluation.likelihood import (
    Progress,
    count_active_units,
    evaluate_elbo,
    importance_estimate,
    standard_error,
)
from popgen.evaluation.pictures import Picture, all_pictures
from popgen.evaluation.shown import Shown
from popgen.models.image_model import ImageModel
from popgen.models.vae import VAE

CURVE_IMAGES = 1_000  # that the active_units curves look at; an evaluation looks at all

WORST_IMAGES = 10  # that a record names

Results = dict[str, Any]


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
    ) -> tuple[Tensor, Results]:
        """Returns the tightest bound on log p(x) of every image, shape `(count,)`, nats, and results about it.

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
        log_p_x, evidence = self.bound(model, examples, parts, num_samples, seed, progress, precision, compiled)
        return {
            "log_p_x": log_p_x.double().mean().item(),
            "log_p_x_standard_error": standard_error(log_p_x),
            **evidence,
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
    ) -> tuple[Tensor, Results]:
        """Returns the importance-weighted bound of every image, and what its weights say of it.

        `log_p_x_of_K_samples` are means of the bound with fewer samples, over groups of all draws; `monte_carlo_error`
        is that of the mean over these images; k̂ is `pareto_shape`, and `worst_images` have the highest.
        """
        estimate = importance_estimate(model, images, num_samples, seed, progress, precision, compiled)
        results: Results = {
            f"log_p_x_of_{size}_samples": bound.double().mean().item() for size, bound in estimate.bounds.items()
        }
        errors, shapes = estimate.monte_carlo_error.double(), estimate.pareto_shape
        results["monte_carlo_error"] = errors.square().sum().sqrt().item() / len(errors)
        results["effective_sample_size_median"] = estimate.effective_sample_size.median().item()
        if num_samples >= MIN_PARETO_SAMPLES:
            results["pareto_shape_median"] = shapes.median().item()
            results["images_of_reliable_pareto_shape"] = int((shapes < RELIABLE_PARETO_SHAPE).sum())
            results["worst_images"] = shapes.topk(min(WORST_IMAGES, len(shapes))).indices.tolist()
        return estimate.log_p_x, results

    def describe(self, record: Mapping[str, Any]) -> str:
        """Returns the lines of every image model, and what the importance weights say of the bound."""
        sizes = [name.split("_")[4] for name in record if name.startswith("log_p_x_of_")]
        curve = ", ".join(f"{record[f'log_p_x_of_{size}_samples']:.3f} ({int(size):,})" for size in sizes)
        lines = [
            super().describe(record),
            f"bound by number of samples  {curve}",
            f"Monte Carlo error of the estimate {record['monte_carlo_error']:.2g} nats, effective samples of an image "
            f"{record['effective_sample_size_median']:.3g} (median)",
        ]
        if "pareto_shape_median" in record:
            total, reliable = record["num_examples"], record["images_of_reliable_pareto_shape"]
            lines.append(
                f"Pareto k̂ of the weights {record['pareto_shape_median']:.2f} (median), below {RELIABLE_PARETO_SHAPE} "
                f"for {reliable:,} of {total:,} images"
            )
            if reliable < total:
                lines.append(
                    f"warning: as an estimate of log p(x) the bound is not to be believed for {total - reliable:,} "
                    f"images, such as {', '.join(map(str, record['worst_images'][:3]))}; it takes more samples, or a "
                    "better posterior"
                )
        return "\n".join(lines)

    def statistics(self, model: VAE, data: ImageData, images: Tensor, parts: Mapping[str, Tensor]) -> Results:
        """Returns the number of active units."""
        return {"active_units": count_active_units(model, images)}

    def show(self, model: VAE, data: ImageData, num_samples: int, generator: torch.Generator) -> dict[str, Shown]:
        """Returns pictures of prior samples, reconstructions, interpolations and pseudo-inputs."""
        pictures: dict[str, Picture] = all_pictures(model, data.test, data.image_shape, num_samples, generator)
        return dict(pictures)
