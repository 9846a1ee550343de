"""What the commands share: one clear line for a user's mistake, and the run behind `--run_dir`."""

import os
import pathlib
import shlex
import sys
from collections.abc import Callable

from absl import app, flags

from popgen import config
from popgen.errors import PopgenError, RunDirectoryError
from popgen.training.run_directory import RunDirectory


def start(main: Callable[[], None], required: tuple[str, ...]) -> None:
    """Parses the flags and calls `main`; a user's mistake becomes one line on standard error and exit status 1."""

    def guarded(arguments: list[str]) -> None:
        try:
            missing = [f"--{name}" for name in required if not flags.FLAGS[name].value]
            if missing:
                raise PopgenError(f"{' and '.join(missing)} must be given; --help lists the options")
            if len(arguments) > 1:
                raise PopgenError(f"unexpected argument {arguments[1]!r}; options begin with --")
            main()
        except PopgenError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; the same command continues a training run from its latest checkpoint", file=sys.stderr)
            sys.exit(130)

    app.run(guarded)


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
    return directory, config.load([os.path.abspath(directory.config_path)])
