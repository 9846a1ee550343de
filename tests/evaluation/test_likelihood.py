"""Laws of evaluation: bounds against quadrature, answers that do not depend on how the work is cut up, active units."""

import math

import pytest
import torch
from torch import Tensor, nn

from popgen.datasets.images import prepare_images
from popgen.distributions import Bernoulli, DiagonalNormal, StandardNormal
from popgen.errors import ArgumentError
from popgen.evaluation import likelihood
from popgen.evaluation.evaluator import EvaluationSettings, ImportanceWeightedEvaluator, VAEEvaluator
from popgen.evaluation.likelihood import (
    LikelihoodEstimate,
    count_active_units,
    estimate_log_likelihood,
    evaluate_elbo,
    image_noise,
    importance_estimate,
    kl_of_dimensions,
)
from popgen.models.image_model import ImageModel, LogDensities
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import Bijection, HouseholderSylvesterFlow, PlanarFlow, PosteriorFlow
from popgen.nn.priors import GaussianMixturePrior, StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior

SIZE = 9
FLOWS = {
    "none": lambda: None,
    "sylvester": lambda: HouseholderSylvesterFlow(2, 8, num_flows=2, num_reflections=2),
    "planar": lambda: PlanarFlow(2, 8, num_flows=2),
}
PRIORS = {
    "standard": StandardNormalPrior,
    "mixture": lambda: GaussianMixturePrior(3, 2, initial_std=0.7),
    "vamp": lambda: VampPrior(SIZE, num_components=3),
}


def make_vae(flow: str = "sylvester", prior: str = "vamp") -> VAE:
    """Returns a VAE with two latent units whose likelihood really depends on them, and a wide posterior."""
    torch.manual_seed(0)
    vae = VAE(GaussianEncoder(SIZE, 2, 8), BernoulliDecoder(2, SIZE, 8), PRIORS[prior](), FLOWS[flow]())
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.mul_(2.0)
        vae.encoder.mean_and_log_var.bias[2:] = 0.8
    return vae.requires_grad_(False)


def make_images(count: int = 13) -> Tensor:
    """Returns binary images as uint8 levels."""
    return 255 * torch.randint(0, 2, (count, SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


# --- against independent answers -------------------------------------------------------------------------------------


def quadrature(vae: VAE, images: Tensor) -> Tensor:
    """Returns log p(x) = log ∫ p(x|z) p(z) dz of each image by summing over a fine grid of the two latent units."""
    axis = torch.linspace(-9.0, 9.0, 361, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    log_cell = 2 * math.log(axis[1] - axis[0])
    if isinstance(vae.prior, StandardNormalPrior):
        components = torch.distributions.Normal(torch.zeros(1, 2, dtype=torch.float64), 1.0)
        log_weights = torch.zeros(1, dtype=torch.float64)
    else:
        vamp = isinstance(vae.prior, VampPrior)
        posterior = vae.encoder(torch.sigmoid(vae.prior.logits))[0] if vamp else vae.prior
        components = torch.distributions.Normal(posterior.mean.double(), (0.5 * posterior.log_var.double()).exp())
        weights = torch.ones(len(posterior.mean)) if vamp else torch.softmax(vae.prior.logits, 0)
        log_weights = (weights / weights.sum()).double().log()
    log_p_z = torch.logsumexp(components.log_prob(z[:, None]).sum(-1) + log_weights, dim=1)
    assert log_p_z.exp().sum().item() * math.exp(log_cell) == pytest.approx(1.0, abs=1e-6)
    pixels = torch.distributions.Bernoulli(logits=vae.decoder(z.float()).logits.double())
    return torch.stack(
        [torch.logsumexp(pixels.log_prob((x / 255).double()).sum(-1) + log_p_z + log_cell, dim=0) for x in images]
    )


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("flow", FLOWS)
def test_the_bound_finds_the_integral(flow: str, prior: str) -> None:
    """p(x) does not depend on the posterior: whatever the flow, many samples find what quadrature finds."""
    vae, images = make_vae(flow, prior), make_images(4)
    expected = quadrature(vae, images)
    found = estimate_log_likelihood(vae, images, num_samples=20_000).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert (evaluate_elbo(vae, images.repeat(200, 1))["elbo"].double().view(200, 4).mean(0) < expected).all()


def test_a_model_without_a_latent_variable_is_answered_exactly() -> None:
    """Where posterior and prior agree and the decoder ignores z, every weight is p(x)."""
    vae = make_vae("none", "standard")
    for part in (vae.encoder.mean_and_log_var, vae.decoder.logits):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    expected = torch.full((13,), -SIZE * math.log(2.0))
    torch.testing.assert_close(estimate_log_likelihood(vae, make_images(), 37), expected, rtol=0, atol=1e-5)
    parts = evaluate_elbo(vae, make_images())
    torch.testing.assert_close(parts["elbo"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts["kl"], torch.zeros(13), rtol=0, atol=1e-5)


def test_the_bound_is_the_mean_weight_over_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 7, 23 samples are three blocks and a rest: log 1/23 Σ w over the noise of all four."""
    monkeypatch.setattr(likelihood, "NOISE_BLOCK", 7)
    vae, images = make_vae(), make_images(5)
    noise = torch.cat([image_noise(range(5), size, 2, block, seed=4) for block, size in enumerate((7, 7, 7, 2))])
    x = images.float() / 255
    log_w = vae(x, noise).log_w.double()
    found = estimate_log_likelihood(vae, images, num_samples=23, seed=4)
    torch.testing.assert_close(found.double(), log_w.exp().mean(0).log(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("flow", FLOWS)
def test_one_sample_is_the_elbo_at_the_same_noise(flow: str) -> None:
    vae, images = make_vae(flow), make_images()
    log_w = vae(images.float() / 255, image_noise(range(13), 1, vae.latent_dim, block=0, seed=3)).log_w[0]
    torch.testing.assert_close(estimate_log_likelihood(vae, images, num_samples=1, seed=3), log_w, rtol=0, atol=1e-5)
    parts = evaluate_elbo(vae, images, seed=3)
    torch.testing.assert_close(parts["elbo"], parts["reconstruction"] - parts["kl"], rtol=0, atol=1e-5)
    torch.testing.assert_close(parts["kl"], parts["log_q_z_given_x"] - parts["log_p_z"], rtol=0, atol=1e-5)
    assert all(part.shape == (13,) for part in parts.values())


def test_the_bound_does_not_fall_with_more_samples_on_average() -> None:
    vae, images = make_vae(), make_images(40)
    means = [
        torch.stack([estimate_log_likelihood(vae, images, num_samples, seed) for seed in range(6)]).mean().item()
        for num_samples in (1, 4, 16, 64)
    ]
    assert means == sorted(means) and means[-1] > means[0] + 0.05


# --- how the work is cut up ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 13, 100])
def test_elbo_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    vae, images = make_vae(), make_images()
    whole, cut = evaluate_elbo(vae, images, seed=2), evaluate_elbo(vae, images, seed=2, batch_size=batch_size)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 50, 120, 1_000_000])
@pytest.mark.parametrize("num_samples", [50, 130])
def test_the_bound_does_not_depend_on_rows_in_flight(
    rows: int, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "NOISE_BLOCK", 50)
    vae, images = make_vae(), make_images()
    expected = estimate_log_likelihood(vae, images, num_samples, seed=2)
    monkeypatch.setitem(likelihood.ROWS_IN_FLIGHT, "cpu", rows)
    torch.testing.assert_close(estimate_log_likelihood(vae, images, num_samples, seed=2), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("evaluate", ["elbo", "bound"])
def test_an_image_meets_the_same_noise_in_every_subset(evaluate: str) -> None:
    """Noise is keyed by an image's index, so a shorter evaluation gives a prefix of the longer one's answer."""
    vae, images = make_vae(), make_images()
    answers = [
        evaluate_elbo(vae, subset)["elbo"] if evaluate == "elbo" else estimate_log_likelihood(vae, subset, 30)
        for subset in (images, images[:5], torch.cat([images[:4].flip(0), images[4:5]]))
    ]
    torch.testing.assert_close(answers[1], answers[0][:5], rtol=0, atol=1e-5)
    torch.testing.assert_close(answers[2][4], answers[0][4], rtol=0, atol=1e-5)


def test_noise_belongs_to_the_index_of_an_image_in_the_whole_set() -> None:
    """Images from the eighth on, told which they are, are answered as among all; taken for the first ones, not."""
    vae, images = make_vae(), make_images()
    whole = importance_estimate(vae, images, 30).log_p_x
    rest, taken_for_first = (importance_estimate(vae, images[8:], 30, first_image=first).log_p_x for first in (8, 0))
    torch.testing.assert_close(rest, whole[8:], rtol=0, atol=1e-5)
    assert (taken_for_first - whole[8:]).abs().min() > 1e-3
    parts = evaluate_elbo(vae, images[8:], first_image=8)
    torch.testing.assert_close(parts["elbo"], evaluate_elbo(vae, images)["elbo"][8:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "rows, block, num_samples", [(60, 20, 1_000), (60, 20, 7), (10, 20, 1_000), (4_000, 1_000, 2_500)]
)
def test_the_decoder_sees_a_bounded_number_of_rows(
    rows: int, block: int, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(likelihood.ROWS_IN_FLIGHT, "cpu", rows)
    monkeypatch.setattr(likelihood, "NOISE_BLOCK", block)
    vae, images = make_vae(), make_images()
    seen: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    encodings: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda _, inputs: encodings.append(len(inputs[0]) - 3))
    estimate_log_likelihood(vae, images, num_samples)
    assert sum(seen) == len(images) * num_samples
    assert max(seen) <= max(rows, block)
    assert sum(encodings) == len(images), "every image is encoded once, whatever the number of samples"


def test_progress_counts_every_image_once() -> None:
    vae, images = make_vae(), make_images(9)
    finished: list[Tensor] = []
    bounds = estimate_log_likelihood(vae, images, 1_500, progress=finished.append)
    assert len(finished) > 1 and torch.equal(torch.cat(finished), bounds)


def test_floats_and_levels_are_the_same_images() -> None:
    vae, images = make_vae(), make_images()
    as_floats = images.float() / 255
    assert torch.equal(evaluate_elbo(vae, images)["elbo"], evaluate_elbo(vae, as_floats)["elbo"])
    assert torch.equal(estimate_log_likelihood(vae, images, 5), estimate_log_likelihood(vae, as_floats, 5))
    assert count_active_units(vae, images) == count_active_units(vae, as_floats)


def test_evaluation_in_float64_agrees() -> None:
    vae, images = make_vae(), make_images().double() / 255
    single = estimate_log_likelihood(vae, images.float(), 40)
    double = estimate_log_likelihood(vae.double(), images, 40)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, single.double(), rtol=0, atol=1e-4)


def test_images_take_the_type_of_the_model() -> None:
    """Levels and float32 values are the same images in float64, for all that an evaluation forms of them."""
    vae, images = make_vae("none", "standard").double(), make_images()
    values = images.double() / 255
    for given in (images, values.float()):
        elbo = evaluate_elbo(vae, given)["elbo"]
        assert elbo.dtype == torch.float64 and torch.equal(elbo, evaluate_elbo(vae, values)["elbo"])
        assert torch.equal(estimate_log_likelihood(vae, given, 5), estimate_log_likelihood(vae, values, 5))
        assert count_active_units(vae, given) == count_active_units(vae, values)
        assert torch.equal(kl_of_dimensions(vae, given), kl_of_dimensions(vae, values))
    grey = torch.arange(2 * SIZE, dtype=torch.uint8).view(2, SIZE)  # levels that float32 rounds otherwise
    assert torch.equal(evaluate_elbo(vae, grey)["elbo"], evaluate_elbo(vae, grey.double() / 255)["elbo"])


@pytest.mark.usefixtures("as_a_user")
def test_samples_and_images_are_at_least_one() -> None:
    with pytest.raises(ArgumentError, match="num_samples must be an integer of at least 1, got 0"):
        estimate_log_likelihood(make_vae(), make_images(), num_samples=0)
    for evaluate in (evaluate_elbo, estimate_log_likelihood):
        with pytest.raises(ArgumentError, match="the number of images must be an integer of at least 1, got 0"):
            evaluate(make_vae(), make_images()[:0])


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_standard_normal_and_keyed_by_image_block_and_seed() -> None:
    noise = image_noise(range(50), 200, 5, block=0, seed=0)
    assert noise.shape == (200, 50, 5)
    assert noise.mean().abs() < 5 / math.sqrt(noise.numel())
    assert noise.var().item() == pytest.approx(1.0, abs=5 * math.sqrt(2 / noise.numel()))
    correlation = torch.corrcoef(noise.permute(1, 0, 2).flatten(1)) - torch.eye(50)
    assert correlation.abs().max() < 6 / math.sqrt(1_000), "images must not share noise"
    assert torch.equal(noise[:, 17:19], image_noise(range(17, 19), 200, 5, block=0, seed=0))
    for other in (image_noise(range(50), 200, 5, block=1, seed=0), image_noise(range(50), 200, 5, block=0, seed=1)):
        assert (noise * other).mean().abs() < 5 / math.sqrt(noise.numel())


def test_no_two_blocks_share_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeds of a standard evaluation, and of one with a hundred thousand samples, are all different."""
    seeds: list[int] = []

    class Listener:
        def manual_seed(self, seed: int) -> None:
            seeds.append(seed)

    monkeypatch.setattr(torch, "Generator", lambda device: Listener())
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, generator: tensor)
    for block in range(100):
        image_noise(range(10_000), num_samples=1, noise_dim=1, block=block, seed=2)
    assert len(set(seeds)) == len(seeds) == 1_000_000 and max(seeds) < 2**32


def test_kl_of_dimensions_is_that_of_torch() -> None:
    vae, images = VAE(GaussianEncoder(16, 3, 6), BernoulliDecoder(3, 16, 6), StandardNormalPrior()), torch.rand(40, 16)
    posterior = vae.encode(images).posterior
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(
        normal(posterior.mean, (0.5 * posterior.log_var).exp()), normal(torch.zeros(3), torch.ones(3))
    )
    torch.testing.assert_close(kl_of_dimensions(vae, images, batch_size=7).float(), exact.detach().mean(0))
    assert kl_of_dimensions(VAE(vae.encoder, vae.decoder, VampPrior(16, 3)), images) is None


def test_global_random_state_is_untouched_and_unused() -> None:
    vae, images = make_vae(), make_images()
    first = estimate_log_likelihood(vae, images, 20)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    parts, second = evaluate_elbo(vae, images), estimate_log_likelihood(vae, images, 20)
    count_active_units(vae, images)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, second)
    assert not any(part.requires_grad for part in parts.values())


def test_evaluation_records_no_gradient() -> None:
    vae, images = make_vae().requires_grad_(True), make_images()
    assert not estimate_log_likelihood(vae, images, 3).requires_grad
    assert not evaluate_elbo(vae, images)["elbo"].requires_grad


# --- active units ----------------------------------------------------------------------------------------------------


class Scales(nn.Module):
    """An encoder whose posterior means are the first pixels times fixed scales."""

    input_dim, latent_dim, context_dim = SIZE, 5, 5

    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        self.scales = torch.tensor(scales)

    def forward(self, x: Tensor) -> tuple[DiagonalNormal, Tensor]:
        mean = 3.0 + self.scales * x[:, :5]
        return DiagonalNormal(mean, torch.zeros_like(mean)), mean


@pytest.mark.parametrize("batch_size", [1, 7, 1_000])
def test_active_units_of_a_constructed_model(batch_size: int) -> None:
    """A pixel that is one in half of the images has variance 1/4, so a scale s gives s² / 4: 0.01 where s = 0.2."""
    images = torch.zeros(20, SIZE)
    images[::2] = 1.0
    vae = VAE(Scales([0.0, 0.19, 0.21, 1.0, -4.0]), BernoulliDecoder(5, SIZE, 4), StandardNormalPrior())
    assert count_active_units(vae, images, batch_size) == 3
    assert count_active_units(vae, images[:1], batch_size) == 0, "one image varies in nothing"


class TenTimes(PosteriorFlow, Bijection):
    """The flow z ← 10 z, whatever the context."""

    def forward(self, context: Tensor) -> Bijection:
        return self

    def forward_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return 10.0 * z, torch.full_like(z[..., 0], z.shape[-1] * math.log(10.0))

    def inverse(self, z: Tensor) -> Tensor:
        return z / 10.0


def test_active_units_look_at_the_code_behind_the_flow() -> None:
    """A flow that scales the code by ten makes quiet units active."""
    images = torch.zeros(20, SIZE)
    images[::2] = 1.0
    parts = (Scales([0.0, 0.019, 0.021, 0.021, 0.1]), BernoulliDecoder(5, SIZE, 4), StandardNormalPrior())
    assert count_active_units(VAE(*parts), images) == 0
    assert count_active_units(VAE(*parts, flow=TenTimes()), images) == 3


class StepDecoder(nn.Module):
    """p(x|z) that depends on which quarter of the standard normal z is in: a latent variable of four states."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.latent_dim, self.output_dim = 1, logits.shape[1]
        self.logits = nn.Parameter(logits)

    def forward(self, z: Tensor) -> Bernoulli:
        bounds = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([0.25, 0.5, 0.75])).to(z)
        return Bernoulli(self.logits[torch.bucketize(z[..., 0], bounds)])


def test_a_discrete_model_is_enumerated() -> None:
    """p(x) = 1/4 Σ_k p(x|k) for each of all 16 images; the estimate is within its own error of it, and sums to one."""
    logits = 1.5 * torch.randn(4, 4, dtype=torch.float64)
    vae = VAE(GaussianEncoder(4, 1, 3), StepDecoder(logits), StandardNormalPrior()).double()
    images = torch.cartesian_prod(*4 * [torch.tensor([0.0, 1.0], dtype=torch.float64)])
    pixels = torch.distributions.Bernoulli(logits=logits[:, None]).log_prob(images).sum(-1)
    exact = pixels.logsumexp(0) - math.log(4.0)
    assert exact.exp().sum().item() == pytest.approx(1.0)
    estimate = importance_estimate(vae, images, num_samples=20_000)
    errors = estimate.monte_carlo_error
    assert errors.max() < 0.05
    assert ((estimate.log_p_x - exact) / errors).abs().max() < 4.0
    assert (estimate.bounds[1] < exact - 5.0 * errors).all(), "the ELBO is visibly below"


# --- the loss that chooses a checkpoint ------------------------------------------------------------------------------


def test_the_bound_of_several_samples_chooses_if_it_is_to() -> None:
    """Its mean over images is the loss, as the ELBO's is otherwise; the ELBO stays what it is."""
    vae, images = make_vae(), make_images()
    plain = VAEEvaluator().validate(vae, images, seed=3)
    found = VAEEvaluator(selection_samples=7).validate(vae, images, seed=3)
    expected = estimate_log_likelihood(vae, images, num_samples=7, seed=3).double().mean().item()
    assert plain["loss"] == -plain["elbo"] and "iwae" not in plain
    assert found == {**plain, "iwae": expected, "loss": -expected}
    assert found["iwae"] > found["elbo"]
    with pytest.raises(ArgumentError, match="VAEEvaluator.selection_samples must be an integer of at least 1, got 0"):
        VAEEvaluator(selection_samples=0)


# --- models that are no VAE -------------------------------------------------------------------------------------------


class TwoLevels(ImageModel):
    """z2 ~ N(0, 1), z1 ~ N(0.8 z2, 0.36), x ~ N(a z1 + 0.5, 0.25 I): log p(x) has a closed form."""

    input_dim, noise_dim = SIZE, 2

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.linspace(-0.5, 0.7, SIZE))

    def forward(self, x: Tensor, noise: Tensor) -> LogDensities:
        noise2, noise1 = noise.split(1, dim=-1)
        code = ((x - 0.5) @ self.a)[:, None]
        q_z2 = DiagonalNormal(0.3 * code, torch.zeros_like(code))
        z2, log_q_z2 = q_z2.sample_and_log_density(noise2)
        z1, log_q_z1 = DiagonalNormal(0.5 * code + 0.2 * z2, torch.zeros_like(z2)).sample_and_log_density(noise1)
        variances = torch.tensor([0.36, 0.25]).log()
        log_p_z1 = DiagonalNormal(0.8 * z2, variances[0].expand_as(z2)).log_density(z1)
        mean = self.a * z1 + 0.5
        log_p_x = DiagonalNormal(mean, variances[1].expand_as(mean)).log_density(x)
        log_p_z = StandardNormal().log_density(z2) + log_p_z1
        return LogDensities(log_p_x, log_p_z, log_q_z2 + log_q_z1, torch.zeros_like(log_p_z))


def test_a_model_that_defines_forward_alone_has_its_exact_likelihood():
    model, images = TwoLevels(), make_images()
    a = model.a.detach().double()
    covariance = (0.64 + 0.36) * torch.outer(a, a) + 0.25 * torch.eye(SIZE, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.full_like(a, 0.5), covariance).log_prob(images.double() / 255)
    found = importance_estimate(model, images, 20_000)
    torch.testing.assert_close(found.log_p_x.double(), exact, rtol=0, atol=0.03)
    assert (found.log_p_x.double() - exact).abs().mean() < 3 * found.monte_carlo_error.mean()
    evaluator = ImportanceWeightedEvaluator()
    evaluator.check_model(model)
    data = prepare_images(images, images, (3, 3), "fixed", binarisation_seed=0)
    results = evaluator.evaluate(model, data, images, EvaluationSettings(num_samples=20_000, seed=0))
    assert results["log_p_x"] == pytest.approx(found.log_p_x.double().mean().item(), abs=1e-5)
    assert results["elbo"] < results["log_p_x"] - 0.01
    lines = evaluator.describe({**results, "num_samples": 20_000, "num_examples": len(images)})
    assert "active units" not in lines and "Pareto" in lines


def test_what_cannot_be_weighed_by_importance_is_refused():
    class Point(TwoLevels):
        noise_dim = 0

    message = "importance weights need a posterior to draw from, and that of Point is a point"
    with pytest.raises(ArgumentError, match=message):
        importance_estimate(Point(), make_images(), 10)
    with pytest.raises(ArgumentError, match=message):
        ImportanceWeightedEvaluator().check_model(Point())
    with pytest.raises(ArgumentError, match="VAEEvaluator evaluates a VAE, and the model is a TwoLevels: bind Exper"):
        VAEEvaluator().check_model(TwoLevels())


def test_terms_of_training_are_those_of_evaluation():
    class Other(TwoLevels):
        def log_densities(self, x: Tensor, encoded: None, noise: Tensor) -> LogDensities:
            return self(x, noise)._replace(log_p_z=torch.zeros(noise.shape[:2]))

    TwoLevels().check_parts(make_images())
    with pytest.raises(ArgumentError, match="log_p_z of Other.forward, which is trained, and of Other.log_densities"):
        Other().check_parts(make_images())


def test_kl_of_dimensions_is_not_known_behind_a_flow() -> None:
    """The flow moves the posterior, and the closed form of its Gaussian is not its KL any more."""
    parts = GaussianEncoder(16, 3, 6), BernoulliDecoder(3, 16, 6), StandardNormalPrior()
    assert kl_of_dimensions(VAE(*parts), torch.rand(4, 16)) is not None
    assert kl_of_dimensions(VAE(*parts, PlanarFlow(3, 6, num_flows=1)), torch.rand(4, 16)) is None


def test_as_many_weights_as_a_fit_needs_have_a_shape() -> None:
    log_w = torch.randn(25, 4)
    assert LikelihoodEstimate.of(log_w).pareto_shape.isfinite().all()
    assert LikelihoodEstimate.of(log_w[:24]).pareto_shape.isnan().all()
