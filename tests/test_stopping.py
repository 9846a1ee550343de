"""A real training process: stopped by signals, evaluated and tried a second time while it runs, killed, replayed."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.kills import ended, forked
from launch import command
from launch.command import OF_THE_DISK, guarded, stop_requests
from popgen.errors import StoppedError, Terminated
from tests.test_commands import REPOSITORY, Workspace

LONG = ("train", "--gin_file=vae_squares.gin", "--run_dir=run", "--gin_bindings=Experiment.num_steps = 1_000_000")


@pytest.fixture
def workspace(tmp_path: pathlib.Path) -> Workspace:
    return Workspace(tmp_path)


@contextlib.contextmanager
def started(workspace: Workspace, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Returns a command that runs, once it has saved a checkpoint; it does not outlive a test that fails."""
    path = os.pathsep.join((str(REPOSITORY), str(workspace.path)))
    command = [sys.executable, "-m", f"launch.{arguments[0]}", *arguments[1:]]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=workspace.path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        waiting = time.monotonic()
        while not (workspace.path / "run/checkpoints/best.ckpt").is_file():
            assert process.poll() is None and time.monotonic() - waiting < 60
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_run_is_evaluated_while_it_trains_stopped_and_replayed(workspace: Workspace) -> None:
    """A second process is refused, an evaluation is not; SIGTERM saves the step in progress and says how to go on."""
    with started(workspace, *LONG) as process:
        assert "in use by another process" in workspace.fail(*LONG)
        workspace.succeed("evaluate", "--run_dir=run", "--num_samples=2", "--num_examples=4")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    lines = stderr.splitlines()
    assert process.returncode == 75 and len(lines) == 2, stderr
    match = re.fullmatch(r"stopped at step (\d+), which is saved; the same command goes on from there", lines[1])
    assert match and lines[0] == "stopping after this step; Ctrl-C interrupts at once"
    assert torch.load(workspace.path / "run/checkpoints/latest.ckpt", weights_only=True)["step"] == int(match[1])
    printed = workspace.succeed("replay", "--run_dir=run", "--step=2", "--trust_config")
    assert re.match(r"step 2: loss \d+\.\d+, gradient norm \d+\.?\d*\neverything in it is finite\n", printed)


def test_a_second_interrupt_is_not_waited_for() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_requests() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize(
    "breaking_off, said, status, training",
    [
        ("raise KeyboardInterrupt", "interrupted", 130, "continues the run from its latest checkpoint"),
        ("__import__('os').kill(__import__('os').getpid(), 15)", "stopped", 75, None),  # it saves, see above
    ],
)
def test_an_interrupted_command_says_what_it_does_the_next_time(
    breaking_off: str, said: str, status: int, training: str | None, workspace: Workspace
) -> None:
    """By Ctrl-C, or by SIGTERM."""
    workspace.succeed("train", "--gin_file=vae_squares.gin", "--run_dir=run")
    parts = workspace.path / "own_parts.py"
    parts.write_text(
        parts.read_text().replace("    def load(self):\n", f"    def load(self):\n        {breaking_off}\n")
    )
    for arguments, again in (
        (("train", "--gin_file=vae_squares.gin", "--run_dir=run"), training),
        (("evaluate", "--run_dir=run"), "goes on with an evaluation of images where it was"),
        (("sample", "--run_dir=run", "--out=grid.png"), "starts anew"),
        (
            ("train", "--gin_file=vae_squares.gin", "--run_dir=run", "--overwrite"),
            training and f"{training}, without --overwrite",
        ),
    ):
        done = workspace.run(*arguments)
        assert done.returncode == status, done.stderr
        assert done.stderr.endswith(", without --overwrite\n") == ("--overwrite" in arguments)
        if again is not None:
            assert (done.returncode, done.stderr) == (status, f"{said}; the same command {again}\n")


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    for error, status in (
        (StoppedError("stopped at step 3"), 75),
        (Terminated(), 75),
        (KeyboardInterrupt(), 130),
        *((OSError(number, os.strerror(number), "file"), 1) for number in OF_THE_DISK),
    ):
        with pytest.raises(SystemExit) as leaving:
            guarded(raising(error))
        assert leaving.value.code == status and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        guarded(raising(FileNotFoundError(2, "No such file", "file")))


def test_sigterm_is_no_error_that_other_code_takes_for_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader of files that passes over what it cannot read does not pass over SIGTERM; where one is lost, as in a
    finaliser, the next one is another attempt."""
    monkeypatch.setattr(command, "CLEANING_SECONDS", 0.0)

    def work() -> None:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            raise AssertionError("it was taken for an error") from error

    with pytest.raises(SystemExit) as leaving:
        guarded(work)
    assert leaving.value.code == 75 and capsys.readouterr().err == "stopped; the same command starts anew\n"


def test_a_command_whose_standard_error_is_closed_writes_into_no_other_file(tmp_path: pathlib.Path) -> None:
    torch.set_num_threads(1)  # a process that has several is not to be forked

    def work() -> None:
        os.close(2)
        sys.stderr = None
        guarded(lambda: print("said", file=sys.stderr))
        assert os.path.samestat(os.fstat(2), os.stat(os.devnull))
        with (tmp_path / "file").open("w") as file:
            assert file.fileno() > 2

    assert ended(forked(work)) == 0
