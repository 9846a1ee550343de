"""Images in memory, their binarisation, and the batches of a run.

A dataset is a description, cheap to build and free of data; its `load()` returns an `ImageData`. Grey levels stay uint8
on the training device, and a batch is gathered and binarised there in a handful of tensor operations.
"""

import dataclasses
import functools
import math
from typing import Any

import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor

from popgen.datasets.data import ShuffledBatches
from popgen.errors import DataError, check_choice, check_integer
from popgen.streams import make_generator

PROTOCOLS = ("dynamic", "fixed", "threshold")


@dataclasses.dataclass(frozen=True)
class ImageData:
    """The images of a dataset, flattened.

    uint8 images are grey levels: every visit draws x ~ Bernoulli(level / 255) afresh, and levels of 0 and 255, which is
    how the fixed protocols are stored, come out of that draw unchanged. Floating-point images are used as they are.

    Attributes:
        train: shape `(count, size)`.
        test: shape `(count, size)`; drawn once, so uint8 holds only 0 and 255.
        validation: like `test`, or None.
        image_shape: height and width.
        protocol: how the images were binarised; recorded with every result.
        binarisation_seed: of the draws made once, recorded too; None where there were none.

    Raises:
        DataError: if a split is empty, its shape does not fit `image_shape`, or it cannot be images: not a tensor, or
            uint8 with no level above 1, or with others than 0 and 255 where it is drawn once.

    Example:
        >>> grey = torch.full((10, 784), 128, dtype=torch.uint8)
        >>> data = ImageData(train=grey, test=binarise_once(grey, seed=0), image_shape=(28, 28), protocol="dynamic")
        >>> data.to(torch.device("cpu")).train.dtype
        torch.uint8
    """

    train: Tensor
    test: Tensor
    image_shape: tuple[int, int]
    protocol: str
    validation: Tensor | None = None
    binarisation_seed: int | None = None

    def __post_init__(self) -> None:
        if len(self.image_shape) != 2:
            raise DataError(
                f"image_shape must be the height and the width of grey images, got {tuple(self.image_shape)}"
            )
        size = self.image_shape[0] * self.image_shape[1]
        for name in ("train", "test", "validation"):
            split = getattr(self, name)
            if split is None and name == "validation":
                continue
            _check_levels(name, split)
            if split.ndim != 2 or len(split) == 0 or split.shape[1] != size:
                raise DataError(
                    f"the {name} images must have shape (count, {size}) for images of {self.image_shape}, "
                    f"got {tuple(split.shape)}"
                )
            if split.dtype != torch.uint8 and not split.is_floating_point():
                raise DataError(f"the {name} images must be uint8 grey levels or floating point, got {split.dtype}")
            if split.dtype == torch.uint8 and name != "train" and not ((split == 0) | (split == 255)).all():
                raise DataError(
                    f"the {name} images are drawn once, so their levels must be 0 and 255, and others are there: see "
                    "prepare_images, or use floating point for values that are no probabilities"
                )

    def split(self, name: str) -> Tensor:
        """Returns the split of that name.

        Raises:
            DataError: if there is none.
        """
        images = getattr(self, name)
        if images is None:
            raise DataError(f"the dataset has no {name} split: set its validation_size to hold out training images")
        return images

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "ImageData":
        """Returns the same data on a device; floating-point images as `dtype` if it is given."""
        moved = {}
        for name in ("train", "test", "validation"):
            split = getattr(self, name)
            if split is not None:
                split = split.to(device, dtype if split.is_floating_point() else None)
            moved[name] = split
        return dataclasses.replace(self, **moved)

    def batches(self, batch_size: int, seed: int) -> "TrainBatches":
        """Returns the training batches.

        Raises:
            ArgumentError: if a batch is larger than the data.
        """
        return TrainBatches(self._train_thresholds, batch_size, seed)

    @functools.cached_property
    def _train_thresholds(self) -> Tensor:
        """The thresholds of grey training images, which all batches share; floating-point images as they are."""
        return bernoulli_thresholds(self.train) if self.train.dtype == torch.uint8 else self.train

    def facts(self) -> dict[str, Any]:
        """Returns the binarisation protocol, and its seed if there is one."""
        seed = {} if self.binarisation_seed is None else {"binarisation_seed": self.binarisation_seed}
        return {"binarisation_protocol": self.protocol, **seed}


def _check_levels(name: str, images: Any) -> None:
    """Raises DataError if images are not a tensor, or uint8 that can hardly be grey levels."""
    if not isinstance(images, Tensor):
        raise DataError(
            f"the {name} images must be a torch.Tensor, got a {type(images).__name__}: torch.from_numpy makes one of "
            "an array"
        )
    if images.dtype == torch.uint8 and images.numel() and images.max() == 1:
        raise DataError(
            f"the {name} images have no level above 1, and grey levels go from 0 to 255: multiply binary images by 255"
        )


def bernoulli_thresholds(levels: UInt8[Tensor, "*shape"]) -> Int16[Tensor, "*shape"]:
    """Returns for each grey level the 16-bit integer that uniform ones fall below with probability level / 255.

    The probability is exact for levels 0 and 255 (`binarise` sees to the latter) and less than level / 255 by at most
    2^-16 for others.

    Example:
        >>> bernoulli_thresholds(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([-32768, -19661,  32767], dtype=torch.int16)
    """
    return (levels.to(torch.int32) * 257 - 32768).to(torch.int16)  # 257 · 255 + 1 = 2^16


def binarise(thresholds: Int16[Tensor, "*shape"], bits: Int16[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns one Bernoulli(level / 255) draw for each grey level, as 0.0 or 1.0.

    Args:
        thresholds: `bernoulli_thresholds(levels)`.
        bits: uniform over all 16-bit integers, the same shape, from `draw_bits`; donated, and clamped in place.

    Example:
        >>> levels = torch.tensor([0, 51, 255], dtype=torch.uint8)
        >>> binarise(bernoulli_thresholds(levels), bits=torch.tensor([-32768, -19662, 32767], dtype=torch.int16))
        tensor([0., 1., 1.])
    """
    drawn = torch.empty(thresholds.shape, device=thresholds.device)
    return torch.lt(bits.clamp_(max=32766), thresholds, out=drawn)


def draw_bits(shape: tuple[int, ...], generator: torch.Generator) -> Int16[Tensor, "*shape"]:
    """Returns uniform 16-bit integers on the generator's device, four from each draw of 64 bits.

    Example:
        >>> draw_bits((2, 3), torch.Generator()).shape
        torch.Size([2, 3])
    """
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count].view(shape)


def binarise_once(levels: UInt8[Tensor, "count size"], seed: int) -> UInt8[Tensor, "count size"]:
    """Returns one seeded draw of the images, stored as 0 and 255; the same on every device.

    Example:
        >>> levels = torch.full((2, 784), 128, dtype=torch.uint8)
        >>> torch.equal(binarise_once(levels, seed=0), binarise_once(levels, seed=0))
        True
    """
    generator = make_generator("cpu", seed, "binarisation")
    return 255 * (levels.cpu() > torch.rand(levels.shape, generator=generator) * 255.0).to(torch.uint8)


def as_values(images: Tensor, dtype: torch.dtype | None = None) -> Float[Tensor, "count size"]:
    """Returns images as values in [0, 1]: uint8 levels divided by 255, floating point as it is.

    Args:
        images: uint8 or floating point.
        dtype: of the values; default that of floating-point images, PyTorch's default for others.

    Raises:
        DataError: if levels go up to 1, as those of binary images do that are no grey levels.

    Example:
        >>> as_values(torch.tensor([[0, 255]], dtype=torch.uint8))
        tensor([[0., 1.]])
    """
    if images.dtype == torch.uint8:
        _check_levels("given", images)
        return images.to(dtype or torch.get_default_dtype()) / 255.0
    return images.to(dtype or images.dtype)


def fix_binarisation(levels: UInt8[Tensor, "count size"], protocol: str, seed: int) -> UInt8[Tensor, "count size"]:
    """Returns the one binarisation of images that a protocol keeps, stored as 0 and 255.

    "threshold" makes a pixel one where its level is 128 or more; "dynamic" and "fixed" draw once with the seed.

    Example:
        >>> fix_binarisation(torch.full((1, 4), 200, dtype=torch.uint8), "threshold", seed=0)
        tensor([[255, 255, 255, 255]], dtype=torch.uint8)
    """
    return 255 * (levels >= 128).to(torch.uint8) if protocol == "threshold" else binarise_once(levels, seed)


def prepare_images(
    train: UInt8[Tensor, "train size"],
    test: UInt8[Tensor, "test size"],
    image_shape: tuple[int, int],
    protocol: str,
    binarisation_seed: int,
    validation_size: int = 0,
) -> ImageData:
    """Returns grey levels as a protocol wants them, with a validation split if asked for.

    Test and validation images are binarised once, whatever the protocol. Training images stay grey under "dynamic",
    and are binarised once under "fixed" and "threshold". Each split has its own seed.

    Args:
        train: grey levels, shape `(count, size)`.
        test: grey levels, shape `(count, size)`.
        image_shape: height and width.
        protocol: one of `PROTOCOLS`.
        binarisation_seed: of the draws made once, and of the choice of the validation images.
        validation_size: training images to hold out.

    Raises:
        ArgumentError: if the protocol is none of these.
        DataError: if they are no grey levels, or nothing would be left to train on.

    Example:
        >>> grey = torch.full((10, 784), 128, dtype=torch.uint8)
        >>> data = prepare_images(grey, grey, (28, 28), "dynamic", binarisation_seed=0, validation_size=3)
        >>> len(data.train), len(data.validation), sorted(set(data.test.flatten().tolist()))
        (7, 3, [0, 255])
    """
    check_choice("protocol", protocol, PROTOCOLS)
    for name, images in (("train", train), ("test", test)):
        _check_levels(name, images)
        if images.dtype != torch.uint8:
            raise DataError(
                f"the {name} images must be uint8 grey levels to be binarised, got {images.dtype}: an ImageData takes "
                "values in [0, 1] as they are"
            )
    train, validation = hold_out(train, validation_size, binarisation_seed)
    if protocol != "dynamic":
        train = fix_binarisation(train, protocol, binarisation_seed + 1)
    if validation is not None:
        validation = fix_binarisation(validation, protocol, binarisation_seed + 2)
    test = fix_binarisation(test, protocol, binarisation_seed)
    return ImageData(train, test, image_shape, protocol, validation, binarisation_seed)


def hold_out(train: Tensor, validation_size: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Returns the training images without, and with only, `validation_size` random ones.

    Raises:
        DataError: if nothing would be left to train on.
        ArgumentError: if `validation_size` is negative.

    Example:
        >>> train, validation = hold_out(torch.zeros(10, 4, dtype=torch.uint8), validation_size=3, seed=0)
        >>> len(train), len(validation)
        (7, 3)
    """
    if check_integer("validation_size", validation_size, minimum=0) == 0:
        return train, None
    if validation_size >= len(train):
        raise DataError(f"validation_size must be below the {len(train)} training images, got {validation_size}")
    order = torch.randperm(len(train), generator=make_generator("cpu", seed, "validation split"))
    return train[order[validation_size:]], train[order[:validation_size]]


class TrainBatches(ShuffledBatches):
    """The training batches of a run, images in random order.

    Args:
        images: uint8 levels, their `bernoulli_thresholds`, or floating point, shape `(count, size)`.
        batch_size: images in a batch.
        seed: of the order.

    Raises:
        ArgumentError: if a batch is larger than the data.

    Example:
        >>> batches = TrainBatches(torch.zeros(10, 784, dtype=torch.uint8), batch_size=4, seed=0)
        >>> batches.draw(step=3, generator=torch.Generator()).shape
        torch.Size([4, 784])
    """

    def __init__(self, images: Tensor, batch_size: int, seed: int) -> None:
        super().__init__(len(images), batch_size, seed, images.device, "images")
        self.images = bernoulli_thresholds(images) if images.dtype == torch.uint8 else images

    def gather(self, indices: Tensor, generator: torch.Generator) -> Float[Tensor, "batch size"]:
        """Returns the images at some indices; grey levels are binarised with noise from `generator`."""
        images = self.images.index_select(0, indices)
        return images if images.is_floating_point() else binarise(images, draw_bits(images.shape, generator))
