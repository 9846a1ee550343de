"""A linear-Gaussian VAE has its log-likelihood in closed form, and every estimator must find it."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from popgen.distributions import DiagonalNormal
from popgen.evaluation.likelihood import estimate_log_likelihood, evaluate_elbo
from popgen.losses import elbo
from popgen.models.vae import VAE
from popgen.nn.flows import Bijection, PosteriorFlow
from popgen.nn.priors import StandardNormalPrior
from popgen.training.importance_objectives import DoublyReparameterisedIWAE, StickingTheLanding
from popgen.training.objectives import AnnealedObjective, NegativeELBO

INPUT_DIM, LATENT_DIM = 4, 2


class LinearEncoder(nn.Module):
    """A Gaussian q(z|x) whose mean is linear in x and whose variance is the same for all x; the context is x."""

    def __init__(self) -> None:
        super().__init__()
        self.input_dim, self.latent_dim, self.context_dim = INPUT_DIM, LATENT_DIM, INPUT_DIM
        self.mean = nn.Linear(INPUT_DIM, LATENT_DIM)
        self.log_var = nn.Parameter(torch.zeros(LATENT_DIM))

    def forward(self, x: Tensor) -> tuple[DiagonalNormal, Tensor]:
        mean = self.mean(x)
        return DiagonalNormal(mean, self.log_var.expand_as(mean)), x


class LinearDecoder(nn.Module):
    """A Gaussian p(x|z) = N(W z + b, s² I)."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_dim, self.output_dim = LATENT_DIM, INPUT_DIM
        self.mean = nn.Linear(LATENT_DIM, INPUT_DIM)
        self.log_var = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> DiagonalNormal:
        mean = self.mean(z)
        return DiagonalNormal(mean, self.log_var.expand_as(mean))


class AffineBijection(Bijection):
    """z ← A z + c, with a shift c for each example."""

    def __init__(self, matrix: Tensor, shift: Tensor) -> None:
        self.matrix, self.shift = matrix, shift

    def forward_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.linalg.slogdet(self.matrix).logabsdet
        return z @ self.matrix.T + self.shift, log_det.expand(z.shape[:-1])

    def inverse(self, z: Tensor) -> Tensor:
        return (z - self.shift) @ torch.linalg.inv(self.matrix).T

    def push_score(self, z: Tensor, score: Tensor) -> Tensor:
        return score @ torch.linalg.inv(self.matrix)


class AffineFlow(PosteriorFlow):
    """A flow of one's own: it turns N(0, I) into any Gaussian whose mean is linear in the context."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(matrix), nn.Linear(INPUT_DIM, LATENT_DIM)

    def forward(self, context: Tensor) -> AffineBijection:
        return AffineBijection(self.matrix, self.shift(context))


def marginal(decoder: LinearDecoder) -> MultivariateNormal:
    """Returns p(x) = N(b, W Wᵀ + s² I)."""
    weight, identity = decoder.mean.weight.detach(), torch.eye(INPUT_DIM, dtype=torch.float64)
    return MultivariateNormal(decoder.mean.bias.detach(), weight @ weight.T + decoder.log_var.exp().item() * identity)


def exact_posterior(decoder: LinearDecoder) -> tuple[Tensor, Tensor]:
    """Returns gain G and covariance of p(z|x) = N(G (x - b), C), by conditioning the joint Gaussian of z and x."""
    weight = decoder.mean.weight.detach()
    gain = weight.T @ torch.linalg.inv(marginal(decoder).covariance_matrix)
    covariance = torch.eye(LATENT_DIM, dtype=torch.float64) - gain @ weight
    return gain, 0.5 * (covariance + covariance.T)


def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Gives a linear layer its weight and bias."""
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)


def make_vae(decoder: LinearDecoder, flow: AffineFlow | None = None) -> VAE:
    """Returns a VAE with a standard normal prior, in float64."""
    return VAE(LinearEncoder(), decoder, StandardNormalPrior(), flow).double()


def make_decoder() -> LinearDecoder:
    """Returns a decoder with visible noise, whose weight has orthogonal columns: its posterior is diagonal."""
    decoder = LinearDecoder().double()
    columns = torch.linalg.qr(torch.randn(INPUT_DIM, LATENT_DIM, dtype=torch.float64)).Q
    set_linear(decoder.mean, columns * torch.tensor([1.5, 0.7]).double(), torch.randn(INPUT_DIM).double())
    with torch.no_grad():
        decoder.log_var.fill_(math.log(0.3))
    return decoder


def make_exact_vae(through_flow: bool) -> VAE:
    """Returns a VAE whose posterior is exact: the encoder's own, or one with correlations that a flow makes."""
    decoder = make_decoder()
    if not through_flow:
        gain, covariance = exact_posterior(decoder)
        torch.testing.assert_close(covariance, covariance.diagonal().diag())
        model = make_vae(decoder)
        set_linear(model.encoder.mean, gain, -gain @ decoder.mean.bias)
        model.encoder.log_var.data.copy_(covariance.diagonal().log())
        return model
    with torch.no_grad():
        decoder.mean.weight.copy_(torch.tensor([[1.5, 0.5], [0.2, -0.7], [0.8, 0.9], [-0.3, 0.4]]))
    gain, covariance = exact_posterior(decoder)
    assert covariance[0, 1].abs() > 1e-2
    model = make_vae(decoder, AffineFlow(torch.linalg.cholesky(covariance)))
    set_linear(model.flow.shift, gain, -gain @ decoder.mean.bias)
    for parameter in model.encoder.parameters():
        parameter.data.zero_()
    return model


def make_data(count: int) -> Tensor:
    """Returns correlated observations."""
    mixing = torch.randn(INPUT_DIM, INPUT_DIM, dtype=torch.float64) * torch.tensor([2.0, 1.2, 0.4, 0.3]).double()
    return torch.randn(count, INPUT_DIM, dtype=torch.float64) @ mixing.T + torch.randn(INPUT_DIM).double()


@pytest.mark.parametrize("through_flow", [False, True])
def test_exact_posterior_gives_the_log_likelihood(through_flow: bool) -> None:
    """Every sample, every bound and every estimator finds log p(x), without any variance."""
    model, x = make_exact_vae(through_flow), make_data(7)
    log_p_x = marginal(model.decoder).log_prob(x)
    log_w = model(x, torch.randn(20, 7, LATENT_DIM, dtype=torch.float64)).log_w
    torch.testing.assert_close(log_w, log_p_x.expand(20, 7), rtol=0, atol=1e-9)
    torch.testing.assert_close(evaluate_elbo(model, x, batch_size=3)["elbo"], log_p_x, rtol=0, atol=1e-9)
    for num_samples in (1, 3, 2_500):
        found = estimate_log_likelihood(model, x, num_samples)
        torch.testing.assert_close(found, log_p_x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("through_flow", [False, True])
def test_wrong_posterior_costs_its_divergence(through_flow: bool) -> None:
    """The ELBO is below by KL(q ‖ p(z|x)), and importance sampling makes that good."""
    model, x = make_exact_vae(through_flow), make_data(3)
    gain, covariance = exact_posterior(model.decoder)
    exact = MultivariateNormal((x - model.decoder.mean.bias.detach()) @ gain.T, covariance)
    model.encoder.mean.bias.data += 0.1
    model.encoder.log_var.data += 0.5
    log_p_x = marginal(model.decoder).log_prob(x)
    with torch.no_grad():
        encoded = model.encode(x)
        centre, spread = encoded.posterior.mean, torch.diag(encoded.posterior.log_var[0].exp())
        if through_flow:
            matrix = model.flow.matrix
            centre, spread = encoded.bijection.forward_and_log_det(centre[None])[0][0], matrix @ spread @ matrix.T
        gap = kl_divergence(MultivariateNormal(centre, spread), exact)
        log_w = model(x, torch.randn(20_000, 3, LATENT_DIM, dtype=torch.float64)).log_w
    error = log_w.std(0) / math.sqrt(len(log_w))
    assert (gap > 10.0 * error).all()
    assert ((log_w.mean(0) - (log_p_x - gap)).abs() < 5.0 * error).all()
    found = estimate_log_likelihood(model, x, num_samples=20_000)
    torch.testing.assert_close(found, log_p_x, rtol=0, atol=0.02)


def sigma_points(batch: int) -> Tensor:
    """Returns ±√L e_i, whose mean and covariance are those of the noise: the ELBO here is quadratic in it, so exact."""
    axes = math.sqrt(LATENT_DIM) * torch.eye(LATENT_DIM, dtype=torch.float64)
    return torch.cat([axes, -axes])[:, None].expand(-1, batch, -1)


def maximise(model: VAE, x: Tensor, parameters: list[nn.Parameter]) -> float:
    """Trains some parameters on the exact ELBO, and returns the mean that is reached."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=400, tolerance_grad=1e-8, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        terms = model(x, sigma_points(len(x)))
        value = -elbo(terms.log_p_x_given_z, terms.log_p_z, terms.log_q_z_given_x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    return -loss().item()


def test_trained_encoder_finds_the_log_likelihood() -> None:
    """With the decoder held, the best encoder is the exact posterior: ELBO, IWAE and log p(x) meet."""
    model, x = make_vae(make_decoder()), make_data(10)
    log_p_x = marginal(model.decoder).log_prob(x)
    reached = maximise(model, x, list(model.encoder.parameters()))
    assert reached == pytest.approx(log_p_x.mean().item(), abs=1e-6)
    torch.testing.assert_close(estimate_log_likelihood(model, x, num_samples=10), log_p_x, rtol=0, atol=1e-3)
    gain, covariance = exact_posterior(model.decoder)
    torch.testing.assert_close(model.encoder.mean.weight.detach(), gain, rtol=0, atol=1e-3)
    torch.testing.assert_close(model.encoder.log_var.detach().exp(), covariance.diagonal(), rtol=0, atol=1e-3)


def test_trained_vae_is_probabilistic_principal_components() -> None:
    """Trained as a whole it reaches the maximum of the likelihood, known from the eigenvalues of the data.

    Tipping and Bishop 1999: s² is the mean of the discarded eigenvalues λ, and the mean log-likelihood at the maximum
    is -1/2 [D log 2π + Σ_kept log λ + (D - L) log s² + D].
    """
    x = make_data(40)
    model = make_vae(LinearDecoder())
    reached = maximise(model, x, list(model.parameters()))
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    discarded, kept = eigenvalues[: INPUT_DIM - LATENT_DIM], eigenvalues[INPUT_DIM - LATENT_DIM :]
    log_det = kept.log().sum() + len(discarded) * discarded.mean().log()
    best = -0.5 * (INPUT_DIM * math.log(2.0 * math.pi) + log_det.item() + INPUT_DIM)
    assert reached == pytest.approx(best, abs=1e-5)
    assert model.decoder.log_var.exp().item() == pytest.approx(discarded.mean().item(), rel=1e-2)
    log_p_x = marginal(model.decoder).log_prob(x)
    assert log_p_x.mean().item() == pytest.approx(best, abs=1e-5)
    torch.testing.assert_close(estimate_log_likelihood(model, x, num_samples=10), log_p_x, rtol=0, atol=1e-2)


@pytest.mark.parametrize("objective", [StickingTheLanding(num_samples=3), DoublyReparameterisedIWAE(num_samples=3)])
@pytest.mark.parametrize("through_flow", [False, True])
def test_at_an_exact_posterior_path_derivatives_have_no_noise(objective: AnnealedObjective, through_flow: bool) -> None:
    """Every draw has a gradient of nought for the posterior, where that of the plain objective is all noise."""
    model, x, noise = make_exact_vae(through_flow), make_data(7), torch.randn(3, 7, LATENT_DIM, dtype=torch.float64)
    parameters = [*model.encoder.parameters(), *([] if model.flow is None else model.flow.parameters())]
    settings = {"beta": torch.tensor(1.0, dtype=torch.float64)}

    def size(objective: AnnealedObjective) -> float:
        loss, _, _ = objective(model, x, noise, settings, {})
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return max(gradient.abs().max().item() for gradient in gradients if gradient is not None)

    assert size(objective) < 1e-12
    assert size(NegativeELBO(num_samples=3)) > 1e-2
