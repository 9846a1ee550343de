"""Objectives: what a training step minimises.

An objective has three methods. `settings(step)` returns the numbers that depend on the step alone, `draw_noise(model,
batch, generator)` draws the noise that one step needs, and `__call__(forward, batch, noise, settings)` returns the
scalar loss and a dictionary of detached scalars. `forward` calls the model with the parameters of the training state.
The loss is formed here, and here alone the mean over the batch is taken.

The step number itself does not reach `__call__`: its settings do, as tensors on the device, so that one compiled
function or one CUDA graph serves every step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from popgen.errors import ArgumentError, check_integer
from popgen.losses import elbo
from popgen.models.vae import VAE
from popgen.optim.schedules import Constant, Schedule

Metrics = dict[str, Tensor]
Settings = Mapping[str, Tensor]


@runtime_checkable
class Objective(Protocol):
    """What a training step minimises."""

    def settings(self, step: int) -> dict[str, float]:
        """Returns the numbers that depend on the step alone, such as an annealed weight."""

    def draw_noise(self, model: Any, batch: Tensor, generator: torch.Generator) -> Any:
        """Returns the noise of one step."""

    def __call__(
        self, forward: Callable[..., Any], batch: Tensor, noise: Any, settings: Settings
    ) -> tuple[Tensor, Metrics]:
        """Returns the scalar loss and detached scalar metrics; `settings` holds scalar tensors."""


@dataclasses.dataclass(frozen=True)
class NegativeELBO:
    """Minimises -(log p(x|z) - β_t (log q(z|x) - log p(z))), averaged over samples and batch, nats.

    Metrics: `loss`, `elbo` (always at β = 1), `reconstruction` (log p(x|z)), `kl`, `log_q_z_given_x`, `log_p_z`,
    `log_det` and `beta`.

    Args:
        beta: the KL weight as a function of the number of steps taken.
        num_samples: posterior samples for each image.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> from popgen.optim.schedules import SigmoidAnnealing
        >>> objective = NegativeELBO(beta=SigmoidAnnealing(rate=1e-4))
        >>> round(objective.settings(step=10_000)["beta"], 4)
        0.4621
    """

    beta: Schedule = Constant(1.0)
    num_samples: int = 1

    def __post_init__(self) -> None:
        if not callable(self.beta):
            raise ArgumentError(f"NegativeELBO.beta must be a schedule (a function of the step), got {self.beta!r}")
        check_integer("NegativeELBO.num_samples", self.num_samples, minimum=1)

    def settings(self, step: int) -> dict[str, float]:
        """Returns β at that step."""
        return {"beta": self.beta(step)}

    def draw_noise(self, model: VAE, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Returns standard normal noise, shape `(num_samples, batch, latent_dim)`."""
        shape = (self.num_samples, len(batch), model.latent_dim)
        return torch.randn(shape, generator=generator, device=batch.device, dtype=batch.dtype)

    def __call__(
        self, forward: Callable[..., Any], batch: Tensor, noise: Tensor, settings: Settings
    ) -> tuple[Tensor, Metrics]:
        """Returns the loss and the metrics of a batch."""
        terms = forward(batch, noise)
        beta = settings["beta"]
        bound = elbo(terms.log_p_x_given_z, terms.log_p_z, terms.log_q_z_given_x, beta)
        loss = -bound.mean()
        means = torch.stack([term.detach() for term in terms]).flatten(1).mean(1)
        reconstruction, log_p_z, log_q_z_given_x, log_det = means.unbind()
        kl = log_q_z_given_x - log_p_z
        metrics = {
            "loss": loss.detach(),
            "elbo": reconstruction - kl,
            "reconstruction": reconstruction,
            "kl": kl,
            "log_q_z_given_x": log_q_z_given_x,
            "log_p_z": log_p_z,
            "log_det": log_det,
            "beta": beta,
        }
        return loss, metrics
