"""Disks that are full, read-only or refuse a file's size: one line, nothing good lost, and the run goes on later."""

import logging
import os
import pathlib
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.kills import difference, ended, forked, train_in
from popgen.training import checkpoints
from popgen.training.run_directory import RunDirectory

EVENTS = "events.out.tfevents"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """A process that has several threads is not to be forked."""
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it says what it hides of processes that failed


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("disks") / "reference"
    assert ended(forked(lambda: train(path))) == 0
    return path


def train(path: pathlib.Path) -> None:
    train_in(path, "vae", num_steps=20)


def line_of(work: Callable[[], None]) -> str:
    """Returns the one line in which some work fails."""
    reading, writing = os.pipe()
    process = forked(work, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        line = pipe.read()
    assert ended(process) == 1, line
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


def assert_whole(path: pathlib.Path) -> None:
    """Every checkpoint that there is can be loaded, and nothing half written lies about."""
    for file in path.glob("checkpoints/*.ckpt"):
        checkpoints.load(file)
    assert not list(path.rglob(".writing-*"))


def test_no_file_may_be_larger_than_so_many_bytes(reference: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Whichever file it is that fails first: the curves, the configuration, a picture, a checkpoint."""
    failed = []
    for limit in (0, 2_000, 20_000):
        path = tmp_path / str(limit)

        def limited(limit: int = limit, path: pathlib.Path = path) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            train(path)

        line = line_of(limited)
        assert "File too large" in line, line
        failed.append(line.split(str(path))[-1].split(":")[0])
        assert_whole(path)
        assert ended(forked(lambda path=path: train(path))) == 0
        assert difference(reference, path) is None
    assert {name for name in failed if EVENTS in name} and {name for name in failed if "checkpoints" in name}, failed


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A disk of its own; only a superuser can have one."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def remount(disk: pathlib.Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_disk_that_fills_up(disk: pathlib.Path, reference: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Again and again, a little later every time; then there is room, and the run ends as if there always had been."""
    path, lines = disk / "run", []
    for kilobytes in (64, 160):
        remount(disk, f"size={kilobytes}k")
        lines.append(line_of(lambda: train(path)))
        assert "No space left on device" in lines[-1]
        assert_whole(path)
    remount(disk, "size=100m")
    assert ended(forked(lambda: train(path))) == 0
    shutil.copytree(path, tmp_path / "run")
    assert difference(reference, tmp_path / "run") is None


def test_a_disk_that_is_read_only(disk: pathlib.Path) -> None:
    remount(disk, "size=100m")
    assert ended(forked(lambda: train_in(disk / "run", "vae", num_steps=8))) == 0
    before = {file: file.read_bytes() for file in disk.rglob("*") if file.is_file()}
    remount(disk, "ro")
    for name in ("run", "another"):
        line = line_of(lambda name=name: train(disk / name))
        assert f"the run directory {disk / name} is not writable" in line and "--run_dir" in line
    assert before == {file: file.read_bytes() for file in disk.rglob("*") if file.is_file()}
    remount(disk, "rw")


@pytest.mark.parametrize(("removed", "said"), [("", "cannot write the curves in"), ("samples", "cannot write")])
def test_a_directory_that_vanishes_during_the_run(
    removed: str, said: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, save_checkpoint = tmp_path / "run", RunDirectory.save_checkpoint

    def save_and_remove(directory: RunDirectory, name: str, contents: dict) -> None:
        save_checkpoint(directory, name, contents)
        if name == "best":  # the last that an evaluation saves: the next to be written is a point of the curves
            shutil.rmtree(path / removed)

    monkeypatch.setattr(RunDirectory, "save_checkpoint", save_and_remove)
    assert said in line_of(lambda: train(path))
