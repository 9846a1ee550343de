"""Objectives of a VAE that go beyond the ELBO or its plain gradient: importance weights, and path derivatives.

    objective                    minimises (a mean over the batch)     gradient of q's parameters
    NegativeELBO                 -ELBO                                  as it comes
    StickingTheLanding           -ELBO                                  along the path alone
    NegativeIWAE                 -log 1/K Σ_k w_k                       as it comes
    DoublyReparameterisedIWAE    -log 1/K Σ_k w_k                       along the path alone, weights squared

Each pair has the same expected gradient. What the path derivative leaves out has an expectation of zero, and where q
is near the true posterior it is all the noise there is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from popgen.losses import doubly_reparameterised_weights, iwae
from popgen.models.image_model import LogDensities
from popgen.models.vae import VAE
from popgen.training.objective import LossOutput, Settings, Tensors
from popgen.training.objectives import AnnealedObjective, NegativeELBO, bound_metrics


@dataclasses.dataclass(frozen=True)
class StickingTheLanding(NegativeELBO):
    """Minimises the loss of `NegativeELBO`, with the path-derivative gradient (Roeder et al. 2017).

    The score function of q, whose expectation is zero, is left out of the gradient (section 3 of
    https://arxiv.org/abs/1703.09194): where q is the true posterior, no noise is left.

    Metrics: those of `NegativeELBO`.

    Args:
        beta: the KL weight as a function of the number of steps taken.
        num_samples: posterior samples for each image, over which the bound is averaged.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> StickingTheLanding().settings(step=0)
        {'beta': 1.0}
    """

    model_type: ClassVar[type] = VAE

    def terms(self, forward: Callable[..., Any], batch: Tensor, noise: Tensor, beta: Tensor) -> LogDensities:
        """Returns the terms of the bound; the gradients of q's parameters in log q(z|x) are gone."""
        return forward(batch, noise, torch.ones_like(noise[..., 0]))


@dataclasses.dataclass(frozen=True)
class NegativeIWAE(AnnealedObjective):
    """Minimises -log 1/K Σ_k w_k, w_k = p(x|z_k) (p(z_k) / q(z_k|x))^β, averaged over the batch, nats.

    At β = 1 the importance-weighted bound (Burda et al. 2016, https://arxiv.org/abs/1509.00519, eq. 8).

    Metrics: those of `NegativeELBO`, and `iwae`, the bound with all samples at β = 1.

    Args:
        beta: the KL weight as a function of the number of steps taken.
        num_samples: posterior samples K for each image.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> NegativeIWAE(num_samples=0)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: NegativeIWAE.num_samples must be an integer of at least 1, got 0
    """

    num_samples: int = 5

    def __call__(
        self, forward: Callable[..., Any], batch: Tensor, noise: Tensor, settings: Settings, state: Tensors
    ) -> LossOutput:
        """Returns the loss and the metrics of a batch; nothing else changes."""
        terms = self.terms(forward, batch, noise, settings["beta"])
        loss = -iwae(weights_of(terms, settings["beta"])).mean()
        metrics = {
            "loss": loss.detach(),
            "iwae": iwae(terms.log_w.detach()).mean(),
            **bound_metrics(terms),
            "beta": settings["beta"],
        }
        return LossOutput(loss, metrics)


@dataclasses.dataclass(frozen=True)
class DoublyReparameterisedIWAE(NegativeIWAE):
    """Minimises the loss of `NegativeIWAE`, with doubly reparameterised gradients (Tucker et al. 2019, eq. 8).

    With one sample it is `StickingTheLanding`. A step takes one more pass forward, which finds the weights.

    Metrics: those of `NegativeIWAE`.

    Args:
        beta: the KL weight as a function of the number of steps taken.
        num_samples: posterior samples K for each image.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> DoublyReparameterisedIWAE(num_samples=8).num_samples
        8
    """

    model_type: ClassVar[type] = VAE

    def terms(self, forward: Callable[..., Any], batch: Tensor, noise: Tensor, beta: Tensor) -> LogDensities:
        """Returns the terms of the bound; gradients through a sample are weighted, and those of q's parameters gone."""
        with torch.no_grad():
            log_w = weights_of(forward(batch, noise), beta)
        return forward(batch, noise, doubly_reparameterised_weights(log_w, beta))


def weights_of(terms: LogDensities, beta: Tensor) -> Tensor:
    """Returns log w_k = log p(x|z_k) + β (log p(z_k) - log q(z_k|x)), shape `(samples, batch)`, nats.

    Example: `NegativeIWAE` calls it.
    """
    return terms.log_p_x_given_z + beta * (terms.log_p_z - terms.log_q_z_given_x)
