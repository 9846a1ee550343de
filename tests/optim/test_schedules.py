"""Annealing schedules at the points that define them."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from popgen.errors import ArgumentError
from popgen.optim.schedules import (
    Constant,
    CosineAnnealing,
    CyclicalAnnealing,
    LinearAnnealing,
    Schedule,
    SigmoidAnnealing,
    WarmUp,
)


def sigmoid(a: float) -> float:
    """Returns the logistic function."""
    return 1.0 / (1.0 + math.exp(-a))


@pytest.mark.parametrize("step", [0, 1, 1_000, 10_000_000])
def test_constant(step: int) -> None:
    """The value, at every step."""
    assert Constant(0.3)(step) == 0.3


@pytest.mark.parametrize("rate", [0.0, 1e-5, 1e-4, 0.1])
@pytest.mark.parametrize("step", [0, 1, 7, 1_000, 30_000, 1_000_000])
def test_sigmoid_annealing(rate: float, step: int) -> None:
    """2 (sigmoid(rate · step) - 1/2), times the maximum."""
    expected = 2.0 * (sigmoid(rate * step) - 0.5)
    assert SigmoidAnnealing(rate)(step) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert SigmoidAnnealing(rate, maximum=0.25)(step) == pytest.approx(0.25 * expected, rel=1e-9, abs=1e-15)


def test_sigmoid_annealing_starts_at_zero_and_tends_to_its_maximum() -> None:
    """With slope rate/2 at the start, and without overflow at the end."""
    schedule = SigmoidAnnealing(rate=1e-4, maximum=3.0)
    assert schedule(0) == 0.0
    assert schedule(1) == pytest.approx(3.0 * 1e-4 / 2.0, rel=1e-6)
    assert schedule(10**12) == 3.0


ENDED = [LinearAnnealing, CosineAnnealing]


@pytest.mark.parametrize("kind", ENDED)
@pytest.mark.parametrize("start, end", [(0.0, 1.0), (1.0, 0.0), (0.3, 0.3), (-2.0, 5.0), (1e-3, 1e-5), (1.0, 1e-20)])
@pytest.mark.parametrize("num_steps", [1, 10, 1_000])
def test_ends_and_middle(kind: Callable[..., Schedule], start: float, end: float, num_steps: int) -> None:
    """From start to end, halfway at half the steps, and at the end ever after."""
    schedule = kind(start=start, end=end, num_steps=num_steps)
    assert schedule(0) == start
    for step in (num_steps, num_steps + 1, 100 * num_steps):
        assert schedule(step) == end
    if num_steps % 2 == 0:
        assert schedule(num_steps // 2) == pytest.approx(0.5 * (start + end), abs=1e-15)
    for step in range(0, num_steps + 1, max(1, num_steps // 10)):
        assert schedule(step) + schedule(num_steps - step) == pytest.approx(start + end, abs=1e-12)


def test_linear_annealing_is_a_straight_line() -> None:
    """Equal steps, equal differences."""
    schedule = LinearAnnealing(start=2.0, end=-1.0, num_steps=10)
    for step in range(10):
        assert schedule(step + 1) - schedule(step) == pytest.approx(-0.3)


def test_cosine_annealing_is_half_a_cosine() -> None:
    """Start, a quarter, a third and the end of the way, where the cosine is known without computing it."""
    schedule = CosineAnnealing(start=1.0, end=0.0, num_steps=12)
    known = {0: 1.0, 3: 0.5 + math.sqrt(2.0) / 4.0, 4: 0.75, 6: 0.5, 8: 0.25, 9: 0.5 - math.sqrt(2.0) / 4.0, 12: 0.0}
    for step, value in known.items():
        assert schedule(step) == pytest.approx(value, abs=1e-14)


@pytest.mark.parametrize(
    "schedule",
    [
        SigmoidAnnealing(rate=1e-2),
        LinearAnnealing(num_steps=500),
        CosineAnnealing(start=0.0, end=1.0, num_steps=500),
        CyclicalAnnealing(period=1_001),
    ],
)
def test_rises_without_leaving_its_range(schedule: Schedule) -> None:
    """Never down on the way up, from 0 to at most 1."""
    values = [schedule(step) for step in range(1_001)]
    assert values == sorted(values)
    assert values[0] == 0.0
    assert values[-1] == pytest.approx(1.0, abs=1e-3)
    assert max(values) <= 1.0


@pytest.mark.parametrize("ramp_fraction", [0.25, 0.5, 1.0])
def test_cyclical_annealing(ramp_fraction: float) -> None:
    """Each period ramps up, holds, and starts anew."""
    schedule = CyclicalAnnealing(period=100, ramp_fraction=ramp_fraction, maximum=4.0)
    top = int(100 * ramp_fraction)
    for step in range(100):
        expected = 4.0 * step / top if step < top else 4.0
        for cycle in (0, 1, 7):
            assert schedule(100 * cycle + step) == pytest.approx(expected)


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        (Constant, {"value": math.nan}, "Constant.value must be a finite number, got nan"),
        (SigmoidAnnealing, {"rate": -1e-4}, "SigmoidAnnealing.rate must be at least 0, got -0.0001"),
        (SigmoidAnnealing, {"maximum": math.inf}, "SigmoidAnnealing.maximum must be a finite number, got inf"),
        (LinearAnnealing, {"num_steps": 0}, "LinearAnnealing.num_steps must be an integer of at least 1, got 0"),
        (LinearAnnealing, {"start": math.nan}, "LinearAnnealing.start must be a finite number, got nan"),
        (LinearAnnealing, {"end": math.inf}, "LinearAnnealing.end must be a finite number, got inf"),
        (CosineAnnealing, {"num_steps": -5}, "CosineAnnealing.num_steps must be an integer of at least 1, got -5"),
        (CosineAnnealing, {"start": -math.inf}, "CosineAnnealing.start must be a finite number, got -inf"),
        (CosineAnnealing, {"end": math.nan}, "CosineAnnealing.end must be a finite number, got nan"),
        (CyclicalAnnealing, {"period": 0}, "CyclicalAnnealing.period must be an integer of at least 1, got 0"),
        (CyclicalAnnealing, {"maximum": math.nan}, "CyclicalAnnealing.maximum must be a finite number, got nan"),
        (CyclicalAnnealing, {"ramp_fraction": 0.0}, "ramp_fraction must be above 0 and at most 1, got 0.0"),
        (CyclicalAnnealing, {"ramp_fraction": 1.5}, "ramp_fraction must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_arguments_are_named(kind: Callable[..., Schedule], arguments: dict[str, Any], message: str) -> None:
    """The message names the argument and its value, when the schedule is built."""
    with pytest.raises(ArgumentError, match=message):
        kind(**arguments)


@pytest.mark.usefixtures("as_a_user")
def test_warm_up_multiplies_a_schedule() -> None:
    """A line from the first step on, and nothing once it is over."""
    schedule = CosineAnnealing(start=2.0, end=0.0, num_steps=100)
    for step in (0, 1, 8, 9, 10, 55, 100, 1_000):
        assert WarmUp(schedule, num_steps=10)(step) == pytest.approx(min(1.0, (step + 1) / 10) * schedule(step))
    assert WarmUp(schedule, num_steps=1)(0) == 2.0
    with pytest.raises(ArgumentError, match="WarmUp.num_steps must be an integer of at least 1, got 0"):
        WarmUp(schedule, num_steps=0)
    for wrong in (0.1, CosineAnnealing):
        with pytest.raises(
            ArgumentError, match=r"WarmUp.schedule must be a schedule .*, such as @popgen.optim.schedules.Constant\(\)"
        ):
            WarmUp(wrong)
