"""Objectives: what a training step minimises; `popgen.training.objective` says what one is.

The ELBO, the ELBO under a constraint, and the loss of a VQ-VAE are here; importance-weighted bounds and models of
sequences have modules of their own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from popgen.distributed import Processes
from popgen.distributions import Bernoulli
from popgen.errors import ArgumentError, check_choice, check_integer, check_number
from popgen.losses import elbo
from popgen.models.image_model import LogDensities
from popgen.models.vqvae import VQVAE, VQVAETerms, VQVAEWithPrior
from popgen.nn.vqvae import within
from popgen.optim.geco import GECO, GECOState
from popgen.optim.schedules import Constant, Schedule, check_schedule
from popgen.training.objective import LossOutput, Metrics, Objective, Settings, Tensors

CONSTRAINTS = ("reconstruction", "kl")


class ELBOObjective(Objective):
    """What objectives share that are made of the ELBO of samples from a posterior.

    Attributes:
        num_samples: posterior samples for each example.

    Example: `NegativeELBO` is one.
    """

    num_samples: int

    def check_model(self, model: Any) -> None:
        """Any model of images that takes normal noise, but a VQ-VAE, whose codebook would stay as it is.

        Raises:
            ArgumentError: if it is another kind of model.
        """
        super().check_model(model)
        if not isinstance(getattr(model, "noise_dim", None), int):
            raise ArgumentError(
                f"{type(self).__name__} trains models with a noise_dim and an ELBO, such as a VAE, and the model is a "
                f"{type(model).__name__}"
            )
        if isinstance(model, VQVAE):
            raise ArgumentError(
                f"{type(self).__name__} trains no codebook, and the model is a {type(model).__name__}: use VQVAELoss"
            )

    def draw_noise(self, model: Any, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Returns standard normal noise, shape `(num_samples, batch, noise_dim)`."""
        shape = (self.num_samples, len(batch), model.noise_dim)
        return torch.randn(shape, generator=generator, device=batch.device, dtype=batch.dtype)

    def part_of_noise(self, noise: Tensor, processes: Processes) -> Tensor:
        """Returns the noise of this process's examples."""
        return processes.part(noise, axis=1)


@dataclasses.dataclass(frozen=True)
class AnnealedObjective(ELBOObjective):
    """What objectives share whose KL term has a weight that follows a schedule.

    Args:
        beta: the KL weight as a function of the number of steps taken.
        num_samples: posterior samples for each image.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example: `NegativeELBO` is one.
    """

    beta: Schedule = Constant(1.0)
    num_samples: int = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_schedule(f"{name}.beta", self.beta)
        check_integer(f"{name}.num_samples", self.num_samples, minimum=1)

    def settings(self, step: int) -> dict[str, float]:
        """Returns β at that step."""
        return {"beta": self.beta(step)}

    def terms(self, forward: Callable[..., Any], batch: Tensor, noise: Tensor, beta: Tensor) -> LogDensities:
        """Returns the terms of the bound, with the gradients that this objective gives them."""
        return forward(batch, noise)


@dataclasses.dataclass(frozen=True)
class NegativeELBO(AnnealedObjective):
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

    def __call__(
        self, forward: Callable[..., Any], batch: Tensor, noise: Tensor, settings: Settings, state: Tensors
    ) -> LossOutput:
        """Returns the loss and the metrics of a batch; nothing else changes."""
        beta = settings["beta"]
        terms = self.terms(forward, batch, noise, beta)
        loss = -elbo(terms.log_p_x_given_z, terms.log_p_z, terms.log_q_z_given_x, beta).mean()
        return LossOutput(loss, {"loss": loss.detach(), **bound_metrics(terms), "beta": beta})


@dataclasses.dataclass(frozen=True)
class ConstrainedELBO(ELBOObjective):
    """Minimises one term of the negative ELBO under a constraint on the other, whose multiplier GECO finds.

        constraint = "reconstruction":  minimise KL              subject to  target - log p(x|z) ≤ 0
        constraint = "kl":              minimise -log p(x|z)     subject to  KL - target ≤ 0

    Both are means over samples and batch, nats per example, and so is the target, in the sign of what it constrains.
    The first equals a β-VAE with β = 1/λ at the λ that it ends with, the second one with β = λ; see
    `popgen.optim.geco`. The best checkpoint is chosen by `selection_loss`, not by the ELBO: it meets the constraint on
    the selection split, if one of them does.

    Metrics: those of `NegativeELBO` without `beta` (`loss` is the Lagrangian), and `constraint`, `constraint_average`
    and `multiplier`.

    Args:
        geco: the multiplier's dynamics.
        constraint: "reconstruction" or "kl".
        target: what it must reach, nats per example: the least log p(x|z), or the largest KL, which is at least 0.
        num_samples: posterior samples for each image.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> objective = ConstrainedELBO(GECO(rate=1e-3), constraint="reconstruction", target=-72.0)
        >>> objective.initial_state(torch.zeros(()))["multiplier"]
        tensor(1.)
    """

    geco: GECO
    constraint: str
    target: float
    num_samples: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.geco, GECO):
            raise ArgumentError(
                f"ConstrainedELBO.geco must be a GECO, such as @popgen.optim.geco.GECO(), got {self.geco!r}"
            )
        check_choice("ConstrainedELBO.constraint", self.constraint, CONSTRAINTS)
        check_number("ConstrainedELBO.target", self.target)
        if self.constraint == "kl":
            check_number("ConstrainedELBO.target (the largest KL)", self.target, minimum=0.0)
        check_integer("ConstrainedELBO.num_samples", self.num_samples, minimum=1)

    def check_model(self, model: Any) -> None:
        """Any model that `ELBOObjective` takes whose two terms can both be trained.

        Raises:
            ArgumentError: if it is another, or its likelihood cannot reach the target.
        """
        super().check_model(model)
        if isinstance(model, VQVAEWithPrior):
            raise ArgumentError(
                "ConstrainedELBO weighs a reconstruction against a KL, and that of a VQVAEWithPrior is fixed: use "
                "NegativeELBO"
            )
        likelihood = getattr(getattr(model, "decoder", None), "likelihood", None)
        if self.constraint == "reconstruction" and self.target > 0.0 and likelihood is Bernoulli:
            raise ArgumentError(
                f"ConstrainedELBO.target must be at most 0 for a Bernoulli likelihood, whose log p(x|z) is, got "
                f"{self.target}"
            )

    @property
    def state_of(self) -> str:
        """The constraint, which the multiplier and the average belong to."""
        return self.constraint

    @property
    def selected_by(self) -> str:
        """The loss of `selection_loss`."""
        if self.constraint == "reconstruction":
            return f"KL (penalised where the reconstruction is below {self.target:g})"
        return f"-reconstruction (penalised where the KL is above {self.target:g})"

    def selection_loss(self, results: Mapping[str, float]) -> float:
        """Returns what is minimised and, where the constraint is missed, `GECO.max_multiplier` times by how much.

        Such a penalty is exact (Nocedal and Wright 2006, section 17.2): its least value is at the solution if the
        multiplier there is no larger.

        Raises:
            ArgumentError: if the evaluator found no `reconstruction` or no `kl`.
        """
        missing = [name for name in ("reconstruction", "kl") if name not in results]
        if missing:
            raise ArgumentError(f"validate of an evaluator must return {' and '.join(missing)} for a ConstrainedELBO")
        minimised, constraint = self._minimised_and_constraint(results["reconstruction"], results["kl"])
        return minimised + self.geco.max_multiplier * max(0.0, constraint)

    def _minimised_and_constraint(self, reconstruction: Any, kl: Any) -> tuple[Any, Any]:
        if self.constraint == "reconstruction":
            return kl, self.target - reconstruction
        return -reconstruction, kl - self.target

    def initial_state(self, reference: Tensor) -> dict[str, Tensor]:
        """Returns GECO's state before the first step."""
        return self.geco.initial_state(reference.device, reference.dtype)._asdict()

    def __call__(
        self, forward: Callable[..., Any], batch: Tensor, noise: Tensor, settings: Settings, state: Tensors
    ) -> LossOutput:
        """Returns the Lagrangian and the metrics of a batch, of which `constraint` is one."""
        terms = forward(batch, noise)
        reconstruction = terms.log_p_x_given_z.mean()
        kl = (terms.log_q_z_given_x - terms.log_p_z).mean()
        minimised, constraint = self._minimised_and_constraint(reconstruction, kl)
        loss = self.geco.lagrangian(minimised, constraint, GECOState(**state))
        metrics = {"loss": loss.detach(), **bound_metrics(terms), "constraint": constraint.detach()}
        return LossOutput(loss, metrics)

    def transition(
        self, model: Any, tensors: Tensors, metrics: Metrics, observed: Tensors
    ) -> tuple[dict[str, Tensor], Metrics]:
        """Returns GECO's next state, and the metrics with those of its state."""
        before = GECOState(**{name: tensors[name] for name in GECOState._fields})
        after = self.geco.update(before, metrics["constraint"])
        of_state = {
            "constraint_average": after.constraint_average,
            "multiplier": before.multiplier.clone(),  # the step overwrites its state
        }
        return after._asdict(), metrics | of_state


@dataclasses.dataclass(frozen=True)
class VQVAELoss(Objective):
    """Minimises -log p(x|z) + |sg[z_e] - e|² + w · |z_e - sg[e]|², a mean over the batch, nats per example.

    Eq. 3 of van den Oord et al. 2017 (https://arxiv.org/abs/1711.00937), with sums over the N vectors of an image where
    the paper takes means in the second and third term: its weight w is w / N here, and the default of 0.25 is the
    paper's 12.25 for a map of 7 × 7. The second term is zero where the codebook is a moving average, which moves after
    the vectors have been quantised.

    Metrics: `loss`, those of the bound under the model's own prior (`elbo`, `reconstruction`, `kl`, ...),
    `commitment_loss`, `codebook_loss` and `codes_revived`, the dead codes revived in a step.

    Args:
        commitment: the weight w of the commitment loss.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> VQVAELoss(commitment=-1.0)
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: VQVAELoss.commitment must be at least 0, got -1.0
    """

    commitment: float = 0.25

    model_type: ClassVar[type] = VQVAE

    def __post_init__(self) -> None:
        check_number("VQVAELoss.commitment", self.commitment, minimum=0.0)

    def draw_noise(self, model: Any, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Returns uniform noise that chooses where dead codes go, shape `(num_codebooks, num_codes)`."""
        shape = (model.quantiser.num_codebooks, model.quantiser.num_codes)
        return torch.rand(shape, generator=generator, device=batch.device, dtype=batch.dtype)

    def part_of_noise(self, noise: Tensor, processes: Processes) -> Tensor:
        """Returns the noise such that the vectors it chooses are this process's for those codes where it is in [0, 1).

        The numbers in [rank / size, (rank + 1) / size) choose from its part, and are stretched to [0, 1).
        """
        return noise * processes.size - processes.rank

    def __call__(
        self, forward: Callable[..., Any], batch: Tensor, noise: Tensor, settings: Settings, state: Tensors
    ) -> LossOutput:
        """Returns the loss and the metrics of a batch, and what its codebook learns from."""
        terms = forward(batch, None, noise)
        commitment, codebook = terms.commitment_loss.mean(), terms.codebook_loss.mean()
        loss = -terms.log_p_x_given_z.mean() + codebook + self.commitment * commitment
        metrics = {
            "loss": loss.detach(),
            **bound_metrics(terms),
            "commitment_loss": commitment.detach(),
            "codebook_loss": codebook.detach(),
        }
        return LossOutput(loss, metrics, terms.observed)

    def transition(
        self, model: VQVAE, tensors: Tensors, metrics: Metrics, observed: Tensors
    ) -> tuple[dict[str, Tensor], Metrics]:
        """Returns the codebook's next state, and the metrics with the number of codes revived."""
        changes, num_revived = model.quantiser.advance(within("quantiser.", tensors), observed)
        named = {f"quantiser.{name}": value for name, value in changes.items()}
        return named, metrics | {"codes_revived": num_revived.to(metrics["loss"].dtype)}


def bound_metrics(terms: LogDensities | VQVAETerms) -> Metrics:
    """Returns the means of the bound at β = 1 and of its parts, detached, nats.

    Example: `NegativeELBO` calls it.
    """
    bound_terms = (terms.log_p_x_given_z, terms.log_p_z, terms.log_q_z_given_x, terms.log_det)
    means = torch.stack([term.detach() for term in bound_terms]).flatten(1).mean(1)
    reconstruction, log_p_z, log_q_z_given_x, log_det = means.unbind()
    kl = log_q_z_given_x - log_p_z
    return {
        "elbo": reconstruction - kl,
        "reconstruction": reconstruction,
        "kl": kl,
        "log_q_z_given_x": log_q_z_given_x,
        "log_p_z": log_p_z,
        "log_det": log_det,
    }
