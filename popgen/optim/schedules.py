"""Schedules of weights and learning rates: functions of the number of steps taken, as small frozen dataclasses."""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

from popgen.errors import ArgumentError, check_integer, check_number


@runtime_checkable
class Schedule(Protocol):
    """Anything that maps the number of steps taken to a value."""

    def __call__(self, step: int) -> float:
        """Returns the value at `step`."""


def check_schedule(name: str, value: Any) -> None:
    """Raises ArgumentError if a value is not a schedule, or is the class of one.

    Example:
        >>> check_schedule("WarmUp.schedule", Constant)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: WarmUp.schedule must be a schedule (a function of the step), such as
        @popgen.optim.schedules.Constant(), got <class 'popgen.optim.schedules.Constant'>
    """
    if not callable(value) or isinstance(value, type):
        raise ArgumentError(
            f"{name} must be a schedule (a function of the step), such as @{__name__}.Constant(), got {value!r}"
        )


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same value at every step.

    Example:
        >>> Constant(0.5)(1_000)
        0.5
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        check_number("Constant.value", self.value)

    def __call__(self, step: int) -> float:
        """Returns the value."""
        return self.value


@dataclasses.dataclass(frozen=True)
class SigmoidAnnealing:
    """The upper half of a sigmoid, 2 · (sigmoid(rate · step) - 1/2) · maximum, from 0 towards `maximum`.

    Example:
        >>> round(SigmoidAnnealing(rate=1e-4)(10_000), 4)
        0.4621
    """

    rate: float = 1e-4
    maximum: float = 1.0

    def __post_init__(self) -> None:
        check_number("SigmoidAnnealing.rate", self.rate, minimum=0.0)
        check_number("SigmoidAnnealing.maximum", self.maximum)

    def __call__(self, step: int) -> float:
        """Returns the value at `step`; 2 · (sigmoid(a) - 1/2) is tanh(a / 2)."""
        return self.maximum * math.tanh(0.5 * self.rate * step)


@dataclasses.dataclass(frozen=True)
class LinearAnnealing:
    """A straight line from `start` to `end` over `num_steps`, then `end`.

    Example:
        >>> LinearAnnealing(start=0.0, end=1.0, num_steps=100)(25)
        0.25
    """

    start: float = 0.0
    end: float = 1.0
    num_steps: int = 10_000

    def __post_init__(self) -> None:
        check_number("LinearAnnealing.start", self.start)
        check_number("LinearAnnealing.end", self.end)
        check_integer("LinearAnnealing.num_steps", self.num_steps, minimum=1)

    def __call__(self, step: int) -> float:
        """Returns the value at `step`."""
        return self.end if step >= self.num_steps else self.start + (self.end - self.start) * (step / self.num_steps)


@dataclasses.dataclass(frozen=True)
class CosineAnnealing:
    """Half a cosine from `start` to `end` over `num_steps`, then `end`.

    Example:
        >>> CosineAnnealing(start=1.0, end=0.0, num_steps=100)(50)
        0.5
    """

    start: float = 1.0
    end: float = 0.0
    num_steps: int = 10_000

    def __post_init__(self) -> None:
        check_number("CosineAnnealing.start", self.start)
        check_number("CosineAnnealing.end", self.end)
        check_integer("CosineAnnealing.num_steps", self.num_steps, minimum=1)

    def __call__(self, step: int) -> float:
        """Returns the value at `step`."""
        if step >= self.num_steps:
            return self.end
        weight = round(0.5 * (1.0 - math.cos(math.pi * step / self.num_steps)), 15)  # exactly 1/2 where it should be
        return self.start + (self.end - self.start) * weight


@dataclasses.dataclass(frozen=True)
class CyclicalAnnealing:
    """A ramp from 0 to `maximum` that starts anew every `period` steps (Fu et al. 2019, arXiv 1903.10145).

    The first `ramp_fraction` of each period rises linearly, the rest stays at `maximum`.

    Example:
        >>> [CyclicalAnnealing(period=100)(step) for step in (0, 25, 75, 100)]
        [0.0, 0.5, 1.0, 0.0]
    """

    period: int = 10_000
    ramp_fraction: float = 0.5
    maximum: float = 1.0

    def __post_init__(self) -> None:
        check_integer("CyclicalAnnealing.period", self.period, minimum=1)
        check_number("CyclicalAnnealing.maximum", self.maximum)
        check_number("CyclicalAnnealing.ramp_fraction", self.ramp_fraction, above=0.0, maximum=1.0)

    def __call__(self, step: int) -> float:
        """Returns the value at `step`."""
        position = (step % self.period) / self.period
        return self.maximum * min(position / self.ramp_fraction, 1.0)


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """Another schedule, multiplied by what rises linearly from 1 / num_steps at step 0 to 1 at step num_steps - 1.

    Example:
        >>> [WarmUp(Constant(2e-3), num_steps=4)(step) for step in (0, 1, 3, 10)]
        [0.0005, 0.001, 0.002, 0.002]
    """

    schedule: Schedule
    num_steps: int = 200

    def __post_init__(self) -> None:
        check_schedule("WarmUp.schedule", self.schedule)
        check_integer("WarmUp.num_steps", self.num_steps, minimum=1)

    def __call__(self, step: int) -> float:
        """Returns the value at `step`."""
        return self.schedule(step) * min((step + 1) / self.num_steps, 1.0)
