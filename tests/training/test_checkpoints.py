"""Checkpoints and run directories: nothing damaged is taken for good, nothing foreign is run, nothing good is lost."""

import hashlib
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys

import pytest
import torch

from popgen.errors import CheckpointError, PopgenError, RunDirectoryError
from popgen.training import checkpoints
from popgen.training.run_directory import RunDirectory

CONTENTS = {"step": 3, "weights": {"a": torch.arange(6.0).view(2, 3)}, "best": 1.5, "average": None}


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return type(first) is type(second) and first == second


@pytest.fixture
def path(tmp_path):
    checkpoints.save(tmp_path / "tiny.ckpt", CONTENTS)
    return tmp_path / "tiny.ckpt"


def test_round_trip_by_popgen_and_by_torch_alone(path):
    assert same(checkpoints.load(path), CONTENTS)
    assert same(torch.load(path, weights_only=True), CONTENTS)
    assert [file.name for file in path.parent.iterdir()] == ["tiny.ckpt"]


def test_a_slice_is_saved_without_the_rest(tmp_path):
    whole = torch.randn(50, 1_000)
    checkpoints.save(tmp_path / "slice.ckpt", {"slice": whole[3], "column": whole[:, 3]})
    assert (tmp_path / "slice.ckpt").stat().st_size < 10_000
    loaded = checkpoints.load(tmp_path / "slice.ckpt")
    assert torch.equal(loaded["slice"], whole[3]) and torch.equal(loaded["column"], whole[:, 3])


def test_what_is_no_checkpoint_or_of_a_later_version_is_refused(path, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoints.load(tmp_path / "absent.ckpt")
    torch.save(CONTENTS, tmp_path / "plain.pt")
    (tmp_path / "text").write_text("hello")
    for name in ("plain.pt", "text"):
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            checkpoints.load(tmp_path / name)
    monkeypatch.setattr(checkpoints, "VERSION", 2)
    checkpoints.save(path, CONTENTS)
    monkeypatch.setattr(checkpoints, "VERSION", 1)
    with pytest.raises(CheckpointError, match="version 2; this popgen reads 1"):
        checkpoints.load(path)


class Payload:
    """Pickles as a call that leaves a trace."""

    def __init__(self, trace: pathlib.Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return pathlib.Path.touch, (self.trace,)


def test_code_in_a_checkpoint_never_runs(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "evil.ckpt"
    buffer = io.BytesIO()
    torch.save({"weights": Payload(trace)}, buffer)
    archive = buffer.getvalue()
    header = {"format": checkpoints.FORMAT, "version": 1, "sha256": hashlib.sha256(archive).hexdigest()}
    comment = json.dumps(header).encode()
    path.write_bytes(archive[:-2] + struct.pack("<H", len(comment)) + comment)
    with pytest.raises(CheckpointError, match="evil.ckpt"):
        checkpoints.load(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists(), "the payload would have worked"


def test_a_failed_write_leaves_the_old_checkpoint(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirectoryError, match="No space left"):
        checkpoints.save(path, {"step": 4})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["tiny.ckpt"]


def test_names_of_checkpoints(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        assert not directory.has_checkpoint()
        directory.save_checkpoint("20", CONTENTS)
        assert same(checkpoints.load(directory.checkpoint_path("20")), CONTENTS)
        assert directory.has_checkpoint()
        with pytest.raises(CheckpointError, match="no checkpoint 'best'; there are: 20"):
            directory.load_checkpoint("best")
        for name in ("../../etc/passwd", "newest", ""):
            with pytest.raises(CheckpointError, match="must be best, latest, previous or a step"):
                directory.load_checkpoint(name)


def test_one_process_at_a_time_and_a_dead_one_holds_nothing(tmp_path):
    program = (
        "import pathlib, sys, time\n"
        "from popgen.training.run_directory import RunDirectory\n"
        "with RunDirectory(pathlib.Path(sys.argv[1])).locked():\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=pathlib.Path(__file__).parents[2]) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match="in use by another process"), RunDirectory(tmp_path).locked():
            pass
        other.kill()
    with RunDirectory(tmp_path).locked():
        pass


def test_the_lock_is_freed_by_an_error(tmp_path):
    with pytest.raises(PopgenError, match="inside"), RunDirectory(tmp_path).locked():
        raise PopgenError("inside")
    with RunDirectory(tmp_path).locked():
        pass
