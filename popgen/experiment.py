"""An experiment: everything that defines a run, and the functions that train, evaluate and sample it.

Plain Python: Gin builds an `Experiment` once and is not seen again.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import popgen
from popgen.datasets.images import ImageData, ImageDataset, TrainBatches
from popgen.errors import ArgumentError, TrainingError, check_choice, check_integer, check_number
from popgen.evaluation.evaluator import Evaluator, VAEEvaluator
from popgen.evaluation.likelihood import evaluate_elbo, standard_error
from popgen.evaluation.pictures import Picture, save_pictures
from popgen.execution import PRECISIONS, check_precision
from popgen.models.image_model import ImageModel
from popgen.streams import make_generator
from popgen.summaries import Writer
from popgen.training.captured_step import CapturedStep
from popgen.training.loop import DrawBatch, Hooks, Step, train
from popgen.training.objectives import NegativeELBO, Objective
from popgen.training.records import write_record
from popgen.training.run_directory import RunDirectory
from popgen.training.state import (
    OptimizerFactory,
    TrainState,
    initial_state,
    model_with_weights,
    state_from_tensors,
    state_to_tensors,
)
from popgen.training.step import make_train_step
from popgen.training.weights import initialise, model_of_checkpoint

PICTURE_COUNT = 64
SELECTION_SPLITS = ("test", "validation")
HPARAM_METRICS = ["best/loss", "evaluation/elbo", "evaluation/log_p_x"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that defines a run.

    Args:
        model: the model, built; a `popgen.models.image_model.ImageModel`.
        dataset: has a `load()` that returns a `popgen.datasets.images.ImageData`.
        objective: what a step minimises; see `popgen.training.objectives`.
        evaluator: what an evaluation reports beside the bound; see `popgen.evaluation.evaluator`.
        pretrained: parts of the model whose weights come from the best checkpoint of another run when training starts:
            name of the part to the run's directory, or its name under `$EXPERIMENT_DIR`.
        optimizer: called with the parameters, for example `torch.optim.Adam` with its arguments bound.
        num_steps: steps in all.
        batch_size: images in a step.
        seed: of the model's first weights, the order of the data and all noise.
        eval_every: steps between evaluations on the selection split; each also saves `latest`.
        log_every: steps between points of the training curves.
        checkpoint_every: steps between checkpoints that are kept for good.
        selection_split: "test" or "validation": the split whose loss (-ELBO at β = 1) chooses the `best` checkpoint.
        weight_average_decay: of the exponential moving average of the weights; None for no average.
        max_gradient_norm: gradients with a larger norm are scaled down to it; None for no limit.
        final_num_samples: importance samples of an evaluation when training ends; 0 for none (`launch.evaluate` makes
            one at any time).
        final_num_images: test images of that evaluation; None for all.
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

    model: ImageModel
    dataset: ImageDataset
    objective: Objective = NegativeELBO()
    evaluator: Evaluator = VAEEvaluator()
    pretrained: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optimizer: OptimizerFactory = torch.optim.Adam
    num_steps: int = 1_000_000
    batch_size: int = 100
    seed: int = 0
    eval_every: int = 1_000
    log_every: int = 100
    checkpoint_every: int = 100_000
    selection_split: str = "test"
    weight_average_decay: float | None = 0.9999
    max_gradient_norm: float | None = None
    final_num_samples: int = 0
    final_num_images: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        for name, minimum in (
            ("num_steps", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("eval_every", 1),
            ("log_every", 1),
            ("checkpoint_every", 1),
            ("final_num_samples", 0),
        ):
            check_integer(f"Experiment.{name}", getattr(self, name), minimum)
        if self.final_num_images is not None:
            check_integer("Experiment.final_num_images", self.final_num_images, minimum=1)
        check_choice("Experiment.selection_split", self.selection_split, SELECTION_SPLITS)
        if self.weight_average_decay is not None:
            check_number("Experiment.weight_average_decay", self.weight_average_decay, minimum=0.0, maximum=1.0)
        if self.max_gradient_norm is not None:
            check_number("Experiment.max_gradient_norm", self.max_gradient_norm, minimum=0.0)
        for name, described, fits in (
            ("model", "an ImageModel, such as @VAE()", isinstance(self.model, ImageModel)),
            ("dataset", "an object with a load() method", hasattr(self.dataset, "load")),
            (
                "objective",
                "an Objective (see popgen.training.objectives), such as @NegativeELBO()",
                isinstance(self.objective, Objective),
            ),
            ("evaluator", "an Evaluator, such as @VAEEvaluator()", isinstance(self.evaluator, Evaluator)),
            (
                "pretrained",
                "a dictionary of parts of the model and runs, such as {'autoencoder': 'vqvae'}",
                isinstance(self.pretrained, Mapping)
                and all(isinstance(text, str) for item in self.pretrained.items() for text in item),
            ),
            (
                "optimizer",
                "a function of the parameters, such as @torch.optim.Adam",
                callable(self.optimizer),
            ),
        ):
            if not fits or (name != "optimizer" and isinstance(getattr(self, name), type)):
                raise ArgumentError(f"Experiment.{name} must be {described}, got {getattr(self, name)!r}")
        self.objective.check_model(self.model)
        if not isinstance(self.model, self.evaluator.model_type):
            evaluated = f"{type(self.evaluator).__name__} evaluates a {self.evaluator.model_type.__name__}"
            raise ArgumentError(f"Experiment.evaluator: {evaluated}, and the model is a {type(self.model).__name__}")
        if self.final_num_samples:  # an error now rather than after the last step
            self.evaluator.check_num_samples("Experiment.final_num_samples", self.final_num_samples)
        for name in ("compile", "cuda_graph"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"Experiment.{name} must be True or False, got {getattr(self, name)!r}")
        check_choice("Experiment.precision", self.precision, PRECISIONS)
        self.torch_device()

    def torch_device(self) -> torch.device:
        """Returns the device that the run uses.

        Raises:
            ArgumentError: if torch does not know it, or it is not there.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=self.device)
            return torch.device(self.device)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ArgumentError(f"Experiment.device {self.device!r} cannot be used here: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Configuration:
    """The text of a run's configuration, to be kept with its results.

    Attributes:
        given: as it was asked for, includes and overrides merged.
        operative: every value that was used, defaults too.
        settings: what was bound, by short name, for the HParams tab.

    Example: `run` takes one.
    """

    given: str
    operative: str
    settings: Mapping[str, bool | int | float | str]


def run(experiment: Experiment, directory: RunDirectory, configuration: Configuration) -> TrainState:
    """Trains an experiment, from its latest checkpoint if it has one, and returns its last state.

    The caller holds the directory's lock.

    Raises:
        DataError: if the data cannot be loaded or does not fit the model.
        ArgumentError: if the data is too small for the batch, the model or the final evaluation.
        CheckpointError: if the latest checkpoint is damaged or of another model.
        TrainingError: if the loss is no longer finite.

    Example:
        >>> import pathlib
        >>> import tempfile
        >>> from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> class Noise:
        ...     def load(self):
        ...         return ImageData(torch.rand(40, 16), torch.rand(20, 16), (4, 4), protocol="none")
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> experiment = Experiment(model=vae, dataset=Noise(), num_steps=4, batch_size=10, final_num_samples=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     directory = RunDirectory(pathlib.Path(folder) / "run")
        ...     with directory.locked():
        ...         state = run(experiment, directory, Configuration("", "", {}))
        ...     state.step, (directory.samples_path / "best.png").is_file(), len(list(directory.path.glob("*.json")))
        (4, True, 1)
    """
    device = experiment.torch_device()
    check_precision("Experiment.precision", experiment.precision, device)
    data, model = prepare(experiment, device)
    _first_images(data.test, experiment.final_num_images)  # an error now rather than after the last step
    if not directory.has_checkpoint():
        initialise(model, experiment.pretrained, data.train, experiment.seed)
    state = first_state(experiment, model)
    if directory.has_checkpoint():
        state = state_from_tensors(directory.load_checkpoint("latest"), state)
    # Written only now that everything is built and loaded: a mistake leaves an earlier run as it was.
    directory.config_path.write_text(configuration.given)
    directory.operative_config_path.write_text(configuration.operative)

    writer = Writer(directory.path, purge_step=state.step + 1)
    try:
        writer.text("config", configuration.given, state.step)
        writer.text("operative_config", configuration.operative, state.step)
        writer.hyper_parameters(configuration.settings, HPARAM_METRICS)
        recorder = _Recorder(experiment, directory, writer, data, model)
        state = train(state, *training_functions(experiment, model, data), experiment.num_steps, recorder.hooks())
        best = model_of_checkpoint(model, directory.load_checkpoint("best"))
        save_pictures(directory.samples_path / "best.png", _pictures(experiment, best, data))
        if experiment.final_num_samples:
            record = evaluate_model(
                experiment,
                best,
                data,
                experiment.final_num_samples,
                experiment.final_num_images,
                state.best_step,
            )
            write_record(directory, writer, {**record, "checkpoint": "best", "weights": "raw"})
    finally:
        writer.close()
    return state


def prepare(experiment: Experiment, device: torch.device) -> tuple[ImageData, ImageModel]:
    """Returns the data and the model on a device, checked against one another.

    Raises:
        DataError: if the data cannot be loaded, or does not fit the model.

    Example: `run` calls it.
    """
    model = experiment.model.to(device)
    data = experiment.dataset.load().to(device, next(model.parameters()).dtype)
    for images in (data.train, data.split(experiment.selection_split), data.test):
        model.check_images(images)
    return data, model


def first_state(experiment: Experiment, model: ImageModel) -> TrainState:
    """Returns the state before the first step.

    Example: `run` calls it.
    """
    auxiliary = experiment.objective.initial_state(next(model.parameters()))
    average = experiment.weight_average_decay is not None
    return initial_state(model, experiment.optimizer, experiment.seed, average, auxiliary)


def training_functions(experiment: Experiment, model: ImageModel, data: ImageData) -> tuple[Step, DrawBatch]:
    """Returns the training step of an experiment and what draws its batches, for `popgen.training.loop.train`.

    On a GPU the step is recorded as a CUDA graph, the draw included; it is then given the indices of its images.

    Example: `run` calls it.
    """
    batches = TrainBatches(data.train, experiment.batch_size, experiment.seed)
    step = make_train_step(
        model,
        experiment.objective,
        0.0 if experiment.weight_average_decay is None else experiment.weight_average_decay,
        experiment.max_gradient_norm,
        experiment.compile,
        experiment.precision,
    )
    if data.train.is_cuda and experiment.cuda_graph:
        return CapturedStep(step, batches), lambda step, generator: batches.indices(step)
    return step, batches.draw


def evaluate_model(
    experiment: Experiment,
    model: ImageModel,
    data: ImageData,
    num_samples: int,
    num_images: int | None,
    step: int,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Returns the record of an evaluation on the test images: bounds in nats, and what is needed to repeat it.

    The evaluator's bound is formed at `precision`, whatever that of training was; the ELBO always at full.

    Raises:
        ArgumentError: if `num_samples`, `num_images` or `precision` is outside its domain.

    Example: `run` calls it.
    """
    images = _first_images(data.test, num_images)
    check_precision("precision", precision, images.device)
    started = time.perf_counter()
    parts = evaluate_elbo(model, images, experiment.seed)
    with tqdm(total=len(images), unit="image", disable=None, dynamic_ncols=True) as bar:
        log_p_x = experiment.evaluator.bound(
            model, images, num_samples, experiment.seed, _show_mean(bar), precision, experiment.compile
        )
    return {
        "log_p_x": log_p_x.double().mean().item(),
        "log_p_x_standard_error": standard_error(log_p_x),
        **{name: part.double().mean().item() for name, part in parts.items()},
        "elbo_standard_error": standard_error(parts["elbo"]),
        **experiment.evaluator.statistics(model, data, images),
        "num_samples": num_samples,
        "num_images": len(images),
        "step": step,
        "split": "test",
        "binarisation_protocol": data.protocol,
        "dataset": repr(experiment.dataset),
        "seed": experiment.seed,
        "precision": precision,
        "training_precision": experiment.precision,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(images.device),
        "seconds": round(time.perf_counter() - started, 1),
        "popgen_version": popgen.__version__,
        "torch_version": torch.__version__,
    }


def _first_images(images: Tensor, num_images: int | None) -> Tensor:
    if num_images is None:
        return images
    check_integer("num_images", num_images, minimum=1)
    if num_images > len(images):
        raise ArgumentError(f"num_images must be at most the {len(images)} test images, got {num_images}")
    return images[:num_images]


def _pictures(experiment: Experiment, model: ImageModel, data: ImageData) -> dict[str, Picture]:
    generator = make_generator(data.test.device, experiment.seed, "pictures")
    return experiment.evaluator.pictures(model, data, PICTURE_COUNT, generator)


def _show_mean(bar: tqdm) -> Callable[[Tensor], None]:
    """Returns a function that moves a bar on by some images and shows the mean bound of all so far."""
    total = 0.0

    def show(bounds: Tensor) -> None:
        nonlocal total
        if not bar.disable:
            total += bounds.sum().item()
            bar.update(len(bounds))
            bar.set_postfix_str(f"log p(x) {total / bar.n:.2f} nats")

    return show


class _Recorder:
    """What a run writes while it trains: curves, pictures and checkpoints."""

    def __init__(
        self,
        experiment: Experiment,
        directory: RunDirectory,
        writer: Writer,
        data: ImageData,
        model: ImageModel,
    ) -> None:
        self.experiment, self.directory, self.writer = experiment, directory, writer
        self.data, self.model = data, model

    def hooks(self) -> Hooks:
        experiment = self.experiment
        return Hooks(
            log_every=experiment.log_every,
            log=lambda step, means: self.writer.scalars("train", means, step),
            eval_every=experiment.eval_every,
            evaluate=self.evaluate,
            checkpoint_every=experiment.checkpoint_every,
            checkpoint=lambda state: self.directory.save_checkpoint(str(state.step), state_to_tensors(state)),
        )

    def evaluate(self, state: TrainState) -> TrainState:
        """Writes the test curves and pictures, saves `latest`, and `best` if the loss is the lowest so far."""
        split = self.experiment.selection_split
        model = model_with_weights(self.model, state.parameters, state.buffers)
        images = self.data.split(split)
        parts = evaluate_elbo(model, images, self.experiment.seed)
        means = {name: part.double().mean().item() for name, part in parts.items()}
        loss = -means["elbo"]
        if not math.isfinite(loss):
            raise TrainingError(
                f"the {split} loss is {loss} at step {state.step}; the last checkpoints are left as they are"
            )
        curves = self.experiment.evaluator.curves
        self.writer.scalars(split, {**means, "loss": loss, "beta": 1.0, **curves(model, images)}, state.step)
        self.writer.scalars("train", curves(model, self.data.train), state.step)

        improved = loss < state.best_loss
        if improved:
            state = dataclasses.replace(state, best_loss=loss, best_step=state.step)
        self.writer.scalars("best", {"loss": state.best_loss}, state.step)
        tensors = state_to_tensors(state)
        if improved:
            self.directory.save_checkpoint("best", tensors)
        self.directory.save_checkpoint("latest", tensors)
        if _is_power_of_two(state.step // self.experiment.eval_every) or state.step == self.experiment.num_steps:
            self._write_pictures(model, state.step)
        return state

    def _write_pictures(self, model: ImageModel, step: int) -> None:
        """Writes every picture; called at ever longer intervals, so that a long run does not fill the disk."""
        pictures = _pictures(self.experiment, model, self.data)
        for name, picture in pictures.items():
            self.writer.image(name, picture, step)
        save_pictures(self.directory.samples_path / f"step_{step:08d}.png", pictures)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
