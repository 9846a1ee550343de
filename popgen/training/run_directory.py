"""A run directory: what lies where, and that only one process at a time trains in it."""

import contextlib
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from popgen.errors import CheckpointError, RunDirectoryError
from popgen.files import LOCK_NAME, locked_folder
from popgen.training import checkpoints

REPLICA = "replica_"  # and its number: the run directory of a replica, see `popgen.replicas`
MAX_DIGITS = 19  # of a step
NAMES = ("best", "latest", "previous")  # of checkpoints, beside those of steps
UNFINISHED = ("checkpoints/.writing-*", "samples/.writing-*", ".writing-*config.gin")  # what a killed run can leave
# Everything that a run writes; starting anew removes these and nothing else. The configuration goes last: as long as
# there is a checkpoint, it says of what.
CONTENTS = (
    "checkpoints/latest.ckpt",
    "checkpoints/latest.damaged",
    "checkpoints/previous.ckpt",
    "checkpoints/best.ckpt",
    "checkpoints/step_*.ckpt",
    "checkpoints/.writing-*",
    "samples/best.png",
    "samples/best_*.wav",
    "samples/step_*.png",
    "samples/step_*.wav",
    "samples/.writing-*",
    "evaluation_step*.json",
    "evaluation_step*.csv",
    "evaluation_step*.png",
    "probe_*.json",
    "events.out.tfevents.*",
    ".writing-*",
    "operative_config.gin",
    "config.gin",
)


class Checkpoint(NamedTuple):
    """A checkpoint that is whole, and what was passed over.

    Attributes:
        name: "latest", "previous", "best" or the step.
        tensors: its contents.
        damaged: what is wrong with each newer one that was passed over.

    Example: `RunDirectory.newest_checkpoint` returns one.
    """

    name: str
    tensors: dict[str, Any]
    damaged: tuple[str, ...]


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

    `config.gin`, `operative_config.gin`, `checkpoints/{latest,previous,best,step_00001000}.ckpt`, `samples/*.png`,
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
        """Returns the path of the checkpoint "latest", "previous", "best" or of a step, given as digits.

        Raises:
            CheckpointError: if the name is none of these.
        """
        if name.isdecimal() and len(name) <= MAX_DIGITS:
            name = f"step_{int(name):08d}"
        elif name not in NAMES:
            raise CheckpointError(f"checkpoint must be {', '.join(NAMES)} or a step, got {name!r}")
        return self.checkpoints_path / f"{name}.ckpt"

    def checkpoint_names(self) -> list[str]:
        """Returns the names of the checkpoints that there are: latest, previous, steps from the newest on, best."""
        stems = (path.stem.removeprefix("step_") for path in self.checkpoints_path.glob("step_*.ckpt"))
        steps = sorted((int(stem) for stem in stems if stem.isdecimal()), reverse=True)
        names = ("latest", "previous", *map(str, steps), "best")
        return [name for name in names if self.checkpoint_path(name).is_file()]

    def has_checkpoint(self) -> bool:
        """Whether there is something to continue, of this run or of its replicas."""
        return bool(self.checkpoint_names()) or any(replica.has_checkpoint() for replica in self.replicas())

    def replica(self, index: int) -> "RunDirectory":
        """Returns the run directory of a replica."""
        return RunDirectory(self.path / f"{REPLICA}{index}")

    def replicas(self) -> list["RunDirectory"]:
        """Returns the run directories of the replicas that there are, up to the last that has a configuration."""
        numbers = (path.parent.name.removeprefix(REPLICA) for path in self.path.glob(f"{REPLICA}*/config.gin"))
        count = max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
        return [self.replica(index) for index in range(count)]

    def check_num_replicas(self, num_replicas: int) -> None:
        """Checks that a run of so many replicas can be continued here, or begun.

        Raises:
            RunDirectoryError: if there is a run of another number.
        """
        found = 1 if self.checkpoint_names() else len(self.replicas()) if self.has_checkpoint() else num_replicas
        if found != num_replicas:
            raise RunDirectoryError(
                f"{self.path} holds a run of num_replicas = {found}, which cannot go on with {num_replicas}: "
                "--overwrite starts anew, --run_dir names another place"
            )

    def load_checkpoint(self, name: str) -> dict[str, Any]:
        """Returns the contents of a checkpoint by name.

        Raises:
            CheckpointError: if it is missing (the message lists what there is), damaged (it lists what is whole), or no
                training state.
        """
        path = self.checkpoint_path(name)
        if not path.is_file():
            found = self.checkpoint_names()
            there = f"there are: {', '.join(found)}" if found else "it has no checkpoints yet"
            raise CheckpointError(f"{self.path} has no checkpoint {name!r}; {there}")
        try:
            return checkpoints.load_state(path)
        except CheckpointError as error:
            whole = [other for other in self.checkpoint_names() if self._load_whole(other) is not None]
            listed = f"these are whole: {', '.join(whole)}" if whole else "no other is whole"
            raise CheckpointError(f"{error}; {listed}") from error

    def _load_whole(self, name: str) -> dict[str, Any] | None:
        """Returns the contents of a checkpoint, or None if it is missing or damaged."""
        try:
            return checkpoints.load_state(self.checkpoint_path(name))
        except CheckpointError:
            return None

    def newest_checkpoint(self, last_step: int | None = None) -> Checkpoint | None:
        """Returns the newest checkpoint that is whole and not of a later step, or None if there is none at all.

        `latest` is the newest where it is whole; `previous`, the newest one that was kept, and `best` are looked at
        where it is not.

        Raises:
            CheckpointError: if there are some, and all are damaged.
        """
        limit = math.inf if last_step is None else last_step
        found: list[Checkpoint] = []
        damaged: list[str] = []
        for name in self.checkpoint_names():
            if name.isdecimal() and (int(name) > limit or any(other.name.isdecimal() for other in found)):
                continue
            try:
                tensors = checkpoints.load_state(self.checkpoint_path(name))
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            if tensors["step"] <= limit:
                found.append(Checkpoint(name, tensors, ()))
                if name == "latest":
                    break
        if damaged and not found:
            raise CheckpointError(f"no checkpoint in {self.path} is whole: {'; '.join(damaged)}")
        newest = max(found, key=lambda one: one.tensors["step"], default=None)
        return newest and newest._replace(damaged=tuple(damaged))

    def continue_from(self, found: Checkpoint) -> bool:
        """Makes the files fit the checkpoint that a run continues from, and returns whether its best one is there.

        What was passed over is named in one line. A damaged `latest` is moved aside and written anew, lest it become
        `previous` in place of a good one. `best` is to be that of the history which is continued: it may be damaged, or
        the process may have been killed between `latest` and `best`. One of a later step is left: the run comes to that
        step again.
        """
        step, best_step = found.tensors["step"], found.tensors["best_step"]
        if found.damaged:
            print(f"{'; '.join(found.damaged)}; continuing from {found.name}, step {step}", file=sys.stderr, flush=True)
        if found.name != "latest":
            latest = self.checkpoint_path("latest")
            if latest.is_file() and found.damaged:
                os.replace(latest, latest.with_suffix(".damaged"))
            checkpoints.save(latest, found.tensors)
        best = self._load_whole("best")
        if best_step == 0 or (best is not None and best["step"] >= best_step):
            return True
        for tensors in (found.tensors, self._load_whole("previous"), self._load_whole(str(best_step))):
            if tensors is not None and tensors["step"] == best_step:
                self.save_checkpoint("best", tensors)
                return True
        print(
            f"{self.checkpoint_path('best')} is missing or damaged; the lowest loss is sought anew from step {step} on",
            file=sys.stderr,
            flush=True,
        )
        return False

    def save_checkpoint(self, name: str, contents: dict[str, Any]) -> None:
        """Writes a checkpoint by name, atomically; the `latest` before a new one is kept as `previous`."""
        keep = self.checkpoint_path("previous") if name == "latest" else None
        checkpoints.save(self.checkpoint_path(name), contents, keep)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the directory and holds it for this process; the operating system frees it when the process dies.

        Checkpoints, pictures and configurations that a killed process left unfinished are removed: whoever holds the
        directory is alone in writing those, where evaluations come and go beside it.

        Raises:
            RunDirectoryError: if it cannot be written, or another process holds it.
        """
        where, advice = f"the run directory {self.path}", "name another with --run_dir"
        with locked_folder(
            self.path,
            in_use=f"{where} is in use by another process, which holds {LOCK_NAME} there; wait for it, or {advice}",
            not_writable=lambda reason: f"{where} is not writable ({reason}); {advice}",
            timeout=0.5,  # long enough for `is_in_use` of another process to let go
            subfolders=(self.checkpoints_path.name, self.samples_path.name),
        ):
            for pattern in UNFINISHED:
                for unfinished in self.path.glob(pattern):
                    unfinished.unlink(missing_ok=True)
            yield

    def is_in_use(self) -> bool:
        """Whether some process trains in it."""
        path = self.path / LOCK_NAME
        if not path.is_file():
            return False
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True

    def clear(self) -> None:
        """Removes what an earlier run and its replicas wrote, and nothing else.

        The last replica goes first: one who is killed in between leaves numbers from zero on.
        """
        for replica in reversed(self.replicas()):
            replica.clear()
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
