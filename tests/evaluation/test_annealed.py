"""Annealed importance sampling against linear-Gaussian models, whose log p(x) is known; and against the other bound."""

import math
import pathlib
from typing import Any

import pytest
import torch
from torch.distributions import MultivariateNormal

from popgen.errors import ArgumentError, UnfinishedEvaluationError
from popgen.evaluation import annealed
from popgen.evaluation.annealed import (
    IMAGES_AT_ONCE,
    Target,
    anneal,
    annealed_estimate,
    check_by_annealing,
    describe_check,
    simulated_sandwich,
    temperatures,
)
from popgen.evaluation.image_table import ImageTable, Shard, read_table
from popgen.evaluation.likelihood import estimate_log_likelihood
from popgen.losses import iwae
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.priors import GaussianMixturePrior, StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior

LATENT, COUNT = 3, 4
WEIGHT = 0.6 * torch.randn(5, LATENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISE = 1.0
POSTERIOR_COVARIANCE = torch.linalg.inv(torch.eye(LATENT).double() + WEIGHT.T @ WEIGHT / NOISE**2)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(seed: int, count: int = COUNT) -> list[torch.Generator]:
    return [generator(1_000 * seed + example) for example in range(count)]


def observations(seed: int = 1) -> torch.Tensor:
    z = torch.randn(COUNT, LATENT, generator=generator(seed), dtype=torch.float64)
    return z @ WEIGHT.T + NOISE * torch.randn(COUNT, 5, generator=generator(seed + 1), dtype=torch.float64)


def gaussian(x: torch.Tensor) -> tuple[Target, torch.Tensor]:
    """Returns z ~ N(0, I), x | z ~ N(W z, s² I), and log p(x)."""
    constant = -0.5 * 5 * math.log(2 * math.pi * NOISE**2)
    target = Target(
        lambda z: -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1),
        lambda z: constant - 0.5 * (x - z @ WEIGHT.T).square().sum(-1) / NOISE**2,
    )
    covariance = WEIGHT @ WEIGHT.T + NOISE**2 * torch.eye(5).double()
    return target, MultivariateNormal(torch.zeros(5).double(), covariance).log_prob(x)


def prior_draws(chains: int, seed: int) -> torch.Tensor:
    return torch.randn(chains, COUNT, LATENT, generator=generator(seed), dtype=torch.float64)


def posterior_draws(x: torch.Tensor, chains: int, seed: int) -> torch.Tensor:
    mean = x @ WEIGHT @ POSTERIOR_COVARIANCE / NOISE**2
    return mean + prior_draws(chains, seed) @ torch.linalg.cholesky(POSTERIOR_COVARIANCE).T


def test_temperatures() -> None:
    betas = temperatures(100)
    assert betas[0] == 0.0 and betas[-1] == 1.0 and bool((betas.diff() > 0).all()) and len(betas) == 101
    torch.testing.assert_close(betas + betas.flip(0), torch.ones(101, dtype=torch.float64))
    assert betas.diff()[0] < 0.1 * betas.diff()[50]


def test_transitions_leave_their_density_as_it_is() -> None:
    """Chains that begin in the posterior stay in it: mean and covariance after twenty transitions at β = 1."""
    x = observations()
    target, _ = gaussian(x)
    start = posterior_draws(x, 8_000, seed=3)
    sizes = torch.full((20, COUNT), 0.25, dtype=torch.float64)
    chains = anneal(target, start, torch.ones(21), generators(4), num_leapfrog_steps=4, step_sizes=sizes)
    mean = x @ WEIGHT @ POSTERIOR_COVARIANCE / NOISE**2
    assert 0.3 < chains.acceptance.mean() < 0.999, "the acceptance has something to mend"
    assert not torch.equal(chains.z, start)
    deviations = POSTERIOR_COVARIANCE.diagonal().sqrt()
    assert ((chains.z.mean(0) - mean) / deviations).abs().max() < 5 / math.sqrt(8_000)
    for example in range(COUNT):
        found = chains.z[:, example].T.cov()
        torch.testing.assert_close(found, POSTERIOR_COVARIANCE, atol=0.08 * float(deviations.max()) ** 2, rtol=0.0)


@pytest.mark.parametrize("num_temperatures", [3, 30])
def test_weights_are_unbiased_both_ways(num_temperatures: int) -> None:
    """E w = p(x) forward and E 1/w = 1 / p(x) backward, however few the temperatures, to five standard errors."""
    x = observations()
    target, log_p = gaussian(x)
    betas = temperatures(num_temperatures)
    tuned = anneal(target, prior_draws(500, 5), betas, generators(6), 4).step_sizes
    forward = anneal(target, prior_draws(8_000, 7), betas, generators(8), 4, tuned)
    backward = anneal(target, posterior_draws(x, 8_000, 9), betas, generators(10), 4, tuned, backward=True)
    both = [(forward.log_w - log_p).exp(), (log_p - backward.log_w).exp()]
    for ratios in both if num_temperatures > 3 else both[:1]:  # with few, 1/w has no variance
        errors = ratios.std(0) / math.sqrt(len(ratios))
        assert errors.max() < 0.1 and ((ratios.mean(0) - 1.0) / errors).abs().max() < 5.0
    assert (forward.log_w.mean(0) < log_p).all() and (backward.log_w.mean(0) > log_p).all()


def test_many_temperatures_find_the_answer_and_the_two_bounds_meet() -> None:
    x = observations()
    target, log_p = gaussian(x)
    betas = temperatures(200)
    tuned = anneal(target, prior_draws(50, 5), betas, generators(6)).step_sizes
    lower = iwae(anneal(target, prior_draws(50, 7), betas, generators(8), step_sizes=tuned).log_w)
    start = posterior_draws(x, 50, 9)
    upper = -iwae(-anneal(target, start, betas, generators(10), step_sizes=tuned, backward=True).log_w)
    torch.testing.assert_close(lower, log_p, atol=0.12, rtol=0.0)
    torch.testing.assert_close(upper, log_p, atol=0.12, rtol=0.0)


def test_step_sizes_are_tuned_to_the_acceptance() -> None:
    """From one far too small or far too large, for examples of different scales."""
    scales = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    target = Target(
        lambda z: -0.5 * (z / scales[:, None]).square().sum(-1), lambda z: torch.zeros(z.shape[:-1], dtype=z.dtype)
    )
    start = scales[:, None] * torch.randn(64, 3, 10, generator=generator(0), dtype=torch.float64)
    chains = anneal(target, start, temperatures(200), generators(1, 3))
    assert (chains.acceptance[-100:].mean(0) - 0.65).abs().max() < 0.06
    ratios = chains.step_sizes[-1] / scales
    assert ratios.max() / ratios.min() < 1.5
    assert bool((chains.log_w == 0.0).all())


PRIORS = {
    "standard": StandardNormalPrior,
    "mixture": lambda: GaussianMixturePrior(4, 2, initial_std=2.0),
    "vamp": lambda: VampPrior(16, num_components=4),
}


def make_vae(prior: str) -> VAE:
    torch.manual_seed(0)
    vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), PRIORS[prior]())
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.mul_(2.0)
    return vae.double()


@pytest.fixture
def all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' models are so small that many images cost no more than few."""
    monkeypatch.setitem(IMAGES_AT_ONCE, "cpu", 40)


@pytest.fixture
def five_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images are several groups then."""
    monkeypatch.setitem(IMAGES_AT_ONCE, "cpu", 5)


@pytest.mark.parametrize("prior", PRIORS)
def test_it_agrees_with_the_importance_weighted_bound(prior: str) -> None:
    vae, images = make_vae(prior), torch.rand(5, 16, generator=generator(1), dtype=torch.float64).round()
    found, chains = annealed_estimate(vae, images, num_temperatures=60, num_chains=30, seed=3)
    torch.testing.assert_close(found, estimate_log_likelihood(vae, images, 20_000), atol=0.2, rtol=0.0)
    assert chains.log_w.shape == (30, 5) and 0.4 < chains.acceptance.mean() < 0.9
    assert not found.requires_grad


@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize("prior", PRIORS)
def test_simulated_images_are_bounded_from_both_sides(prior: str) -> None:
    vae = make_vae(prior)
    sandwich = simulated_sandwich(vae, count=40, num_temperatures=60, num_chains=10)
    assert set(sandwich.images.unique().tolist()) == {0.0, 1.0}
    below = estimate_log_likelihood(vae, sandwich.images, 5_000).mean()  # this encoder knows nothing of mixtures
    assert below - 0.05 < sandwich.lower.mean() < sandwich.upper.mean()
    gap = (sandwich.upper - sandwich.lower).mean()
    assert gap < {"standard": 0.1, "vamp": 0.1, "mixture": 1.0}[prior]
    coarse = simulated_sandwich(vae, count=40, num_temperatures=2, num_chains=1)
    assert (coarse.upper - coarse.lower).mean() > 2 * gap
    again, other = (simulated_sandwich(vae, count=40, num_temperatures=2, num_chains=1, seed=seed) for seed in (0, 1))
    assert torch.equal(again.images, coarse.images) and torch.equal(again.upper, coarse.upper)
    assert not torch.equal(other.images, coarse.images) and not torch.equal(other.upper, coarse.upper)
    assert torch.equal(coarse.images, sandwich.images), "what is drawn does not depend on the chains"


@pytest.mark.usefixtures("all_at_once")
def test_chains_that_are_weighted_take_the_steps_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that were tuned by the chain itself would bias its weight, forward and back."""
    calls = []

    def watching(target, start, betas, generators, num_leapfrog_steps, step_sizes=None, backward=False):
        chains = anneal(target, start, betas, generators, num_leapfrog_steps, step_sizes, backward=backward)
        calls.append((len(start), step_sizes, chains.step_sizes, backward))
        return chains

    monkeypatch.setattr(annealed, "anneal", watching)
    simulated_sandwich(make_vae("standard"), count=3, num_temperatures=5, num_chains=7, num_leapfrog_steps=2)
    tuning, forward, back = calls
    assert [count for count, *_ in calls] == [4, 7, 1] and [backward for *_, backward in calls] == [False, False, True]
    assert tuning[1] is None
    for weighted in (forward, back):
        assert torch.equal(weighted[1], tuning[2]) and torch.equal(weighted[2], tuning[2]), "and they stay so"


def binary_images(count: int) -> torch.Tensor:
    return torch.rand(count, 16, generator=generator(1), dtype=torch.float64).round()


@pytest.mark.usefixtures("five_at_once")
def test_an_image_is_alone_whatever_is_evaluated_with_it() -> None:
    """To the last bit, whether it is one of few or of many; so is a simulated one."""
    vae, images = make_vae("mixture").float(), binary_images(12).float()
    arguments = {"num_temperatures": 6, "num_chains": 15, "num_leapfrog_steps": 3}
    whole, chains = annealed_estimate(vae, images, **arguments)
    sandwich = simulated_sandwich(vae, 12, **arguments)
    assert len(whole.unique()) == len(sandwich.upper.unique()) == 12, "none has the noise of another"
    for count in (1, 2, 7):
        found, own = annealed_estimate(vae, images[:count], **arguments)
        assert torch.equal(found, whole[:count])
        assert all(torch.equal(one, other[:, :count]) for one, other in zip(own, chains, strict=True))
        few = simulated_sandwich(vae, count, **arguments)
        assert all(torch.equal(one, other[:count]) for one, other in zip(few, sandwich, strict=True))
    for start, stop in ((5, 12), (3, 9), (7, 8)):
        part = {**arguments, "first_image": start}
        assert torch.equal(annealed_estimate(vae, images[start:stop], **part)[0], whole[start:stop])
        rest = simulated_sandwich(vae, stop - start, **part)
        assert all(torch.equal(one, other[start:stop]) for one, other in zip(rest, sandwich, strict=True))


def test_the_noise_of_an_image_is_that_of_its_index() -> None:
    """Equal images at other places have other chains."""
    vae, images = make_vae("standard"), binary_images(1).expand(6, -1)
    arguments = {"num_temperatures": 4, "num_chains": 3}
    found, _ = annealed_estimate(vae, images, **arguments)
    assert len(found.unique()) == 6
    alone, _ = annealed_estimate(vae, images[:1], **arguments, first_image=3)
    assert torch.equal(alone, found[3:4])


def checked(table: ImageTable | None = None, count: int = 12, **changes: Any) -> dict[str, Any]:
    settings = {
        "num_samples": 50,
        "num_temperatures": 4,
        "num_chains": 3,
        "num_leapfrog_steps": 2,
        "seed": 2,
        **changes,
    }
    return check_by_annealing(make_vae("standard").float(), binary_images(count).float(), **settings, table=table)


@pytest.mark.usefixtures("five_at_once")
def test_a_check_does_not_depend_on_how_it_was_cut_up(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, in shards, or interrupted and continued: the same numbers, none found twice."""
    whole, path = checked(), tmp_path / "annealed.csv"
    for index in (3, 1):
        with pytest.raises(UnfinishedEvaluationError):
            checked(ImageTable(path, Shard(index, 3)))
    assert checked(ImageTable(path, Shard(2, 3))) == whole
    assert len(read_table(path).rows) == 12 and [file.name for file in tmp_path.iterdir()] == ["annealed.csv"]
    path.unlink()

    asked: list[int] = []

    def interrupted(*arguments: Any, first_image: int, **settings: Any) -> Any:
        asked.append(first_image)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return simulated_sandwich(*arguments, first_image=first_image, **settings)

    monkeypatch.setattr("popgen.evaluation.annealed.simulated_sandwich", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checked(ImageTable(path))
    assert checked(ImageTable(path)) == whole
    assert asked == [0, 5, 5, 10]


@pytest.mark.parametrize("change", ["num_samples", "num_temperatures", "num_chains", "num_leapfrog_steps", "seed"])
def test_rows_are_used_again_only_by_the_same_check(change: str, tmp_path: pathlib.Path, capsys) -> None:
    table = ImageTable(tmp_path / "annealed.csv")
    first = checked(table, count=5)
    assert checked(table, count=5) == first and not capsys.readouterr().err
    again = checked(table, count=5, **{change: 7})
    assert "is of another evaluation and is not used" in capsys.readouterr().err
    assert again == checked(count=5, **{change: 7})
    assert again["annealed_minus_importance"] != first["annealed_minus_importance"]
    assert again.get(f"annealed_{change}", 7) == 7


@pytest.mark.usefixtures("as_a_user")
def test_the_check_compares_means_of_the_same_images() -> None:
    vae, images = make_vae("standard"), torch.rand(6, 16, generator=generator(1), dtype=torch.float64).round()
    found = check_by_annealing(vae, images, num_samples=500, num_temperatures=20, num_chains=5, seed=2)
    annealed, _ = annealed_estimate(vae, images, 20, 5, seed=2)
    weighted = estimate_log_likelihood(vae, images, 500, seed=2)
    assert found["annealed_log_p_x"] == pytest.approx(annealed.mean().item())
    assert found["annealed_minus_importance"] == pytest.approx((annealed - weighted).mean().item())
    error = (annealed - weighted).std().item() / math.sqrt(6)
    assert found["annealed_minus_importance_standard_error"] == pytest.approx(error)
    assert found["simulated_lower"] - 0.5 < found["simulated_importance"] < found["simulated_upper"] + 0.5
    sandwich = simulated_sandwich(vae, 6, num_temperatures=20, num_chains=5, seed=2)
    gap = sandwich.upper - sandwich.lower
    assert found["simulated_gap"] == pytest.approx(gap.mean().item())
    assert found["simulated_gap_standard_error"] == pytest.approx(gap.std().item() / math.sqrt(6))
    above = sandwich.upper - estimate_log_likelihood(vae, sandwich.images, 500, seed=2)
    assert found["simulated_importance_gap"] == pytest.approx(above.mean().item())
    assert found["simulated_importance_gap_standard_error"] == pytest.approx(above.std().item() / math.sqrt(6))
    assert f"{found['annealed_log_p_x']:.3f}" in describe_check(found)
    assert f"at most {found['simulated_importance_gap']:.3f} ± " in describe_check(found)
    with pytest.raises(ArgumentError, match="annealing takes a VAE, and the model is a Linear"):
        check_by_annealing(torch.nn.Linear(2, 2), images, 5, 5, 5)  # type: ignore[arg-type]


def test_a_posterior_that_is_far_off_is_warned_of() -> None:
    """Annealing does not use it, and so finds more; the gap on simulated images is as large. A good one has neither."""
    vae, images = make_vae("standard"), torch.rand(6, 16, generator=generator(1), dtype=torch.float64).round()
    warned = []
    for shift in (0.0, 6.0):
        with torch.no_grad():
            list(vae.encoder.parameters())[-1][: vae.latent_dim].add_(shift)
        found = check_by_annealing(vae, images, num_samples=50, num_temperatures=60, num_chains=8, seed=2)
        warned.append("warning: annealing finds more" in describe_check(found))
        assert (found["simulated_importance_gap"] > 3.0) == (shift > 0.0)
    assert warned == [False, True]


@pytest.mark.usefixtures("as_a_user")
def test_what_does_not_fit_is_one_line() -> None:
    vae, images = make_vae("standard"), torch.zeros(2, 16, dtype=torch.float64)
    for name in ("num_temperatures", "num_chains", "num_leapfrog_steps"):
        with pytest.raises(ArgumentError, match=f"{name} must be an integer of at least 1, got 0"):
            annealed_estimate(vae, images, **{name: 0})
    with pytest.raises(ArgumentError, match="count must be an integer of at least 1, got 0"):
        simulated_sandwich(vae, count=0)


def test_images_take_the_type_of_the_model() -> None:
    """Grey levels too, which float32 rounds otherwise."""
    vae = VAE(GaussianEncoder(4, 2, 3), BernoulliDecoder(2, 4, 3), StandardNormalPrior()).double()
    images = torch.arange(20, dtype=torch.uint8).view(5, 4)
    found, _ = annealed_estimate(vae, images, num_temperatures=3, num_chains=2)
    expected, _ = annealed_estimate(vae, images.double() / 255, num_temperatures=3, num_chains=2)
    assert found.dtype == torch.float64 and torch.equal(found, expected)


@pytest.mark.usefixtures("five_at_once")
def test_no_two_purposes_share_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is simulated, tuned, weighted and sent back is drawn from a stream of its own for every image."""
    starts: list[tuple] = []
    make = annealed.make_generator
    monkeypatch.setattr(annealed, "make_generator", lambda device, *key: (starts.append(key), make(device, *key))[1])
    simulated_sandwich(make_vae("standard"), count=7, num_temperatures=2, num_chains=3, num_leapfrog_steps=1)
    assert len(starts) == len(set(starts)) == 4 * 10


def test_a_proposal_that_overflows_is_refused_and_the_step_shortened() -> None:
    """Its energy is not a number; the chain stays, and the steps after it are smaller ones."""
    target = Target(lambda z: -0.5 * (z / 1e-40).square().sum(-1), lambda z: torch.zeros(z.shape[:-1], dtype=z.dtype))
    start = 1e-40 * torch.randn(3, 2, 4, dtype=torch.float64)
    chains = anneal(target, start, temperatures(6), generators(0, 2))
    assert torch.equal(chains.z, start) and bool((chains.acceptance == 0.0).all())
    assert bool((chains.step_sizes.diff(dim=0) < 0.0).all())


@pytest.mark.parametrize("name", ["torch.__version__", "popgen.evaluation.annealed.ESTIMATOR_VERSION"])
def test_rows_of_another_version_are_not_used(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in ("98", "99"):
        monkeypatch.setattr(name, version)
        checked(ImageTable(tmp_path / "annealed.csv"), count=2)
    assert "is of another evaluation and is not used" in capsys.readouterr().err
