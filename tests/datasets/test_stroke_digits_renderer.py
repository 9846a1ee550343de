"""Laws of the procedural digits: reproducible, balanced, in MNIST's format, varied and yet recognisable."""

import pytest
import torch
from torch import Tensor

from popgen.datasets import stroke_digits_renderer
from popgen.datasets.stroke_digits_renderer import MAX_POINTS, NUM_CLASSES, SKELETONS, draw_digits


@pytest.fixture(scope="module")
def train() -> tuple[Tensor, Tensor]:
    """Images `(4000, 28, 28)` and labels `(4000,)` of the stream "train"."""
    return draw_digits(4000, seed=0, stream="train")


@pytest.fixture(scope="module")
def test() -> tuple[Tensor, Tensor]:
    """Images `(1000, 28, 28)` and labels `(1000,)` of the stream "test"."""
    return draw_digits(1000, seed=0, stream="test")


def features(images: Tensor) -> Tensor:
    """Returns the grey levels between 0 and 1, `(n, 784)`."""
    return images.flatten(1).float() / 255


def test_same_arguments_give_same_images() -> None:
    """The images and labels depend on the arguments alone, and the global generator stays as it was."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw_digits(300, seed=3, stream="train")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = draw_digits(300, seed=3, stream="train")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("seed", "stream"), [(4, "train"), (3, "test"), (33, "train")])
def test_other_seed_or_stream_gives_other_images(seed: int, stream: str) -> None:
    """No image of one set recurs in a set with another seed or stream."""
    images, labels = draw_digits(300, seed=3, stream="train")
    other_images, other_labels = draw_digits(300, seed=seed, stream=stream)
    assert not torch.equal(labels, other_labels)
    assert torch.cat([images, other_images]).flatten(1).unique(dim=0).shape[0] == 600


def test_threads_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread or two, and chunks of any size, give the same images to the last bit."""
    num_threads = torch.get_num_threads()
    results = []
    try:
        for threads, chunk_size in [(1, 1000), (2, 1000), (2, 7), (1, 64)]:
            torch.set_num_threads(threads)
            monkeypatch.setattr(stroke_digits_renderer, "CHUNK_SIZE", chunk_size)
            results.append(draw_digits(1100, seed=0, stream="train")[0])
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_default_dtype_does_not_matter() -> None:
    """A program that works in float64 sees the same images."""
    images, _ = draw_digits(50, seed=0, stream="train")
    torch.set_default_dtype(torch.float64)
    try:
        images_float64, _ = draw_digits(50, seed=0, stream="train")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(images, images_float64)


@pytest.mark.parametrize("num_images", [1, 9, 10, 1003])
def test_format(num_images: int) -> None:
    """Images and labels are uint8 and as many as asked for; the classes' counts differ by one at most."""
    images, labels = draw_digits(num_images, seed=0, stream="train")
    assert images.shape == (num_images, 28, 28)
    assert labels.shape == (num_images,)
    assert images.dtype == labels.dtype == torch.uint8
    counts = labels.long().bincount(minlength=NUM_CLASSES)
    assert counts.shape == (NUM_CLASSES,)
    assert counts.max() - counts.min() <= 1


def test_labels_are_in_random_order(train: tuple[Tensor, Tensor]) -> None:
    """Neighbouring labels agree as often as by chance."""
    _, labels = train
    agreement = (labels[1:] == labels[:-1]).float().mean()
    assert 0.07 < agreement < 0.13


def test_ink_is_like_mnist(train: tuple[Tensor, Tensor]) -> None:
    """Paper is exactly 0, strokes have a white core, and grey is only the edge between them."""
    images, _ = train
    assert 25 < images.float().mean() < 40
    assert 0.75 < (images == 0).float().mean() < 0.88
    assert 0.06 < (images > 250).float().mean() < 0.12
    assert (images.flatten(1).amax(1) > 240).float().mean() > 0.999
    per_image = images.float().mean((1, 2))
    assert per_image.min() > 5
    assert per_image.max() < 100


def test_digits_are_centred_and_fill_twenty_pixels(train: tuple[Tensor, Tensor]) -> None:
    """The centre of mass is in the middle, the longer side is about 20, and strokes hardly reach the rim."""
    images, _ = train
    ink = images.float()
    pixels = torch.arange(28.0)
    for axis in (1, 2):
        centre = (ink.sum(3 - axis) * pixels).sum(1) / ink.sum((1, 2))
        assert abs(centre.mean() - 14) < 0.15
        assert centre.std() < 0.7
    inked = images > 64
    size = torch.maximum(inked.any(1).sum(1), inked.any(2).sum(1)).float()
    assert 19 < size.mean() < 21
    assert size.std() < 1.2
    rim = torch.ones(28, 28, dtype=torch.bool)
    rim[1:-1, 1:-1] = False
    assert (images[:, rim] > 128).any(1).float().mean() < 0.02


def test_classifier_recognises_new_digits(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
    """A small network that saw one stream reads the other, so that the labels can be told from the images."""
    images, labels = features(train[0]), train[1].long()
    generator = torch.Generator().manual_seed(0)
    first = (torch.randn(784, 64, generator=generator) / 784**0.5).requires_grad_()
    second = (torch.randn(64, NUM_CLASSES, generator=generator) / 64**0.5).requires_grad_()
    optimizer = torch.optim.Adam([first, second], lr=3e-3)
    for _ in range(8):
        for batch in torch.randperm(len(images), generator=generator).split(100):
            loss = torch.nn.functional.cross_entropy((images[batch] @ first).relu() @ second, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        predicted = ((features(test[0]) @ first).relu() @ second).argmax(1)
    accuracy = (predicted == test[1]).float().mean()
    assert accuracy > 0.9


def test_digits_of_a_class_vary(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
    """A single template per class, its mean, reads far more digits than chance, but by no means all."""
    images, labels = features(train[0]), train[1]
    means = torch.stack([images[labels == digit].mean(0) for digit in range(NUM_CLASSES)])
    predicted = torch.cdist(features(test[0]), means).argmin(1)
    accuracy = (predicted == test[1]).float().mean()
    assert 0.5 < accuracy < 0.93


@pytest.mark.parametrize("digit", range(NUM_CLASSES))
def test_skeletons_are_well_formed(digit: int) -> None:
    """The shares of a digit's skeletons sum to ten, and every skeleton's points fit into the table."""
    assert sum(share for share, _ in SKELETONS[digit]) == 10
    assert all(path.count(",") <= MAX_POINTS for _, path in SKELETONS[digit])


def test_spline_passes_through_its_points() -> None:
    """At its knots the spline takes the given values, and between them it keeps a straight line straight."""
    knots = torch.tensor([0.0, 1.0, 2.5, 3.0], dtype=torch.float64)
    at_knots = stroke_digits_renderer._spline_basis(knots, knots)
    torch.testing.assert_close(at_knots, torch.eye(4, dtype=torch.float64))
    times = torch.linspace(0, 3, 20, dtype=torch.float64)
    torch.testing.assert_close(stroke_digits_renderer._spline_basis(knots, times) @ knots, times)


@pytest.mark.parametrize(
    ("num_images", "seed", "stream", "message"),
    [
        (0, 0, "train", "num_images must be an integer of at least 1, got 0"),
        (-3, 0, "train", "num_images must be an integer of at least 1, got -3"),
        (1, -1, "train", "seed must be an integer of at least 0, got -1"),
        (1, 0, "", "stream must not be empty, got ''"),
    ],
)
def test_bad_arguments(num_images: int, seed: int, stream: str, message: str) -> None:
    """A bad argument is named together with its value."""
    with pytest.raises(ValueError, match=message):
        draw_digits(num_images, seed=seed, stream=stream)
