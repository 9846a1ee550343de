"""What the commands share: one clear line for a user's mistake, and the run behind `--run_dir`."""

import contextlib
import errno
import io
import math
import os
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from absl import app, flags

from popgen import config
from popgen.config.foreign import check_files
from popgen.errors import PopgenError, RunDirectoryError, StoppedError, Terminated, reason_of
from popgen.experiment import Experiment
from popgen.training.run_directory import RunDirectory
from popgen.training.weights import WEIGHTS

STOPPED = 75  # exit status of a run that was asked to stop: "try again later", EX_TEMPFAIL of sysexits.h
CLEANING_SECONDS = 2.0  # after SIGTERM, in which another one breaks nothing off
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)
OF_THE_PATH = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
MAX_TIMEOUT = 1e7  # seconds, four months
TRUST_CONFIG = "Build whatever the run's config.gin names, other code than popgen's and torch's too, which then runs."

flags.disclaim_key_flags()  # a flag that is defined here is one of the command that asks for it, and in its --help


def define_run_flags(checkpoint: str = "best", remark: str = "") -> None:
    """Defines the flags of a command that loads a checkpoint of a run.

    Args:
        checkpoint: which one, where a command is told nothing else.
        remark: added to what `--help` says of that.
    """
    flags.DEFINE_string("run_dir", None, "The run directory that training wrote.")
    flags.DEFINE_string("checkpoint", checkpoint, f"best, latest, previous, or a step that was kept{remark}.")
    flags.DEFINE_enum("weights", "raw", WEIGHTS, "The weights as trained, or their moving average.")
    flags.DEFINE_bool("trust_config", False, TRUST_CONFIG)


def define_process_timeout() -> None:
    """Defines the flag of a command that several processes may share."""
    flags.DEFINE_float(
        "process_timeout", 600.0, "Seconds that one of several processes waits for the others.", 1.0, MAX_TIMEOUT
    )
    flags.register_validator("process_timeout", lambda seconds: seconds == seconds, "it must be a number")


def config_name(gin_files: Sequence[str]) -> str:
    """Returns the name of a run or sweep that config files describe."""
    return "+".join(pathlib.Path(gin_file).stem for gin_file in gin_files)


def starts_anew() -> str:
    """Returns what the same command does after it was interrupted, where it keeps nothing."""
    return "starts anew"


def start(main: Callable[[], None], required: tuple[str, ...], again: Callable[[], str] = starts_anew) -> None:
    """Parses the flags and calls `main` as `guarded` does."""

    def checked(arguments: list[str]) -> None:
        missing = [f"--{name}" for name in required if flags.FLAGS[name].value in (None, "", [])]
        if missing:
            raise PopgenError(f"{' and '.join(missing)} must be given; --help lists the options")
        if len(arguments) > 1:
            raise PopgenError(f"unexpected argument {arguments[1]!r}; options begin with --")
        main()

    guarded(lambda: app.run(checked, flags_parser=parsed), again)


def parsed(arguments: list[str]) -> list[str]:
    """Parses the flags and returns what is none; `--help` ends with exit status 0, not with absl's 1.

    Raises:
        PopgenError: if there is no such flag, or its value is of another kind.
    """
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, ValueError) as error:
        raise PopgenError(f"{reason_of(error)}; --help lists the options") from error
    except SystemExit:  # help was asked for and has been printed
        sys.exit(0)


def guarded(main: Callable[[], None], again: Callable[[], str] = starts_anew) -> None:
    """Calls `main`; a user's mistake or a bad disk becomes one line on standard error.

    Of several processes that end for the same reason one prints it. The exit status is then 1; it is 75 for what was
    asked to stop, by SIGTERM, and 130 for what was interrupted at once.

    Args:
        main: does the work of a command.
        again: returns what the same command does after it was interrupted.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        _guarded(lambda: _broken_off_by_sigterm(main), again)
    finally:
        signal.signal(signal.SIGTERM, before)


def _broken_off_by_sigterm(main: Callable[[], None]) -> None:
    """Calls `main`; where SIGTERM comes, it is broken off at once, and what it then cleans up is not broken off again.

    An exception can be lost, as in a finaliser: a SIGTERM that comes later is another attempt.
    """
    raised = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if time.monotonic() - raised > CLEANING_SECONDS:
            raised = time.monotonic()
            raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        main()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _guarded(main: Callable[[], None], again: Callable[[], str]) -> None:
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know ± or k̂
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read along has had enough, such as `head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for what is printed on the way out
        sys.exit(1)
    except StoppedError as stopped:
        if not stopped.said:
            print(stopped, file=sys.stderr)
        sys.exit(STOPPED)
    except Terminated as stopped:
        if not stopped.said:
            print(f"stopped; the same command {again()}", file=sys.stderr)
        sys.exit(STOPPED)
    except PopgenError as error:
        if not error.said:
            print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: there is not enough memory: {printable(reason_of(error))}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in OF_THE_DISK + OF_THE_PATH:
            raise
        print(f"error: cannot read or write: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted; the same command {again()}", file=sys.stderr)
        sys.exit(130)


def _open_what_is_closed() -> None:
    """Gives a process that was started without one of its streams the null device: no file then takes its place."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w"))  # noqa: SIM115 - to the end


@contextlib.contextmanager
def stop_requests(quiet: bool = False) -> Iterator[Callable[[], bool]]:
    """Returns a function that says whether SIGTERM or Ctrl-C asked to stop; a second Ctrl-C interrupts at once.

    Args:
        quiet: whether the request is not acknowledged.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked and not quiet:
            os.write(2, b"stopping after this step; Ctrl-C interrupts at once\n")  # print is not safe in a handler
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_typed() -> str:
    """Returns the command that is running, with the module's name in place of the file's."""
    module = pathlib.Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", f"launch.{module}", *sys.argv[1:]])


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory could not be had: of Python and numpy, of a GPU, or of torch on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def printable(text: str) -> str:
    """Returns a text in one line, what is no character as Python writes it: it may quote what somebody else wrote."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def existing_run(
    run_dir: str, checkpoint: str | None, trust_config: bool
) -> tuple[RunDirectory, Experiment, dict[str, Any]]:
    """Returns the run in a directory, the experiment that its configuration describes, and a checkpoint.

    Args:
        run_dir: that training wrote.
        checkpoint: best, latest, previous, or a step that was kept; None for the newest that is whole, if any.
        trust_config: whether its configuration may name whatever it likes; else see `popgen.config.foreign`.

    Raises:
        RunDirectoryError: if there is no run, or what is there is not what training writes.
        CheckpointError: if the checkpoint is missing or damaged.
        ConfigError: if the configuration cannot be built, or may not be.
    """
    directory = RunDirectory(pathlib.Path(run_dir))
    if not directory.config_path.is_file():
        raise RunDirectoryError(f"there is no run in {run_dir!r} (no config.gin); --run_dir names what training wrote")
    if not trust_config:
        check_files(directory.path)
    if directory.replicas() and not directory.checkpoint_names():
        names = ", ".join(str(replica.path) for replica in directory.replicas())
        raise RunDirectoryError(f"{run_dir!r} holds several replicas; --run_dir names one of them: {names}")
    if checkpoint is None:
        found = directory.newest_checkpoint()
        tensors = {} if found is None else found.tensors
    else:
        tensors = directory.load_checkpoint(checkpoint)
    if trust_config:
        return directory, config.load([os.path.abspath(directory.config_path)]).experiment, tensors
    if not tensors:
        raise RunDirectoryError(
            f"{run_dir!r} has no checkpoint yet, which says how large its model may be; --trust_config goes without"
        )
    return directory, config.load_foreign(directory.config_path, tensors).experiment, tensors
