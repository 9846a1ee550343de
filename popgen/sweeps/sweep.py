"""A sweep in its directory: its points checked before anything starts, trained as ordinary runs, and remembered."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from popgen import config
from popgen.datasets.data import Data
from popgen.errors import ArgumentError, CheckpointError, ConfigError, PopgenError, RunDirectoryError
from popgen.files import locked_folder, write_json
from popgen.prepared import PreparedExperiment, load_data
from popgen.sweeps.points import Point, bindings, bound_name, may_be_the_same, point_name, setting_name
from popgen.sweeps.processes import Job
from popgen.training import checkpoints
from popgen.training.records import evaluation_records
from popgen.training.run_directory import RunDirectory

LOG_NAME = "train.log"


@dataclasses.dataclass(frozen=True)
class Run:
    """A point of a sweep, as the sweep remembers it.

    Attributes:
        name: of its run directory.
        values: what was bound, as text, by name.
        num_steps: of the run.
        final_num_samples: of the evaluation at its end, 0 for none.
        headline: names of the results of an evaluation.
        failure: what the last attempt ended with; None if it has not failed.

    Example: `check_points` returns them.
    """

    name: str
    values: Mapping[str, str]
    num_steps: int
    final_num_samples: int
    headline: Sequence[str]
    failure: str | None = None

    def numbers(self, sweep: pathlib.Path) -> dict[str, Any]:
        """Returns `step`, `best_step` and `best_loss` of the first checkpoint that can be read, from the latest on."""
        directory = RunDirectory(sweep / self.name)
        for name in directory.checkpoint_names():
            with contextlib.suppress(CheckpointError):
                return checkpoints.load_numbers(directory.checkpoint_path(name))
        return {}

    def is_finished(self, sweep: pathlib.Path) -> bool:
        """Whether every step has been taken, and the evaluation that follows them made."""
        numbers = self.numbers(sweep)
        if numbers.get("step", 0) < self.num_steps:
            return False
        records = evaluation_records(sweep / self.name, numbers["best_step"], "raw", self.final_num_samples)
        return not self.final_num_samples or bool(records)


class SweepDirectory:
    """The runs of a sweep, and `sweep.json`, which says which there are.

    Args:
        path: the directory; it need not exist yet.

    Example:
        >>> SweepDirectory(pathlib.Path("nowhere")).runs()
        {}
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.list_path = path / "sweep.json"
        self.table_path = path / "table.csv"

    def runs(self) -> dict[str, Run]:
        """Returns the runs by name, in the order in which they were added.

        Raises:
            RunDirectoryError: if the list of them cannot be read.
        """
        if not self.list_path.is_file():
            return {}
        try:
            return {run["name"]: Run(**run) for run in json.loads(self.list_path.read_text())}
        except (ValueError, TypeError, KeyError) as error:
            raise RunDirectoryError(f"{self.list_path} is not the list of a sweep's runs: {error}") from error

    def record(self, *runs: Run) -> None:
        """Adds runs to the list, or replaces those of the same name; a reader finds the old list or the new one."""
        listed = self.runs() | {run.name: run for run in runs}
        write_json(self.list_path, [dataclasses.asdict(run) for run in listed.values()])

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Creates the directory and holds it for this process.

        Raises:
            RunDirectoryError: if it cannot be written, or another process holds it.
        """
        return locked_folder(
            self.path,
            in_use=f"another process runs the sweep in {self.path}; --table_only shows it",
            not_writable=lambda reason: f"the sweep directory {self.path} is not writable ({reason})",
        )


def check_points(
    gin_files: Sequence[str], fixed: Sequence[str], points: Sequence[Point], sweep: SweepDirectory, reconfigure: bool
) -> tuple[list[Run], list[Job]]:
    """Returns the runs of a sweep, and a job for each that is not finished; nothing is written.

    Every point is built as training would build it and checked against its data, which is loaded once.

    Args:
        gin_files: of every run.
        fixed: bindings of every run.
        points: what differs.
        sweep: where the runs are, or will be.
        reconfigure: whether runs go on under a changed configuration.

    Raises:
        ConfigError: if a point does not build, or two are the same.
        DataError: if its data cannot be loaded, or does not fit the model.
        ArgumentError: if there is too little of it.
        RunDirectoryError: if a run directory holds a run with another configuration.

    Example:
        >>> runs, jobs = check_points(["configs/vae.gin"], [], [], SweepDirectory(pathlib.Path("nowhere")), False)
        >>> len(runs), len(jobs)
        (0, 0)
    """
    runs, jobs, conflicts = [], [], []
    named_by_configuration: dict[str, str] = {}
    known_data: dict[str, Data] = {}
    for name, bound in itertools.product(points[0] if points else (), map(bound_name, fixed)):
        if may_be_the_same(name, bound):
            raise ArgumentError(f"{name} is both swept and bound by --gin_bindings; leave one of them out")
    for point in points:
        name = point_name(point)
        try:
            loaded = config.load(gin_files, [*fixed, *bindings(point)])
        except PopgenError as error:
            raise ConfigError(f"{error} (at the point {name}; nothing was started)") from error
        given, experiment = loaded.configuration.given, loaded.experiment
        if experiment.num_replicas != 1:
            raise ConfigError(
                f"Experiment.num_replicas must be 1 in a sweep, got {experiment.num_replicas}: sweep Experiment.seed"
            )
        if (same := named_by_configuration.setdefault(given, name)) != name:
            raise ConfigError(f"the points {same} and {name} are the same configuration; nothing was started")
        directory = RunDirectory(sweep.path / name)
        run = Run(name, point, experiment.num_steps, experiment.final_num_samples, experiment.evaluator.headline)
        runs.append(run)
        changes = config.changes_since(directory, given)
        if changes and not reconfigure:
            conflicts.append(f"{directory.path} ({'; '.join(changes)})")
        if run.is_finished(sweep.path) and not changes:
            continue
        if (dataset := repr(experiment.dataset)) not in known_data:
            known_data[dataset] = load_data(experiment, torch.device("cpu"))
        try:
            prepared = PreparedExperiment(experiment, known_data[dataset], experiment.model)
            prepared.check_data()
            prepared.check_amounts()
        except PopgenError as error:
            raise type(error)(f"{error} (at the point {name}; nothing was started)") from error
        command = [sys.executable, "-m", "launch.train", f"--run_dir={directory.path}"]
        command += [f"--gin_file={gin_file}" for gin_file in gin_files]
        command += [f"--gin_bindings={binding}" for binding in (*fixed, *bindings(point))]
        shown = [setting_name(swept) for swept in point]
        command += [f"--hparam={setting}" for setting in shown if setting in loaded.configuration.settings]
        jobs.append(Job(name, command + ["--reconfigure"] * bool(changes), directory.path / LOG_NAME))
    if conflicts:
        more = f", and {len(conflicts) - 1} more hold another one too" if conflicts[1:] else ""
        raise RunDirectoryError(
            f"there is a run with another configuration in {conflicts[0]}{more}: --reconfigure continues under the "
            "new one, --sweep_dir names another place; nothing was started"
        )
    return runs, jobs
