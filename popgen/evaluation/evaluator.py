"""What an evaluation reports of a model: one class for each kind of model."""

import abc
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from popgen.datasets.images import ImageData
from popgen.errors import ArgumentError, check_integer
from popgen.evaluation.image_table import ImageTable
from popgen.evaluation.importance import MIN_PARETO_SAMPLES, reliable_pareto_shape
from popgen.evaluation.likelihood import (
    bounds_by_size,
    check_has_samples,
    check_samples,
    count_active_units,
    estimate_log_likelihood,
    evaluate_elbo,
    importance_estimate,
    kl_of_dimensions,
    log_weight_function,
    name_of_bound,
)
from popgen.evaluation.pictures import Picture, all_pictures
from popgen.evaluation.progress import Progress
from popgen.evaluation.shown import Shown
from popgen.evaluation.statistics import standard_error
from popgen.models.image_model import ImageModel
from popgen.models.vae import VAE

CURVE_IMAGES = 1_000  # that the active_units curves look at; an evaluation looks at all

WORST_IMAGES = 10  # that a record names
PARTS = ("elbo", "reconstruction", "kl", "log_q_z_given_x", "log_p_z", "log_det")
ESTIMATOR_VERSION = 3  # raised with every change to what a row is made of: rows on file are used no more

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How an evaluation is made.

    Args:
        num_samples: for each example.
        seed: of its noise.
        precision: of the networks' matrix products; see `popgen.precision.matrix_products`.
        compiled: whether torch.compile fuses what is done to the samples, where an evaluator can use it.
        progress: called with a number for each example that has been finished since the last call.
        table: keeps what is found of every image, where an evaluator works `in_parts`.

    Example:
        >>> EvaluationSettings(num_samples=5_000, seed=0).precision
        'fp32'
    """

    num_samples: int
    seed: int
    precision: str = "fp32"
    compiled: bool = False
    progress: Progress | None = None
    table: ImageTable = ImageTable()


class Evaluator(abc.ABC):
    """How a kind of model is evaluated.

    Attributes:
        model_type: what it evaluates.
        default_num_samples: samples of an evaluation for each example, where a command is told nothing else.
        num_shown: samples that are drawn to be seen or heard, where a command is told nothing else.
        headline: names of the results that TensorBoard shows, and by which its HParams tab compares runs.
        progress_text: says what the mean of the values given to `progress` is; it has one field to format.
        in_parts: whether `evaluate` fills the table of its settings, which shards and processes can share.
        selection_samples: of the bound whose negative is the loss that `validate` returns; 1 where there is but one.
    """

    model_type: ClassVar[type]
    default_num_samples: ClassVar[int]
    num_shown: ClassVar[int]
    headline: ClassVar[tuple[str, ...]]
    progress_text: ClassVar[str]
    in_parts: ClassVar[bool] = False
    selection_samples: int = 1

    def check_model(self, model: Any) -> None:
        """Raises ArgumentError if it cannot evaluate a model: one of another type, unless a subclass says more."""
        if not isinstance(model, self.model_type):
            raise ArgumentError(
                f"{type(self).__name__} evaluates a {self.model_type.__name__}, and the model is a "
                f"{type(model).__name__}: bind Experiment.evaluator to one that evaluates it"
            )

    @abc.abstractmethod
    def check_num_samples(self, name: str, num_samples: int) -> None:
        """Raises ArgumentError, with the name of an argument, if `evaluate` does not take so many samples."""

    @abc.abstractmethod
    def validate(self, model: Any, examples: Any, seed: int) -> Results:
        """Returns the curves of a split on which nothing is trained; the lowest `loss` is the best checkpoint."""

    def curves(self, model: Any, examples: Any) -> Results:
        """Returns further numbers for the curves of any split, cheap enough for a curve; none, unless defined."""
        return {}

    @abc.abstractmethod
    def evaluate(self, model: Any, data: Any, examples: Any, settings: EvaluationSettings) -> Results:
        """Returns the results of an evaluation on some of the test examples."""

    @abc.abstractmethod
    def describe(self, record: Mapping[str, Any]) -> str:
        """Returns lines that show the results in the record of an evaluation."""

    @abc.abstractmethod
    def show(self, model: Any, data: Any, num_samples: int, generator: torch.Generator) -> dict[str, Shown]:
        """Returns pictures and sounds by name; the generator is on the model's device."""


class ImageEvaluator(Evaluator):
    """What evaluations of image models share: the ELBO in parts, and a bound on log p(x) that subclasses form.

    Example: `VAEEvaluator` is one.
    """

    num_shown: ClassVar[int] = 64
    headline: ClassVar[tuple[str, ...]] = ("log_p_x", "log_p_x_standard_error", "elbo", "reconstruction", "kl")
    progress_text: ClassVar[str] = "log p(x) {:.2f} nats"
    in_parts: ClassVar[bool] = True
    bound_name: ClassVar[str]
    statistic_names: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def bounds(
        self, model: Any, settings: EvaluationSettings
    ) -> Callable[[Tensor, Mapping[str, Tensor], int], dict[str, Tensor]]:
        """Returns a function that gives, for every one of some images, what the summary is made of.

        It is called with images, the parts of their ELBO at full precision, and the index of the first of them, and
        returns columns of shape `(count,)`. One is `log_p_x`, the tightest bound, nats.
        """

    def summary(self, columns: Mapping[str, Tensor]) -> Results:
        """Returns results about the tightest bound, made of the columns of all images."""
        return {}

    @abc.abstractmethod
    def statistics(self, model: Any, data: ImageData, images: Tensor, parts: Mapping[str, Tensor]) -> Results:
        """Returns the results named in `statistic_names`, on some of the test images with these parts of the ELBO."""

    def validate(self, model: ImageModel, examples: Tensor, seed: int) -> Results:
        """Returns the mean ELBO at β = 1 and its parts, nats, and the loss, which is its negative."""
        parts = evaluate_elbo(model, examples, seed)
        means = {name: part.double().mean().item() for name, part in parts.items()}
        return {**means, "loss": -means["elbo"], "beta": 1.0}

    def evaluate(self, model: ImageModel, data: ImageData, examples: Tensor, settings: EvaluationSettings) -> Results:
        """Returns the mean bound on log p(x), the ELBO and its parts, nats, and the statistics.

        The bound is formed at the precision of the settings; the ELBO always at full. Images whose columns the table
        has on file are not evaluated again.

        Raises:
            UnfinishedEvaluationError: if the table's other shards are not finished.
        """
        bounds = self.bounds(model, settings)

        def columns_of(indices: range) -> dict[str, Tensor]:
            images = examples[indices.start : indices.stop]
            parts = evaluate_elbo(model, images, settings.seed, first_image=indices.start)
            columns = bounds(images, parts, indices.start)
            return {"log_p_x": columns.pop("log_p_x"), **columns, **parts}

        identity = identity_of(
            model,
            examples,
            num_samples=settings.num_samples,
            seed=settings.seed,
            precision=settings.precision,
            estimator_version=ESTIMATOR_VERSION,
        )
        columns = settings.table.fill(identity, len(examples), columns_of, settings.progress)
        parts = {name: columns[name] for name in PARTS}
        log_p_x = columns["log_p_x"]
        return {
            "log_p_x": log_p_x.mean().item(),
            "log_p_x_standard_error": standard_error(log_p_x),
            "bits_per_dimension": -log_p_x.mean().item() / (model.input_dim * math.log(2.0)),
            **self.summary(columns),
            **{name: part.mean().item() for name, part in parts.items()},
            "elbo_standard_error": standard_error(parts["elbo"]),
            **self.statistics(model, data, examples, parts),
            "model_sha256": identity["model_sha256"],
            "images_sha256": identity["images_sha256"],
            "seconds_of_images": columns["seconds"].sum().item(),
        }

    def describe(self, record: Mapping[str, Any]) -> str:
        """Returns a line for the bound, for that in bits, for the ELBO, each part of it and each statistic."""
        return "\n".join(
            [
                f"log p(x)        {record['log_p_x']:9.3f} ± {record['log_p_x_standard_error']:.3f} nats "
                f"({self.bound_name}, {record['num_samples']} samples, {record['num_examples']} test images)",
                f"bits/dimension  {record['bits_per_dimension']:9.4f}",
                f"ELBO            {record['elbo']:9.3f} ± {record['elbo_standard_error']:.3f}",
                f"reconstruction  {record['reconstruction']:9.3f}",
                f"KL              {record['kl']:9.3f}",
                *(f"{name.replace('_', ' '):<28}{record[name]:9.6g}" for name in self.statistic_names),
            ]
        )


@dataclasses.dataclass(frozen=True)
class ImportanceWeightedEvaluator(ImageEvaluator):
    """Evaluates any model of images with a posterior to draw from by the importance-weighted bound.

    Subclasses add statistics, and `show` pictures.

    Args:
        selection_samples: of the bound whose negative is the loss by which the best checkpoint is chosen: 1 for the
            ELBO; an objective that trains the bound of several samples asks for as many.

    Raises:
        ArgumentError: if that is not a positive integer.

    Example:
        >>> ImportanceWeightedEvaluator().default_num_samples
        5000
    """

    selection_samples: int = 1

    model_type: ClassVar[type] = ImageModel
    bound_name: ClassVar[str] = "IWAE"
    statistic_names: ClassVar[tuple[str, ...]] = ()
    default_num_samples: ClassVar[int] = 5_000

    def __post_init__(self) -> None:
        check_integer(f"{type(self).__name__}.selection_samples", self.selection_samples, minimum=1)

    def check_model(self, model: Any) -> None:
        """Any model of images whose posterior is no point.

        Raises:
            ArgumentError: if it is another.
        """
        super().check_model(model)
        check_has_samples(model)

    def check_num_samples(self, name: str, num_samples: int) -> None:
        """Any positive number will do for which there is noise; see `check_samples`."""
        check_samples(name, num_samples)

    def validate(self, model: Any, examples: Tensor, seed: int) -> Results:
        """Returns the mean ELBO at β = 1 and its parts, and the bound of `selection_samples` if it is another, nats.

        The loss is the negative of the latter, `iwae`, or of the ELBO.
        """
        results = super().validate(model, examples, seed)
        if self.selection_samples == 1:
            return results
        iwae = estimate_log_likelihood(model, examples, self.selection_samples, seed).double().mean().item()
        return {**results, "iwae": iwae, "loss": -iwae}

    def bounds(
        self, model: ImageModel, settings: EvaluationSettings
    ) -> Callable[[Tensor, Mapping[str, Tensor], int], dict[str, Tensor]]:
        """Returns what finds the importance-weighted bound of every image, and what its weights say of it.

        The columns `log_p_x_of_K_samples` are the bound with fewer samples, a mean over groups of all draws.
        """
        log_weights = log_weight_function(model, settings.compiled)

        def columns(images: Tensor, parts: Mapping[str, Tensor], first_image: int) -> dict[str, Tensor]:
            found = importance_estimate(
                model,
                images,
                settings.num_samples,
                settings.seed,
                settings.progress,
                settings.precision,
                log_weights,
                first_image,
            )
            return {
                "log_p_x": found.log_p_x,
                **{name_of_bound(size): bound for size, bound in found.bounds.items()},
                "monte_carlo_error": found.monte_carlo_error,
                "effective_sample_size": found.effective_sample_size,
                "pareto_shape": found.pareto_shape,
            }

        return columns

    def summary(self, columns: Mapping[str, Tensor]) -> Results:
        """Returns the bound by number of samples, and how far it can be believed.

        `monte_carlo_error` is that of the mean over these images; k̂ is `pareto_shape`, and `worst_images` have the
        highest. Where it is not a number an image counts among the worst, and not in the median.
        """
        bounds = bounds_by_size(columns)
        results: Results = {name_of_bound(size): bound.mean().item() for size, bound in bounds.items()}
        errors, shapes = columns["monte_carlo_error"], columns["pareto_shape"]
        results["monte_carlo_error"] = errors.square().sum().sqrt().item() / len(errors)
        results["effective_sample_size_median"] = columns["effective_sample_size"].quantile(0.5).item()
        if max(bounds) >= MIN_PARETO_SAMPLES:
            results["pareto_shape_median"] = shapes.nanquantile(0.5).item()
            results["reliable_pareto_shape"] = reliable_pareto_shape(max(bounds))
            results["images_of_reliable_pareto_shape"] = int((shapes < results["reliable_pareto_shape"]).sum())
            results["worst_images"] = shapes.topk(min(WORST_IMAGES, len(shapes))).indices.tolist()
        return results

    def describe(self, record: Mapping[str, Any]) -> str:
        """Returns the lines of every image model, and what the importance weights say of the bound."""
        curve = ", ".join(f"{bound:.3f} ({size:,})" for size, bound in bounds_by_size(record).items())
        lines = [
            super().describe(record),
            f"bound by number of samples  {curve}",
            f"Monte Carlo error of the estimate {record['monte_carlo_error']:.2g} nats, effective samples of an image "
            f"{record['effective_sample_size_median']:.3g} (median)",
        ]
        if "pareto_shape_median" in record:
            total, reliable = record["num_examples"], record["images_of_reliable_pareto_shape"]
            lines.append(
                f"Pareto k̂ of the weights {record['pareto_shape_median']:.2f} (median), below "
                f"{record['reliable_pareto_shape']:.2g} for {reliable:,} of {total:,} images"
            )
            if reliable < total:
                lines.append(
                    f"warning: as an estimate of log p(x) the bound is unreliable for {total - reliable:,} images, "
                    f"such as {', '.join(map(str, record['worst_images'][:3]))}; it takes more samples, or a "
                    "better posterior"
                )
        return "\n".join(lines)

    def statistics(self, model: Any, data: ImageData, images: Tensor, parts: Mapping[str, Tensor]) -> Results:
        """Returns nothing more than the bounds say."""
        return {}

    def show(self, model: Any, data: ImageData, num_samples: int, generator: torch.Generator) -> dict[str, Shown]:
        """Returns nothing: how a model draws is its own."""
        return {}


@dataclasses.dataclass(frozen=True)
class VAEEvaluator(ImportanceWeightedEvaluator):
    """Evaluates a VAE: the importance-weighted bound, active units, and pictures of what it has learned.

    Args:
        selection_samples: as that of `ImportanceWeightedEvaluator`.

    Raises:
        ArgumentError: if that is not a positive integer.

    Example:
        >>> VAEEvaluator().statistic_names
        ('active_units',)
    """

    model_type: ClassVar[type] = VAE
    statistic_names: ClassVar[tuple[str, ...]] = ("active_units",)

    def curves(self, model: VAE, examples: Tensor) -> Results:
        """Returns the number of active units on the first images."""
        return {"active_units": count_active_units(model, examples[:CURVE_IMAGES])}

    def statistics(self, model: VAE, data: ImageData, images: Tensor, parts: Mapping[str, Tensor]) -> Results:
        """Returns the number of active units, and the KL of each where posterior and prior both factorise, nats."""
        kl = kl_of_dimensions(model, images)
        return {
            "active_units": count_active_units(model, images),
            **({} if kl is None else {"kl_of_dimensions": kl.tolist()}),
        }

    def show(self, model: VAE, data: ImageData, num_samples: int, generator: torch.Generator) -> dict[str, Shown]:
        """Returns pictures of prior samples, reconstructions, interpolations and pseudo-inputs."""
        pictures: dict[str, Picture] = all_pictures(model, data.test, data.image_shape, num_samples, generator)
        return dict(pictures)


def identity_of(model: torch.nn.Module, images: Tensor, **settings: int | str) -> dict[str, int | str]:
    """Returns everything that the numbers of some images depend on, for an `ImageTable`.

    Args:
        model: evaluated.
        images: all of them.
        settings: of the estimate, and its version.

    Example:
        >>> list(identity_of(torch.nn.Linear(4, 4), torch.zeros(3, 4), seed=0))
        ['model_sha256', 'images_sha256', 'seed', 'device', 'torch_version']
    """
    return {
        "model_sha256": checksum(*model.state_dict().values()),
        "images_sha256": checksum(images),
        **settings,
        "device": images.device.type,
        "torch_version": torch.__version__,
    }


def checksum(*tensors: Tensor) -> str:
    """Returns the SHA-256 of tensors' shapes, dtypes and values.

    Example:
        >>> zeros = torch.zeros(3)
        >>> checksum(zeros) == checksum(zeros.clone()), checksum(zeros) == checksum(zeros[None])
        (True, False)
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
