"""Laws of binarisation, of the protocols and of the order in which a run visits its images."""

import itertools
import math

import pytest
import torch

from popgen.datasets.images import (
    ImageData,
    TrainBatches,
    as_values,
    bernoulli_thresholds,
    binarise,
    binarise_once,
    draw_bits,
    fix_binarisation,
    hold_out,
    prepare_images,
)
from popgen.errors import ArgumentError, DataError

ALL_LEVELS = torch.arange(256, dtype=torch.uint8)


def numbered(count: int, size: int = 4) -> torch.Tensor:
    """Returns float images whose values are their index, so that a batch tells which images it holds."""
    return torch.arange(count, dtype=torch.float32)[:, None].expand(count, size).contiguous()


def visited(batches: TrainBatches, steps: range) -> list[int]:
    """Returns the indices of the images that some steps visit, read from numbered images."""
    return [int(value) for step in steps for value in batches.draw(step, torch.Generator())[:, 0]]


# --- binarisation ----------------------------------------------------------------------------------------------------


def test_probabilities_over_all_noise() -> None:
    """All 2^16 values of the noise, each once: never one for black, always for white, level / 255 between."""
    noise = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    thresholds = bernoulli_thresholds(ALL_LEVELS)
    probabilities = torch.stack([binarise(threshold.expand(2**16), noise.clone()).mean() for threshold in thresholds])
    shortfall = ALL_LEVELS.double() / 255 - probabilities.double()
    assert probabilities[0] == 0.0 and probabilities[255] == 1.0
    assert shortfall.min() > -1e-7 and shortfall.max() <= 2.0**-16


def test_bits_are_uniform_and_independent() -> None:
    """The 16 bits of a value are fair, and so are their pairs, within a value and between neighbours."""
    count = 40_001  # not a multiple of the four values that a word holds
    drawn = draw_bits((count,), torch.Generator().manual_seed(0))
    assert drawn.shape == (count,) and drawn.dtype == torch.int16
    bits = ((drawn[:, None].int() >> torch.arange(16)) & 1).double() - 0.5
    pairs = torch.cat([bits[:-1], bits[1:]], dim=1)
    covariance = pairs.T @ pairs / len(pairs)
    torch.testing.assert_close(covariance, 0.25 * torch.eye(32).double(), rtol=0, atol=5 * 0.25 / count**0.5)
    assert bits.mean(0).abs().max() < 5 * 0.5 / count**0.5


def test_one_draw_follows_the_levels() -> None:
    count = 20_000
    levels = ALL_LEVELS[:, None].expand(256, count)
    shares = (binarise_once(levels, seed=3) == 255).double().mean(1)
    expected = ALL_LEVELS.double() / 255
    deviation = (shares - expected) / (expected * (1 - expected) / count).sqrt().clamp_min(1e-12)
    assert deviation.abs().max() < 5.0
    assert deviation[1:-1].square().mean() == pytest.approx(
        1.0, abs=0.4
    )  # a chi-squared statistic: spread as binomials


def test_one_draw_is_a_function_of_the_seed() -> None:
    levels = torch.full((50, 20), 128, dtype=torch.uint8)
    first = binarise_once(levels, seed=0)
    torch.manual_seed(99)
    assert torch.equal(first, binarise_once(levels, seed=0))
    assert not torch.equal(first, binarise_once(levels, seed=1))
    assert set(first.unique().tolist()) == {0, 255}


def test_a_fixed_draw_survives_the_draw_of_a_batch() -> None:
    """Images stored as 0 and 255 come out of every later draw unchanged."""
    fixed = binarise_once(torch.randint(0, 256, (30, 16), dtype=torch.uint8), seed=0)
    for extreme in (-(2**15), 2**15 - 1, 0):
        bits = torch.full((30, 16), extreme, dtype=torch.int16)
        assert torch.equal(binarise(bernoulli_thresholds(fixed), bits), as_values(fixed))


def test_binarisation_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    levels = torch.full((20, 4), 100, dtype=torch.uint8)
    prepare_images(levels, levels, (2, 2), "fixed", binarisation_seed=0, validation_size=5)
    TrainBatches(levels, 5, seed=0).draw(3, torch.Generator())
    assert torch.equal(before, torch.get_rng_state())


def test_threshold_is_at_128() -> None:
    fixed = fix_binarisation(ALL_LEVELS[None], "threshold", seed=0)[0]
    assert torch.equal(fixed, torch.tensor([0] * 128 + [255] * 128, dtype=torch.uint8))


def test_values_are_levels_over_255() -> None:
    torch.testing.assert_close(as_values(ALL_LEVELS[None])[0], torch.linspace(0, 1, 256), rtol=0, atol=1e-7)
    floats = torch.rand(3, 4)
    assert as_values(floats) is floats


# --- protocols -------------------------------------------------------------------------------------------------------


@pytest.fixture
def grey() -> tuple[torch.Tensor, torch.Tensor]:
    """Grey training and test levels."""
    return torch.randint(1, 255, (60, 16), dtype=torch.uint8), torch.randint(1, 255, (40, 16), dtype=torch.uint8)


def is_binary(images: torch.Tensor) -> bool:
    return bool(((images == 0) | (images == 255)).all())


def test_dynamic_keeps_grey_training_levels(grey) -> None:
    data = prepare_images(*grey, (4, 4), "dynamic", binarisation_seed=0, validation_size=10)
    assert not is_binary(data.train)
    assert is_binary(data.test) and is_binary(data.validation)
    assert {tuple(row) for row in data.train.tolist()} <= {tuple(row) for row in grey[0].tolist()}


@pytest.mark.parametrize("protocol", ["fixed", "threshold"])
def test_other_protocols_fix_every_split(grey, protocol: str) -> None:
    first, second = (prepare_images(*grey, (4, 4), protocol, 0, validation_size=10) for _ in range(2))
    for name in ("train", "validation", "test"):
        assert is_binary(getattr(first, name))
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.protocol == protocol


def test_threshold_does_not_depend_on_the_seed(grey) -> None:
    first, second = (prepare_images(*grey, (4, 4), "threshold", seed) for seed in (0, 1))
    assert torch.equal(first.train, second.train) and torch.equal(first.test, second.test)


def test_splits_are_drawn_with_noise_of_their_own() -> None:
    """The same grey levels in every split give draws that agree no more often than independent ones."""
    same = torch.full((3_000, 4), 128, dtype=torch.uint8)
    data = prepare_images(same, same[:1_500], (2, 2), "fixed", binarisation_seed=0, validation_size=1_500)
    for a, b in itertools.combinations((data.train, data.validation, data.test), 2):
        assert (a == b).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(a.numel()))


def test_test_images_do_not_depend_on_the_held_out_number(grey) -> None:
    with_validation, without = (prepare_images(*grey, (4, 4), "dynamic", 0, size) for size in (0, 20))
    assert torch.equal(with_validation.test, without.test)


def test_an_unknown_protocol_is_refused(grey) -> None:
    with pytest.raises(ArgumentError, match="protocol must be one of dynamic, fixed, threshold, got 'static'"):
        prepare_images(*grey, (4, 4), "static", 0)


def test_hold_out_is_disjoint_and_complete() -> None:
    images = torch.arange(100, dtype=torch.uint8)[:, None].expand(100, 4)
    train, validation = hold_out(images, validation_size=30, seed=0)
    assert (len(train), len(validation)) == (70, 30)
    assert sorted([*train[:, 0].tolist(), *validation[:, 0].tolist()]) == list(range(100))
    assert validation[:, 0].tolist() != list(range(30)), "the held-out images must be random ones"
    again = hold_out(images, validation_size=30, seed=0)
    assert torch.equal(again[0], train) and torch.equal(again[1], validation)
    assert not torch.equal(hold_out(images, validation_size=30, seed=1)[1], validation)


def test_hold_out_of_nothing_and_of_everything() -> None:
    images = torch.zeros(10, 4, dtype=torch.uint8)
    train, validation = hold_out(images, 0, seed=0)
    assert train is images and validation is None
    for size in (10, 11):
        with pytest.raises(DataError, match=f"validation_size must be below the 10 training images, got {size}"):
            hold_out(images, size, seed=0)
    with pytest.raises(ArgumentError, match="validation_size must be an integer of at least 0, got -3"):
        hold_out(images, -3, seed=0)


@pytest.mark.parametrize(
    "train, test, message",
    [
        (torch.zeros(0, 4), torch.zeros(2, 4), "the train images must have shape"),
        (torch.zeros(2, 5), torch.zeros(2, 4), "the train images must have shape .count, 4."),
        (torch.zeros(2, 4), torch.zeros(2, 2, 2), "the test images must have shape"),
        (torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int64), "the test images must be uint8 .* got torch.int64"),
    ],
)
def test_image_data_refuses_wrong_shapes_and_types(train, test, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageData(train, test, (2, 2), "none")


def test_a_missing_split_is_named() -> None:
    data = ImageData(torch.zeros(2, 4), torch.zeros(2, 4), (2, 2), "none")
    assert data.split("test") is data.test
    with pytest.raises(DataError, match="no validation split: set its validation_size"):
        data.split("validation")


def test_to_changes_the_type_of_floating_point_images_alone() -> None:
    data = ImageData(torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.uint8), (2, 2), "none")
    moved = data.to(torch.device("cpu"), torch.float32)
    assert (moved.train.dtype, moved.test.dtype, moved.validation) == (torch.float32, torch.uint8, None)
    assert data.to(torch.device("cpu")).train.dtype == torch.float64


# --- batches ---------------------------------------------------------------------------------------------------------


def test_every_epoch_visits_each_image_once() -> None:
    batches = TrainBatches(numbered(24), batch_size=6, seed=0)
    for epoch in range(5):
        assert sorted(visited(batches, range(4 * epoch, 4 * epoch + 4))) == list(range(24))


def test_an_incomplete_batch_is_left_out() -> None:
    batches = TrainBatches(numbered(10), batch_size=4, seed=0)
    seen = [visited(batches, range(2 * epoch, 2 * epoch + 2)) for epoch in range(50)]
    assert all(len(set(epoch)) == 8 for epoch in seen)
    assert {image for epoch in seen for image in epoch} == set(range(10)), "every image has its turn in some epoch"


def test_order_differs_between_epochs_and_seeds() -> None:
    batches = TrainBatches(numbered(50), batch_size=10, seed=0)
    orders = [tuple(visited(batches, range(5 * epoch, 5 * epoch + 5))) for epoch in range(4)]
    orders.append(tuple(visited(TrainBatches(numbered(50), batch_size=10, seed=1), range(5))))
    assert len(set(orders)) == len(orders)


def test_order_is_a_function_of_seed_and_step_alone() -> None:
    """Jumping to a step, forwards or backwards, gives the batch that going there step by step gives."""
    walked = TrainBatches(numbered(30), batch_size=7, seed=5)
    expected = [walked.indices(step).clone() for step in range(40)]
    jumping = TrainBatches(numbered(30), batch_size=7, seed=5)
    for step in (39, 0, 17, 16, 4, 3, 39, 8):
        assert torch.equal(jumping.indices(step), expected[step])
    assert torch.equal(TrainBatches(numbered(30), 7, seed=5).indices(22), expected[22])


def test_float_images_are_used_as_they_are_and_take_no_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    images = torch.rand(20, 4)
    batches = TrainBatches(images, batch_size=5, seed=0)
    assert torch.equal(batches.draw(2, generator), images[batches.indices(2)])
    assert torch.equal(before, generator.get_state())


def test_dynamic_draws_differ_between_visits() -> None:
    grey = torch.full((40, 16), 128, dtype=torch.uint8)
    batches, generator = TrainBatches(grey, batch_size=40, seed=0), torch.Generator().manual_seed(0)
    first, second = (batches.draw(step, generator)[batches.indices(step).argsort()] for step in (0, 1))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert (first == second).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_batches_of_grey_levels_have_the_right_mean() -> None:
    levels = torch.randint(0, 256, (50, 100), dtype=torch.uint8)
    batches, generator = TrainBatches(levels, batch_size=50, seed=0), torch.Generator().manual_seed(0)
    mean = torch.stack([batches.draw(step, generator) for step in range(40)]).mean().item()
    assert mean == pytest.approx(levels.double().mean().item() / 255, abs=5 * 0.5 / math.sqrt(40 * 5_000))


def test_batches_of_several_seeds_share_one_copy_of_the_images(grey) -> None:
    data = prepare_images(*grey, (4, 4), "dynamic", binarisation_seed=0)
    first, second = (data.batches(2, seed) for seed in range(2))
    assert first.images is second.images
    drawn = [batches.draw(3, torch.Generator().manual_seed(5)) for batches in (first, TrainBatches(data.train, 2, 0))]
    assert torch.equal(*drawn)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    assert TrainBatches(numbered(5), batch_size=5, seed=0).steps_per_epoch == 1
    with pytest.raises(ArgumentError, match="batch_size must be at most the 5 training images, got 6"):
        TrainBatches(numbered(5), batch_size=6, seed=0)


@pytest.mark.usefixtures("as_a_user")
def test_what_can_hardly_be_grey_levels_is_refused() -> None:
    """Binary images as 0 and 1, values in [0, 1] and arrays: read as levels, they would be nearly black."""
    binary = torch.randint(0, 2, (10, 16), dtype=torch.uint8)
    grey = 255 * binary
    for train, test in ((binary, grey), (grey, binary)):
        with pytest.raises(DataError, match="images have no level above 1, .* multiply binary images by 255"):
            prepare_images(train, test, (4, 4), "dynamic", 0)
        with pytest.raises(DataError, match="images have no level above 1, .* multiply binary images by 255"):
            ImageData(train, test, (4, 4), "none")
    with pytest.raises(DataError, match="the train images must be uint8 grey levels .*, got torch.float32"):
        prepare_images(binary.float(), grey, (4, 4), "threshold", 0)
    with pytest.raises(DataError, match="the test images must be uint8 grey levels .*, got torch.float64"):
        prepare_images(grey, grey.double(), (4, 4), "fixed", 0)
    for make in (ImageData, lambda *given: prepare_images(*given, 0)):
        with pytest.raises(DataError, match=r"must be a torch.Tensor, got a ndarray: torch.from_numpy"):
            make(grey.numpy(), grey, (4, 4), "dynamic")
    assert ImageData(torch.zeros(3, 16, dtype=torch.uint8), grey, (4, 4), "none").train.sum() == 0


def test_images_that_are_drawn_once_have_no_grey_levels() -> None:
    grey, binary = torch.full((4, 6), 128, dtype=torch.uint8), torch.tensor([[0, 255, 255, 0, 0, 0]], dtype=torch.uint8)
    ImageData(grey, binary, (2, 3), "dynamic", validation=binary)
    for others in ({"test": grey}, {"test": binary, "validation": grey}):
        with pytest.raises(DataError, match=f"the {list(others)[-1]} images are drawn once, so their levels must"):
            ImageData(train=grey, image_shape=(2, 3), protocol="none", **others)


@pytest.mark.usefixtures("as_a_user")
def test_images_have_a_height_and_a_width() -> None:
    with pytest.raises(DataError, match=r"the height and the width of grey images, got \(3, 2, 1\)"):
        ImageData(torch.rand(4, 6), torch.rand(4, 6), (3, 2, 1), "none")


def test_binary_uint8_images_are_not_taken_for_black_ones() -> None:
    with pytest.raises(DataError, match="the given images have no level above 1, and grey levels go from 0 to 255"):
        as_values(torch.tensor([[0, 1]], dtype=torch.uint8))
    assert as_values(torch.zeros(2, 3, dtype=torch.uint8)).sum() == 0.0


@pytest.mark.parametrize("noise", [0.0, 1.0 - 2.0**-24])
def test_one_draw_leaves_black_and_white_as_they_are(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at the ends of the noise: white is always drawn, black never."""
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.full(shape, noise))
    levels = torch.tensor([[0, 1, 254, 255]], dtype=torch.uint8)
    assert binarise_once(levels, seed=0).tolist() == [[0, 255, 255, 255] if noise == 0.0 else [0, 0, 0, 255]]
