"""Several seeds of one experiment in one process: replicas, which train side by side and end as runs of their own.

`<run directory>/replica_0`, `replica_1`, ... are ordinary run directories. The run directory itself holds the
configuration of the whole, and curves of the means over replicas (`train/loss`) and of their standard deviations
(`train_std/loss`). See docs/replicas.md.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from popgen.distributed import Processes
from popgen.errors import ArgumentError, CheckpointError, TrainingError
from popgen.experiment import Configuration, Experiment, begin, finish, train_to_the_end
from popgen.precision import check_precision
from popgen.prepared import PreparedExperiment, prepare
from popgen.summaries import Writer
from popgen.training.captured_step import functions_of_loop
from popgen.training.loop import DrawBatch, Step
from popgen.training.recorder import Recorder, fit_files
from popgen.training.replicas import (
    ReplicaMeans,
    ReplicatedBatches,
    ReplicatedState,
    check_can_map,
    make_replicated_step,
    mean_metrics_of_replicas,
    split_states,
    spread,
    stack_states,
)
from popgen.training.run_directory import Checkpoint, RunDirectory
from popgen.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Replica:
    """A replica: an experiment that differs from the others in its seed alone, and its configuration.

    Example: `run_replicas` takes some.
    """

    experiment: Experiment
    configuration: Configuration


def run_replicas(
    replicas: Sequence[Replica],
    directory: RunDirectory,
    configuration: Configuration,
    stop: Callable[[], bool] = lambda: False,
    anew: bool = False,
) -> list[TrainState]:
    """Trains replicas side by side, from their newest checkpoints of one step, and returns their last states.

    The caller holds the lock of the directory; those of the replicas' own are taken here.

    Args:
        replicas: what is run.
        directory: of the whole; replica `i` is kept in `replica_<i>` there.
        configuration: of the whole.
        stop: asked before every step, and while the final evaluations last; where it says so, the states are saved.
        anew: whether what is there is removed, once every check has passed.

    Raises:
        DataError: if the data cannot be loaded or does not fit the model.
        ArgumentError: if the data is too small, or the model or the objective cannot be mapped over replicas.
        RunDirectoryError: if there is a run of another number of replicas, or a replica is in use.
        CheckpointError: if the replicas cannot be continued from one step.
        TrainingError: if the loss of one is no longer finite.
        StoppedError: if it was stopped; the same call goes on.

    Example:
        >>> import tempfile
        >>> from popgen.datasets.images import ImageData
        >>> from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> class Noise:
        ...     def load(self):
        ...         return ImageData(torch.rand(40, 16), torch.rand(20, 16), (4, 4), protocol="none")
        >>> def replica(seed):
        ...     vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        ...     experiment = Experiment(model=vae, dataset=Noise(), num_steps=4, batch_size=10, seed=seed)
        ...     return Replica(experiment, Configuration("", "", {}))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     directory = RunDirectory(pathlib.Path(folder) / "run")
        ...     with directory.locked():
        ...         states = run_replicas([replica(0), replica(1)], directory, Configuration("", "", {}))
        ...     len(states), (directory.path / "replica_1" / "samples" / "best.png").is_file()
        (2, True)
    """
    experiments = [replica.experiment for replica in replicas]
    first = experiments[0]
    device = first.torch_device()
    check_precision("Experiment.precision", first.precision, device)
    if not anew:
        directory.check_num_replicas(len(replicas))
    prepared = prepare_replicas(experiments, device)
    prepared[0].check_amounts()
    prepared[0].check_steps()
    functions, facts = replicated_training(prepared), prepared[0].facts()
    step = make_replicated_step(prepared[0].plain_step())
    check_can_map(step, initial_states_of(prepared), first.batch_size, [one.plain_step() for one in prepared])
    own = [directory.replica(index) for index in range(len(replicas))]
    with contextlib.ExitStack() as stack:
        for where in own:
            stack.enter_context(where.locked())
        newest = [None] * len(own) if anew else newest_common(directory.path, own)
        state = stack_states(
            [
                fit_files(where, found, one.state_to_start_from(found), facts)
                for one, where, found in zip(prepared, own, newest, strict=True)
            ]
        )
        if anew:
            directory.clear()
        whole = begin(prepared[0], directory, configuration, facts, state.step).writer
        stack.callback(whole.close)
        recorders = []
        for one, replica, where in zip(prepared, replicas, own, strict=True):
            recorder = begin(one, where, replica.configuration, facts, state.step, make_writer=KeepingWriter)
            stack.callback(recorder.writer.close)
            recorders.append(recorder)
        together = Recorders(recorders, whole)
        last = train_to_the_end(first, state, functions, together, own, stop, mean=mean_metrics_of_replicas)
        for one, recorder in zip(prepared, recorders, strict=True):
            finish(one, recorder.directory, recorder, stop)
        together.write_spread(last.step)
    return split_states(cast(ReplicatedState, last))


def check_one_process(num_replicas: int, processes: Processes) -> None:
    """Raises ArgumentError if several replicas are to be trained by several processes.

    Example:
        >>> check_one_process(2, Processes(rank=0, size=2))
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: Experiment.num_replicas must be 1 where there are several processes: give each its
        seeds
    """
    if num_replicas > 1 and processes.size > 1:
        raise ArgumentError("Experiment.num_replicas must be 1 where there are several processes: give each its seeds")


def newest_common(path: pathlib.Path, directories: Sequence[RunDirectory]) -> list[Checkpoint | None]:
    """Returns the newest checkpoints of replicas that are of one step; None for each if none has begun.

    A process may be killed when some replicas have saved a step and others have not: those go back to the step before,
    whose checkpoint is kept. If it was the first of all, every replica starts anew; where one has come farther, its
    steps are not thrown away because those of another are missing.

    Args:
        path: of the whole, for errors.
        directories: of the replicas.

    Raises:
        CheckpointError: if they have no step in common.

    Example:
        >>> newest_common(pathlib.Path("nowhere"), [RunDirectory(pathlib.Path("nowhere"))] * 2)
        [None, None]
    """
    newest = [directory.newest_checkpoint() for directory in directories]
    found = newest
    while all(found) and len(steps := {one.tensors["step"] for one in found if one is not None}) > 1:
        found = [directory.newest_checkpoint(min(steps)) for directory in directories]
    if all(found):
        return found
    if any(has_come_farther(directory) for directory in directories):
        listed = ", ".join(
            f"{directory.path.name}: {one.tensors['step'] if one else 'none'}"
            for directory, one in zip(directories, newest, strict=True)
        )
        begun = next((directory for directory, one in zip(directories, newest, strict=True) if one), directories[0])
        raise CheckpointError(
            f"the replicas in {path} have no step in common to go on from ({listed}): continue each alone, with "
            f"--run_dir={begun.path}"
        )
    return [None] * len(directories)


def has_come_farther(directory: RunDirectory) -> bool:
    """Whether a run has saved its state more than once.

    Example:
        >>> has_come_farther(RunDirectory(pathlib.Path("nowhere")))
        False
    """
    names = directory.checkpoint_names()
    return "previous" in names or sum(name.isdecimal() for name in names) > 1


def prepare_replicas(experiments: Sequence[Experiment], device: torch.device) -> list[PreparedExperiment]:
    """Returns replicas as `prepare` returns an experiment, all with the same data.

    Example: `run_replicas` calls it.
    """
    first = prepare(experiments[0], device)
    others = [dataclasses.replace(first, experiment=one, model=one.model.to(device)) for one in experiments[1:]]
    return [first, *others]


def initial_states_of(prepared: Sequence[PreparedExperiment]) -> ReplicatedState:
    """Returns the states before the first step, stacked.

    Example: `run_replicas` calls it.
    """
    return stack_states([one.initial_state() for one in prepared])


def replicated_training(prepared: Sequence[PreparedExperiment]) -> tuple[Step, DrawBatch]:
    """Returns the training step of replicas and what draws their batches, for `popgen.training.loop.train`.

    Example: `run_replicas` calls it.
    """
    first = prepared[0]
    step = make_replicated_step(first.plain_step(), first.experiment.compile)
    batches = ReplicatedBatches([one.batches() for one in prepared])
    return functions_of_loop(step, batches, first.experiment.cuda_graph)


class KeepingWriter(Writer):
    """A writer that keeps the last value of each scalar, by group and name, until they are taken.

    Args: those of `Writer`.

    Example: `run_replicas` makes one for each replica.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kept: dict[str, dict[str, float | int]] = {}

    def scalars(self, group: str, values: Mapping[str, float | int], step: int) -> None:
        """Writes each value as `group/name`."""
        super().scalars(group, values, step)
        self.kept.setdefault(group, {}).update(values)

    def take(self) -> dict[str, dict[str, float | int]]:
        """Returns what was written since the last time."""
        taken, self.kept = self.kept, {}
        return taken


class Recorders:
    """What replicas write while they train: each its own, and after it means and standard deviations.

    Args:
        recorders: of the replicas; their writers are `KeepingWriter`s.
        writer: of the whole.

    Example: `run_replicas` makes one.
    """

    def __init__(self, recorders: Sequence[Recorder], writer: Writer) -> None:
        self.recorders, self.writer = recorders, writer

    def log(self, step: int, means: Mapping[str, float]) -> None:
        """Writes a point of the training curves."""
        each, speed = cast(ReplicaMeans, means).each, means["steps_per_second"]
        for recorder, own in zip(self.recorders, each, strict=True):
            recorder.log(step, {**own, "steps_per_second": speed})
        self.write_spread(step)

    def evaluate(self, state: TrainState) -> TrainState:
        """Writes the curves of the selection split, and pictures and sounds, of each replica."""
        replicas = []
        for index, (recorder, one) in enumerate(zip(self.recorders, _split(state), strict=True)):
            try:
                replicas.append(recorder.evaluate(one))
            except TrainingError as error:
                raise TrainingError(f"replica {index}: {error}") from error
        self.write_spread(state.step)
        return dataclasses.replace(cast(ReplicatedState, state), replicas=tuple(replicas))

    def checkpoint(self, state: TrainState) -> None:
        """Saves a checkpoint of each that is kept."""
        for recorder, one in zip(self.recorders, _split(state), strict=True):
            recorder.checkpoint(one)

    def save(self, state: TrainState) -> None:
        """Saves `latest` of each, and `best` of those whose loss is the lowest so far."""
        self.writer.sync()
        for recorder, one in zip(self.recorders, _split(state), strict=True):
            recorder.save(one)

    def write_spread(self, step: int) -> None:
        """Writes mean and standard deviation of what the replicas have written since the last time."""
        taken = [cast(KeepingWriter, recorder.writer).take() for recorder in self.recorders]
        for group in dict.fromkeys(group for one in taken for group in one):
            means, deviations = spread([one.get(group, {}) for one in taken])
            self.writer.scalars(group, means, step)
            self.writer.scalars(f"{group}_std", deviations, step)


def _split(state: TrainState) -> list[TrainState]:
    return split_states(cast(ReplicatedState, state))
