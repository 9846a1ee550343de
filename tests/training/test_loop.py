"""The loop: when it calls what, where it starts, and which step it blames."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from popgen.errors import DivergedError
from popgen.training import loop
from popgen.training.loop import Hooks, train
from popgen.training.state import TrainState, initial_state


class Recorder:
    """Scripted metrics for each step, and everything that the loop did, in order."""

    def __init__(self, log_every: int, eval_every: int, checkpoint_every: int, **script: dict[int, float]) -> None:
        self.events: list[tuple] = []
        self.script = script
        self.skipped, self.in_a_row, self.stop_at = 0, 0, math.inf
        self.hooks = Hooks(
            log_every, self.log, eval_every, self.evaluate, checkpoint_every, self.checkpoint, self.save, self.stop
        )

    def draw_batch(self, step: int, generator: torch.Generator) -> torch.Tensor:
        self.events.append(("batch", step))
        return torch.rand(1, generator=generator)

    def train_step(self, state: TrainState, batch: torch.Tensor) -> tuple[TrainState, dict[str, torch.Tensor]]:
        values = {"loss": float(state.step + 1), "gradient_norm": 1.0}
        values |= {name: steps[state.step + 1] for name, steps in self.script.items() if state.step + 1 in steps}
        wrong = not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]))
        self.skipped, self.in_a_row = self.skipped + wrong, wrong * (self.in_a_row + 1)
        values |= {"skipped_steps": float(self.skipped), "skipped_in_a_row": float(self.in_a_row)}
        return dataclasses.replace(state, step=state.step + 1), {k: torch.tensor(v) for k, v in values.items()}

    def log(self, step: int, means: dict[str, float]) -> None:
        self.events.append(("log", step, means["loss"]))

    def evaluate(self, state: TrainState) -> TrainState:
        self.events.append(("evaluate", state.step))
        return dataclasses.replace(state, best_step=state.step)

    def checkpoint(self, state: TrainState) -> None:
        self.events.append(("checkpoint", state.step, state.best_step))

    def save(self, state: TrainState) -> None:
        self.events.append(("save", state.step, len(state.recent)))

    def stop(self) -> bool:
        return sum(event[0] == "batch" for event in self.events) >= self.stop_at

    def run(self, num_steps: int, start: int = 0) -> TrainState:
        state = dataclasses.replace(initial_state(nn.Linear(1, 1), torch.optim.SGD, 0), step=start)
        return train(state, self.train_step, self.draw_batch, num_steps, self.hooks)

    def without_batches(self) -> list[tuple]:
        return [event for event in self.events if event[0] != "batch"]


def test_order_of_the_hooks() -> None:
    """Metrics are logged before the evaluation, whose state the checkpoint holds; what is continued from comes last."""
    recorder = Recorder(log_every=2, eval_every=3, checkpoint_every=3)
    final = recorder.run(5)
    assert (final.step, final.best_step) == (5, 5)
    assert recorder.without_batches() == [
        ("log", 2, 1.5),
        ("log", 3, 3.0),
        ("evaluate", 3),
        ("checkpoint", 3, 3),
        ("save", 3, 0),
        ("log", 4, 4.0),
        ("log", 5, 5.0),
        ("evaluate", 5),
        ("checkpoint", 5, 5),
        ("save", 5, 0),
    ]


def test_intervals_longer_than_the_run() -> None:
    recorder = Recorder(log_every=100, eval_every=100, checkpoint_every=100)
    recorder.run(3)
    assert recorder.without_batches() == [("log", 3, 2.0), ("evaluate", 3), ("checkpoint", 3, 3), ("save", 3, 0)]


def test_a_later_start_is_counted() -> None:
    recorder = Recorder(log_every=2, eval_every=10, checkpoint_every=10)
    assert recorder.run(8, start=5).step == 8
    assert [event[1] for event in recorder.events if event[0] == "batch"] == [5, 6, 7]
    at_the_end = [("log", 8, 7.5), ("evaluate", 8), ("checkpoint", 8, 8), ("save", 8, 0)]
    assert recorder.without_batches() == [("log", 6, 6.0), *at_the_end]


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
    with pytest.raises(DivergedError, match=message):
        recorder.run(12)
    assert recorder.without_batches() == [("log", 3, 2.0), ("evaluate", 3), ("checkpoint", 3, 3), ("save", 3, 0)]


def test_other_metrics_may_be_infinite() -> None:
    recorder = Recorder(log_every=2, eval_every=4, checkpoint_every=4, kl={step: math.inf for step in range(1, 5)})
    assert recorder.run(4).step == 4


@pytest.mark.parametrize("stop_at, since_last_point", [(0, None), (1, 1), (2, 2), (3, None), (4, 0), (5, 1), (6, None)])
def test_a_stop_saves_what_is_not_saved_yet(stop_at: int, since_last_point: int | None) -> None:
    """With the metrics of the steps since the last point of the curves, which the next one averages."""
    recorder = Recorder(log_every=4, eval_every=3, checkpoint_every=100)
    recorder.stop_at = stop_at
    assert recorder.run(6).step == stop_at
    expected = [] if since_last_point is None else [("save", stop_at, since_last_point)]
    assert [event for event in recorder.events if event[0] == "save"][stop_at // 3 :] == expected


def test_a_run_that_has_gone_wrong_is_not_saved_when_it_is_stopped() -> None:
    recorder = Recorder(log_every=100, eval_every=100, checkpoint_every=100, loss={2: math.nan})
    recorder.stop_at = 4
    with pytest.raises(DivergedError, match="at step 2"):
        recorder.run(12)
    assert recorder.without_batches() == []


def test_metrics_of_an_objective_from_before_are_left_out() -> None:
    """A run that was stopped between two points goes on under an objective with other metrics."""
    recorder = Recorder(4, 4, 4)
    state = initial_state(nn.Linear(1, 1), torch.optim.SGD, 0)
    before = {"loss": 100.0, "iwae": 3.0, "gradient_norm": 1.0, "skipped_steps": 0.0, "skipped_in_a_row": 0.0}
    state.recent.append({name: torch.tensor(value) for name, value in before.items()})
    train(dataclasses.replace(state, step=1), recorder.train_step, recorder.draw_batch, 4, recorder.hooks)
    assert ("log", 4, 3.0) in recorder.events, "the mean of the losses of steps 2 to 4"


def test_skipped_steps_are_left_out_of_the_means_and_counted() -> None:
    logged = []
    recorder = Recorder(log_every=3, eval_every=6, checkpoint_every=6, loss={2: math.nan, 4: 1e9, 5: math.inf})
    recorder.hooks = recorder.hooks._replace(max_skipped_steps=1, log=lambda step, means: logged.append(means))
    recorder.run(6)
    assert [means["loss"] for means in logged] == [2.0, (1e9 + 6.0) / 2]
    assert [means["skipped_steps"] for means in logged] == [1.0, 2.0]
    assert not any("skipped_in_a_row" in means for means in logged)


def test_an_interval_in_which_every_step_was_skipped_has_no_means() -> None:
    logged = []
    recorder = Recorder(log_every=2, eval_every=6, checkpoint_every=6, loss={3: math.nan, 4: math.nan})
    recorder.hooks = recorder.hooks._replace(max_skipped_steps=2, log=lambda step, means: logged.append(means))
    recorder.run(6)
    assert set(logged[1]) == {"skipped_steps", "steps_per_second"} and logged[2]["loss"] == 5.5


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4])
def test_the_first_of_too_many_in_a_row_is_the_one_to_replay(limit: int) -> None:
    """Also where they began before the last point of the curves."""
    wrong = {step: math.nan for step in (2, *range(6, 10))}
    recorder = Recorder(log_every=4, eval_every=100, checkpoint_every=100, loss=wrong)
    recorder.hooks = recorder.hooks._replace(max_skipped_steps=limit)
    if limit == 4:
        assert recorder.run(12).step == 12
        return
    with pytest.raises(DivergedError) as caught:
        recorder.run(12)
    assert caught.value.step == (2 if limit == 0 else 6)
    assert f"at step {2 if limit == 0 else 6 + limit}" in str(caught.value)


def test_the_speed_is_that_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps a second, of a run that goes on from step 5; the minute of an evaluation does not count."""
    now, speeds = [100.0], []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    names = ("loss", "gradient_norm", "skipped_steps", "skipped_in_a_row")

    def step(state: TrainState, batch: None) -> tuple[TrainState, dict[str, Tensor]]:
        now[0] += 0.5
        return dataclasses.replace(state, step=state.step + 1), {name: torch.zeros(()) for name in names}

    def evaluate(state: TrainState) -> TrainState:
        now[0] += 60.0
        return state

    state = dataclasses.replace(initial_state(nn.Linear(1, 1), torch.optim.SGD, 0), step=5)
    log = lambda step, means: speeds.append(means["steps_per_second"])  # noqa: E731
    hooks = Hooks(2, log, 4, evaluate, 100, lambda state: None, quiet=True)
    train(state, step, lambda number, generator: None, 13, hooks)
    assert speeds == [2.0] * 5
