"""The textbook formulation of the model, its training step and its evaluation: an oracle for tests, and a baseline.

It is written straight from the papers, much as research code is, without any of popgen's faster formulations: one
layer for each quantity, full matrices, explicit broadcasts, one image at a time in evaluation, and the model called
afresh wherever it is needed. Nothing here is slower than that manner asks for.

- Kingma and Welling 2014, https://arxiv.org/abs/1312.6114 (the bound)
- Burda et al. 2016, https://arxiv.org/abs/1509.00519 (the importance-weighted bound)
- Tomczak and Welling 2018, https://arxiv.org/abs/1705.07120 (gated layers, VampPrior)
- van den Berg et al. 2018, https://arxiv.org/abs/1803.05649 (Householder Sylvester flow)
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.priors import StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior

MAX_DIAGONAL = 0.9999  # bound on the diagonals of R and R̃, so that r_ii r̃_ii > -1


def log_normal(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Returns log N(z; mean, diag(exp(log_var))), summed over the last axis."""
    return -0.5 * (math.log(2.0 * math.pi) + log_var + (z - mean) ** 2 / torch.exp(log_var)).sum(-1)


class GatedDense(nn.Module):
    """A linear layer gated by another, h(x) ⊙ sigmoid(g(x)), as in Tomczak and Welling 2018."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.h = nn.Linear(input_dim, output_dim)
        self.g = nn.Linear(input_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(x) * torch.sigmoid(self.g(x))


class Encoder(nn.Module):
    """Mean and log-variance of q(z_0|x), and the last hidden layer, the context of the flow."""

    def __init__(self, input_dim: int, latent_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(GatedDense(input_dim, hidden_dim), GatedDense(hidden_dim, hidden_dim))
        self.mean = nn.Linear(hidden_dim, latent_dim)
        self.log_var = nn.Linear(hidden_dim, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context = self.hidden(x)
        return self.mean(context), F.hardtanh(self.log_var(context), -6.0, 2.0), context


class SylvesterFlow(nn.Module):
    """K maps z ← z + Q R tanh(R̃ Qᵀ z + b) with Q = H_1 H_2 … H_H (van den Berg et al. 2018, eqs. 9, 10 and 13).

    R and R̃ come from a layer each, as in the equation; the authors' code, like popgen, reads both off one square.
    """

    def __init__(self, latent_dim: int, context_dim: int, num_flows: int, num_reflections: int) -> None:
        super().__init__()
        self.latent_dim, self.num_flows, self.num_reflections = latent_dim, num_flows, num_reflections
        self.r = nn.Linear(context_dim, num_flows * latent_dim * latent_dim)
        self.r_tilde = nn.Linear(context_dim, num_flows * latent_dim * latent_dim)
        self.r_diagonal = nn.Linear(context_dim, num_flows * latent_dim)
        self.r_tilde_diagonal = nn.Linear(context_dim, num_flows * latent_dim)
        self.vectors = nn.Linear(context_dim, num_flows * num_reflections * latent_dim)
        self.bias = nn.Linear(context_dim, num_flows * latent_dim)
        self.register_buffer("mask", torch.triu(torch.ones(latent_dim, latent_dim), diagonal=1))
        self.register_buffer("identity", torch.eye(latent_dim))

    def reflection(self, v: Tensor) -> Tensor:
        """Returns the Householder matrix I - 2 v vᵀ / |v|² of each vector."""
        unit = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        return self.identity - 2.0 * unit[..., :, None] * unit[..., None, :]

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z_K, shape `(samples, batch, latent)`, and log |det ∂z_K/∂z_0|, shape `(samples, batch)`."""
        size = self.latent_dim

        def of_each_flow(layer: nn.Linear, *shape: int) -> Tensor:
            return layer(context).view(len(context), self.num_flows, *shape).transpose(0, 1)

        r_diagonal = MAX_DIAGONAL * torch.tanh(of_each_flow(self.r_diagonal, size))
        r_tilde_diagonal = MAX_DIAGONAL * torch.tanh(of_each_flow(self.r_tilde_diagonal, size))
        r = of_each_flow(self.r, size, size) * self.mask + torch.diag_embed(r_diagonal)
        r_tilde = of_each_flow(self.r_tilde, size, size) * self.mask + torch.diag_embed(r_tilde_diagonal)
        vectors = of_each_flow(self.vectors, self.num_reflections, size)
        q = functools.reduce(torch.matmul, [self.reflection(v) for v in vectors.unbind(2)])
        b = of_each_flow(self.bias, size, 1)
        points = z.permute(1, 2, 0)  # the samples of an image are the columns of a matrix: (batch, latent, samples)
        log_det = torch.zeros_like(z[..., 0].T)
        for k in range(self.num_flows):
            h = torch.tanh(r_tilde[k] @ (q[k].mT @ points) + b[k])
            points = points + q[k] @ (r[k] @ h)
            slope = (1.0 - h**2) * (r_diagonal[k] * r_tilde_diagonal[k])[..., None]
            log_det = log_det + torch.log(torch.abs(1.0 + slope)).sum(1)
        return points.permute(2, 0, 1), log_det.T


class Textbook(nn.Module):
    """A VAE with a VampPrior, or N(0, I) if `num_components` is 0, and a posterior flow unless `num_flows` is 0."""

    def __init__(
        self,
        input_dim: int,
        latent_dim: int,
        hidden_dim: int,
        num_components: int,
        num_flows: int,
        num_reflections: int,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = Encoder(input_dim, latent_dim, hidden_dim)
        gated = GatedDense(latent_dim, hidden_dim), GatedDense(hidden_dim, hidden_dim)
        self.decoder = nn.Sequential(*gated, nn.Linear(hidden_dim, input_dim))  # the logits of p(x|z)
        logits = torch.logit(torch.rand(num_components, input_dim), eps=1e-4)
        self.pseudo_input_logits = nn.Parameter(logits) if num_components else None
        self.flow = SylvesterFlow(latent_dim, hidden_dim, num_flows, num_reflections) if num_flows else None

    @classmethod
    @torch.no_grad()
    def like(cls, vae: VAE) -> "Textbook":
        """Returns a textbook model with the weights of a popgen VAE, which computes the same function."""
        encoder, decoder, prior, flow = vae.encoder, vae.decoder, vae.prior, vae.flow
        known = (GaussianEncoder, BernoulliDecoder, StandardNormalPrior | VampPrior, HouseholderSylvesterFlow | None)
        if not all(map(isinstance, (encoder, decoder, prior, flow), known)):
            raise TypeError(f"there is no textbook formulation of {vae}")
        components = len(prior.logits) if isinstance(prior, VampPrior) else 0
        flows, reflections = (0, 0) if flow is None else (flow.num_flows, flow.num_reflections)
        model = cls(vae.input_dim, vae.latent_dim, encoder.context_dim, components, flows, reflections)
        model.to(decoder.logits.weight)
        gated = [*model.encoder.hidden, *model.decoder[:2]]
        for mine, theirs in zip(gated, [*encoder.hidden, *decoder.hidden], strict=True):
            _copy_rows(theirs.linear, lambda rows: rows.chunk(2), mine.h, mine.g)
        _copy_rows(encoder.mean_and_log_var, lambda rows: rows.chunk(2), model.encoder.mean, model.encoder.log_var)
        _copy_rows(decoder.logits, lambda rows: [rows], model.decoder[2])
        if model.pseudo_input_logits is not None:
            model.pseudo_input_logits.copy_(prior.logits)
        if model.flow is not None:
            _copy_flow(flow, model.flow)
        return model

    def log_prior(self, z: Tensor) -> Tensor:
        """Returns log p(z): of N(0, I), or log 1/K Σ_k q(z|u_k) (Tomczak and Welling 2018, eq. 9)."""
        if self.pseudo_input_logits is None:
            return log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
        mean, log_var, _ = self.encoder(torch.sigmoid(self.pseudo_input_logits))
        points = z.reshape(-1, self.latent_dim)
        log_components = log_normal(points, mean[:, None], log_var[:, None])  # sums over (components, points, latent)
        return torch.logsumexp(log_components, dim=0).view(z.shape[:-1]) - math.log(len(mean))

    def log_densities(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log p(x|z), log p(z) and log q(z|x), nats, each of shape `(samples, batch)`.

        Args:
            x: images, shape `(batch, input_dim)`.
            noise: standard normal, shape `(samples, batch, latent_dim)`.
        """
        mean, log_var, context = self.encoder(x)
        z = mean + torch.exp(0.5 * log_var) * noise
        log_q_z_given_x = log_normal(z, mean, log_var)
        if self.flow is not None:
            z, log_det = self.flow(z, context)
            log_q_z_given_x = log_q_z_given_x - log_det
        logits = self.decoder(z)
        negative = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        return -negative.sum(-1), self.log_prior(z), log_q_z_given_x


def _copy_rows(source: nn.Linear, split: Callable, *targets: nn.Linear) -> None:
    """Copies the rows of a layer's weight and bias into the layers that share them out."""
    for name in ("weight", "bias"):
        for target, rows in zip(targets, split(getattr(source, name)), strict=True):
            getattr(target, name).copy_(rows)


def _copy_flow(source: HouseholderSylvesterFlow, target: SylvesterFlow) -> None:
    """Copies a flow, whose squares hold R above the diagonal, its diagonal, and R̃ᵀ below; masked entries become 0."""
    size = target.latent_dim

    def split(rows: Tensor) -> list[Tensor]:
        square, vectors, r_tilde_diagonal, bias = rows.unflatten(0, (target.num_flows, -1)).split(source.sizes, dim=1)
        square = square.reshape(target.num_flows, size, size, -1)
        r, r_tilde = (matrix * target.mask[..., None] for matrix in (square, square.transpose(1, 2)))
        r_diagonal = square.diagonal(dim1=1, dim2=2).mT
        return [part.reshape(-1, *rows.shape[1:]) for part in (r, r_tilde, r_diagonal, r_tilde_diagonal, vectors, bias)]

    layers = (target.r, target.r_tilde, target.r_diagonal, target.r_tilde_diagonal, target.vectors, target.bias)
    _copy_rows(source.parameters_of_context, split, *layers)


class BinarisedImages(Dataset):
    """Grey levels, shape `(count, size)`; every visit to an image binarises it anew."""

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: int) -> Tensor:
        return torch.bernoulli(self.levels[index] / 255.0)


class TextbookTrainer:
    """Trains a model in place on the negative ELBO at β = 1, one sample for each image.

    `levels` are uint8 grey levels on the CPU, shape `(count, size)`; the model is on any device. The decay of
    `weight_average` is at most (1 + step) / (10 + step). `max_gradient_norm` may be None, for no limit.
    """

    def __init__(
        self,
        model: Textbook,
        levels: Tensor,
        batch_size: int = 100,
        learning_rate: float = 2e-4,
        max_gradient_norm: float | None = None,
        weight_average_decay: float = 0.9999,
    ) -> None:
        if batch_size > len(levels):
            raise ValueError(f"batch_size must be at most the {len(levels)} images, got {batch_size}")
        self.model, self.num_steps = model, 0
        self.max_gradient_norm, self.weight_average_decay = max_gradient_norm, weight_average_decay
        loader = DataLoader(BinarisedImages(levels), batch_size, shuffle=True, drop_last=True, num_workers=0)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))  # one epoch after another
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        self.weight_average = [parameter.detach().clone() for parameter in model.parameters()]

    def step(self) -> float:
        """Takes one step on the next batch and returns its loss, nats."""
        x = next(self.batches).to(self.weight_average[0])
        return self.update(x, torch.randn(1, len(x), self.model.latent_dim, dtype=x.dtype, device=x.device))

    def update(self, x: Tensor, noise: Tensor) -> float:
        """Takes one step on given images and noise and returns the loss, nats."""
        log_p_x_given_z, log_p_z, log_q_z_given_x = self.model.log_densities(x, noise)
        loss = -(log_p_x_given_z + log_p_z - log_q_z_given_x).mean()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.num_steps}")
        self.optimizer.zero_grad()
        loss.backward()
        if self.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_gradient_norm)
        self.optimizer.step()
        decay = min(self.weight_average_decay, (1 + self.num_steps) / (10 + self.num_steps))
        with torch.no_grad():
            for average, parameter in zip(self.weight_average, self.model.parameters(), strict=True):
                average.mul_(decay).add_(parameter, alpha=1.0 - decay)
        self.num_steps += 1
        return value


@torch.no_grad()
def iwae(model: Textbook, images: Tensor, num_samples: int, chunk: int = 500, noise: Tensor | None = None) -> Tensor:
    """Returns log 1/S Σ_s p(x|z_s) p(z_s) / q(z_s|x) of every image, nats (Burda et al. 2016, eq. 8).

    Args:
        model: called for every chunk of samples of every image, on as many copies of the image, as the authors of the
            VampPrior do.
        images: values 0.0 and 1.0, shape `(count, input_dim)`.
        num_samples: importance samples S for each image.
        chunk: samples that pass through the model together.
        noise: standard normal, shape `(num_samples, count, latent_dim)`; drawn chunk by chunk if None.
    """
    bounds = []
    for index, image in enumerate(images):
        log_w = []
        for first in range(0, num_samples, chunk):
            if noise is None:
                shape = (min(chunk, num_samples - first), model.latent_dim)
                drawn = torch.randn(shape, dtype=image.dtype, device=image.device)
            else:
                drawn = noise[first : min(first + chunk, num_samples), index]
            copies = image.expand(len(drawn), -1)  # one for each sample: the chunk is a batch, of one sample each
            log_p_x_given_z, log_p_z, log_q_z_given_x = model.log_densities(copies, drawn[None])
            log_w.append((log_p_x_given_z + log_p_z - log_q_z_given_x)[0])
        bounds.append(torch.logsumexp(torch.cat(log_w), dim=0) - math.log(num_samples))
    return torch.stack(bounds)
