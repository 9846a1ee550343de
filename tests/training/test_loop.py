"""The loop: when it calls what, where it starts, and which step it blames."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from popgen.errors import TrainingError
from popgen.training.loop import Hooks, train
from popgen.training.state import TrainState, initial_state


class Recorder:
    """Scripted metrics for each step, and everything that the loop did, in order."""

    def __init__(self, log_every: int, eval_every: int, checkpoint_every: int, **script: dict[int, float]) -> None:
        self.events: list[tuple] = []
        self.script = script
        self.hooks = Hooks(log_every, self.log, eval_every, self.evaluate, checkpoint_every, self.checkpoint)

    def draw_batch(self, step: int, generator: torch.Generator) -> torch.Tensor:
        self.events.append(("batch", step))
        return torch.rand(1, generator=generator)

    def train_step(self, state: TrainState, batch: torch.Tensor) -> tuple[TrainState, dict[str, torch.Tensor]]:
        values = {"loss": float(state.step + 1), "gradient_norm": 1.0}
        values |= {name: steps[state.step + 1] for name, steps in self.script.items() if state.step + 1 in steps}
        return dataclasses.replace(state, step=state.step + 1), {k: torch.tensor(v) for k, v in values.items()}

    def log(self, step: int, means: dict[str, float]) -> None:
        self.events.append(("log", step, means["loss"]))

    def evaluate(self, state: TrainState) -> TrainState:
        self.events.append(("evaluate", state.step))
        return dataclasses.replace(state, best_step=state.step)

    def checkpoint(self, state: TrainState) -> None:
        self.events.append(("checkpoint", state.step, state.best_step))

    def run(self, num_steps: int, start: int = 0) -> TrainState:
        state = dataclasses.replace(initial_state(nn.Linear(1, 1), torch.optim.SGD, 0), step=start)
        return train(state, self.train_step, self.draw_batch, num_steps, self.hooks)

    def without_batches(self) -> list[tuple]:
        return [event for event in self.events if event[0] != "batch"]


def test_order_of_the_hooks() -> None:
    """Metrics are logged before the evaluation, whose state the checkpoint holds; the last step has all three."""
    recorder = Recorder(log_every=2, eval_every=3, checkpoint_every=3)
    final = recorder.run(5)
    assert (final.step, final.best_step) == (5, 5)
    assert recorder.without_batches() == [
        ("log", 2, 1.5),
        ("log", 3, 3.0),
        ("evaluate", 3),
        ("checkpoint", 3, 3),
        ("log", 4, 4.0),
        ("log", 5, 5.0),
        ("evaluate", 5),
        ("checkpoint", 5, 5),
    ]


def test_intervals_longer_than_the_run() -> None:
    recorder = Recorder(log_every=100, eval_every=100, checkpoint_every=100)
    recorder.run(3)
    assert recorder.without_batches() == [("log", 3, 2.0), ("evaluate", 3), ("checkpoint", 3, 3)]


def test_a_later_start_is_counted() -> None:
    recorder = Recorder(log_every=2, eval_every=10, checkpoint_every=10)
    assert recorder.run(8, start=5).step == 8
    assert [event[1] for event in recorder.events if event[0] == "batch"] == [5, 6, 7]
    assert recorder.without_batches() == [("log", 6, 6.0), ("log", 8, 7.5), ("evaluate", 8), ("checkpoint", 8, 8)]


@pytest.mark.parametrize("start", [4, 5])
def test_nothing_is_left_to_do(start: int) -> None:
    recorder = Recorder(log_every=1, eval_every=1, checkpoint_every=1)
    assert recorder.run(4, start=start).step == start
    assert recorder.events == []


@pytest.mark.parametrize(
    "script, message",
    [
        ({"loss": {4: math.nan}}, "the loss became nan at step 4"),
        ({"loss": {4: -math.inf, 5: math.nan}}, "the loss became -inf at step 4"),
        ({"loss": {4: math.inf, 5: -math.inf}}, "the loss became inf at step 4"),
        ({"gradient_norm": {6: math.inf}}, "the gradient norm became inf at step 6"),
        (
            {"gradient_norm": {4: math.nan}, "loss": {5: math.nan, 6: math.nan}},
            "the gradient norm became nan at step 4",
        ),
        ({"gradient_norm": {4: math.nan, 5: math.nan}, "loss": {4: math.nan}}, "the loss became nan at step 4"),
    ],
)
def test_the_first_bad_step_is_blamed(script: dict, message: str) -> None:
    recorder = Recorder(log_every=3, eval_every=3, checkpoint_every=3, **script)
    with pytest.raises(TrainingError, match=message):
        recorder.run(12)
    assert recorder.without_batches() == [("log", 3, 2.0), ("evaluate", 3), ("checkpoint", 3, 3)]


def test_other_metrics_may_be_infinite() -> None:
    recorder = Recorder(log_every=2, eval_every=4, checkpoint_every=4, kl={step: math.inf for step in range(1, 5)})
    assert recorder.run(4).step == 4
