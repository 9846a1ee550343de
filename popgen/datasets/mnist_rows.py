"""MNIST row by row: every image is a sequence of 28 steps."""

import dataclasses

import torch

from popgen.datasets.binary_mnist import IMAGE_SHAPE, read_mnist_images, read_mnist_labels
from popgen.datasets.data import data_folder
from popgen.datasets.images import hold_out
from popgen.datasets.sequences import SequenceData, Sequences
from popgen.errors import DataError, check_integer, check_path

DIGITS = tuple("0123456789")


@dataclasses.dataclass(frozen=True)
class MNISTRows:
    """MNIST as sequences of 28 rows, from the top, of 28 grey values in [0, 1]: 60,000 to train on, 10,000 to test.

    The label is `digit`. Grey levels are not binarised.

    Args:
        data_dir: holds, or receives, `MNIST/raw/`; default `$POPGEN_DATA`, or `data`.
        validation_size: training images to hold out, the same ones every time.
        download: fetch MNIST into `data_dir` if it is not there.

    Raises:
        ArgumentError: if an argument is outside its domain.
        DataError: by `load()`, if files are missing or damaged.

    Example:
        >>> MNISTRows(validation_size=5_000).validation_size
        5000
    """

    data_dir: str | None = None
    validation_size: int = 0
    download: bool = True

    def __post_init__(self) -> None:
        if self.data_dir is not None:
            check_path("MNISTRows.data_dir", self.data_dir)
        check_integer("MNISTRows.validation_size", self.validation_size, minimum=0)

    def load(self) -> SequenceData:
        """Returns the images as sequences of rows.

        Raises:
            DataError: if files are missing and cannot be downloaded, or are damaged.
        """
        data_dir = data_folder(self.data_dir)
        splits = []
        images = read_mnist_images(data_dir, self.download, "MNISTRows")
        for levels, digits in zip(images, read_mnist_labels(data_dir, self.download, "MNISTRows"), strict=True):
            if len(levels) != len(digits) or len(digits) == 0 or int(digits.max()) >= len(DIGITS):
                raise DataError(
                    f"the MNIST files in {data_dir} must hold a label from 0 to 9 for each image, got {len(levels):,} "
                    f"images and {len(digits):,} labels up to {max(digits.tolist(), default=None)}; delete them to "
                    "fetch them anew"
                )
            lengths = torch.full((len(levels),), IMAGE_SHAPE[0])
            splits.append(Sequences(levels.view(-1, IMAGE_SHAPE[1]), lengths, {"digit": digits.long()}))
        train, test = splits
        kept, held_out = hold_out(torch.arange(len(train)), self.validation_size, seed=0)
        return SequenceData(
            train=train if held_out is None else train.select(kept),
            test=test,
            validation=None if held_out is None else train.select(held_out),
            window=IMAGE_SHAPE[0],
            classes={"digit": DIGITS},
        )
