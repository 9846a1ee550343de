"""The project's exceptions, and the checks that raise them.

Every error that a user can cause is a `PopgenError` whose message names the thing, its value and what would be
right. The commands print that message alone and exit with a non-zero status.
"""

import math
import os
from typing import Any


class PopgenError(Exception):
    """An error that a user caused and can mend; the message says how.

    Attributes:
        said: whether another process of the same run has printed it.
    """

    said: bool = False


class ArgumentError(PopgenError, ValueError):
    """An argument outside its domain, or tensors whose shapes do not fit."""


class ConfigError(PopgenError):
    """A configuration that does not parse, does not build, or binds what nothing uses."""


class DataError(PopgenError):
    """Data that is missing, damaged or outside the support of the likelihood."""


class CheckpointError(PopgenError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class RunDirectoryError(PopgenError):
    """A run directory that is in use, not writable, or holds a different run."""


class TrainingError(PopgenError):
    """Training that cannot go on, for example because the loss is no longer finite."""


class DivergedError(TrainingError):
    """Training that cannot go on, since too many steps in a row were skipped.

    Attributes:
        step: the first of them.
        replica: whose they are; 0 where there is one alone.
    """

    def __init__(self, message: str, step: int, replica: int = 0) -> None:
        super().__init__(message)
        self.step, self.replica = step, replica


class StoppedError(PopgenError):
    """A run that was asked to stop, and has saved where it is."""


class Terminated(BaseException):  # no Exception: code that goes on after any of those would go on
    """SIGTERM came to what has nothing to save.

    Example: `guarded` of launch.command has it raised.

    Attributes:
        said: whether another process of the same run has printed it.
    """

    said: bool = False


class ProcessesError(PopgenError):
    """Processes of one run that do not find each other, do not fit together, or of which one has ended."""


class UnfinishedEvaluationError(PopgenError):
    """An evaluation whose other shards are not finished yet."""


def reason_of(error: Exception, text: str | None = None) -> str:
    """Returns the first line of what an error says, without a stop at its end, or its name if it says nothing.

    Args:
        error: that a library raised.
        text: what it says, where that is not its `str`.

    Example:
        >>> reason_of(OSError("the disk is full.\\nmore")), reason_of(EOFError())
        ('the disk is full', 'EOFError')
    """
    lines = (str(error) if text is None else text).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Returns `value` if it is an integer of at least `minimum`.

    Raises:
        ArgumentError: if it is not.

    Example:
        >>> check_integer("num_reflections", 0, minimum=1)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: num_reflections must be an integer of at least 1, got 0
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ArgumentError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return value


def check_number(
    name: str,
    value: Any,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Returns `value` if it is a finite number, at least `minimum`, at most `maximum`, above `above`, below `below`.

    Raises:
        ArgumentError: if it is not.

    Example:
        >>> check_number("decay", 0.999, minimum=0.0, below=1.0)
        0.999
        >>> check_number("decay", 1.0, minimum=0.0, below=1.0)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: decay must be at least 0 and below 1, got 1.0
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArgumentError(f"{name} must be a finite number, got {value!r}")
    if not (minimum <= value <= maximum and above < value < below):
        bounds = {"at least": minimum, "above": above, "at most": maximum, "below": below}
        wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
        raise ArgumentError(f"{name} must be {wanted}, got {value!r}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """Returns `value` if it is True or False.

    Raises:
        ArgumentError: if it is not.

    Example:
        >>> check_flag("compile", 1)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: compile must be True or False, got 1
    """
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be True or False, got {value!r}")
    return value


def check_path(name: str, value: Any) -> str | os.PathLike:
    """Returns `value` if it is a path.

    Raises:
        ArgumentError: if it is not.

    Example:
        >>> check_path("data_dir", 3)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: data_dir must be a path, got 3
    """
    if not isinstance(value, str | os.PathLike):
        raise ArgumentError(f"{name} must be a path, got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Returns `value` if it is one of `choices`.

    Raises:
        ArgumentError: if it is not.

    Example:
        >>> check_choice("protocol", "dynamic", ("dynamic", "fixed"))
        'dynamic'
    """
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value
