"""What the commands share: one clear line for a user's mistake, and the run behind `--run_dir`."""

import contextlib
import errno
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from absl import app, flags

from popgen import config
from popgen.errors import PopgenError, RunDirectoryError, StoppedError
from popgen.training.run_directory import RunDirectory

STOPPED = 75  # exit status of a run that was asked to stop: "try again later", EX_TEMPFAIL of sysexits.h
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def start(main: Callable[[], None], required: tuple[str, ...]) -> None:
    """Parses the flags and calls `main` as `guarded` does."""

    def checked(arguments: list[str]) -> None:
        missing = [f"--{name}" for name in required if not flags.FLAGS[name].value]
        if missing:
            raise PopgenError(f"{' and '.join(missing)} must be given; --help lists the options")
        if len(arguments) > 1:
            raise PopgenError(f"unexpected argument {arguments[1]!r}; options begin with --")
        main()

    app.run(lambda arguments: guarded(lambda: checked(arguments)))


def guarded(main: Callable[[], None]) -> None:
    """Calls `main`; a user's mistake or a bad disk becomes one line on standard error.

    The exit status is then 1; it is 75 for a run that was asked to stop, and 130 for what was interrupted at once.
    """
    try:
        main()
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(STOPPED)
    except PopgenError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        print(f"error: cannot write: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command continues a training run from its latest checkpoint", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Returns a function that says whether SIGTERM or Ctrl-C asked to stop; a second Ctrl-C interrupts at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        os.write(2, b"stopping after this step; Ctrl-C interrupts at once\n")  # print is not safe in a handler

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


def existing_run(run_dir: str) -> tuple[RunDirectory, config.LoadedConfig]:
    """Returns the run in a directory, and what its configuration describes.

    Raises:
        RunDirectoryError: if there is no run.
    """
    directory = RunDirectory(pathlib.Path(run_dir))
    if not directory.config_path.is_file():
        raise RunDirectoryError(f"there is no run in {run_dir!r} (no config.gin); --run_dir names what training wrote")
    loaded = config.load([os.path.abspath(directory.config_path)])
    if loaded.experiment.num_replicas != 1:
        names = ", ".join(str(replica.path) for replica in directory.replicas())
        raise RunDirectoryError(f"{run_dir!r} holds several replicas; --run_dir names one of them: {names}")
    return directory, loaded
