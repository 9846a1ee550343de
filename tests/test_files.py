"""Files of JSON: strict, and whole or not there, as `tests/training/test_checkpoint_files.py` shows of any file."""

import concurrent.futures
import json
import math
import os
import pathlib
import time

import numpy as np
import pytest
import torch

from popgen.errors import RunDirectoryError
from popgen.files import locked_folder, write_json, write_whole


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def test_what_is_no_finite_number_is_null_at_any_depth(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"a": math.nan, "rows": [{"b": -math.inf, "c": 1.5}, (2, math.inf)], "d": "nan", "e": True})
    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"a": None, "rows": [{"b": None, "c": 1.5}, [2, None]], "d": "nan", "e": True}
    assert path.read_text().startswith('{\n  "a": null,\n') and path.read_text().endswith("}\n")


def test_tensors_and_numbers_of_numpy_are_numbers_and_lists(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "record.json"
    write_json(
        path, {"a": torch.tensor(1.5), "rows": [np.float32("nan"), np.int64(2)], "b": torch.tensor([1.0, -math.inf])}
    )
    assert json.loads(path.read_text(), parse_constant=refuse) == {"a": 1.5, "rows": [None, 2], "b": [1.0, None]}


@pytest.mark.parametrize("value", [{"a": object()}, {"a": 1}])
def test_what_cannot_be_written_leaves_the_old_file(
    value: object, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "record.json"
    write_json(path, [1])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((RunDirectoryError, TypeError)):
        write_json(path, value)
    assert json.loads(path.read_text()) == [1] and list(tmp_path.iterdir()) == [path]


def test_any_number_of_writers_of_one_file(tmp_path: pathlib.Path) -> None:
    """As where the same evaluation runs twice: each leaves the whole of what it wrote, and none fails."""
    path, contents = tmp_path / "record", [bytes([number]) * 10_000 for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(len(contents)) as writers:
        for written in [writers.submit(write_whole, path, content) for content in contents * 5]:
            written.result()
    assert path.read_bytes() in contents and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("written", [None, "config.gin", "samples/best.png"])
def test_a_folder_in_which_nothing_was_written_goes_again(
    written: str | None, existed: bool, tmp_path: pathlib.Path
) -> None:
    """What was there before stays, and so does whatever was written."""
    folder = tmp_path / "run"
    if existed:
        folder.mkdir()
    with pytest.raises(ValueError), locked_folder(folder, "in use", str, subfolders=("checkpoints", "samples")):
        if written is not None:
            (folder / written).write_text("")
        raise ValueError
    assert folder.exists() == (existed or written is not None)
    assert written is None or (folder / written).is_file()
    with locked_folder(folder, "in use", str):
        pass
    assert folder.is_dir()


def test_what_a_killed_writer_left_long_ago_goes_with_the_next_write(tmp_path: pathlib.Path) -> None:
    """Of the same file; what somebody may still be writing stays."""
    left = {name: tmp_path / f".writing-{name}" for name in ("00000000-notes", "11111111-notes", "00000000-other")}
    for path in left.values():
        path.write_bytes(b"half")
    for name in ("00000000-notes", "00000000-other"):
        os.utime(left[name], (time.time() - 7_200.0,) * 2)
    write_whole(tmp_path / "notes", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"notes", ".writing-11111111-notes", ".writing-00000000-other"}
