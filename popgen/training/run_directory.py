"""A run directory: what lies where, and that only one process at a time trains in it."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from filelock import FileLock, Timeout

from popgen.errors import CheckpointError, RunDirectoryError
from popgen.training import checkpoints

LOCK_NAME = ".lock"
MAX_DIGITS = 19  # of a step
# Everything that a run writes; starting anew removes these and nothing else.
CONTENTS = (
    "config.gin",
    "operative_config.gin",
    "checkpoints/latest.ckpt",
    "checkpoints/best.ckpt",
    "checkpoints/step_*.ckpt",
    "checkpoints/.writing-*.ckpt",
    "samples/best.png",
    "samples/step_*.png",
    "evaluation_step*.json",
    "evaluation_step*.csv",
    "evaluation_step*.png",
    "events.out.tfevents.*",
)


def default_root() -> pathlib.Path:
    """Returns `$EXPERIMENT_DIR` if it is set, else `experiments`.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, EXPERIMENT_DIR="runs"):
        ...     default_root().name
        'runs'
    """
    return pathlib.Path(os.environ.get("EXPERIMENT_DIR") or "experiments")


class RunDirectory:
    """The files of one run.

    `config.gin`, `operative_config.gin`, `checkpoints/{latest,best,step_00001000}.ckpt`, `samples/*.png`,
    `evaluation_*.{json,csv,png}` and TensorBoard's event files.

    Args:
        path: the directory; it need not exist yet.

    Example:
        >>> RunDirectory(pathlib.Path("experiments/vae")).checkpoint_path("best").as_posix()
        'experiments/vae/checkpoints/best.ckpt'
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.config_path = path / "config.gin"
        self.operative_config_path = path / "operative_config.gin"
        self.checkpoints_path = path / "checkpoints"
        self.samples_path = path / "samples"

    def checkpoint_path(self, name: str) -> pathlib.Path:
        """Returns the path of the checkpoint "latest", "best" or of a step, given as digits.

        Raises:
            CheckpointError: if the name is none of these.
        """
        if name.isdecimal() and len(name) <= MAX_DIGITS:
            name = f"step_{int(name):08d}"
        elif name not in ("latest", "best"):
            raise CheckpointError(f"checkpoint must be best, latest or a step, got {name!r}")
        return self.checkpoints_path / f"{name}.ckpt"

    def has_checkpoint(self) -> bool:
        """Whether there is something to continue."""
        return self.checkpoint_path("latest").is_file()

    def load_checkpoint(self, name: str) -> dict[str, Any]:
        """Returns the contents of a checkpoint by name.

        Raises:
            CheckpointError: if it is missing (the message lists what there is), damaged, or no training state.
        """
        path = self.checkpoint_path(name)
        if not path.is_file():
            found = sorted(file.stem for file in self.checkpoints_path.glob("*.ckpt"))
            there = f"there are: {', '.join(found)}" if found else "it has no checkpoints yet"
            raise CheckpointError(f"{self.path} has no checkpoint {name!r}; {there}")
        return checkpoints.load_state(path)

    def save_checkpoint(self, name: str, contents: dict[str, Any]) -> None:
        """Writes a checkpoint by name, atomically."""
        checkpoints.save(self.checkpoint_path(name), contents)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the directory and holds it for this process; the operating system frees it when the process dies.

        Raises:
            RunDirectoryError: if it cannot be written, or another process holds it.
        """
        try:
            self.checkpoints_path.mkdir(parents=True, exist_ok=True)
            self.samples_path.mkdir(exist_ok=True)
            lock = FileLock(self.path / LOCK_NAME)
            lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"the run directory {self.path} is in use by another process; wait for it, or name another with "
                "--run_dir"
            ) from None
        except OSError as error:
            raise RunDirectoryError(
                f"the run directory {self.path} is not writable ({error.strerror or error}); name another with "
                "--run_dir"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Removes what an earlier run wrote, and nothing else."""
        for pattern in CONTENTS:
            for found in self.path.glob(pattern):
                found.unlink()


def find_run(name: str, run: str) -> RunDirectory:
    """Returns the run in a directory, or of that name under `default_root()`.

    Args:
        name: of the argument, for the error.
        run: a path or a name.

    Raises:
        CheckpointError: if neither holds a checkpoint.

    Example:
        >>> find_run("Experiment.pretrained", "/nowhere/vqvae")
        Traceback (most recent call last):
            ...
        popgen.errors.CheckpointError: Experiment.pretrained: there is no trained run in /nowhere/vqvae; train it first
    """
    places = list(dict.fromkeys([pathlib.Path(run), default_root() / run]))
    for place in places:
        directory = RunDirectory(place)
        if directory.checkpoint_path("best").is_file():
            return directory
    looked = " or ".join(map(str, places))
    raise CheckpointError(f"{name}: there is no trained run in {looked}; train it first")
