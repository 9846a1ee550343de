"""Checks, trains and evaluates an experiment (see `popgen.description`); Gin, which builds one, is not seen here."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from popgen.datasets.data import Batches, Data, first_examples
from popgen.description import Experiment
from popgen.distributed import ALONE, Processes, check_divided
from popgen.errors import ArgumentError, DataError, DivergedError, StoppedError
from popgen.evaluation.evaluator import EvaluationSettings
from popgen.evaluation.image_table import ImageTable, Shard
from popgen.evaluation.progress import show_mean
from popgen.files import write_whole
from popgen.models.model import Model
from popgen.precision import check_precision
from popgen.provenance import surroundings
from popgen.streams import make_generator
from popgen.summaries import Writer
from popgen.training import checks
from popgen.training.captured_step import CapturedStep
from popgen.training.diagnosis import with_replay
from popgen.training.loop import DrawBatch, Hooks, MeanMetrics, Step, StopTogether, mean_metrics, train
from popgen.training.recorder import NullRecorder, Recorder, fit_files, selected_by
from popgen.training.records import Configuration, EvaluationFiles
from popgen.training.run_directory import Checkpoint, RunDirectory
from popgen.training.state import TrainState, initial_state, state_from_tensors, state_to_tensors
from popgen.training.step import TrainStep, make_train_step
from popgen.training.weights import initialise, model_of_checkpoint


def run(
    experiment: Experiment,
    directory: RunDirectory,
    configuration: Configuration,
    stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
    anew: bool = False,
) -> TrainState:
    """Trains an experiment, from its newest checkpoint if it has one, and returns its last state.

    The caller, or that of the first of several processes, holds the directory's lock. Each of them calls this with the
    same experiment; the first one reads and writes all that there is in the directory.

    `stop` is asked before every step, by several processes about twice a second, and while the final evaluation lasts;
    where it says so, the state is saved. To start `anew` removes an earlier run, once every check has passed.

    Raises:
        DataError: if the data cannot be loaded or does not fit the model.
        ArgumentError: if the data is too small for the batch, the model or the final evaluation.
        CheckpointError: if every checkpoint is damaged, or the newest is of another model.
        TrainingError: if the loss is no longer finite.
        StoppedError: if it was stopped; the same call goes on.
        ProcessesError: if one of several processes has ended.

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
    device = processes.device("Experiment.device", experiment.torch_device())
    check_precision("Experiment.precision", experiment.precision, device)
    if experiment.num_replicas != 1:
        raise ArgumentError(f"run trains one replica, got num_replicas = {experiment.num_replicas}: use run_replicas")
    check_divided("Experiment.batch_size", experiment.batch_size, processes)
    if not anew:
        directory.check_num_replicas(1)
    with processes.first_goes_ahead():
        data, model = prepare(experiment, device)
    check_amounts(experiment, data)
    check_steps(experiment, data, model)
    functions = training_functions(experiment, model, data, processes)
    state = shared_state(experiment, model, data, directory, processes, anew)
    recorder: Recorder | NullRecorder = NullRecorder(processes)
    if processes.first:  # only now that everything is built and loaded: a mistake leaves an earlier run as it was
        if anew:
            directory.clear()
        recorder = begin(experiment, directory, configuration, data, model, state.step, processes)
    try:
        state = train_to_the_end(
            experiment,
            state,
            functions,
            recorder,
            [directory],
            stop=StopTogether(stop, processes),
            quiet=not processes.first,
        )
        finish(experiment, model, data, directory, recorder, stop, processes)
    finally:
        recorder.close()
    return state


def train_to_the_end(
    experiment: Experiment,
    state: TrainState,
    functions: tuple[Step, DrawBatch],
    recorder: Any,
    directories: Sequence[RunDirectory],
    stop: Callable[[], bool],
    quiet: bool = False,
    mean: MeanMetrics = mean_metrics,
) -> TrainState:
    """Returns the state after the last step of an experiment, or of its replicas.

    Of replicas `experiment` is any: they differ in their seed alone. `recorder` has `log`, `evaluate`, `checkpoint` and
    `save` as `Recorder` has them, and there is a directory for each replica; the rest is as in `Hooks`.

    Raises:
        DivergedError: if too many steps in a row were skipped; it says what command shows why.
        StoppedError: if it was stopped; the state is saved.

    Example: `run` calls it.
    """
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
        quiet=quiet,
        mean=mean,
    )
    try:
        state = train(state, *functions, experiment.num_steps, hooks)
    except DivergedError as error:
        raise with_replay(error, directories[error.replica].path) from error
    if stop():
        raise StoppedError(f"stopped at step {state.step}, which is saved; the same command goes on from there")
    return state


def begin(
    experiment: Experiment,
    directory: RunDirectory,
    configuration: Configuration,
    data: Data,
    model: Model,
    step: int,
    processes: Processes = ALONE,
    make_writer: Callable[..., Writer] = Writer,
) -> Recorder:
    """Writes the configuration of a run, and returns what records it from a step on; it is to be closed.

    Example: `run` calls it.
    """
    write_whole(directory.config_path, configuration.given.encode())
    write_whole(directory.operative_config_path, configuration.operative.encode())
    writer = make_writer(directory.path, purge_step=step + 1)
    writer.text("config", configuration.given, step)
    writer.text("operative_config", configuration.operative, step)
    where = surroundings(next(model.parameters()).device)
    writer.text("trained_on", "\n".join(f"{name}: {value}" for name, value in where.items()), step)
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
        processes,
    )


def finish(
    experiment: Experiment,
    model: Model,
    data: Data,
    directory: RunDirectory,
    recorder: Recorder | NullRecorder,
    stop: Callable[[], bool],
    processes: Processes = ALONE,
) -> None:
    """Writes what the best checkpoint of a run has to show, and its evaluation if there is to be one.

    Example: `run` calls it.
    """
    tensors = processes.broadcast(directory.load_checkpoint("best") if processes.first else {})
    best = model_of_checkpoint(model, tensors)
    recorder.show_best(best)
    in_parts = experiment.evaluator.in_parts
    if experiment.final_num_samples and (in_parts or processes.first):
        num_samples, step = experiment.final_num_samples, tensors["step"]
        num_examples = len(first_examples(data, experiment.final_num_examples))
        files = EvaluationFiles(directory.path, step, "raw", num_samples, num_examples)
        table = ImageTable(files.images_path, processes=processes if in_parts else ALONE)
        record = evaluate_model(experiment, best, data, num_samples, num_examples, step, table=table, stop=stop)
        recorder.write_evaluation(files, record)


def prepare(experiment: Experiment, device: torch.device) -> tuple[Data, Model]:
    """Returns the data and the model on a device, checked against one another.

    Raises:
        DataError: if the data cannot be loaded, or does not fit the model.

    Example: `run` calls it.
    """
    model, data = experiment.model.to(device), load_data(experiment, device)
    check_data(experiment, data)
    return data, model


def load_data(experiment: Experiment, device: torch.device) -> Data:
    """Returns the data of an experiment on a device, in the type of its model.

    Raises:
        DataError: if it cannot be loaded.

    Example: `prepare` calls it.
    """
    data = experiment.dataset.load()
    if not isinstance(data, Data):
        raise DataError(
            f"{type(experiment.dataset).__name__}.load must return a Data (see popgen.datasets.data), such as an "
            f"ImageData, got an object of type {type(data).__name__}"
        )
    return data.to(device, next(experiment.model.parameters()).dtype)


def check_data(experiment: Experiment, data: Data) -> None:
    """Checks data against the model of an experiment.

    Raises:
        DataError: if it does not fit the model, or a split is missing.
        ArgumentError: if the parts of the model do not fit each other.

    Example: `prepare` calls it.
    """
    for examples in (data.train, data.split(experiment.selection_split), data.test):
        experiment.model.check_examples(examples)
    experiment.model.check_parts(data.train)


def check_amounts(experiment: Experiment, data: Data) -> None:
    """Checks that there are examples enough for a batch, and for the evaluation that follows the last step.

    Raises:
        ArgumentError: if there are not.

    Example: `run` calls it.
    """
    data.batches(experiment.batch_size, experiment.seed)
    first_examples(data, experiment.final_num_examples)


def check_steps(experiment: Experiment, data: Data, model: Model) -> None:
    """Checks that a step is a function of state and batch alone, on the batch of the first step.

    Raises:
        ArgumentError: as the checks of `popgen.training.checks`.

    Example: `run` calls it.
    """
    device = next(model.parameters()).device
    batch = data.batches(experiment.batch_size, experiment.seed).draw(0, make_generator(device, 0, "trial"))
    state, step = initial_state_of(experiment, model), plain_step(experiment, model)
    checks.check_settings(step, (0, experiment.num_steps - 1))
    checks.check_repeats(step, state, batch)
    checks.check_can_be_copied(model)
    checks.check_can_be_saved(state, initial_state_of(experiment, model))


def initial_state_of(experiment: Experiment, model: Model) -> TrainState:
    """Returns the state before the first step.

    Raises:
        ArgumentError: if the optimizer is not fit for training steps or checkpoints, or steps may be skipped and it
            cannot be told on the device to skip one.

    Example: `check_steps` calls it.
    """
    auxiliary = experiment.objective.initial_state(next(model.parameters()))
    checks.check_tensors(f"{type(experiment.objective).__name__}.initial_state", auxiliary)
    average = experiment.weight_average_decay is not None
    state = initial_state(model, experiment.optimizer, experiment.seed, average, auxiliary)
    checks.check_optimizer(state.optimizer)
    if experiment.max_skipped_steps:
        checks.check_can_skip(state.optimizer, next(model.parameters()).device)
    return state


def restored_or_initial_state(experiment: Experiment, model: Model, data: Data, found: Checkpoint | None) -> TrainState:
    """Returns the state that a checkpoint holds, or that before the first step if there is none.

    Raises:
        CheckpointError: if the checkpoint is of another model, optimizer or kind of device.

    Example: `shared_state` calls it.
    """
    if found is not None:
        return state_from_tensors(found.tensors, initial_state_of(experiment, model))
    initialise(model, experiment.pretrained, data.train, experiment.seed)
    return initial_state_of(experiment, model)


def shared_state(
    experiment: Experiment, model: Model, data: Data, directory: RunDirectory, processes: Processes, anew: bool = False
) -> TrainState:
    """Returns the state that a run goes on from; where it is to start anew, no checkpoint is looked for.

    In every process it is the one that the first has found or made.

    Example: `run` calls it.
    """
    if not processes.first:
        return state_from_tensors(processes.broadcast({}), initial_state_of(experiment, model))
    found = None if anew else directory.newest_checkpoint()
    selection = selected_by(experiment.selection_split, experiment.evaluator)
    state = restored_or_initial_state(experiment, model, data, found)
    state = fit_files(directory, found, state, selection, data.train)
    on_cpu = tree_map_only(torch.Tensor, Tensor.cpu, state_to_tensors(state))  # from a GPU all would open the first's
    processes.broadcast(on_cpu)
    return state


def training_functions(
    experiment: Experiment, model: Model, data: Data, processes: Processes = ALONE
) -> tuple[Step, DrawBatch]:
    """Returns the training step of an experiment and what draws its batches, for `popgen.training.loop.train`.

    Example: `run` calls it.
    """
    batches = data.batches(experiment.batch_size, experiment.seed)
    return recorded_on_a_gpu(experiment, plain_step(experiment, model, processes), batches)


def recorded_on_a_gpu(experiment: Experiment, step: TrainStep, batches: Batches) -> tuple[Step, DrawBatch]:
    """Returns a training step and what draws its batches, on a GPU recorded as a CUDA graph, the draw included.

    A recorded step is given the indices of its examples. What several processes exchange is no part of a recording, so
    a loss in whose midst they exchange something is not recorded.

    Example: `training_functions` calls it.
    """
    if not (next(step.model.parameters()).is_cuda and experiment.cuda_graph):
        return step, batches.draw
    if step.exchanges_in_loss:
        if step.processes.first:
            name = type(step.objective).__name__
            print(f"Experiment.cuda_graph is not used: processes exchange something in a {name}", flush=True)
        return step, batches.draw
    return CapturedStep(step, batches), lambda number, generator: batches.indices(number)


def plain_step(experiment: Experiment, model: Model, processes: Processes = ALONE) -> TrainStep:
    """Returns the training step of an experiment, which is not recorded.

    Example: `training_functions` calls it.
    """
    return make_train_step(
        model,
        experiment.objective,
        weight_average_decay=0.0 if experiment.weight_average_decay is None else experiment.weight_average_decay,
        max_gradient_norm=experiment.max_gradient_norm,
        compiled=experiment.compile,
        precision=experiment.precision,
        learning_rate=experiment.learning_rate,
        skip_gradient_norm=experiment.skip_gradient_norm,
        processes=processes,
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
    every image, where the evaluator works in parts.

    Raises:
        ArgumentError: if `num_samples`, `num_examples` or `precision` is outside its domain, or the table has several
            shards and the evaluator works in one piece.
        UnfinishedEvaluationError: if other shards of the table are not finished.
        StoppedError: if `stop`, which is asked from time to time, says so.

    Example: `finish` calls it.
    """
    examples = first_examples(data, num_examples)
    reference = next(model.parameters())
    check_precision("precision", precision, reference.device)
    evaluator, started, where = experiment.evaluator, time.perf_counter(), surroundings(reference.device)
    evaluator.check_num_samples("num_samples", num_samples)
    table = ImageTable() if table is None else table
    processes = table.processes
    if processes.size > 1 and not evaluator.in_parts:
        raise ArgumentError(f"{type(evaluator).__name__} evaluates in one piece; run it in one process")
    if table.shard != Shard() and not evaluator.in_parts:
        raise ArgumentError(f"shard: {type(evaluator).__name__} evaluates in one piece; leave --shard out")
    disable = None if processes.first else True
    with tqdm(total=len(examples) // processes.size, unit="example", disable=disable, dynamic_ncols=True) as bar:
        progress = show_mean(bar, evaluator.progress_text, stop)
        settings = EvaluationSettings(num_samples, experiment.seed, precision, experiment.compile, progress, table)
        results = evaluator.evaluate(model, data, examples, settings)
    return {
        **results,
        "num_samples": num_samples,
        "num_examples": len(examples),
        "step": step,
        "split": "test",
        "selection_split": experiment.selection_split,
        **data.facts(),
        "dataset": repr(experiment.dataset),
        "seed": experiment.seed,
        "precision": precision,
        "training_precision": experiment.precision,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "processes": processes.size,
        "seconds": round(time.perf_counter() - started, 1),
        **where,
    }
