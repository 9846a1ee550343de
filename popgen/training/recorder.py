"""What a run writes while it trains: curves, pictures, sounds and checkpoints."""

import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from popgen.datasets.data import Data
from popgen.distributed import ALONE, Processes
from popgen.errors import ArgumentError, TrainingError
from popgen.evaluation.evaluator import Evaluator, checksum
from popgen.evaluation.shown import Shown, save_shown, write_shown
from popgen.models.model import Model
from popgen.streams import make_generator
from popgen.summaries import Writer
from popgen.training.objective import Objective
from popgen.training.records import EvaluationFiles
from popgen.training.run_directory import Checkpoint, RunDirectory
from popgen.training.state import TrainState, model_with_weights, state_to_tensors


@dataclasses.dataclass(frozen=True)
class Recorder:
    """What a run writes while it trains.

    Attributes:
        evaluator: forms the curves, pictures and sounds.
        objective: says which loss chooses the `best` checkpoint.
        selection_split: on which that is formed.
        seed: of the evaluations' noise.
        eval_every: steps between evaluations.
        num_steps: of the run.
        directory: of the run.
        writer: of TensorBoard's files.
        data: that is trained and evaluated on.
        model: the architecture; its own weights are not used.
        facts: what checkpoints hold of the run beside its state, see `facts_of_run`.
        processes: of the run, whose others are told what an evaluation finds.

    Example: `begin` makes one.
    """

    evaluator: Evaluator
    objective: Objective
    selection_split: str
    seed: int
    eval_every: int
    num_steps: int
    directory: RunDirectory
    writer: Writer
    data: Data
    model: Model
    facts: Mapping[str, str]
    processes: Processes = ALONE

    def log(self, step: int, means: Mapping[str, float]) -> None:
        """Writes a point of the training curves."""
        self.writer.scalars("train", means, step)

    def evaluate(self, state: TrainState) -> TrainState:
        """Writes the curves of the selection split, and pictures and sounds at ever longer intervals.

        The state it returns has the lowest loss so far.
        """
        with self.processes.first_alone():
            state = self._evaluate(state)
        self.processes.broadcast((state.best_loss, state.best_step))
        return state

    def _evaluate(self, state: TrainState) -> TrainState:
        model = model_with_weights(self.model, state.parameters, state.buffers)
        examples = self.data.split(self.selection_split)
        name = type(self.evaluator).__name__
        results = numbers_of(f"{name}.validate", self.evaluator.validate(model, examples, self.seed))
        if "loss" not in results:
            raise ArgumentError(f"{name}.validate must return a loss, which chooses the best checkpoint")
        loss = self.objective.selection_loss(results)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the {self.selection_split} loss is {loss} at step {state.step}; the last checkpoints are left as "
                "they are"
            )
        curves = {self.selection_split: dict(results), "train": {}}
        for split, found in ((self.selection_split, examples), ("train", self.data.train)):
            curves[split] |= numbers_of(f"{name}.curves", self.evaluator.curves(model, found))
            self.writer.scalars(split, curves[split], state.step)
        if loss < state.best_loss:
            state = dataclasses.replace(state, best_loss=loss, best_step=state.step)
        self.writer.scalars("best", {"loss": state.best_loss}, state.step)
        if _is_power_of_two(state.step // self.eval_every) or state.step == self.num_steps:
            self._write_shown(model, state.step)
        return state

    def checkpoint(self, state: TrainState) -> None:
        """Saves a checkpoint that is kept."""
        self.directory.save_checkpoint(str(state.step), self._tensors(state))

    def save(self, state: TrainState) -> None:
        """Saves `latest`, and `best` if the loss is the lowest so far.

        A run continues from `latest`, so all else that belongs to its step is on the disk before it: curves, pictures
        and the checkpoint that is kept. `best` alone comes after it, so that it is never of a history that was lost; a
        run that continues writes it if it is missing, see `RunDirectory.continue_from`.
        """
        self.writer.sync()
        tensors = self._tensors(state)
        self.directory.save_checkpoint("latest", tensors)
        if state.best_step == state.step:
            self.directory.save_checkpoint("best", tensors)

    def shown(self, model: Model) -> dict[str, Shown]:
        """Returns the pictures and sounds of a model."""
        generator = make_generator(next(model.parameters()).device, self.seed, "pictures")
        return self.evaluator.show(model, self.data, self.evaluator.num_shown, generator)

    def show_best(self, best: Model) -> None:
        """Writes the pictures and sounds of the model at its lowest loss."""
        save_shown(self.directory.samples_path / "best.png", self.shown(best))

    def write_evaluation(self, files: EvaluationFiles, record: Mapping[str, Any]) -> None:
        """Writes the record of its evaluation, with a command that repeats it."""
        settings = (
            ("run_dir", self.directory.path),
            ("num_samples", files.num_samples),
            ("num_examples", files.num_examples),
        )
        command = shlex.join(["python", "-m", "launch.evaluate", *(f"--{name}={value}" for name, value in settings)])
        found = {**record, "checkpoint": "best", "weights": "raw", "command": command}
        files.write(self.writer, found, self.evaluator)

    def close(self) -> None:
        """Closes the files."""
        self.writer.close()

    def _tensors(self, state: TrainState) -> dict[str, Any]:
        return {**state_to_tensors(state), **self.facts}

    def _write_shown(self, model: Model, step: int) -> None:
        """Writes pictures and sounds; ever more rarely, so that a long run does not fill the disk."""
        shown = self.shown(model)
        write_shown(self.writer, shown, step)
        save_shown(self.directory.samples_path / f"step_{step:08d}.png", shown)


@dataclasses.dataclass(frozen=True)
class NullRecorder:
    """What the other processes of a run do where the first one has its `Recorder`: they write nothing.

    Attributes:
        processes: of the run.

    Example:
        >>> NullRecorder(Processes(rank=1, size=2)).log(100, {"loss": 90.0})
    """

    processes: Processes

    def log(self, step: int, means: Mapping[str, float]) -> None:
        """Does nothing."""

    def evaluate(self, state: TrainState) -> TrainState:
        """Returns the state with what the evaluation of the first process has found."""
        with self.processes.first_alone():
            pass  # what the first one does meanwhile
        best_loss, best_step = self.processes.broadcast((state.best_loss, state.best_step))
        return dataclasses.replace(state, best_loss=best_loss, best_step=best_step)

    def checkpoint(self, state: TrainState) -> None:
        """Does nothing."""

    def save(self, state: TrainState) -> None:
        """Does nothing."""

    def show_best(self, best: Model) -> None:
        """Does nothing."""

    def write_evaluation(self, files: EvaluationFiles, record: Mapping[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def numbers_of(name: str, results: Any) -> dict[str, float]:
    """Returns what an evaluator found as numbers of Python: checkpoints hold none of numpy.

    Args:
        name: of the method, for the error.
        results: what it returned.

    Raises:
        ArgumentError: if that is not numbers by name.

    Example:
        >>> numbers_of("Mine.curves", {"loss": torch.zeros(3)})
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: Mine.curves must return numbers by name, got tensor([0., 0., 0.]) as 'loss'
    """
    if not isinstance(results, Mapping):
        raise ArgumentError(f"{name} must return numbers by name, got {results!r}")
    numbers = {}
    for key, value in results.items():
        try:
            numbers[key] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentError(f"{name} must return numbers by name, got {value!r} as {key!r}") from None
    return numbers


def selected_by(selection_split: str, evaluator: Evaluator, objective: Objective) -> str:
    """Returns which loss chooses the best checkpoint, in words.

    Example:
        >>> from popgen.evaluation.evaluator import VAEEvaluator
        >>> from popgen.training.objectives import NegativeELBO
        >>> selected_by("validation", VAEEvaluator(selection_samples=5), NegativeELBO())
        'validation loss of 5 samples'
    """
    samples = evaluator.selection_samples
    loss = objective.selected_by or "loss" + (f" of {samples} samples" if samples != 1 else "")
    return f"{selection_split} {loss}"


def facts_of_run(selection_split: str, evaluator: Evaluator, objective: Objective, train: Any) -> dict[str, str]:
    """Returns what checkpoints hold of a run beside its state.

    `selected_by` says in words which loss chooses the best checkpoint, `state_of` what the objective's own state is of,
    and `train_sha256` is the checksum of the training split.

    Example: `facts` calls it.
    """
    return {
        "selected_by": selected_by(selection_split, evaluator, objective),
        "state_of": objective.state_of,
        "train_sha256": checksum_of_split(train),
    }


def checksum_of_split(split: Any) -> str:
    """Returns the SHA-256 of all tensors that a split holds.

    Example:
        >>> from popgen.datasets.sequences import Sequences
        >>> one, other = (Sequences(torch.zeros(5), torch.tensor(lengths)) for lengths in ([2, 3], [3, 2]))
        >>> checksum_of_split(one) == checksum_of_split(other)
        False
    """
    held = split if isinstance(split, torch.Tensor) else dict(getattr(split, "__dict__", {}))
    return checksum(*(leaf for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor)))


def fit_files(
    directory: RunDirectory, found: Checkpoint | None, state: TrainState, facts: Mapping[str, str]
) -> TrainState:
    """Makes the files of a run fit the checkpoint that its state was found in, and returns the state.

    Where the best checkpoint is lost, or was chosen by another loss, the lowest is sought anew. Where the training
    split is another than it was, one line says so.

    Args:
        directory: of the run.
        found: the checkpoint, if there is one.
        state: that it holds, or that before the first step.
        facts: of the run, see `facts_of_run`.

    Example: `shared_state` calls it.
    """
    if found is None:
        return state
    selection = facts["selected_by"]
    if found.tensors.get("train_sha256") not in (None, facts["train_sha256"]):  # earlier checkpoints have none
        print(
            f"{directory.path}: the training data is not that of the first {state.step} steps",
            file=sys.stderr,
            flush=True,
        )
    best_is_there = directory.continue_from(found)
    before = found.tensors.get("selected_by", f"{selection.partition(' ')[0]} loss")  # earlier checkpoints do not say
    if before != selection:
        print(
            f"the best checkpoint was chosen by the {before}: the lowest {selection} is sought from step {state.step} "
            "on",
            file=sys.stderr,
            flush=True,
        )
    if best_is_there and before == selection:
        return state
    return dataclasses.replace(state, best_loss=math.inf, best_step=0)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
