"""MNIST row by row: the real files against torchvision, small files, and what does not fit together."""

import pathlib

import pytest
import torch
import torchvision.datasets

from popgen.datasets.binary_mnist import BinaryMNIST
from popgen.datasets.mnist_rows import MNISTRows
from popgen.errors import ArgumentError, DataError

NUM_TRAIN, NUM_TEST = 30, 8


def idx(array: torch.Tensor) -> bytes:
    """Returns a uint8 tensor in the IDX format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + bytes(array.flatten().tolist())


@pytest.fixture
def levels(tmp_path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Grey levels of both splits, `(count, 28, 28)`, whose files are in `tmp_path`; labels count from 0 to 9."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    levels = {
        name: torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
        for name, count in (("train", NUM_TRAIN), ("t10k", NUM_TEST))
    }
    for name, images in levels.items():
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx(torch.arange(len(images), dtype=torch.uint8) % 10))
    return levels


@pytest.mark.mnist
def test_real_mnist(mnist_dir: pathlib.Path) -> None:
    data = MNISTRows(str(mnist_dir), download=False).load()
    assert (len(data.train), len(data.test), data.window) == (60_000, 10_000, 28)
    assert data.train.labels["digit"][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    oracle = torchvision.datasets.MNIST(str(mnist_dir), train=False)
    batch = data.test.padded(torch.arange(10_000))
    assert batch.values.shape == (10_000, 28, 28) and batch.values.dtype == torch.float32
    torch.testing.assert_close(batch.values, oracle.data / 255.0, rtol=0, atol=0)
    assert torch.equal(batch.labels["digit"], oracle.targets)


def test_images_become_rows(tmp_path: pathlib.Path, levels: dict[str, torch.Tensor]) -> None:
    data = MNISTRows(str(tmp_path), download=False).load()
    assert data.classes == {"digit": tuple("0123456789")} and data.sample_rate is None and data.validation is None
    for split, name in ((data.train, "train"), (data.test, "t10k")):
        batch = split.padded(torch.arange(len(split)))
        torch.testing.assert_close(batch.values, levels[name] / 255.0, rtol=0, atol=0)
        assert batch.labels["digit"].tolist() == [index % 10 for index in range(len(levels[name]))]
        assert batch.lengths.tolist() == [28] * len(levels[name])


def test_training_batches_are_whole_images(tmp_path: pathlib.Path, levels: dict[str, torch.Tensor]) -> None:
    batches = MNISTRows(str(tmp_path)).load().batches(30, seed=0)
    for step in range(3):
        batch = batches.draw(step, torch.Generator())
        expected = levels["train"][batches.indices(step)] / 255.0
        torch.testing.assert_close(batch.values, expected, rtol=0, atol=0)


def test_held_out_images(tmp_path: pathlib.Path, levels: dict[str, torch.Tensor]) -> None:
    data = MNISTRows(str(tmp_path), validation_size=10).load()
    train, validation = (split.padded(torch.arange(len(split))) for split in (data.train, data.split("validation")))
    assert (len(train.values), len(validation.values), len(data.test)) == (20, 10, NUM_TEST)
    found = {
        tuple(image.flatten().tolist()): label
        for batch in (train, validation)
        for image, label in zip(batch.values, batch.labels["digit"].tolist(), strict=True)
    }
    expected = {tuple((image / 255.0).flatten().tolist()): index % 10 for index, image in enumerate(levels["train"])}
    assert found == expected, "no image is lost or changes its label"
    again = MNISTRows(str(tmp_path), validation_size=10).load()
    assert torch.equal(again.train.values, data.train.values)
    same = BinaryMNIST(str(tmp_path), protocol="threshold", validation_size=10).load().split("validation")
    assert torch.equal(same, 255 * (validation.values.flatten(1) >= 128 / 255).to(torch.uint8)), "as BinaryMNIST's"
    with pytest.raises(DataError, match="validation_size must be below the 30 training images, got 30"):
        MNISTRows(str(tmp_path), validation_size=30).load()


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.zeros(NUM_TRAIN - 1, dtype=torch.uint8), "got 30 images and 29 labels up to 0; delete them"),
        (torch.full((NUM_TRAIN,), 10, dtype=torch.uint8), "got 30 images and 30 labels up to 10"),
        (torch.zeros(0, dtype=torch.uint8), "got 30 images and 0 labels up to None"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: pathlib.Path, levels, labels: torch.Tensor, message: str) -> None:
    (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DataError, match=message):
        MNISTRows(str(tmp_path)).load()


def test_missing_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPGEN_DATA", str(tmp_path))
    with pytest.raises(DataError, match="downloading is off.*MNISTRows.data_dir") as caught:
        MNISTRows(download=False).load()
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"data_dir": 3}, ArgumentError, "MNISTRows.data_dir must be a path, got 3"),
        ({"validation_size": -1}, ArgumentError, "MNISTRows.validation_size must be an integer of at least 0, got -1"),
    ],
)
def test_arguments_outside_their_domain(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        MNISTRows(**arguments)
