"""An experiment: everything that defines a run, and the functions that train, evaluate and sample it.

Plain Python: Gin builds an `Experiment` once and is not seen again.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm import tqdm

from popgen.datasets.data import Data, Dataset, first_examples
from popgen.errors import (
    ArgumentError,
    DivergedError,
    StoppedError,
    check_choice,
    check_integer,
    check_number,
    reason_of,
)
from popgen.evaluation.evaluator import Evaluator, ImageEvaluator, VAEEvaluator
from popgen.evaluation.image_table import ImageTable, Shard
from popgen.evaluation.progress import show_mean
from popgen.evaluation.shown import save_shown
from popgen.execution import PRECISIONS, check_precision, surroundings
from popgen.models.model import Model
from popgen.optim.schedules import Schedule
from popgen.summaries import Writer
from popgen.training.captured_step import CapturedStep
from popgen.training.diagnosis import with_replay
from popgen.training.files import write_whole
from popgen.training.loop import DrawBatch, Hooks, Step, train
from popgen.training.objectives import NegativeELBO, Objective
from popgen.training.recorder import Recorder, fit_files
from popgen.training.records import Configuration, EvaluationFiles
from popgen.training.run_directory import Found, RunDirectory
from popgen.training.state import (
    OptimizerFactory,
    TrainState,
    initial_state,
    state_from_tensors,
)
from popgen.training.step import TrainStep, check_can_skip, make_train_step
from popgen.training.weights import initialise, model_of_checkpoint

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
            name of the part to the run's directory, or its name under `$EXPERIMENT_DIR`.
        optimizer: called with the parameters, for example `torch.optim.Adam` with its arguments bound.
        learning_rate: as a function of the steps taken, see `popgen.optim.schedules`; None for that of the optimizer.
        num_steps: steps in all.
        batch_size: examples in a step.
        seed: of the model's first weights, the order of the data and all noise.
        num_replicas: runs to train side by side, with the seeds `seed`, `seed + 1`, ...; see `popgen.replicas`.
        eval_every: steps between evaluations on the selection split; each also saves `latest`.
        log_every: steps between points of the training curves.
        checkpoint_every: steps between checkpoints that are kept for good.
        selection_split: "test" or "validation": the split whose loss chooses the `best` checkpoint; for a model with
            latent variables it is -ELBO at β = 1.
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
        for name, minimum in (
            ("num_steps", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("num_replicas", 1),
            ("eval_every", 1),
            ("log_every", 1),
            ("checkpoint_every", 1),
            ("max_skipped_steps", 0),
            ("final_num_samples", 0),
        ):
            check_integer(f"Experiment.{name}", getattr(self, name), minimum)
        if self.final_num_examples is not None:
            check_integer("Experiment.final_num_examples", self.final_num_examples, minimum=1)
        check_choice("Experiment.selection_split", self.selection_split, SELECTION_SPLITS)
        if self.weight_average_decay is not None:
            check_number("Experiment.weight_average_decay", self.weight_average_decay, minimum=0.0, maximum=1.0)
        for name in ("max_gradient_norm", "skip_gradient_norm"):
            if getattr(self, name) is not None:
                check_number(f"Experiment.{name}", getattr(self, name), minimum=0.0)
        for name, described, fits in (
            ("model", "a Model (see popgen.models.model), such as @VAE()", isinstance(self.model, Model)),
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
            ("optimizer", "a function of the parameters, such as @torch.optim.Adam", callable(self.optimizer)),
            (
                "learning_rate",
                "None or a function of the step, such as @CosineAnnealing()",
                self.learning_rate is None or callable(self.learning_rate),
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
            reason = reason_of(error)
            raise ArgumentError(f"Experiment.device {self.device!r} cannot be used here: {reason}") from error


def run(
    experiment: Experiment,
    directory: RunDirectory,
    configuration: Configuration,
    stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Trains an experiment, from its newest checkpoint if it has one, and returns its last state.

    The caller holds the directory's lock. `stop` is asked before every step, and while the final evaluation lasts;
    where it says so, the state is saved.

    Raises:
        DataError: if the data cannot be loaded or does not fit the model.
        ArgumentError: if the data is too small for the batch, the model or the final evaluation.
        CheckpointError: if every checkpoint is damaged, or the newest is of another model.
        TrainingError: if the loss is no longer finite.
        StoppedError: if it was stopped; the same call goes on.

    Example:
        >>> import pathlib
        >>> import tempfile
        >>> from popgen.datasets.images import ImageData
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
    if experiment.num_replicas != 1:
        raise ArgumentError(f"run trains one replica, got num_replicas = {experiment.num_replicas}: use run_replicas")
    directory.check_num_replicas(1)
    data, model = prepare(experiment, device)
    first_examples(data, experiment.final_num_examples)  # an error now rather than after the last step
    found = directory.newest_checkpoint()
    state = fit_files(directory, found, starting_state(experiment, model, data, found))
    # Written only now that everything is built and loaded: a mistake leaves an earlier run as it was.
    recorder = begin(experiment, directory, configuration, data, model, state.step)
    try:
        hooks = Hooks(
            log_every=experiment.log_every,
            log=recorder.log,
            eval_every=experiment.eval_every,
            evaluate=recorder.evaluate,
            checkpoint_every=experiment.checkpoint_every,
            checkpoint=recorder.checkpoint,
            save=recorder.save,
            stop=stop,
            max_skipped_steps=experiment.max_skipped_steps,
        )
        try:
            state = train(state, *training_functions(experiment, model, data), experiment.num_steps, hooks)
        except DivergedError as error:
            raise with_replay(error, directory.path) from error
        if stop():
            raise StoppedError(f"stopped at step {state.step}, which is saved; the same command goes on from there")
        finish(experiment, recorder, stop)
    finally:
        recorder.writer.close()
    return state


def begin(
    experiment: Experiment,
    directory: RunDirectory,
    configuration: Configuration,
    data: Data,
    model: Model,
    step: int,
    make_writer: Callable[..., Writer] = Writer,
) -> Recorder:
    """Writes the configuration of a run, and returns what records it from a step on; its writer is to be closed.

    Example: `run` calls it.
    """
    write_whole(directory.config_path, configuration.given.encode())
    write_whole(directory.operative_config_path, configuration.operative.encode())
    writer = make_writer(directory.path, purge_step=step + 1)
    writer.text("config", configuration.given, step)
    writer.text("operative_config", configuration.operative, step)
    metrics = ["best/loss", *(f"evaluation/{name}" for name in experiment.evaluator.headline)]
    writer.hyper_parameters(configuration.settings, metrics, configuration.compared)
    return Recorder(
        experiment.evaluator,
        experiment.selection_split,
        experiment.seed,
        experiment.eval_every,
        experiment.num_steps,
        directory,
        writer,
        data,
        model,
    )


def finish(experiment: Experiment, recorder: Recorder, stop: Callable[[], bool]) -> None:
    """Writes what the best checkpoint of a run has to show, and its evaluation if there is to be one.

    Example: `run` calls it.
    """
    directory, data = recorder.directory, recorder.data
    tensors = directory.load_checkpoint("best")
    best = model_of_checkpoint(recorder.model, tensors)
    save_shown(directory.samples_path / "best.png", recorder.shown(best))
    if experiment.final_num_samples:
        num_samples, step = experiment.final_num_samples, tensors["step"]
        num_examples = len(first_examples(data, experiment.final_num_examples))
        files = EvaluationFiles(directory.path, step, "raw", num_samples, num_examples)
        table = ImageTable(files.images)
        record = evaluate_model(experiment, best, data, num_samples, num_examples, step, table=table, stop=stop)
        files.write(recorder.writer, record | {"checkpoint": "best", "weights": "raw"}, experiment.evaluator.headline)


def prepare(experiment: Experiment, device: torch.device) -> tuple[Data, Model]:
    """Returns the data and the model on a device, checked against one another.

    Raises:
        DataError: if the data cannot be loaded, or does not fit the model.

    Example: `run` calls it.
    """
    model = experiment.model.to(device)
    data = experiment.dataset.load().to(device, next(model.parameters()).dtype)
    for examples in (data.train, data.split(experiment.selection_split), data.test):
        model.check_examples(examples)
    return data, model


def first_state(experiment: Experiment, model: Model) -> TrainState:
    """Returns the state before the first step.

    Raises:
        ArgumentError: if steps may be skipped, and the optimizer cannot be told on the device to skip one.

    Example: `run` calls it.
    """
    auxiliary = experiment.objective.initial_state(next(model.parameters()))
    average = experiment.weight_average_decay is not None
    state = initial_state(model, experiment.optimizer, experiment.seed, average, auxiliary)
    if experiment.max_skipped_steps:
        check_can_skip(state.optimizer, next(model.parameters()).device)
    return state


def starting_state(experiment: Experiment, model: Model, data: Data, found: Found | None) -> TrainState:
    """Returns the state that a checkpoint holds, or that before the first step if there is none.

    Raises:
        CheckpointError: if the checkpoint is of another model, optimizer or kind of device.

    Example: `run` calls it.
    """
    if found is not None:
        return state_from_tensors(found.tensors, first_state(experiment, model))
    initialise(model, experiment.pretrained, data.train, experiment.seed)
    return first_state(experiment, model)


def training_functions(experiment: Experiment, model: Model, data: Data) -> tuple[Step, DrawBatch]:
    """Returns the training step of an experiment and what draws its batches, for `popgen.training.loop.train`.

    On a GPU the step is recorded as a CUDA graph, the draw included; it is then given the indices of its examples.

    Example: `run` calls it.
    """
    step, batches = plain_step(experiment, model), data.batches(experiment.batch_size, experiment.seed)
    if next(model.parameters()).is_cuda and experiment.cuda_graph:
        return CapturedStep(step, batches), lambda step, generator: batches.indices(step)
    return step, batches.draw


def plain_step(experiment: Experiment, model: Model) -> TrainStep:
    """Returns the training step of an experiment, which is not recorded.

    Example: `training_functions` calls it.
    """
    return make_train_step(
        model,
        experiment.objective,
        0.0 if experiment.weight_average_decay is None else experiment.weight_average_decay,
        experiment.max_gradient_norm,
        experiment.compile,
        experiment.precision,
        experiment.learning_rate,
        experiment.skip_gradient_norm,
    )


def evaluate_model(
    experiment: Experiment,
    model: Model,
    data: Data,
    num_samples: int,
    num_examples: int | None,
    step: int,
    precision: str = "fp32",
    table: ImageTable | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Returns the record of an evaluation on the test examples: its results, and what is needed to repeat it.

    It is made at `precision`, whatever that of training was; the ELBO always at full. A table keeps what is found of
    every image, and is for models of images.

    Raises:
        ArgumentError: if `num_samples`, `num_examples` or `precision` is outside its domain, or the table has several
            shards and the model is not one of images.
        UnfinishedEvaluationError: if other shards of the table are not finished.
        StoppedError: if `stop`, which is asked from time to time, says so.

    Example: `run` calls it.
    """
    examples = first_examples(data, num_examples)
    reference = next(model.parameters())
    check_precision("precision", precision, reference.device)
    evaluator, started = experiment.evaluator, time.perf_counter()
    evaluator.check_num_samples("num_samples", num_samples)
    with tqdm(total=len(examples), unit="example", disable=None, dynamic_ncols=True) as bar:
        progress = show_mean(bar, evaluator.progress_text, stop)
        evaluate: Callable[..., dict[str, Any]] = evaluator.evaluate
        if table is not None and isinstance(evaluator, ImageEvaluator):
            evaluate = functools.partial(evaluate, table=table)
        elif table is not None and table.shard != Shard():
            raise ArgumentError(f"shard: {type(evaluator).__name__} evaluates in one piece; leave --shard out")
        results = evaluate(model, data, examples, num_samples, experiment.seed, progress, precision, experiment.compile)
    return {
        **results,
        "num_samples": num_samples,
        "num_examples": len(examples),
        "step": step,
        "split": "test",
        **data.facts(),
        "dataset": repr(experiment.dataset),
        "seed": experiment.seed,
        "precision": precision,
        "training_precision": experiment.precision,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - started, 1),
        **surroundings(reference.device),
    }
