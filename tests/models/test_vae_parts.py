"""Parts of a VAE that are of one's own: what they are to return is tried on a few images before the first step."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from popgen.distributions import Bernoulli, DiagonalNormal
from popgen.errors import ArgumentError
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import Bijection, HouseholderSylvesterFlow, PosteriorFlow
from popgen.nn.priors import Prior, StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior

IMAGES = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0, 1.0]])


class WithoutUniform(Prior):
    """A prior whose density draws from one noise alone."""

    def forward(self, encoded=None):
        return DiagonalNormal(torch.zeros(2), torch.zeros(2))


class Density(SimpleNamespace):
    """A density made of two functions."""


class Returning(Prior):
    """A prior that returns whatever it is told."""

    def __init__(self, density) -> None:
        super().__init__()
        self.density = density

    def forward(self, encoded=None):
        return self.density


class OwnBijection(Bijection):
    """A map whose log-determinant is of a shape of its own."""

    def __init__(self, log_det: Tensor) -> None:
        self.log_det = log_det

    def forward_and_log_det(self, z):
        return z, self.log_det

    def inverse(self, z):
        return z


class OwnFlow(PosteriorFlow):
    """A flow that returns whatever it is told."""

    def __init__(self, returned) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, context):
        return self.returned


def own_vae(prior=None, flow=None, encoder=None, decoder=None, kind=VAE) -> VAE:
    encoder, decoder = encoder or GaussianEncoder(6, 2, 5), decoder or BernoulliDecoder(2, 6, 5)
    return kind(encoder, decoder, prior or StandardNormalPrior(), flow)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "prior, message",
    [
        (
            WithoutUniform(),
            r"WithoutUniform returns must have a sample\(noise, uniform\) of shape \(3, 2\), see popgen",
        ),
        (Returning(None), r"Returning returns must have a log_density\(z\) of shape \(2, 3\), see .*'NoneType'"),
        (Returning(torch.distributions.Normal(torch.zeros(2), torch.ones(2))), r"must have a log_density\(z\)"),
        (Returning(Density(log_density=lambda z: z)), r"log_density\(z\) of shape \(2, 3\), got \(2, 3, 2\)"),
        (
            Returning(Density(log_density=lambda z: z.sum(-1), sample=lambda noise, uniform: None)),
            r"must have a sample\(noise, uniform\) of shape \(3, 2\), got a NoneType",
        ),
    ],
)
def test_a_density_is_tried_before_the_first_step(prior: Prior, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        own_vae(prior).check_parts(torch.zeros(3, 6))


@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_prior_or_no_bijection_is_named() -> None:
    with pytest.raises(ArgumentError, match="VAE.prior must be a popgen.nn.priors.Prior, got Linear"):
        own_vae(nn.Linear(2, 2))
    x, noise = torch.zeros(3, 6), torch.zeros(4, 3, 2)
    with pytest.raises(ArgumentError, match="Bijection for a context, and OwnFlow returns a tuple"):
        own_vae(flow=OwnFlow((noise, noise)))(x, noise)
    for shape in ((), (3,), (1, 1), (4, 3, 2)):
        with pytest.raises(
            ArgumentError, match=r"OwnBijection.forward_and_log_det must return .* of shape \(4, 3\), got"
        ):
            own_vae(flow=OwnFlow(OwnBijection(torch.zeros(shape))))(x, noise)
    assert own_vae(flow=OwnFlow(OwnBijection(torch.zeros(4, 3))))(x, noise).log_w.shape == (4, 3)


class OwnEncoder(nn.Module):
    """An encoder that returns what a function makes of the mean."""

    input_dim, latent_dim = 6, 2

    def __init__(self, returned) -> None:
        super().__init__()
        self.layer, self.returned = nn.Linear(6, 2), returned

    def forward(self, x):
        return self.returned(self.layer(x))


class OwnDecoder(OwnEncoder):
    """A decoder that returns what a function makes of the logits."""

    def __init__(self, returned, size: int = 6) -> None:
        super().__init__(returned)
        self.layer = nn.Linear(2, size)


class Laplace(DiagonalNormal):
    """A posterior of another family."""


class Summed(SimpleNamespace):
    """A likelihood whose density is a single number."""


def normal(mean: Tensor) -> DiagonalNormal:
    return DiagonalNormal(mean, torch.zeros_like(mean))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "encoder, message",
    [
        (
            lambda mean: normal(mean),
            r"must return \(DiagonalNormal, context\), and OwnEncoder returns \(DiagonalNormal",
        ),
        (lambda mean: (torch.distributions.Normal(mean, 1.0), mean), r"returns \(Normal, Tensor\)"),
        (lambda mean: (Laplace(mean, mean), mean), r"returns \(Laplace, Tensor\)"),
        (lambda mean: (normal(mean[:, :1]), mean), r"the mean of VAE.encoder must have shape .* \(3, 2\); .* \(3, 1\)"),
        (lambda mean: (normal(mean), None), "VAE.flow needs a context, and the encoder OwnEncoder returns None"),
        (
            lambda mean: mean @ mean,
            r"cannot encode images of .*: mat1 and mat2 .*test_vae_parts.py, line \d+\)",
        ),
    ],
)
def test_an_encoder_is_tried_before_the_first_step(encoder, message: str) -> None:
    flow = HouseholderSylvesterFlow(2, 2, num_flows=1, num_reflections=1)
    with pytest.raises(ArgumentError, match=message):
        own_vae(encoder=OwnEncoder(encoder), flow=flow).check_parts(IMAGES)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "decoder, message",
    [
        (OwnDecoder(lambda logits: logits), "OwnDecoder returns a Tensor without log_density"),
        (OwnDecoder(lambda logits: Summed(log_density=lambda x: logits.sum())), "returns a Summed without mean"),
        (
            OwnDecoder(lambda logits: Summed(log_density=lambda x: logits.sum(), mean=logits)),
            r"VAE must return log_p_x_given_z of shape \(samples, batch\), here \(2, 3\), got shape \(\)",
        ),
        (OwnDecoder(Bernoulli, size=1), "x has events of size 6, and the logits of size 1"),
    ],
)
def test_a_decoder_is_tried_before_the_first_step(decoder: nn.Module, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        own_vae(decoder=decoder).check_parts(IMAGES)


class Company(nn.BatchNorm1d):
    """Batch normalisation by the batch itself."""

    def __init__(self) -> None:
        super().__init__(2, track_running_stats=False)


@pytest.mark.parametrize("prior", [StandardNormalPrior, lambda: VampPrior(6, num_components=4)])
def test_the_bound_of_an_image_is_its_own(prior) -> None:
    company = Company()
    encoder = OwnEncoder(lambda mean: (normal(company(mean)), mean))
    encoder.company = company
    with pytest.raises(ArgumentError, match="of an image depends on the images beside it, as under batch norm"):
        own_vae(encoder=encoder, prior=prior()).check_parts(IMAGES)
    own_vae(encoder=OwnEncoder(lambda mean: (normal(mean), mean)), prior=prior()).check_parts(IMAGES)


class Weighted(VAE):
    """Trains terms of its own."""

    def forward(self, x, noise, path_weights=None):
        terms = super().forward(x, noise, path_weights)
        return terms._replace(log_p_x_given_z=terms.log_p_x_given_z - 1.0)


class WeightedThroughout(VAE):
    """Trains and evaluates terms of its own."""

    def log_densities(self, x, encoded, noise):
        terms = super().log_densities(x, encoded, noise)
        return terms._replace(log_p_x_given_z=terms.log_p_x_given_z - 1.0)


def test_what_is_trained_is_what_is_evaluated() -> None:
    with pytest.raises(ArgumentError, match="log_p_x_given_z of Weighted.forward, which is trained, and of"):
        own_vae(kind=Weighted).check_parts(IMAGES)
    own_vae(kind=WeightedThroughout).check_parts(IMAGES)


def test_a_trial_changes_nothing() -> None:
    """Modes stay as they are, of a part that is not trained too, and grey levels are tried as values."""
    model = own_vae(prior=VampPrior(6, num_components=4))
    model.decoder.eval()
    before, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    model.check_parts((255 * IMAGES).to(torch.uint8))
    assert model.training and model.encoder.training and not model.decoder.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
