"""A training step as one CUDA graph: the whole step, the draw of its batch included, is launched at once.

Among several processes it is two, one before their exchange and one after it.
"""

import contextlib
import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from popgen.cuda_graphs import Recorded, record_cuda_graph
from popgen.datasets.data import Batches
from popgen.errors import TrainingError, reason_of
from popgen.training.loop import DrawBatch, Step
from popgen.training.objective import Metrics
from popgen.training.replicas import replicas_of
from popgen.training.state import TrainState
from popgen.training.step import TrainStep, settings_tensor

WARM_UP_STEPS = 3  # steps before the recording: libraries are loaded, kernels chosen, optimizer state made

Recording = Callable[[Callable[[], Any], Iterable[torch.Generator]], Recorded]


def record_step(work: Callable[[], Any], generators: Iterable[torch.Generator]) -> Recorded:
    """Returns a function that repeats work of a step, and what the work returned: its tensors hold the results.

    Args:
        work: reads and writes the same tensors every time, and never waits for the device.
        generators: all that it draws from.

    Raises:
        TrainingError: if the work cannot be recorded.

    Example: `CapturedStep` calls it.
    """
    try:
        return record_cuda_graph(work, generators)
    except Exception as error:  # an optimizer may refuse in its own way
        raise TrainingError(
            f"the training step cannot be recorded as a CUDA graph ({reason_of(error)}): set Experiment.cuda_graph = "
            "False"
        ) from error


class CapturedStep:
    """A training step `step(state, indices) -> (state, metrics)` that replays a recording of its work.

    It does what `train_step(state, batches.gather(indices, generator))` does. The first steps run plainly, as the
    recording of a CUDA graph asks; then the work of one step is recorded, and every later step copies the indices and
    the settings into the recorded tensors and replays. Nothing waits for the device.

    Several processes record two pieces: what each finds in its part of the batch, and the update. Between them they add
    up the messages that the first piece has left; that is no part of a recording.

    Args:
        train_step: what a step does.
        batches: the examples, on the device.
        record: how work is recorded; `record_step`, or a stand-in where there is no GPU.

    Example: `functions_of_loop` makes one.
    """

    def __init__(self, train_step: TrainStep, batches: Batches, record: Recording = record_step) -> None:
        self.train_step, self.batches, self.record = train_step, batches, record
        self._warmed_up = 0
        self._recorded_for: tuple | None = None
        self._replay: Callable[[], Metrics] | None = None

    def __call__(self, state: TrainState, indices: Tensor) -> tuple[TrainState, Metrics]:
        """Returns the next state and the metrics of the batch at these indices; the old state is consumed."""
        settings = self.train_step.settings(state)
        tensors = (
            state.parameters,
            state.buffers,
            state.auxiliary,
            state.weight_average,
            state.optimizer,
            state.generators,
            state.skipped,
        )
        if self._recorded_for is None or not all(map(operator.is_, tensors, self._recorded_for)):
            self._prepare(state, indices, list(settings))
            self._recorded_for = tensors
        self._indices.copy_(indices)
        self._settings.copy_(settings_tensor(settings, state), non_blocking=True)
        with torch.cuda.device(indices.device) if indices.is_cuda else contextlib.nullcontext():
            if self._warmed_up < WARM_UP_STEPS:
                self._warmed_up += 1
                with warnings.catch_warnings():  # PyTorch's, that this optimizer is made for a recording
                    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                    metrics = self._work()
            else:
                if self._replay is None:
                    for one in replicas_of(state):
                        _check_optimizer(one)
                    self._replay = self._recorded(tree_leaves(state.generators))
                metrics = self._replay()
        values = torch.stack(list(metrics.values()))  # a copy: the next replay overwrites what it was made of
        state = dataclasses.replace(state, step=state.step + 1)
        return state, dict(zip(metrics, values.unbind(), strict=True))

    def _prepare(self, state: TrainState, indices: Tensor, names: list[str]) -> None:
        """Makes the tensors that a recording reads, and the work it repeats."""
        reference = next(iter(state.parameters.values()))
        self._indices = indices.clone()
        self._settings = torch.zeros(len(names), dtype=reference.dtype, device=reference.device)
        settings = dict(zip(names, self._settings.unbind(), strict=True))
        if reference.is_cuda:
            for one in replicas_of(state):
                _count_on_device(one)

        def batch() -> Any:
            return self.batches.gather(self._indices, state.generators["binarisation"])

        step = self.train_step
        self._work = lambda: step.update(state, batch(), settings)
        self._find = lambda: step.local_gradients(state, batch(), settings)
        self._take = lambda found: step.apply(state, *step.reduced(found), settings)
        self._replay, self._warmed_up = None, 0

    def _recorded(self, generators: list[torch.Generator]) -> Callable[[], Metrics]:
        """Records the work, and returns what replays it and returns its metrics."""
        processes = self.train_step.processes
        if processes.size == 1:
            repeat, metrics = self.record(self._work, generators)
            return lambda: (repeat(), metrics)[1]
        find, found = self.record(self._find, generators)
        take, metrics = self.record(lambda: self._take(found), [])

        def replay() -> Metrics:
            find()
            processes.all_reduce(found.messages)
            take()
            return metrics

        return replay


def _count_on_device(state: TrainState) -> None:
    """Lets an optimizer that can be captured count its steps on the device, where a replay advances the count."""
    for group in state.optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
            for parameter in group["params"]:
                kept = state.optimizer.state.get(parameter, {})
                if isinstance(kept.get("step"), Tensor):
                    kept["step"] = kept["step"].to(parameter.device)


def _check_optimizer(state: TrainState) -> None:
    """Refuses an optimizer that keeps something elsewhere than the parameters, which a replay would not advance."""
    for parameter, kept in state.optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.device != parameter.device):
                raise TrainingError(
                    f"{type(state.optimizer).__name__} keeps {name!r} away from the device, beyond a CUDA graph: "
                    "set Experiment.cuda_graph = False"
                )


def functions_of_loop(step: TrainStep, batches: Batches, cuda_graph: bool) -> tuple[Step, DrawBatch]:
    """Returns a training step and what draws its batches, for `popgen.training.loop.train`.

    On a GPU both are recorded as a CUDA graph if `cuda_graph` says so; a recorded step is given the indices of its
    examples. What several processes exchange is no part of a recording, so a loss in whose midst they exchange
    something is not recorded.

    Example: `replicated_training` calls it.
    """
    if not (next(step.model.parameters()).is_cuda and cuda_graph):
        return step, batches.draw
    if step.exchanges_in_loss:
        if step.processes.first:
            name = type(step.objective).__name__
            print(f"Experiment.cuda_graph is not used: processes exchange something in a {name}", flush=True)
        return step, batches.draw
    return CapturedStep(step, batches), lambda number, generator: batches.indices(number)
