"""Checkpoint files, exhaustively: every flipped bit, every length, and every way in which a write can fail."""

import collections
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from popgen.errors import CheckpointError, RunDirectoryError
from popgen.training import checkpoints

CONTENTS: dict[str, Any] = {"weight": torch.arange(3.0), "step": 7}


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    """A tiny checkpoint."""
    checkpoints.save(tmp_path / "tiny.ckpt", CONTENTS)
    return tmp_path / "tiny.ckpt"


@pytest.fixture
def descriptor(path: pathlib.Path) -> Iterator[int]:
    """The open file of the tiny checkpoint, to change it in place."""
    opened = os.open(path, os.O_RDWR)
    yield opened
    os.close(opened)


def is_whole(contents: dict[str, Any]) -> bool:
    return (
        contents.keys() == CONTENTS.keys()
        and torch.equal(contents["weight"], CONTENTS["weight"])
        and contents["step"] == CONTENTS["step"]
    )


@pytest.mark.usefixtures("as_a_user")
def test_every_flipped_bit_is_refused_or_harmless(path: pathlib.Path, descriptor: int) -> None:
    """Never another content, and never an exception that is not the project's."""
    good, refused = path.read_bytes(), 0
    for position, byte in enumerate(good):
        for flip in (*(1 << bit for bit in range(8)), 0xFF):
            os.pwrite(descriptor, bytes([byte ^ flip]), position)
            try:
                assert is_whole(checkpoints.load(path)), (position, flip)
            except CheckpointError:
                refused += 1
        os.pwrite(descriptor, bytes([byte]), position)
    assert refused > 0.99 * 9 * len(good)
    assert is_whole(checkpoints.load(path))


@pytest.mark.usefixtures("as_a_user")
def test_every_truncation_is_refused(path: pathlib.Path, descriptor: int) -> None:
    for length in reversed(range(path.stat().st_size)):
        os.ftruncate(descriptor, length)
        with pytest.raises(CheckpointError, match="tiny.ckpt"):
            checkpoints.load(path)


@pytest.mark.parametrize("extra", [b"\0", b"x" * 100, b"PK\5\6" + bytes(18)])
def test_a_longer_file_is_refused_or_harmless(path: pathlib.Path, extra: bytes) -> None:
    for content in (path.read_bytes() + extra, extra + path.read_bytes()):
        path.write_bytes(content)
        try:
            assert is_whole(checkpoints.load(path))
        except CheckpointError as error:
            assert str(path) in str(error)
        checkpoints.save(path, CONTENTS)


@pytest.mark.parametrize("content", [b"", b"\0", b"PK\3\4", b"PK\5\6" + bytes(18), b"PK\5\6" + bytes(18) + b"{}"])
def test_other_files_are_refused(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint of popgen, or was cut short"):
        checkpoints.load(path)


@pytest.mark.parametrize("comment", [b"[]", b"7", b"null", b'"popgen checkpoint"', b'{"format": "another"}', b"\xff"])
def test_other_headers_are_refused(path: pathlib.Path, comment: bytes) -> None:
    good = path.read_bytes()
    end = good.rindex(b"PK\5\6")
    path.write_bytes(good[: end + 20] + len(comment).to_bytes(2, "little") + comment)
    with pytest.raises(CheckpointError, match="not a checkpoint of popgen, or was cut short"):
        checkpoints.load(path)


def test_a_folder_in_its_place_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        checkpoints.load(tmp_path)


def test_tensors_come_back_with_their_types(path: pathlib.Path) -> None:
    contents = {
        "types": {str(dtype): torch.ones(3).to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.uint8, bool)},
        "special": torch.tensor([torch.nan, torch.inf, -0.0]),
        "numbers": [1, 2.5, True, None, float("inf"), (1, 2)],
        "empty": torch.zeros(0, 4),
    }
    checkpoints.save(path, contents)
    found = checkpoints.load(path)
    assert found["numbers"] == contents["numbers"]
    for name, tensor in contents["types"].items():
        assert found["types"][name].dtype == tensor.dtype and torch.equal(found["types"][name], tensor)
    assert found["special"].view(torch.int32).tolist() == contents["special"].view(torch.int32).tolist()
    assert found["empty"].shape == (0, 4)


class Shares(dict):
    pass


WEIGHT = torch.ones(1_000)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (np.float64(1.0), "optimizer.state.0.history is a numpy.float64"),
        ({1, 2}, "optimizer.state.0.history is a set"),
        (collections.deque([1.0]), "optimizer.state.0.history is a collections.deque"),
        (torch.float32, "optimizer.state.0.history is a torch.dtype"),
        ({(0, 1): 1.0}, r"optimizer.state.0.history.\(0, 1\) has a key of type tuple"),
        (2**64, "optimizer.state.0.history is an integer of more than 64 bits"),
        ([1, Shares()], "optimizer.state.0.history.1 is a .*Shares"),
        (torch.eye(2).to_sparse(), "optimizer.state.0.history is a tensor that is sparse"),
        (torch.nn.Parameter(torch.ones(1)), "optimizer.state.0.history is a .*Parameter"),
        ([WEIGHT.view(-1), WEIGHT.view(10, 100)], "optimizer.state.0.history.[01] is a tensor that shares its memory"),
        (lambda: None, "optimizer.state.0.history is a function"),
    ],
)
def test_what_could_not_be_loaded_is_not_written(path: pathlib.Path, kept: Any, reason: str) -> None:
    contents = {**CONTENTS, "optimizer": {"state": {0: {"history": kept}}}}
    with pytest.raises(CheckpointError, match=rf"tiny.ckpt, which could not be loaded: {reason}"):
        checkpoints.save(path, contents, keep=path.with_name("kept"))
    assert is_whole(checkpoints.load(path)) and not path.with_name("kept").exists()


def test_an_expanded_tensor_is_written_whole(path: pathlib.Path) -> None:
    checkpoints.save(path, {"expanded": torch.ones(1).expand(10_000), "ordered": collections.OrderedDict(a=1)})
    assert torch.equal(checkpoints.load(path)["expanded"], torch.ones(10_000))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_changes_nothing(
    path: pathlib.Path, function: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    before = path.read_bytes()
    monkeypatch.setattr(os, function, fail)
    expected = RunDirectoryError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        checkpoints.save(path, {"weight": torch.zeros(1_000)})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["tiny.ckpt"]


def test_a_reader_never_meets_a_part(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the moment of replacement the old content is there, whole; after it the new one."""
    seen = []
    replace = os.replace

    def looking(source, target) -> None:
        seen.append(checkpoints.load(path)["step"])
        replace(source, target)
        seen.append(checkpoints.load(path)["step"])

    monkeypatch.setattr(os, "replace", looking)
    checkpoints.save(path, {**CONTENTS, "step": 8})
    assert seen == [7, 8]


def test_a_checkpoint_can_be_read_by_others(path: pathlib.Path) -> None:
    """It has the permissions that the user's umask gives to any file."""
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_missing_folder_is_named(tmp_path: pathlib.Path) -> None:
    for folder in (tmp_path / "absent", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(RunDirectoryError, match=f"cannot write the checkpoint {folder}"):
            checkpoints.save(folder / "latest.ckpt", CONTENTS)
