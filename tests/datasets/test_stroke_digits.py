"""Laws of the embedded dataset: its cache is written, reused, and drawn anew when it is damaged."""

import os
import pathlib

import numpy as np
import pytest
import torch

from popgen.datasets import stroke_digits
from popgen.datasets.stroke_digits import StrokeDigits
from popgen.errors import ArgumentError

NUM_TRAIN, NUM_TEST = 30, 12


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the dataset small, and returns a list that grows with every drawing of a split."""
    drawings: list[int] = []
    draw_digits = stroke_digits.draw_digits

    def counting(count: int, seed: int, stream: str):
        drawings.append(count)
        return draw_digits(count, seed, stream)

    monkeypatch.setattr(stroke_digits, "NUM_TRAIN", NUM_TRAIN)
    monkeypatch.setattr(stroke_digits, "NUM_TEST", NUM_TEST)
    monkeypatch.setattr(stroke_digits, "draw_digits", counting)
    return drawings


def cache_of(folder: pathlib.Path) -> pathlib.Path:
    """Returns the one file that the cache holds."""
    (path,) = (folder / "stroke_digits").iterdir()
    return path


def test_the_cache_is_written_and_reused(tmp_path: pathlib.Path, small: list[int]) -> None:
    first = StrokeDigits(data_dir=str(tmp_path)).load()
    assert small == [NUM_TRAIN, NUM_TEST]
    assert np.load(cache_of(tmp_path)).shape == (NUM_TRAIN + NUM_TEST, 784)
    second = StrokeDigits(data_dir=str(tmp_path)).load()
    assert small == [NUM_TRAIN, NUM_TEST], "a second load must not draw"
    assert torch.equal(first.train, second.train) and torch.equal(first.test, second.test)


def test_the_cache_can_be_read_by_others(tmp_path: pathlib.Path) -> None:
    """A cache in a shared folder has the permissions that the user's umask gives to any file."""
    StrokeDigits(data_dir=str(tmp_path)).load()
    plain = tmp_path / "plain"
    plain.touch()
    assert cache_of(tmp_path).stat().st_mode == plain.stat().st_mode


def test_each_seed_has_its_own_images_and_cache(tmp_path: pathlib.Path, small: list[int]) -> None:
    zero, one = (StrokeDigits(data_dir=str(tmp_path), seed=seed).load() for seed in (0, 1))
    assert not torch.equal(zero.train, one.train)
    assert len(list((tmp_path / "stroke_digits").iterdir())) == 2
    assert torch.equal(StrokeDigits(data_dir=str(tmp_path), seed=1).load().train, one.train)
    assert len(small) == 4


def test_data_dir_comes_from_the_environment(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPGEN_DATA", str(tmp_path / "elsewhere"))
    StrokeDigits().load()
    assert cache_of(tmp_path / "elsewhere").is_file()


def damage(path: pathlib.Path, how: str) -> None:
    data = path.read_bytes()
    if how == "other shape":
        np.save(path, np.zeros((3, 784), dtype=np.uint8))
    elif how == "other type":
        np.save(path, np.zeros((NUM_TRAIN + NUM_TEST, 784), dtype=np.float32))
    elif how == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        changed = {
            "empty": b"",
            "text": b"not an array\n",
            "cut in the header": data[:50],
            "cut in the images": data[:-1],
            "longer": data + b"\0",
            "zip": b"PK\3\4" + data[4:],
            "shifted": data[:8] + bytes([data[8] - 1]) + data[9:],
            "unclosed header": data[:127] + b"{" + data[128:],
            "header of another type": data[:50] + b"b" + data[51:],
        }
        path.write_bytes(changed[how])


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "text",
        "cut in the header",
        "cut in the images",
        "longer",
        "zip",
        "shifted",
        "unclosed header",
        "header of another type",
        "other shape",
        "other type",
        "pickle",
    ],
)
def test_a_damaged_cache_is_drawn_anew_with_a_warning(tmp_path: pathlib.Path, small: list[int], how: str) -> None:
    dataset = StrokeDigits(data_dir=str(tmp_path))
    expected = dataset.load()
    whole = cache_of(tmp_path).read_bytes()
    damage(cache_of(tmp_path), how)
    with pytest.warns(UserWarning, match="is damaged; the digits are drawn anew"):
        found = dataset.load()
    assert torch.equal(found.train, expected.train) and torch.equal(found.test, expected.test)
    assert len(small) == 4
    assert cache_of(tmp_path).read_bytes() == whole, "the cache must be mended"


def test_without_a_cache_folder_the_digits_are_drawn(tmp_path: pathlib.Path) -> None:
    expected = StrokeDigits(data_dir=str(tmp_path / "good")).load()
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be cached in .*blocked.*; they are drawn at every start"):
        data = StrokeDigits(data_dir=str(blocked)).load()
    assert torch.equal(data.train, expected.train)


def test_a_failed_write_leaves_nothing_behind(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        StrokeDigits(data_dir=str(tmp_path)).load()
    assert list((tmp_path / "stroke_digits").iterdir()) == []


def test_protocols(tmp_path: pathlib.Path) -> None:
    dynamic, fixed, threshold = (
        StrokeDigits(data_dir=str(tmp_path), protocol=protocol, validation_size=5).load()
        for protocol in ("dynamic", "fixed", "threshold")
    )
    for data in (dynamic, fixed, threshold):
        assert (len(data.train), len(data.validation), len(data.test)) == (NUM_TRAIN - 5, 5, NUM_TEST)
        assert data.image_shape == (28, 28)
    assert len(dynamic.train.unique()) > 10
    assert fixed.train.unique().tolist() == threshold.train.unique().tolist() == [0, 255]
    assert torch.equal(threshold.train, 255 * (dynamic.train >= 128).to(torch.uint8))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"seed": -1}, ArgumentError, "StrokeDigits.seed must be an integer of at least 0, got -1"),
        ({"protocol": "larochelle"}, ArgumentError, "StrokeDigits.protocol must be one of dynamic, fixed, threshold"),
        ({"validation_size": 2.5}, ArgumentError, "StrokeDigits.validation_size must be an integer"),
        ({"binarisation_seed": True}, ArgumentError, "StrokeDigits.binarisation_seed must be an integer"),
        ({"data_dir": 7}, ArgumentError, "StrokeDigits.data_dir must be a path, got 7"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_arguments_outside_their_domain(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        StrokeDigits(**arguments)


def test_training_and_test_digits_are_drawn_apart(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of the one as of the other would be the same ones, were they of one stream."""
    for size in ("NUM_TRAIN", "NUM_TEST"):
        monkeypatch.setattr(stroke_digits, size, 12)
    data = StrokeDigits(data_dir=str(tmp_path), protocol="threshold").load()
    assert len(torch.cat([data.train, data.test]).unique(dim=0)) == 24
