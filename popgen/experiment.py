"""Trains and evaluates an experiment (see `popgen.description`); Gin, which builds one, is not seen here."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from popgen.datasets.data import first_examples
from popgen.description import Experiment
from popgen.distributed import ALONE, Processes, check_divided
from popgen.errors import ArgumentError, DivergedError, StoppedError
from popgen.evaluation.evaluator import EvaluationSettings
from popgen.evaluation.image_table import ImageTable, Shard
from popgen.evaluation.progress import show_mean
from popgen.files import write_whole
from popgen.precision import check_precision
from popgen.prepared import PreparedExperiment, prepare
from popgen.provenance import surroundings
from popgen.summaries import Writer
from popgen.training.diagnosis import with_replay
from popgen.training.loop import DrawBatch, Hooks, MeanMetrics, Step, StopTogether, mean_metrics, train
from popgen.training.recorder import NullRecorder, Recorder, fit_files, selected_by
from popgen.training.records import Configuration, EvaluationFiles
from popgen.training.run_directory import RunDirectory
from popgen.training.state import TrainState, state_from_tensors, state_to_tensors


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
        prepared = prepare(experiment, device, processes)
    prepared.check_amounts()
    prepared.check_steps()
    functions, facts = prepared.training_functions(), prepared.facts()
    state = shared_state(prepared, directory, facts, anew)
    recorder: Recorder | NullRecorder = NullRecorder(processes)
    if processes.first:  # only now that everything is built and loaded: a mistake leaves an earlier run as it was
        if anew:
            directory.clear()
        recorder = begin(prepared, directory, configuration, facts, state.step)
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
        finish(prepared, directory, recorder, stop)
    finally:
        recorder.close()
    return state


def shared_state(
    prepared: PreparedExperiment, directory: RunDirectory, facts: Mapping[str, str], anew: bool = False
) -> TrainState:
    """Returns the state that a run goes on from; where it is to start anew, no checkpoint is looked for.

    In every process it is the one that the first has found or made.

    Example: `run` calls it.
    """
    processes = prepared.processes
    if not processes.first:
        return state_from_tensors(processes.broadcast({}), prepared.initial_state())
    found = None if anew else directory.newest_checkpoint()
    state = fit_files(directory, found, prepared.state_to_start_from(found), facts)
    on_cpu = tree_map_only(torch.Tensor, Tensor.cpu, state_to_tensors(state))  # from a GPU all would open the first's
    processes.broadcast(on_cpu)
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
        saved = ", which is saved" if state.step else ""
        raise StoppedError(f"stopped at step {state.step}{saved}; the same command goes on from there")
    return state


def begin(
    prepared: PreparedExperiment,
    directory: RunDirectory,
    configuration: Configuration,
    facts: Mapping[str, str],
    step: int,
    make_writer: Callable[..., Writer] = Writer,
) -> Recorder:
    """Writes the configuration of a run, and returns what records it from a step on; it is to be closed.

    Example: `run` calls it.
    """
    experiment = prepared.experiment
    write_whole(directory.config_path, configuration.given.encode())
    write_whole(directory.operative_config_path, configuration.operative.encode())
    writer = make_writer(directory.path, purge_step=step + 1)
    writer.text("config", configuration.given, step)
    writer.text("operative_config", configuration.operative, step)
    where = surroundings(prepared.device)
    writer.text("trained_on", "\n".join(f"{name}: {value}" for name, value in where.items()), step)
    metrics = ["best/loss", *(f"evaluation/{name}" for name in experiment.evaluator.headline)]
    writer.hyper_parameters(configuration.settings, metrics, configuration.compared)
    return Recorder(
        experiment.evaluator,
        experiment.objective,
        experiment.selection_split,
        experiment.seed,
        experiment.eval_every,
        experiment.num_steps,
        directory,
        writer,
        prepared.data,
        prepared.model,
        facts,
        prepared.processes,
    )


def finish(
    prepared: PreparedExperiment, directory: RunDirectory, recorder: Recorder | NullRecorder, stop: Callable[[], bool]
) -> None:
    """Writes what the best checkpoint of a run has to show, and its evaluation if there is to be one.

    Example: `run` calls it.
    """
    experiment, processes = prepared.experiment, prepared.processes
    tensors = processes.broadcast(directory.load_checkpoint("best") if processes.first else {})
    best = prepared.with_checkpoint(tensors)
    recorder.show_best(best.model)
    in_parts = experiment.evaluator.in_parts
    if experiment.final_num_samples and (in_parts or processes.first):
        num_samples, step = experiment.final_num_samples, tensors["step"]
        num_examples = len(first_examples(best.data, experiment.final_num_examples))
        files = EvaluationFiles(directory.path, step, "raw", num_samples, num_examples)
        table = ImageTable(files.images_path, processes=processes if in_parts else ALONE)
        recorder.write_evaluation(files, evaluate(best, num_samples, num_examples, step, table=table, stop=stop))


def evaluate(
    prepared: PreparedExperiment,
    num_samples: int,
    num_examples: int | None,
    step: int,
    precision: str = "fp32",
    table: ImageTable | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Returns the record of an evaluation on the test examples: its results, and what is needed to repeat it.

    It is made at `precision`, whatever that of training was; the ELBO always at full. A table keeps what is found of
    every image, where the evaluator works in parts; its processes share the images.

    Raises:
        ArgumentError: if `num_samples`, `num_examples` or `precision` is outside its domain, or the table has several
            shards and the evaluator works in one piece.
        UnfinishedEvaluationError: if other shards of the table are not finished.
        StoppedError: if `stop`, which is asked from time to time, says so.

    Example: `finish` calls it.
    """
    experiment, data, model = prepared.experiment, prepared.data, prepared.model
    examples = first_examples(data, num_examples)
    check_precision("precision", precision, prepared.device)
    evaluator, started, where = experiment.evaluator, time.perf_counter(), surroundings(prepared.device)
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
        "headline": list(evaluator.headline),
        "num_samples": num_samples,
        "num_examples": len(examples),
        "step": step,
        "split": "test",
        "selection_split": experiment.selection_split,
        "selected_by": selected_by(experiment.selection_split, evaluator, experiment.objective),
        **data.facts(),
        "dataset": repr(experiment.dataset),
        "seed": experiment.seed,
        "precision": precision,
        "training_precision": experiment.precision,
        "compiled": experiment.compile,
        "num_threads": torch.get_num_threads(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "processes": processes.size,
        "seconds": round(time.perf_counter() - started, 1),
        **where,
    }
