"""A procedural renderer of digits that look handwritten, in MNIST's format: white strokes on black, 28 x 28.

No two images are alike. Each is drawn in four steps:

1. Choose a skeleton of the digit (a seven with or without a bar, a two with or without a loop, ...): a few
   points on the pen's path, which are jittered for every image.
2. Join the points by a natural cubic spline. A spline is linear in its points, so each skeleton has one
   precomputed basis, and a path is a matrix product. The pen's pressure is a third coordinate of the points.
3. Bend the path by a smooth wave, then stretch, slant and rotate it. Fit it to the image as MNIST does: the
   ink fills a square of 20 pixels, and its centre of mass lies in the middle of the image.
4. Let every sample of the path leave a Gaussian spot. The logarithm of the spots' sum gives a soft distance
   to the path: pixels nearer than half the pen's width are white, and the edge fades over one pixel.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from popgen.errors import ArgumentError, check_integer
from popgen.streams import make_generator

RENDERER_VERSION = 1
"""Increase it whenever the same arguments give other images: caches of the images are keyed by it."""

IMAGE_SIZE = 28
NUM_CLASSES = 10

# For each digit: how often out of ten, and the pen's path. "x,y" is a point in a box 20 high, x to the right
# and y down; "!" after a point makes it a corner; "|" lifts the pen.
SKELETONS = (
    (  # 0
        (4, "8,0 2,4 0,11 5,20 12,17 14,8 7,0 4,2"),
        (3, "8,0 3,5 2,12 6,20 11,16 12,8 8,0"),
        (3, "10,2 5,0 0,8 3,18 9,20 14,12 12,3 5,2"),
    ),
    (  # 1
        (5, "7,0 7,20"),
        (3, "7,0 7,10 7,20"),
        (1, "5,3 8,0! 8,20"),
        (1, "4,4 8,0! 8,20 | 3,20 13,20"),
    ),
    (  # 2
        (3, "1,4 6,0 12,3 10,10 1,19! 7,19 14,19"),
        (3, "2,4 7,0 12,4 9,12 3,19 1,16 5,15 9,18 15,19"),
        (2, "1,4 5,0 12,2 12,8 6,15 0,20! 5,18 10,20 15,18"),
        (2, "3,6 3,2 8,0 12,4 9,12 2,20! 14,20"),
    ),
    (  # 3
        (5, "1,2 7,0 12,4 6,9! 13,12 11,18 5,20 0,17"),
        (3, "1,2 8,0 11,4 7,9 5,10 8,9 13,14 8,20 0,18"),
        (2, "1,1 12,1! 6,8! 13,12 10,19 4,20 0,18"),
    ),
    (  # 4
        (4, "3,1 1,11! 7,12 14,10 | 12,0 11,10 10,20"),
        (4, "1,1 1,8 4,11 12,10 | 12,1 12,10 11,20"),
        (2, "10,20 11,0! 0,13! 15,13"),
    ),
    (  # 5
        (3, "13,0 4,0! 3,8! 9,7 13,13 9,19 0,19"),
        (4, "4,1 3,8! 9,7 13,13 8,20 1,18 | 4,1 14,0"),
        (3, "13,1 6,0 3,4 5,8 11,11 12,16 7,20 0,18"),
    ),
    (  # 6
        (4, "8,0 3,7 1,14 5,20 11,17 10,12 5,11 1,15"),
        (4, "6,0 2,8 2,16 6,20 11,17 9,12 5,13 2,17"),
        (2, "9,0 4,5 1,12 3,19 9,20 13,15 9,11 4,13 1,16"),
    ),
    (  # 7
        (4, "0,2 6,1 13,0! 10,9 7,20"),
        (2, "0,5 1,1! 13,1! 10,10 8,20"),
        (2, "0,2 6,1 13,0! 10,9 7,20 | 3,11 12,10"),
        (2, "0,4 5,0 12,1 11,8 8,20"),
    ),
    (  # 8
        (5, "12,3 7,0 2,3 4,8 11,13 11,18 6,20 1,17 3,12 10,7 12,2"),
        (4, "13,1 7,0 2,4 7,9 12,15 7,20 1,16 6,10 12,5 11,1"),
        (1, "7,9 2,5 6,0 11,4 7,9 | 7,9 1,14 6,20 12,15 7,9"),
    ),
    (  # 9
        (4, "12,4 7,0 1,5 4,10 10,8 12,2! 11,11 10,20"),
        (3, "12,4 7,0 2,4 4,10 10,8 12,2! 12,12 9,19 3,19"),
        (3, "11,3 6,1 2,5 5,9 11,4 10,11 6,20"),
    ),
)

# The handwriting. Lengths are in pixels, angles in radians; what is named "jitter" is a standard deviation.
POINT_JITTER = (0.65, 0.65, 0.28)  # x, y, log pressure of the skeleton's points
TREMOR_JITTER = (0.3, 0.3, 0.35)  # the same for every sample of the path
BEND_JITTER, BEND_FREQUENCY = 0.9, 0.15  # pixels, radians per pixel
MEAN_SLANT, SLANT_JITTER = 0.2, 0.2
ROTATION_JITTER = 0.08
LOG_ASPECT_JITTER = 0.2
HALF_WIDTH, LOG_WIDTH_JITTER, HALF_WIDTH_RANGE = 1.24, 0.25, (0.95, 2.1)
INK_SIZE = 19.6  # the tremor adds the rest of MNIST's 20

SPOT_STD = 0.8  # wide enough for spots a pixel apart to melt into a stroke, narrow enough for small loops
PATH_SAMPLES = 72
MAX_POINTS = 13
CHUNK_SIZE = 1000  # images; bounds the working memory to about 100 MB

# Normals per image: points, samples and 14 for the style, rounded up to a multiple of 16. Torch draws normals
# in blocks of 16, so any other number would let the images depend on CHUNK_SIZE.
NOISE_DIM = math.ceil((3 * MAX_POINTS + 3 * PATH_SAMPLES + 14) / 16) * 16


class SkeletonTable(NamedTuple):
    """All skeletons, ready to be drawn.

    Attributes:
        points: x, y and log pressure of the points, padded by zeros, `(num_skeletons, MAX_POINTS, 3)`.
        basis: takes the points to the samples of the path, `(num_skeletons, PATH_SAMPLES, MAX_POINTS)`.
        choices: ten equally likely skeletons of every digit, `(NUM_CLASSES, 10)`.
    """

    points: Tensor
    basis: Tensor
    choices: Tensor


def draw_digits(num_images: int, seed: int, stream: str) -> tuple[Tensor, Tensor]:
    """Returns images of hand-drawn digits and their labels, the same ones for the same arguments.

    The classes are balanced (their counts differ by one at most) and in random order. No global random state
    is read or changed. Neither the number of threads nor `CHUNK_SIZE` matters; another version of torch or
    another processor may round a few grey levels differently.

    Args:
        num_images: how many, at least 1.
        seed: chooses the images, at least 0.
        stream: names an independent set of images under the same seed, such as "train" or "test".

    Returns:
        images: uint8, `(num_images, 28, 28)`, 0 for paper and 255 for ink.
        labels: uint8, `(num_images,)`, the digits 0 to 9.

    Raises:
        ArgumentError: if `num_images` or `seed` is too small or `stream` is empty.

    Example:
        >>> images, labels = draw_digits(20, seed=0, stream="train")
        >>> images.shape, images.dtype, labels.bincount().tolist()
        (torch.Size([20, 28, 28]), torch.uint8, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    check_integer("num_images", num_images, minimum=1)
    check_integer("seed", seed, minimum=0)
    if not stream:
        raise ArgumentError(f"stream must not be empty, got {stream!r}")
    with torch.device("cpu"):  # whatever the caller's default device: a CPU generator draws CPU tensors only
        generator = make_generator("cpu", seed, stream)
        labels = torch.randperm(num_images, generator=generator) % NUM_CLASSES
        table = _skeleton_table()
        skeletons = table.choices[labels, torch.randint(10, (num_images,), generator=generator)]
        images = torch.empty(num_images, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        for index, out in zip(skeletons.split(CHUNK_SIZE), images.split(CHUNK_SIZE), strict=True):
            noise = torch.randn(len(index), NOISE_DIM, generator=generator, dtype=torch.float32)
            out.copy_(_paint(*_trace(table.points[index], table.basis[index], noise)))
    return images, labels.to(torch.uint8)


def _trace(points: Tensor, basis: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns n paths in pixels `(n, 2, samples)`, their ink `(n, samples)` and half widths `(n, 1)`."""
    sizes = [3 * MAX_POINTS, 3 * PATH_SAMPLES, 4, 2, 4, 2, 2]
    jitter, tremor, style, offset, wave, phase, bend = noise[:, : sum(sizes)].split(sizes, dim=1)
    slant, rotation, log_aspect, log_width = style[:, :, None].unbind(1)

    points = points + jitter.view_as(points) * noise.new_tensor(POINT_JITTER)
    path = basis @ points
    xy, log_pressure = path[..., :2], path[..., 2]

    angle = BEND_FREQUENCY * xy @ wave.view(-1, 2, 2) + math.pi * phase[:, None]
    x, y = (xy + BEND_JITTER * bend[:, None] * angle.sin()).unbind(2)
    x = x * (LOG_ASPECT_JITTER * log_aspect).exp() - (MEAN_SLANT + SLANT_JITTER * slant) * y
    cos, sin = (ROTATION_JITTER * rotation).cos(), (ROTATION_JITTER * rotation).sin()
    xy = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=1)

    half_width = (HALF_WIDTH * (LOG_WIDTH_JITTER * log_width).exp()).clamp(*HALF_WIDTH_RANGE)
    extent = (xy.amax(2) - xy.amin(2)).amax(1, keepdim=True)
    xy = xy * ((INK_SIZE - 2 * half_width) / extent)[:, None]

    # A sample stands for the shorter of the steps before and after it, which is never a pen lift.
    step = xy.diff(dim=2).norm(dim=1)
    step = torch.minimum(torch.cat([step[:, :1], step], dim=1), torch.cat([step, step[:, -1:]], dim=1))
    # The tremor joins only now, so that it neither lengthens the steps nor changes the extent.
    tremor = tremor.view_as(path) * noise.new_tensor(TREMOR_JITTER)
    ink = step * (log_pressure + tremor[..., 2]).exp()
    centre_of_mass = (xy * ink[:, None]).sum(2) / ink.sum(1, keepdim=True)
    offset = torch.special.ndtr(offset) - 0.5  # uniform: MNIST is centred to the nearest pixel
    xy = xy + (IMAGE_SIZE / 2 + offset - centre_of_mass)[:, :, None] + tremor[..., :2].mT
    return xy, ink, half_width


def _paint(xy: Tensor, ink: Tensor, half_width: Tensor) -> Tensor:
    """Returns the images `(n, 28, 28)`, uint8, of paths as `_trace` returns them.

    Where `ink` is the arc length, the spots of a straight stroke sum to exp(-distance^2 / (2 SPOT_STD^2)),
    which is solved for the distance. More ink, from pressure or where strokes meet, makes the stroke thicker.
    """
    pixels = torch.arange(IMAGE_SIZE)
    exponent = (xy[..., None] - pixels).square() * (-0.5 / SPOT_STD**2)
    # The floor keeps products of two spots normal: subnormal numbers are slow, and zero has no logarithm.
    spot_x, spot_y = exponent.clamp_min(-40).exp().unbind(1)
    spot_y = spot_y * (ink / (math.sqrt(2 * math.pi) * SPOT_STD))[..., None]
    spots = spot_y.transpose(1, 2) @ spot_x
    distance = SPOT_STD * (-2 * spots.clamp_max(1).log()).sqrt()
    grey = (half_width[..., None] - distance + 0.5).clamp(0, 1)
    return (255 * grey).round().to(torch.uint8)


def _skeleton_table() -> SkeletonTable:
    """Returns `SKELETONS` as tensors."""
    points: list[Tensor] = []
    bases: list[Tensor] = []
    choices: list[list[int]] = []
    for variants in SKELETONS:
        choices.append([])
        for share, path in variants:
            choices[-1] += [len(points)] * share
            skeleton_points, basis = _skeleton(path)
            points.append(skeleton_points)
            bases.append(basis)
    return SkeletonTable(torch.stack(points), torch.stack(bases), torch.tensor(choices))


def _skeleton(path: str) -> tuple[Tensor, Tensor]:
    """Returns one skeleton's points `(MAX_POINTS, 3)` and basis `(PATH_SAMPLES, MAX_POINTS)`."""
    positions: list[list[float]] = []
    pieces: list[list[int]] = []  # the points of each smooth piece: a corner or a pen lift ends it
    for stroke in path.split("|"):
        pieces.append([])
        for word in stroke.split():
            pieces[-1].append(len(positions))
            if word.endswith("!"):
                pieces.append([len(positions)])
            positions.append([float(number) for number in word.rstrip("!").split(",")])
    xy = torch.tensor(positions, dtype=torch.float64)

    # Knots at the chord lengths make the pen's speed nearly even, and so the samples evenly spaced.
    chords = [xy[piece].diff(dim=0).norm(dim=1) for piece in pieces]
    ends = torch.stack([chord.sum() for chord in chords]).cumsum(0)
    times = (torch.arange(PATH_SAMPLES, dtype=torch.float64) + 0.5) / PATH_SAMPLES * ends[-1]
    piece_of_time = torch.searchsorted(ends, times)
    basis = torch.zeros(PATH_SAMPLES, MAX_POINTS, dtype=torch.float32)
    for number, (piece, chord) in enumerate(zip(pieces, chords, strict=True)):
        knots = ends[number] - chord.sum() + torch.cat([chord.new_zeros(1), chord.cumsum(0)])
        rows = (piece_of_time == number).nonzero()
        basis[rows, torch.tensor(piece)] = _spline_basis(knots, times[rows[:, 0]]).float()

    points = torch.zeros(MAX_POINTS, 3, dtype=torch.float32)
    points[: len(xy), :2] = xy - (xy.amax(0) + xy.amin(0)) / 2
    return points, basis


def _spline_basis(knots: Tensor, times: Tensor) -> Tensor:
    """Returns the matrix `(times, knots)` that takes values at the knots to their natural cubic spline.

    The spline is a line and a sum of |t - knot|^3, whose weights are orthogonal to every line.
    """

    def features(t: Tensor) -> Tensor:
        return torch.cat([(t[:, None] - knots).abs() ** 3, torch.ones_like(t)[:, None], t[:, None]], dim=1)

    num_knots = len(knots)
    system = knots.new_zeros(num_knots + 2, num_knots + 2)
    system[:num_knots] = features(knots)
    system[num_knots:, :num_knots] = system[:num_knots, num_knots:].T
    return torch.linalg.solve(system, features(times), left=False)[:, :num_knots]
