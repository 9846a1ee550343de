"""An embedded dataset that needs no network: digits drawn from stroke skeletons."""

import contextlib
import dataclasses
import io
import pathlib
import warnings

import numpy as np
import torch
from torch import Tensor

from popgen.datasets.binary_mnist import IMAGE_SHAPE
from popgen.datasets.data import data_folder
from popgen.datasets.images import PROTOCOLS, ImageData, prepare_images
from popgen.datasets.stroke_digits_renderer import RENDERER_VERSION, draw_digits
from popgen.errors import RunDirectoryError, check_choice, check_integer, check_path
from popgen.files import write_whole

NUM_TRAIN, NUM_TEST = 60_000, 10_000


@dataclasses.dataclass(frozen=True)
class StrokeDigits:
    """Hand-drawn-looking digits, 28 × 28, rendered procedurally: 60,000 training and 10,000 test images.

    They stand in for MNIST where there is no network. They are not MNIST, and likelihoods on them say nothing
    about it. The images are a function of `seed` alone and are cached in `data_dir/stroke_digits`.

    Args:
        data_dir: where the cache lies; default `$POPGEN_DATA`, or `data`.
        seed: of the drawing.
        protocol: "dynamic", "fixed" or "threshold", as in `popgen.datasets.binary_mnist.BinaryMNIST`.
        binarisation_seed: of the draws that are made once.
        validation_size: training images to hold out.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> StrokeDigits(seed=1).protocol
        'dynamic'
    """

    data_dir: str | None = None
    seed: int = 0
    protocol: str = "dynamic"
    binarisation_seed: int = 0
    validation_size: int = 0

    def __post_init__(self) -> None:
        if self.data_dir is not None:
            check_path("StrokeDigits.data_dir", self.data_dir)
        check_integer("StrokeDigits.seed", self.seed, minimum=0)
        check_choice("StrokeDigits.protocol", self.protocol, PROTOCOLS)
        check_integer("StrokeDigits.binarisation_seed", self.binarisation_seed, minimum=0)
        check_integer("StrokeDigits.validation_size", self.validation_size, minimum=0)

    def load(self) -> ImageData:
        """Returns the images under the protocol, drawn now or read from the cache."""
        levels = self._grey_levels()
        return prepare_images(
            levels[:NUM_TRAIN],
            levels[NUM_TRAIN:],
            IMAGE_SHAPE,
            self.protocol,
            self.binarisation_seed,
            self.validation_size,
        )

    def _grey_levels(self) -> Tensor:
        """Returns all images, shape `(70000, 784)`; a cache that cannot be read is drawn anew."""
        folder = data_folder(self.data_dir) / "stroke_digits"
        path = folder / f"version{RENDERER_VERSION}_seed{self.seed}.npy"
        shape = (NUM_TRAIN + NUM_TEST, IMAGE_SHAPE[0] * IMAGE_SHAPE[1])
        if path.is_file():
            # numpy raises exceptions of many types for a damaged header, tokenize.TokenError and TypeError among them.
            with contextlib.suppress(Exception), path.open("rb") as file:
                cached = np.lib.format.read_array(file, allow_pickle=False)
                if cached.shape == shape and cached.dtype == np.uint8 and not file.read(1):
                    return torch.from_numpy(cached)
            warnings.warn(f"the cache {path} is damaged; the digits are drawn anew", stacklevel=2)
        parts = (draw_digits(NUM_TRAIN, self.seed, "train"), draw_digits(NUM_TEST, self.seed, "test"))
        levels = torch.cat([images.flatten(1) for images, _ in parts])
        _write_cache(path, levels.numpy())
        return levels


def _write_cache(path: pathlib.Path, levels: np.ndarray) -> None:
    """Writes the cache under another name first, so that no reader meets half of it."""
    content = io.BytesIO()
    np.save(content, levels)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getbuffer())
    except (OSError, RunDirectoryError) as error:
        warnings.warn(
            f"the digits could not be cached in {path.parent} ({error}); they are drawn at every start",
            stacklevel=2,
        )
