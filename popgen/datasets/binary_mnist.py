"""Binarised MNIST, under the binarisation protocols that the literature uses."""

import dataclasses
import hashlib
import http.client
import math
import pathlib
import socket
import sys

import numpy as np
import torch
from torch import Tensor

from popgen.datasets.data import DOWNLOAD_TIMEOUT_SECONDS, data_folder
from popgen.datasets.images import PROTOCOLS, ImageData, prepare_images
from popgen.errors import DataError, check_choice, check_integer, check_path, reason_of
from popgen.files import new_folder

IMAGE_SHAPE = (28, 28)
PUBLISHED_SHA256 = {  # of the decompressed files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MNIST_SPLITS = ("train", "t10k")
LAROCHELLE_FILES = {"train": (50_000, "train"), "validation": (10_000, "valid"), "test": (10_000, "test")}


@dataclasses.dataclass(frozen=True)
class BinaryMNIST:
    """MNIST with binary pixels: 60,000 training and 10,000 test images of 28 × 28.

    Likelihoods under different protocols are not comparable; the protocol is recorded with every result:
        - "dynamic": a fresh draw x ~ Bernoulli(level / 255) at every visit of a training image; the test images
          are drawn once with `binarisation_seed`.
        - "fixed": one seeded draw of both.
        - "threshold": a pixel is one where its level is 128 or more.
        - "larochelle": the published draw of Larochelle and Murray (2011), read from its three files
          `binarized_mnist_{train,valid,test}.amat` in `data_dir`, with their split of 50,000 / 10,000 / 10,000.

    Args:
        data_dir: holds, or receives, `MNIST/raw/`; default `$POPGEN_DATA`, or `data`.
        protocol: one of the four above.
        binarisation_seed: of the draws that are made once.
        validation_size: training images to hold out; "larochelle" has its own split.
        download: fetch MNIST into `data_dir` if it is not there.

    Raises:
        ArgumentError: if an argument is outside its domain.
        DataError: by `load()`, if files are missing or damaged.

    Example:
        >>> BinaryMNIST(protocol="dynamic", validation_size=5_000).protocol
        'dynamic'
    """

    data_dir: str | None = None
    protocol: str = "dynamic"
    binarisation_seed: int = 0
    validation_size: int = 0
    download: bool = True

    def __post_init__(self) -> None:
        if self.data_dir is not None:
            check_path("BinaryMNIST.data_dir", self.data_dir)
        check_choice("BinaryMNIST.protocol", self.protocol, (*PROTOCOLS, "larochelle"))
        check_integer("BinaryMNIST.binarisation_seed", self.binarisation_seed, minimum=0)
        check_integer("BinaryMNIST.validation_size", self.validation_size, minimum=0)

    def load(self) -> ImageData:
        """Returns the images under the protocol.

        Raises:
            DataError: if files are missing and cannot be downloaded, or are damaged.
        """
        data_dir = data_folder(self.data_dir)
        if self.protocol == "larochelle":
            splits = {name: _read_amat(data_dir, *file) for name, file in LAROCHELLE_FILES.items()}
            return ImageData(image_shape=IMAGE_SHAPE, protocol=self.protocol, binarisation_seed=None, **splits)
        train, test = read_mnist_images(data_dir, self.download, "BinaryMNIST")
        return prepare_images(train, test, IMAGE_SHAPE, self.protocol, self.binarisation_seed, self.validation_size)


def read_mnist_images(data_dir: pathlib.Path, download: bool, dataset: str) -> tuple[Tensor, Tensor]:
    """Returns the grey levels of both splits, uint8, `(count, 784)`, downloading MNIST first if it is not there.

    Args:
        data_dir: holds, or receives, `MNIST/raw/`.
        download: fetch MNIST if it is not there.
        dataset: the name of the class that reads, for its errors.

    Raises:
        DataError: if files are missing and cannot be downloaded, or are damaged.

    Example: `BinaryMNIST` and `popgen.datasets.mnist_rows.MNISTRows` call it.
    """
    _provide_mnist(data_dir, download, dataset)
    train, test = _read_splits(data_dir, "images-idx3", header_size=16)
    return train.view(-1, math.prod(IMAGE_SHAPE)), test.view(-1, math.prod(IMAGE_SHAPE))


def read_mnist_labels(data_dir: pathlib.Path, download: bool, dataset: str) -> tuple[Tensor, Tensor]:
    """Returns the digits of both splits, uint8, `(count,)`; as `read_mnist_images`.

    Example: `MNISTRows` calls it.
    """
    _provide_mnist(data_dir, download, dataset)
    return _read_splits(data_dir, "labels-idx1", header_size=8)


def _raw(data_dir: pathlib.Path) -> pathlib.Path:
    return data_dir / "MNIST" / "raw"


def _provide_mnist(data_dir: pathlib.Path, download: bool, dataset: str) -> None:
    """Sees to it that the four files are there and whole."""
    raw = _raw(data_dir)
    names = [f"{split}-{kind}-ubyte" for split in MNIST_SPLITS for kind in ("images-idx3", "labels-idx1")]
    if not all((raw / name).is_file() for name in names):
        if not download:
            raise DataError(_missing_message(raw, names, "downloading is off", dataset))
        _download(data_dir, names, dataset)
    for name in names:
        _check_idx(raw / name)


def _read_splits(data_dir: pathlib.Path, kind: str, header_size: int) -> tuple[Tensor, Tensor]:
    """Returns the values of both splits' files, and names those files that are not MNIST's: likelihoods of such images
    do not compare with published ones."""
    names = [f"{split}-{kind}-ubyte" for split in MNIST_SPLITS]
    read = {name: np.fromfile(_raw(data_dir) / name, dtype=np.uint8) for name in names}
    others = [
        name for name, content in read.items() if hashlib.sha256(content.data).hexdigest() != PUBLISHED_SHA256[name]
    ]
    if others:
        print(f"not the published MNIST: {', '.join(others)} in {_raw(data_dir)}", file=sys.stderr, flush=True)
    train, test = (torch.from_numpy(content[header_size:]) for content in read.values())
    return train, test


def _download(data_dir: pathlib.Path, names: list[str], dataset: str) -> None:
    from torchvision.datasets import MNIST  # takes a second to import, and only a download needs it

    raw = _raw(data_dir)
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        with new_folder(raw):
            MNIST(str(data_dir), train=True, download=True)
            if not all((raw / name).is_file() for name in names):
                raise RuntimeError("torchvision makes do with the older MNIST/processed that it found")
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = reason_of(error)
        raise DataError(_missing_message(raw, names, f"the download failed ({reason})", dataset)) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)


def _missing_message(raw: pathlib.Path, names: list[str], why: str, dataset: str) -> str:
    return (
        f"MNIST is not in {raw} and {why}. Put the four decompressed files {', '.join(names)} there, or set "
        f"{dataset}.data_dir (or $POPGEN_DATA) to a folder that holds MNIST/raw; or use the embedded dataset, which "
        "needs no network: --gin_file=configs/quickstart.gin"
    )


def _check_idx(path: pathlib.Path) -> None:
    """Compares a file's size with what its IDX header announces.

    Raises:
        DataError: if the header is not one of MNIST's, or the file is shorter or longer than it says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(16)
    dimensions = 3 if "images" in path.name else 1
    magic = bytes([0, 0, 8, dimensions])  # IDX: two zeros, 8 for unsigned bytes, the number of dimensions
    if len(header) < 4 + 4 * dimensions or header[:4] != magic:
        raise DataError(
            f"{path} is not an IDX file of MNIST (it begins {header[:4].hex()}); delete it to fetch it anew"
        )
    shape = [int.from_bytes(header[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    expected = 4 + 4 * dimensions + math.prod(shape)
    if size != expected or (dimensions == 3 and tuple(shape[1:]) != IMAGE_SHAPE):
        raise DataError(
            f"{path} is damaged: its header announces shape {tuple(shape)}, {expected:,} bytes in all, but the file "
            f"has {size:,}; delete it to fetch it anew"
        )


def _read_amat(data_dir: pathlib.Path, count: int, name: str) -> Tensor:
    """Returns the levels 0 and 255 of one of Larochelle's text files."""
    path = data_dir / f"binarized_mnist_{name}.amat"
    if not path.is_file():
        raise DataError(
            f"the protocol 'larochelle' needs {path}, which is not there; popgen does not download it or put another "
            "binarisation in its place. Put the three published binarized_mnist_*.amat files there, or choose the "
            "protocol 'fixed'"
        )
    text = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    digits = text[text > ord(" ")] - ord("0")
    if len(digits) != count * math.prod(IMAGE_SHAPE) or digits.max() > 1:
        raise DataError(
            f"{path} is damaged: it must hold {count:,} rows of 784 zeros and ones, got {len(digits):,} values"
        )
    return 255 * torch.from_numpy(digits).view(count, -1)
