"""What is reported of VQ-VAEs, against NumPy and by hand, and that it does not depend on how the work is cut up."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from popgen.datasets.images import ImageData
from popgen.errors import ArgumentError
from popgen.evaluation import vqvae as evaluation
from popgen.evaluation.evaluator import EvaluationSettings, Evaluator, VAEEvaluator
from popgen.evaluation.likelihood import evaluate_elbo
from popgen.evaluation.vqvae import (
    VQVAEEvaluator,
    VQVAEWithPriorEvaluator,
    codes_of_images,
    positionwise_log_prior,
)
from popgen.models.vqvae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder, VQVAEWithPrior
from popgen.nn.pixelcnn import GatedPixelCNN
from popgen.nn.vqvae import MovingAverageQuantiser, Quantiser, ResidualQuantiser
from popgen.summaries import image_grid

SHAPE = (8, 12)
NUM_CODES = 6


def make_vqvae(quantiser: Quantiser | None = None) -> VQVAE:
    """Returns a VQ-VAE that uses some of its codes often, some seldom and one never."""
    torch.manual_seed(0)
    quantiser = MovingAverageQuantiser(NUM_CODES, 3) if quantiser is None else quantiser
    encoder, decoder = (part(3, SHAPE, 16, 1) for part in (ConvolutionalEncoder, ConvolutionalDecoder))
    model = VQVAE(encoder, quantiser, decoder)
    model.initialise_from_data(torch.rand(100, 96), torch.Generator().manual_seed(0))
    if isinstance(quantiser, MovingAverageQuantiser):
        quantiser.codes[2] = 1_000.0
    return model.requires_grad_(False)


def make_model(kind: str) -> VQVAE | VQVAEWithPrior:
    vqvae = make_vqvae()
    if kind == "plain":
        return vqvae
    return VQVAEWithPrior(vqvae, GatedPixelCNN(NUM_CODES, vqvae.map_shape, 4, 1)).requires_grad_(False)


def make_images(count: int = 23, seed: int = 1) -> Tensor:
    """Returns binary images as uint8 levels."""
    return 255 * torch.randint(2, (count, 96), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def make_data() -> ImageData:
    """Returns grey training images, and binary test images."""
    generator = torch.Generator().manual_seed(2)
    train = torch.randint(0, 256, (40, 96), generator=generator, dtype=torch.uint8)
    return ImageData(train, make_images(), SHAPE, "dynamic")


def evaluator_of(kind: str) -> VQVAEEvaluator:
    return VQVAEEvaluator() if kind == "plain" else VQVAEWithPriorEvaluator()


every_kind = pytest.mark.parametrize("kind", ["plain", "with prior"])


# --- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 23, 1_000])
def test_codes_of_binary_images_do_not_depend_on_the_batch_size(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = make_vqvae(), make_images()
    expected = model.encode(images.float() / 255)
    monkeypatch.setattr(evaluation, "BATCH_SIZE", batch_size)
    seen: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for seed in (0, 1):  # there is nothing to be drawn
        assert torch.equal(codes_of_images(model, images, seed), expected)
    assert torch.equal(codes_of_images(model, images.float() / 255), expected)
    assert max(seen) <= batch_size and sum(seen) == 3 * 23


def test_codes_of_grey_images_are_those_of_one_seeded_draw() -> None:
    model, grey = make_vqvae(), make_data().train
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before = torch.get_rng_state()
    first, same, other = (codes_of_images(model, grey, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert set(torch.cat(seen).unique().tolist()) == {0.0, 1.0}
    assert torch.cat(seen).mean().item() == pytest.approx(grey.float().mean().item() / 255, abs=0.02)


def test_images_take_the_type_of_the_model() -> None:
    """Levels that are drawn, and values, encoded and shown by a float64 model."""
    model, data = make_vqvae().double(), make_data()
    single = make_vqvae()
    for images in (data.train, data.test, data.test.float() / 255):
        assert torch.equal(codes_of_images(model, images), codes_of_images(single, images))
    shown, expected = (VQVAEEvaluator().show(one, data, 4, torch.Generator()) for one in (model, single))
    torch.testing.assert_close(shown["reconstructions"].int(), expected["reconstructions"].int(), rtol=0, atol=1)


def test_codes_of_several_codebooks_keep_their_axis() -> None:
    codes = codes_of_images(make_vqvae(ResidualQuantiser(3, NUM_CODES, 3)), make_images())
    assert codes.shape == (23, 2, 3, 3)


@pytest.mark.parametrize("batch_size", [1, 9, 1_000])
def test_usage_is_that_of_a_whole_pass(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make_vqvae(), make_images()
    counts = np.bincount(model.encode(images.float() / 255).numpy().ravel(), minlength=NUM_CODES)
    frequencies = counts[counts > 0] / counts.sum()
    monkeypatch.setattr(evaluation, "BATCH_SIZE", batch_size)
    found = VQVAEEvaluator().curves(model, images)
    assert found.keys() == {"codes_used", "perplexity"}
    assert found["codes_used"] == np.count_nonzero(counts) < NUM_CODES
    assert found["perplexity"] == pytest.approx(float(np.exp(-(frequencies * np.log(frequencies)).sum())), rel=1e-6)
    assert VQVAEWithPriorEvaluator().curves(make_model("with prior"), images) == {}


def test_usage_of_several_codebooks_is_that_of_each() -> None:
    """Of all together the number of codes is the sum, and the perplexity the exponential of the mean entropy."""
    model, images = make_vqvae(ResidualQuantiser(3, NUM_CODES, 3)), make_images()
    for book, codes in enumerate(([0.0] * 3, [1_000.0] * 3)):  # what no vector is near, in two of the books
        model.quantiser.stages[book].codes[book + 1 :] = 1_000.0 + torch.tensor(codes)
    indices, found = model.encode(images.float() / 255).numpy(), VQVAEEvaluator().curves(model, images)
    entropies, used = [], []
    for book in range(3):
        counts = np.bincount(indices[..., book].ravel(), minlength=NUM_CODES)
        frequencies = counts[counts > 0] / counts.sum()
        entropies.append(float(-(frequencies * np.log(frequencies)).sum()))
        used.append(int(np.count_nonzero(counts)))
        assert found.pop(f"codes_used_of_codebook_{book + 1}") == used[-1]
        assert found.pop(f"perplexity_of_codebook_{book + 1}") == pytest.approx(math.exp(entropies[-1]), rel=1e-6)
    assert used[0] == 1 and used[1] == 2 and used[2] > 2
    assert found == {"codes_used": sum(used), "perplexity": pytest.approx(math.exp(np.mean(entropies)), rel=1e-6)}


# --- the prior that knows no neighbours ------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(2, 3), (2, 3, 2)])
def test_positionwise_prior_by_brute_force(axes: tuple[int, ...]) -> None:
    """One categorical for each position, with one added to every count; the last axis may be one of codebooks."""
    seen, codes = torch.randint(4, (17, *axes)), torch.randint(5, (9, *axes))
    found = positionwise_log_prior(codes, seen, num_codes=5)
    table, expected = seen.numpy().reshape(17, -1), []
    for image in codes.numpy().reshape(9, -1):
        rows = [(1 + np.sum(table[:, place] == code)) / (17 + 5) for place, code in enumerate(image)]
        expected.append(math.fsum(math.log(row) for row in rows))
    assert found.shape == (9,) and found.tolist() == pytest.approx(expected, rel=1e-5)


def test_positionwise_prior_is_normalised() -> None:
    """Over all 3^4 maps; codes that were never seen have a probability too."""
    maps = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    log_p = positionwise_log_prior(maps, torch.randint(2, (11, 2, 2)), num_codes=3)
    assert log_p.double().exp().sum().item() == pytest.approx(1.0, abs=1e-5) and torch.isfinite(log_p).all()


def test_positionwise_prior_of_uniform_codes_is_the_uniform_one() -> None:
    seen = torch.arange(5).repeat(20)[:, None].expand(-1, 6)
    log_p = positionwise_log_prior(torch.randint(5, (3, 6)), seen, num_codes=5)
    torch.testing.assert_close(log_p, torch.full((3,), -6 * math.log(5)))


# --- the bound -------------------------------------------------------------------------------------------------------


@every_kind
def test_the_bound_is_the_elbo(kind: str) -> None:
    model, images = make_model(kind), make_images()
    finished: list[Tensor] = []
    parts = evaluate_elbo(model, images)
    evaluator = evaluator_of(kind)
    settings = EvaluationSettings(1, seed=0, progress=finished.append)
    bound = evaluator.bounds(model, settings)(images, parts, 0)["log_p_x"]
    assert torch.equal(bound, parts["elbo"]) and torch.equal(torch.cat(finished), bound)
    assert torch.equal(bound, evaluate_elbo(model, images, seed=5)["elbo"]), "nothing is drawn"
    coarse = evaluator.bounds(model, EvaluationSettings(1, seed=0, precision="bf16"))(images, parts, 0)["log_p_x"]
    assert not torch.equal(coarse, bound)
    torch.testing.assert_close(coarse, bound, rtol=0.1, atol=0)


@every_kind
@pytest.mark.parametrize("num_samples", [0, 2, 5_000])
def test_more_than_one_sample_is_refused(kind: str, num_samples: int) -> None:
    with pytest.raises(ArgumentError, match=f"num_samples must be 1 for a VQ-VAE, got {num_samples}: its posterior"):
        evaluator_of(kind).bounds(make_model(kind), EvaluationSettings(num_samples, seed=0))


@every_kind
@pytest.mark.parametrize("batch_size", [1, 10])
def test_the_elbo_of_an_image_does_not_depend_on_the_others(kind: str, batch_size: int) -> None:
    model, images = make_model(kind), make_images()
    whole, cut = evaluate_elbo(model, images), evaluate_elbo(model, images, batch_size=batch_size)
    turned = evaluate_elbo(model, images.flip(0), seed=3)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=1e-4)
        torch.testing.assert_close(turned[name].flip(0), whole[name], rtol=0, atol=1e-4)
    assert whole["log_q_z_given_x"].eq(0).all() and whole["log_det"].eq(0).all()
    if kind == "plain":
        torch.testing.assert_close(whole["kl"], torch.full((23,), 6 * math.log(NUM_CODES)))


# --- statistics and pictures -----------------------------------------------------------------------------------------


@every_kind
def test_statistics(kind: str) -> None:
    """The positionwise prior is of the training images' codes, the rest of those that are evaluated."""
    model, data = make_model(kind), make_data()
    vqvae, images = make_vqvae(), data.test[:11]
    found = evaluator_of(kind).statistics(model, data, images, evaluate_elbo(model, images))
    codes = codes_of_images(vqvae, images)
    log_p = positionwise_log_prior(codes, codes_of_images(vqvae, data.train), NUM_CODES).double().mean().item()
    reconstruction = vqvae(images.float() / 255).log_p_x_given_z.double().mean().item()
    expected = {
        **VQVAEEvaluator().curves(vqvae, images),
        "kl_of_positionwise_prior": -log_p,
        "elbo_of_positionwise_prior": reconstruction + log_p,
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["elbo_of_positionwise_prior"] < 0.0 < found["kl_of_positionwise_prior"]


@every_kind
@pytest.mark.parametrize("count", [2, 20])
def test_pictures(kind: str, count: int) -> None:
    """Each image stands beside what its codes decode to; the draws are those of the prior with the given noise."""
    model, data = make_model(kind), make_data()
    found = evaluator_of(kind).show(model, data, count, torch.Generator().manual_seed(7))
    x, vqvae = data.test[:count].float() / 255, make_vqvae()
    decoded = vqvae.decoder(vqvae.quantiser.codes[vqvae.encode(x)]).mean
    pairs = [image for pair in zip(x, decoded, strict=True) for image in pair]
    expected = {"originals": x, "reconstructions": torch.stack(pairs)}
    if kind == "with prior":
        uniform = torch.rand(count, 2, 3, generator=torch.Generator().manual_seed(7))
        expected["prior_samples"] = vqvae.decoder(vqvae.quantiser.codes[model.prior.sample(uniform)]).mean
    assert found.keys() == expected.keys()
    for name, images in expected.items():
        grid = image_grid(images, SHAPE, columns=16)
        assert found[name].dtype == torch.uint8 and found[name].shape == grid.shape
        assert (found[name].int() - grid.int()).abs().max() <= 1, name


def test_every_evaluator_is_one() -> None:
    for evaluator in (VAEEvaluator(), VQVAEEvaluator(), VQVAEWithPriorEvaluator()):
        assert isinstance(evaluator, Evaluator)
    assert not isinstance(make_vqvae(), Evaluator)
