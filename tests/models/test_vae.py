"""The VAE: its terms against formulas written out, its contract with its parts, and its errors."""

import copy
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from popgen.distributions import DiagonalNormal
from popgen.errors import ArgumentError, DataError
from popgen.losses import elbo
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow, PlanarFlow
from popgen.nn.priors import GaussianMixturePrior, StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior

INPUT_DIM, LATENT_DIM, HIDDEN_DIM = 12, 3, 8
FLOWS = {
    "none": lambda: None,
    "sylvester": lambda: HouseholderSylvesterFlow(LATENT_DIM, HIDDEN_DIM, num_flows=2, num_reflections=2),
    "planar": lambda: PlanarFlow(LATENT_DIM, HIDDEN_DIM, num_flows=2),
}
PRIORS = {
    "normal": StandardNormalPrior,
    "mixture": lambda: GaussianMixturePrior(num_components=4, latent_dim=LATENT_DIM),
    "vamp": lambda: VampPrior(INPUT_DIM, num_components=5),
}
every_flow = pytest.mark.parametrize("flow", FLOWS)
every_prior = pytest.mark.parametrize("prior", PRIORS)


def make_vae(flow: str = "none", prior: str = "normal") -> VAE:
    """Returns a small VAE in float64 whose posterior depends visibly on the image."""
    model = VAE(
        encoder=GaussianEncoder(INPUT_DIM, LATENT_DIM, HIDDEN_DIM),
        decoder=BernoulliDecoder(LATENT_DIM, INPUT_DIM, HIDDEN_DIM),
        prior=PRIORS[prior](),
        flow=FLOWS[flow](),
    )
    with torch.no_grad():
        for module in (model.encoder, model.decoder):
            for parameter in module.parameters():
                parameter *= 2.0
    return model.double()


def make_images(batch: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns binary images."""
    return torch.randint(2, (batch, INPUT_DIM)).to(dtype)


def make_noise(samples: int = 2, batch: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns posterior noise."""
    return torch.randn(samples, batch, LATENT_DIM, dtype=dtype)


def log_normal(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Returns the log density of a diagonal Gaussian by torch.distributions."""
    return Independent(Normal(mean, torch.exp(0.5 * log_var)), 1).log_prob(z)


def log_prior(model: VAE, z: Tensor) -> Tensor:
    """Returns log p(z) by torch.distributions, for each kind of prior."""
    prior = model.prior
    if isinstance(prior, StandardNormalPrior):
        return log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
    if isinstance(prior, VampPrior):
        components, _ = model.encoder(torch.sigmoid(prior.logits))
        mean, log_var, logits = components.mean, components.log_var, torch.zeros(len(prior.logits)).to(z)
    else:
        mean, log_var, logits = prior.mean, prior.log_var, prior.logits
    components = Independent(Normal(mean, torch.exp(0.5 * log_var)), 1)
    return MixtureSameFamily(Categorical(logits=logits), components).log_prob(z)


@every_flow
@every_prior
@pytest.mark.parametrize("batch", [1, 4])
def test_terms_equal_their_formulas(flow: str, prior: str, batch: int) -> None:
    """Reconstruction, prior and posterior at z_K, with log q(z_K|x) = log N(z_0) - log |det ∂z_K/∂z_0|."""
    model, x, noise = make_vae(flow, prior), make_images(batch), make_noise(batch=batch)
    terms = model(x, noise)
    posterior, context = model.encoder(x)
    start = posterior.mean + torch.exp(0.5 * posterior.log_var) * noise
    end, log_det = start, torch.zeros(2, batch, dtype=torch.float64)
    if model.flow is not None:
        bijection = model.flow(context)
        end, _ = bijection.forward_and_log_det(start)
        rows = [
            torch.autograd.grad(bijection.forward_and_log_det(start)[0][..., i].sum(), start, retain_graph=True)[0]
            for i in range(LATENT_DIM)
        ]
        log_det = torch.linalg.slogdet(torch.stack(rows, dim=-2)).logabsdet
        assert log_det.abs().max() > 1e-3
    log_q_z_given_x = log_normal(start, posterior.mean, posterior.log_var) - log_det
    logits = model.decoder(end).logits
    log_p_x_given_z = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    log_p_z = log_prior(model, end)

    assert terms.log_w.shape == (2, batch)
    torch.testing.assert_close(terms.log_det, log_det)
    torch.testing.assert_close(terms.log_q_z_given_x, log_q_z_given_x)
    torch.testing.assert_close(terms.log_p_z, log_p_z)
    torch.testing.assert_close(terms.log_p_x_given_z, log_p_x_given_z)
    torch.testing.assert_close(terms.log_w, log_p_x_given_z + log_p_z - log_q_z_given_x)
    bound = elbo(terms.log_p_x_given_z, terms.log_p_z, terms.log_q_z_given_x)
    torch.testing.assert_close(bound, terms.log_w.mean(0))


@every_flow
@every_prior
def test_forward_is_encode_and_log_densities(flow: str, prior: str) -> None:
    """What depends on the images alone can be computed once and used for any number of samples."""
    model, x, noise = make_vae(flow, prior), make_images(), make_noise(samples=6)
    whole, encoded = model(x, noise), model.encode(x)
    for first in (0, 2, 4):
        part = model.log_densities(x, encoded, noise[first : first + 2])
        for name, term in part._asdict().items():
            torch.testing.assert_close(term, getattr(whole, name)[first : first + 2])


@every_flow
@every_prior
def test_examples_do_not_meet(flow: str, prior: str) -> None:
    """A batch gives what its examples give one at a time."""
    model, x, noise = make_vae(flow, prior), make_images(), make_noise()
    log_w = model(x, noise).log_w
    alone = [model(x[i : i + 1], noise[:, i : i + 1]).log_w for i in range(4)]
    torch.testing.assert_close(torch.cat(alone, dim=1), log_w)


@every_flow
def test_pseudo_inputs_encoded_with_the_batch_are_those_encoded_apart(flow: str) -> None:
    """One call of the encoder serves both, and neither changes the other."""
    model, x = make_vae(flow, "vamp"), make_images()
    calls = []
    handle = model.encoder.register_forward_hook(lambda *_: calls.append(None))
    encoded = model.encode(x)
    handle.remove()
    assert len(calls) == 1

    posterior, context = model.encoder(x)
    torch.testing.assert_close(encoded.posterior.mean, posterior.mean)
    torch.testing.assert_close(encoded.posterior.log_var, posterior.log_var)
    pseudo, _ = model.encoder(model.prior.pseudo_inputs())
    for density in (encoded.prior, model.prior_density()):
        torch.testing.assert_close(density.mean, pseudo.mean)
        torch.testing.assert_close(density.log_var, pseudo.log_var)
    if model.flow is not None:
        z = make_noise()
        together, apart = encoded.bijection, model.flow(context)
        torch.testing.assert_close(together.forward_and_log_det(z)[0], apart.forward_and_log_det(z)[0])


@every_prior
def test_prior_density_is_the_prior(prior: str) -> None:
    """The density that samples are drawn from is the one in the bound."""
    model, z = make_vae(prior=prior), make_noise()
    torch.testing.assert_close(model.prior_density().log_density(z), log_prior(model, z))


@every_flow
def test_latent_code_is_the_moved_mean(flow: str) -> None:
    """The code is where the posterior puts an image when there is no noise."""
    model, x = make_vae(flow), make_images()
    posterior, context = model.encoder(x)
    expected = posterior.mean
    if model.flow is not None:
        expected = model.flow(context).forward_and_log_det(posterior.mean[None])[0].squeeze(0)
        assert (expected - posterior.mean).abs().max() > 1e-2
    torch.testing.assert_close(model.latent_code(x), expected)


@every_flow
@every_prior
def test_every_parameter_gets_a_gradient(flow: str, prior: str) -> None:
    """From the ELBO, whatever the pair of flow and prior."""
    model = make_vae(flow, prior)
    x = torch.rand(4, INPUT_DIM, dtype=torch.float64)  # a pixel that is off in all images would get none
    terms = model(x, make_noise())
    elbo(terms.log_p_x_given_z, terms.log_p_z, terms.log_q_z_given_x).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0.0).all(), name


@every_flow
@every_prior
def test_float32_agrees_with_float64(flow: str, prior: str) -> None:
    """Single precision in, single precision out, and the same numbers."""
    model, x, noise = make_vae(flow, prior), make_images(), make_noise()
    exact = model(x, noise)
    rounded = model.float()(x.float(), noise.float())
    for term, reference in zip(rounded, exact, strict=True):
        assert reference.dtype == torch.float64
        assert term.dtype == torch.float32
        torch.testing.assert_close(term.double(), reference, rtol=1e-4, atol=1e-4)


@every_flow
@every_prior
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_densities_in_float32(flow: str, prior: str, dtype: torch.dtype) -> None:
    model, x, noise = make_vae(flow, prior), make_images(), make_noise()
    half = copy.deepcopy(model).to(dtype)
    for weights in (None, torch.ones(2, 4)):
        found = half(x.to(dtype), noise.to(dtype), weights).log_w
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), model(x, noise).log_w, rtol=0.05, atol=0.3)
    half.check_parts(x)


@every_flow
@every_prior
def test_shapes_are_known_on_the_meta_device(flow: str, prior: str) -> None:
    model = make_vae(flow, prior).to("meta")
    assert model(make_images().to("meta"), make_noise().to("meta")).log_w.shape == (2, 4)


def test_saved_model_is_the_same_model() -> None:
    """A state dictionary holds all there is."""
    saved, loaded, x, noise = make_vae("sylvester", "vamp"), make_vae("sylvester", "vamp"), make_images(), make_noise()
    assert not torch.equal(saved(x, noise).log_w, loaded(x, noise).log_w)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(saved(x, noise).log_w, loaded(x, noise).log_w)


def test_log_variance_is_clamped() -> None:
    """To [-6, 2], both ends of which are reached, while the mean is free; inside, nothing is changed."""
    encoder = GaussianEncoder(INPUT_DIM, LATENT_DIM, HIDDEN_DIM)
    x = make_images(100, torch.float32)
    posterior, context = encoder(x)
    _, free = F.linear(context, encoder.mean_and_log_var.weight, encoder.mean_and_log_var.bias).chunk(2, dim=-1)
    torch.testing.assert_close(posterior.log_var, free)
    with torch.no_grad():
        encoder.mean_and_log_var.weight *= 1e4
    posterior, _ = encoder(x)
    assert posterior.log_var.min() == -6.0
    assert posterior.log_var.max() == 2.0
    assert posterior.mean.abs().max() > 6.0


class TableEncoder(nn.Module):
    """An encoder of one's own: a linear map of the input, and no context worth the name."""

    def __init__(self) -> None:
        super().__init__()
        self.input_dim, self.latent_dim = INPUT_DIM, LATENT_DIM
        self.mean = nn.Linear(INPUT_DIM, LATENT_DIM).double()

    def forward(self, x: Tensor) -> tuple[DiagonalNormal, Tensor]:
        mean = self.mean(x)
        return DiagonalNormal(mean, torch.full_like(mean, -1.0)), x


class LaplaceLikelihood:
    """A likelihood that popgen does not know: independent Laplace variables of scale one."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def log_density(self, x: Tensor) -> Tensor:
        return -((x - self.mean).abs() + torch.log(torch.tensor(2.0).to(x))).sum(-1)


class LaplaceDecoder(nn.Module):
    """A decoder of one's own, with that likelihood; it states its latent size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_dim = LATENT_DIM
        self.mean = nn.Linear(LATENT_DIM, INPUT_DIM).double()

    def forward(self, z: Tensor) -> LaplaceLikelihood:
        return LaplaceLikelihood(self.mean(z))


class GaussianDecoder(LaplaceDecoder):
    """A decoder whose likelihood is popgen's own Gaussian, with unit variance."""

    def forward(self, z: Tensor) -> DiagonalNormal:
        mean = self.mean(z)
        return DiagonalNormal(mean, torch.zeros_like(mean))


@pytest.mark.parametrize(
    "make_decoder, family", [(LaplaceDecoder, torch.distributions.Laplace), (GaussianDecoder, Normal)]
)
@every_prior
def test_parts_of_ones_own(make_decoder: type[nn.Module], family: Any, prior: str) -> None:
    """Any module that returns a distribution is an encoder or a decoder."""
    model = VAE(TableEncoder(), make_decoder(), PRIORS[prior]().double())
    x, noise = torch.randn(4, INPUT_DIM, dtype=torch.float64), make_noise()
    mean = model.encoder.mean(x)
    z = mean + noise * torch.exp(torch.tensor(-0.5))
    expected = (
        family(model.decoder.mean(z), 1.0).log_prob(x).sum(-1)
        + log_prior(model, z)
        - log_normal(z, mean, torch.full_like(mean, -1.0))
    )
    torch.testing.assert_close(model(x, noise).log_w, expected, rtol=1e-6, atol=1e-6)
    model.check_examples(1e3 * x)  # no likelihood is stated, so no values are refused


PARTS = {
    "encoder": lambda: GaussianEncoder(INPUT_DIM, LATENT_DIM, HIDDEN_DIM),
    "decoder": lambda: BernoulliDecoder(LATENT_DIM, INPUT_DIM, HIDDEN_DIM),
    "prior": StandardNormalPrior,
    "flow": lambda: None,
}


@pytest.mark.parametrize(
    "part, misfit, message",
    [
        (
            "decoder",
            lambda: BernoulliDecoder(4, INPUT_DIM),
            "decoder.latent_dim is 4, but encoder.latent_dim is 3",
        ),
        (
            "decoder",
            lambda: BernoulliDecoder(LATENT_DIM, 13),
            "decoder.output_dim is 13, but encoder.input_dim is 12",
        ),
        ("prior", lambda: GaussianMixturePrior(4, 5), "prior.latent_dim is 5, but encoder.latent_dim is 3"),
        ("prior", lambda: VampPrior(11), "prior.input_dim is 11, but encoder.input_dim is 12"),
        (
            "flow",
            lambda: HouseholderSylvesterFlow(2, HIDDEN_DIM),
            "flow.latent_dim is 2, but encoder.latent_dim is 3",
        ),
        ("flow", lambda: PlanarFlow(LATENT_DIM, 9), "flow.context_dim is 9, but encoder.context_dim is 8"),
    ],
)
def test_parts_that_do_not_fit_are_named(part: str, misfit: Any, message: str) -> None:
    """Both sizes, before any tensor meets another."""
    parts = {name: make() for name, make in {**PARTS, part: misfit}.items()}
    with pytest.raises(ArgumentError, match=message):
        VAE(**parts)


@pytest.mark.parametrize(
    "part, value",
    [("encoder", None), ("decoder", None), ("prior", None)]
    + [(part, value) for part in PARTS for value in (GaussianEncoder, 3)],
)
def test_parts_must_be_modules(part: str, value: Any) -> None:
    """A class, a number or nothing at all in place of a module is named; only the flow may be left out."""
    parts = {name: make() for name, make in {**PARTS, part: lambda: value}.items()}
    below_the_type_checker = inspect.unwrap(VAE.__init__)
    with pytest.raises(ArgumentError, match=f"VAE.{part} must be a torch.nn.Module") as error:
        below_the_type_checker(VAE.__new__(VAE), **parts)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "make_part, message",
    [
        (lambda: GaussianEncoder(0, 3), "GaussianEncoder.input_dim must be an integer of at least 1, got 0"),
        (lambda: GaussianEncoder(12, -1), "GaussianEncoder.latent_dim must be an integer of at least 1, got -1"),
        (lambda: GaussianEncoder(12, 3, 0), "GaussianEncoder.hidden_dim must be an integer of at least 1, got 0"),
        (lambda: BernoulliDecoder(0, 12), "BernoulliDecoder.latent_dim must be an integer of at least 1, got 0"),
        (lambda: BernoulliDecoder(3, 0), "BernoulliDecoder.output_dim must be an integer of at least 1, got 0"),
        (lambda: BernoulliDecoder(3, 12, -8), "BernoulliDecoder.hidden_dim must be an integer of at least 1, got -8"),
    ],
)
def test_bad_arguments_are_named(make_part: Any, message: str) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ArgumentError, match=message):
        make_part()


@pytest.mark.parametrize("shape", [(4, 13), (4, 3, 4), (12,)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    """The message holds the shape that came and the one that is taken."""
    with pytest.raises(DataError, match=r"the encoder takes \(count, 12\)") as error:
        make_vae().check_examples(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("value", [1.2, -0.1, float("nan")])
def test_images_outside_the_support_are_refused(value: float) -> None:
    """A Bernoulli decoder takes values in [0, 1]."""
    images = torch.rand(4, INPUT_DIM)
    images[2, 3] = value
    with pytest.raises(DataError, match="Bernoulli"):
        make_vae().check_examples(images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_good_images_pass(dtype: torch.dtype) -> None:
    """Grey levels, and values in [0, 1] of either precision; a single image too."""
    make_vae().check_examples(make_images(1, dtype))


class Bare(nn.Module):
    """An encoder without a context, and perhaps without sizes."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        for name, size in sizes.items():
            setattr(self, name, size)

    def forward(self, x):
        mean, log_var = self.layer(x).chunk(2, dim=-1)
        return DiagonalNormal(mean, log_var), None


def test_an_encoder_states_its_sizes() -> None:
    for sizes, missing in (({}, "input_dim"), ({"input_dim": 6}, "latent_dim")):
        with pytest.raises(ArgumentError, match=f"VAE.encoder must have an attribute {missing}.*Bare"):
            VAE(Bare(**sizes), BernoulliDecoder(2, 6, 3), StandardNormalPrior())


def test_an_encoder_needs_no_context_where_there_is_no_flow() -> None:
    vae = VAE(Bare(input_dim=6, latent_dim=2), BernoulliDecoder(2, 6, 3), VampPrior(6, num_components=3))
    assert vae(torch.zeros(5, 6), torch.randn(1, 5, 2)).log_w.shape == (1, 5)


COMPILED_ALONE = """
import torch
from popgen.nn.flows import HouseholderSylvesterFlow
flow = HouseholderSylvesterFlow(4, 5, 2, 2)
moved = lambda context, z: flow(context).forward_and_log_det(z)[0]
context, z = torch.randn(3, 5), torch.randn(2, 3, 4)
found = torch.compile(moved, fullgraph=True, backend="eager")(context, z)
torch.testing.assert_close(found, moved(context, z))

from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import PlanarFlow
from popgen.nn.vamp_prior import VampPrior
x, noise = torch.rand(3, 16).round(), torch.randn(2, 3, 4)
for flow in (HouseholderSylvesterFlow(4, 8, 2, 2), PlanarFlow(4, 8, 2)):
    vae = VAE(GaussianEncoder(16, 4, 8), BernoulliDecoder(4, 16, 8), VampPrior(16, 5), flow)
    for weights in (None, torch.ones(2, 3)):
        found = torch.compile(vae, fullgraph=True, backend="eager")(x, noise, weights)
        torch.testing.assert_close(found.log_w, vae(x, noise, weights).log_w)
"""


def test_parts_are_compiled_in_one_piece_by_users() -> None:
    """In a process that has compiled nothing of popgen's yet."""
    done = subprocess.run([sys.executable, "-c", COMPILED_ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
