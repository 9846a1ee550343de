"""What defines a run."""

import dataclasses
from collections.abc import Mapping

import torch

from popgen.datasets.data import Dataset
from popgen.errors import (
    ArgumentError,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    reason_of,
)
from popgen.evaluation.evaluator import Evaluator, VAEEvaluator
from popgen.models.model import Model
from popgen.optim.schedules import Schedule
from popgen.precision import PRECISIONS
from popgen.training.objective import Objective
from popgen.training.objectives import NegativeELBO
from popgen.training.state import (
    OptimizerFactory,
)

SELECTION_SPLITS = ("test", "validation")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that defines a run.

    Args:
        model: the model, built; a `popgen.models.model.Model`.
        dataset: has a `load()` that returns a `popgen.datasets.data.Data`.
        objective: what a step minimises; see `popgen.training.objectives`.
        evaluator: what an evaluation reports; see `popgen.evaluation.evaluator`.
        pretrained: parts of the model whose weights come from the best checkpoint of another run when training starts:
            name of the part, or "" for the whole model, to the run's directory, or its name under `$EXPERIMENT_DIR`.
        optimizer: called with the parameters, for example `torch.optim.Adam` with its arguments bound.
        learning_rate: of all parameters, as a function of the steps taken, see `popgen.optim.schedules`; None for that
            of the optimizer, which may have another for each of its parameter groups.
        num_steps: steps in all.
        batch_size: examples in a step.
        seed: of the model's first weights, the order of the data and all noise.
        num_replicas: runs that are trained side by side in one process, with the seeds `seed`, `seed + 1`, ...; see
            `popgen.replicas`.
        eval_every: steps between evaluations on the selection split; each also saves `latest`.
        log_every: steps between points of the training curves.
        checkpoint_every: steps between checkpoints that are kept for good.
        selection_split: "test" or "validation": the split whose loss chooses the `best` checkpoint; for a model with
            latent variables it is -ELBO at β = 1, unless its evaluator or the objective says otherwise.
        weight_average_decay: of the exponential moving average of the weights; None for no average.
        max_gradient_norm: gradients with a larger norm are scaled down to it; None for no limit.
        skip_gradient_norm: steps whose gradient has a larger norm are skipped, as are those whose loss or gradient is
            not finite; None for no limit.
        max_skipped_steps: steps in a row that may be skipped before the run stops; 0 stops at the first.
        final_num_samples: samples for each example of an evaluation when training ends (importance samples of a VAE);
            0 for no evaluation (`launch.evaluate` makes one at any time).
        final_num_examples: test examples of that evaluation; None for all.
        device: "auto" (the GPU if there is one), or a device of torch.
        precision: of the networks' matrix products in training: "fp32", "tf32" (GPU) or "bf16"; densities stay exact.
        compile: whether torch.compile fuses the loss, its gradient and the evaluation; it starts half a minute later.
        cuda_graph: on a GPU, whether a step is recorded and replayed; a model that waits for the device needs False.

    Raises:
        ArgumentError: if an argument has the wrong type or is outside its domain.

    Example:
        >>> from popgen.datasets.stroke_digits import StrokeDigits
        >>> from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(784, 40), BernoulliDecoder(40, 784), StandardNormalPrior())
        >>> Experiment(model=vae, dataset=StrokeDigits(), num_steps=0)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: Experiment.num_steps must be an integer of at least 1, got 0
    """

    model: Model
    dataset: Dataset
    objective: Objective = NegativeELBO()
    evaluator: Evaluator = VAEEvaluator()
    pretrained: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optimizer: OptimizerFactory = torch.optim.Adam
    learning_rate: Schedule | None = None
    num_steps: int = 1_000_000
    batch_size: int = 100
    seed: int = 0
    num_replicas: int = 1
    eval_every: int = 1_000
    log_every: int = 100
    checkpoint_every: int = 100_000
    selection_split: str = "test"
    weight_average_decay: float | None = 0.9999
    max_gradient_norm: float | None = None
    skip_gradient_norm: float | None = None
    max_skipped_steps: int = 10
    final_num_samples: int = 0
    final_num_examples: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_parts()
        self._check_evaluation()
        check_choice("Experiment.precision", self.precision, PRECISIONS)
        for name in ("compile", "cuda_graph"):
            check_flag(f"Experiment.{name}", getattr(self, name))
        self.torch_device()

    def _check_numbers(self) -> None:
        for name in ("num_steps", "batch_size", "num_replicas", "eval_every", "log_every", "checkpoint_every"):
            check_integer(f"Experiment.{name}", getattr(self, name), minimum=1)
        for name in ("seed", "max_skipped_steps"):
            check_integer(f"Experiment.{name}", getattr(self, name), minimum=0)
        if self.weight_average_decay is not None:
            check_number("Experiment.weight_average_decay", self.weight_average_decay, minimum=0.0, maximum=1.0)
        for name in ("max_gradient_norm", "skip_gradient_norm"):
            if getattr(self, name) is not None:
                check_number(f"Experiment.{name} (None for no limit)", getattr(self, name), above=0.0)

    def _check_parts(self) -> None:
        of_type: tuple[tuple[str, type, str], ...] = (
            ("model", Model, "a Model (see popgen.models.model), such as @popgen.models.vae.VAE()"),
            (
                "objective",
                Objective,
                "an Objective (see popgen.training.objectives), such as @popgen.training.objectives.NegativeELBO()",
            ),
            ("evaluator", Evaluator, "an Evaluator, such as @popgen.evaluation.evaluator.VAEEvaluator()"),
        )
        for name, kind, described in of_type:
            self._check(name, isinstance(getattr(self, name), kind), described)
        is_class = isinstance(self.dataset, type)
        self._check("dataset", hasattr(self.dataset, "load") and not is_class, "an object with a load() method")
        self._check("optimizer", callable(self.optimizer), "a function of the parameters, such as @torch.optim.Adam")
        self._check(
            "learning_rate",
            self.learning_rate is None or (callable(self.learning_rate) and not isinstance(self.learning_rate, type)),
            "None or a function of the step, such as @popgen.optim.schedules.CosineAnnealing()",
        )
        self._check(
            "pretrained",
            isinstance(self.pretrained, Mapping)
            and all(isinstance(text, str) for item in self.pretrained.items() for text in item),
            "a dictionary of parts of the model and runs, such as {'autoencoder': 'vqvae'}",
        )
        self.objective.check_model(self.model)

    def _check_evaluation(self) -> None:
        check_choice("Experiment.selection_split", self.selection_split, SELECTION_SPLITS)
        self.evaluator.check_model(self.model)
        check_integer("Experiment.final_num_samples", self.final_num_samples, minimum=0)
        if self.final_num_samples:  # an error now rather than after the last step
            self.evaluator.check_num_samples("Experiment.final_num_samples", self.final_num_samples)
        if self.final_num_examples is not None:
            check_integer("Experiment.final_num_examples", self.final_num_examples, minimum=1)

    def _check(self, name: str, fits: bool, described: str) -> None:
        if not fits:
            got = repr(getattr(self, name)).partition("(\n")[0]  # that of a module goes on with its parts
            raise ArgumentError(f"Experiment.{name} must be {described}, got {got}")

    def torch_device(self) -> torch.device:
        """Returns the device that the run uses.

        Raises:
            ArgumentError: if torch does not know it, or it is not there.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "meta":
            raise ArgumentError("Experiment.device 'meta' cannot be used here: it holds no values")
        try:
            torch.empty(0, device=self.device)
            return torch.device(self.device)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = reason_of(error)
            raise ArgumentError(f"Experiment.device {self.device!r} cannot be used here: {reason}") from error
