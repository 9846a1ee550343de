"""Pictures show what they say: originals beside reconstructions, lines between codes, draws from the whole prior."""

import pytest
import torch
from torch import Tensor

from popgen.distributions import GaussianMixture
from popgen.evaluation.pictures import (
    COLUMNS,
    all_pictures,
    interpolations,
    originals,
    prior_samples,
    pseudo_inputs,
    reconstructions,
)
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.priors import GaussianMixturePrior, StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior

SHAPE, SIZE, PADDING = (3, 4), 12, 2


def make_vae(prior: torch.nn.Module | None = None, flow: bool = False) -> VAE:
    torch.manual_seed(0)
    encoder, decoder = GaussianEncoder(SIZE, 2, 8), BernoulliDecoder(2, SIZE, 8)
    vae = VAE(encoder, decoder, prior or StandardNormalPrior(), HouseholderSylvesterFlow(2, 8) if flow else None)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(2.0)  # so that different codes give visibly different images
    return vae


def cells(picture: Tensor) -> Tensor:
    """Returns the images of a grid in reading order, `(rows * columns, height, width)`, as uint8 levels."""
    height, width = SHAPE
    rows = (picture.shape[0] - PADDING) // (height + PADDING)
    columns = (picture.shape[1] - PADDING) // (width + PADDING)
    return torch.stack(
        [
            picture[PADDING + r * (height + PADDING) :, PADDING + c * (width + PADDING) :][:height, :width]
            for r in range(rows)
            for c in range(columns)
        ]
    )


def levels(values: Tensor) -> Tensor:
    """Returns values in [0, 1] as images of levels 0 to 255."""
    return (values.detach().reshape(-1, *SHAPE) * 255).round().to(torch.uint8)


def assert_shows(picture: Tensor, expected: Tensor) -> None:
    """The picture's cells begin with the expected images, to one level; those after them are empty."""
    found = cells(picture)
    torch.testing.assert_close(found[: len(expected)].int(), expected.int(), rtol=0, atol=1)
    assert (found[len(expected) :] == 64).all()


@pytest.fixture
def images() -> Tensor:
    return 255 * torch.randint(0, 2, (20, SIZE), dtype=torch.uint8)


def test_originals(images: Tensor) -> None:
    assert_shows(originals(images, SHAPE), images.view(-1, *SHAPE))


@pytest.mark.parametrize("flow", [False, True])
def test_reconstructions_stand_beside_their_originals(images: Tensor, flow: bool) -> None:
    vae = make_vae(flow=flow)
    x = images.float() / 255
    z, context = vae.encoder(x)
    codes = vae.flow(context).forward_and_log_det(z.mean[None])[0][0] if flow else z.mean
    decoded = torch.sigmoid(vae.decoder(codes).logits)
    expected = [image for pair in zip(levels(x), levels(decoded), strict=True) for image in pair]
    assert COLUMNS % 2 == 0, "a pair must not be torn apart"
    assert_shows(reconstructions(vae, images, SHAPE), torch.stack(expected))


def test_interpolations_go_from_one_code_to_the_next(images: Tensor) -> None:
    vae = make_vae()
    found = cells(interpolations(vae, images[:6], SHAPE)).view(3, COLUMNS, *SHAPE)
    codes = vae.encoder(images[:6].float() / 255)[0].mean
    for row in range(3):
        start, end = codes[2 * row], codes[2 * row + 1]
        for column in range(COLUMNS):
            fraction = column / (COLUMNS - 1)
            expected = levels(torch.sigmoid(vae.decoder(((1 - fraction) * start + fraction * end)[None]).logits))
            torch.testing.assert_close(found[row, column].int(), expected[0].int(), rtol=0, atol=1)


def test_interpolations_of_an_odd_number_and_of_one(images: Tensor) -> None:
    vae = make_vae()
    assert torch.equal(interpolations(vae, images[:5], SHAPE), interpolations(vae, images[:4], SHAPE))
    assert interpolations(vae, images[:1], SHAPE) is None


def test_pseudo_inputs_stand_beside_what_they_decode_to() -> None:
    prior = VampPrior(SIZE, num_components=7)
    vae = make_vae(prior)
    u = torch.sigmoid(prior.logits)
    decoded = torch.sigmoid(vae.decoder(vae.encoder(u)[0].mean).logits)
    expected = torch.stack([levels(u), levels(decoded)], dim=1).flatten(0, 1)
    assert_shows(pseudo_inputs(vae, SHAPE, count=100), expected)
    assert_shows(pseudo_inputs(vae, SHAPE, count=3), expected[:6])
    assert pseudo_inputs(make_vae(), SHAPE, count=3) is None


def test_prior_samples_come_from_the_prior() -> None:
    """With components far apart and narrow, every picture is one of the components' own, and all of them occur."""
    prior = GaussianMixturePrior(3, 2)
    vae = make_vae(prior)
    with torch.no_grad():
        prior.mean.copy_(torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 3.0]]))
    prior.forward = lambda encoded=None: GaussianMixture(prior.mean, torch.full_like(prior.mean, -30.0))
    modes = levels(torch.sigmoid(vae.decoder(prior.mean).logits)).int()
    found = cells(prior_samples(vae, SHAPE, 48, torch.Generator().manual_seed(0))).int()
    distance = (found[:, None] - modes).abs().amax((2, 3))
    assert (distance.amin(1) <= 1).all()
    assert set(distance.argmin(1).tolist()) == {0, 1, 2}


def test_pictures_are_a_function_of_the_generator(images: Tensor) -> None:
    vae = make_vae()
    before = torch.get_rng_state()
    first, same, other = (
        all_pictures(vae, images, SHAPE, 9, torch.Generator().manual_seed(seed))["prior_samples"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("count", [1, 2, 20])
def test_every_model_has_its_pictures(images: Tensor, count: int) -> None:
    names = {"originals", "reconstructions", "prior_samples"} | ({"interpolations"} if count > 1 else set())
    for prior, more in ((None, set()), (VampPrior(SIZE, 3), {"pseudo_inputs"})):
        pictures = all_pictures(make_vae(prior), images[:count], SHAPE, 4, torch.Generator())
        assert set(pictures) == names | more
        for picture in pictures.values():
            assert picture.dtype == torch.uint8 and not picture.requires_grad


def test_samples_of_a_model_in_double_precision() -> None:
    vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior()).double()
    assert prior_samples(vae, (4, 4), num_samples=16, generator=torch.Generator()).shape == (8, 98)


def test_images_take_the_type_of_the_model() -> None:
    """Levels are shown by a float64 model as their values are."""
    vae, images = make_vae(VampPrior(SIZE, 3), flow=True).double(), 255 * torch.randint(2, (8, SIZE), dtype=torch.uint8)
    found, expected = (
        all_pictures(vae, given, SHAPE, 4, torch.Generator().manual_seed(0))
        for given in (images, images.double() / 255)
    )
    assert found.keys() == expected.keys()
    for name, picture in found.items():
        assert torch.equal(picture, expected[name]), name
