"""Lower bounds on log p(x), in nats per example; higher is better."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from popgen.errors import ArgumentError


def elbo(
    log_p_x_given_z: Float[Tensor, "samples batch"],
    log_p_z: Float[Tensor, "samples batch"],
    log_q_z_given_x: Float[Tensor, "samples batch"],
    beta: float | Tensor = 1.0,
) -> Float[Tensor, " batch"]:
    """Returns the evidence lower bound of each example, nats, averaged over its samples.

        ELBO_β = E_q [log p(x|z) - β (log q(z|x) - log p(z))]

    With β = 1 it is a lower bound on log p(x) (Kingma and Welling 2014, https://arxiv.org/abs/1312.6114, eq. 3);
    other weights give the β-VAE objective, which is no bound when β < 1.

    Args:
        log_p_x_given_z: log-likelihoods, shape `(samples, batch)`.
        log_p_z: prior log densities at the same samples.
        log_q_z_given_x: posterior log densities at the same samples.
        beta: weight of the KL term, a number or a scalar tensor.

    Raises:
        ArgumentError: if the shapes differ.

    Example:
        >>> ones = torch.ones(1, 4)
        >>> elbo(log_p_x_given_z=-90 * ones, log_p_z=-50 * ones, log_q_z_given_x=-30 * ones)
        tensor([-110., -110., -110., -110.])
    """
    if not log_p_x_given_z.shape == log_p_z.shape == log_q_z_given_x.shape:
        raise ArgumentError(
            "log_p_x_given_z, log_p_z and log_q_z_given_x must have one shape (samples, batch), got "
            f"{tuple(log_p_x_given_z.shape)}, {tuple(log_p_z.shape)} and {tuple(log_q_z_given_x.shape)}"
        )
    return (log_p_x_given_z - beta * (log_q_z_given_x - log_p_z)).mean(0)


def iwae(log_w: Float[Tensor, "samples batch"]) -> Float[Tensor, " batch"]:
    """Returns the importance-weighted bound of each example, nats.

        IWAE_K = log 1/K Σ_k w_k,   w_k = p(x|z_k) p(z_k) / q(z_k|x)

    (Burda et al. 2016, https://arxiv.org/abs/1509.00519, eq. 8). Its expectation never falls in K, is the ELBO
    at K = 1 and tends to log p(x).

    Args:
        log_w: log importance weights, shape `(samples, batch)`.

    Raises:
        ArgumentError: if there are no samples.

    Example:
        >>> iwae(torch.tensor([[0.0], [0.0]]))
        tensor([0.])
    """
    if len(log_w) == 0:
        raise ArgumentError(f"log_w must hold at least one sample, got shape {tuple(log_w.shape)}")
    return torch.logsumexp(log_w, dim=0) - math.log(len(log_w))


def doubly_reparameterised_weights(
    log_w: Float[Tensor, "samples batch"], beta: float | Tensor = 1.0
) -> Float[Tensor, "samples batch"]:
    """Returns what multiplies the path gradient of each sample, beyond its share of the importance-weighted bound.

        ∇_φ E log 1/K Σ_k w_k = E Σ_k w̄_k (1 - β + β w̄_k) ∂log w_k/∂z_k ∇_φ z_k,   w̄_k = w_k / Σ_j w_j

    At β = 1 these are eqs. 7 and 8 of Tucker et al. 2019 (https://arxiv.org/abs/1810.04152): the score function of q is
    reparameterised once more and gives the second w̄_k. With w_k = p(x|z_k) (p(z_k) / q(z_k|x))^β it comes β times, and
    so a part of 1 - β remains.

    Args:
        log_w: log importance weights, of the KL weight β too, shape `(samples, batch)`.
        beta: weight of the KL term.

    Example:
        >>> doubly_reparameterised_weights(torch.tensor([[0.0], [0.0]]))
        tensor([[0.5000],
                [0.5000]])
    """
    return 1.0 - beta + beta * torch.softmax(log_w, dim=0)
