"""GECO: a Lagrange multiplier that weighs a constraint by how far its moving average is from being met."""

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from popgen.errors import ArgumentError, check_integer, check_number


class GECOState(NamedTuple):
    """What GECO carries from step to step: scalar tensors on one device, so that nothing waits for it.

    Attributes:
        multiplier: the weight λ of the constraint, positive.
        constraint_average: the moving average C̄ of the constraint, in its unit; 0 before the first update.
        num_updates: how many values of the constraint have been seen, an integer.

    Example:
        >>> GECO(rate=0.01).initial_state()
        GECOState(multiplier=tensor(1.), constraint_average=tensor(0.), num_updates=tensor(0))
    """

    multiplier: Tensor
    constraint_average: Tensor
    num_updates: Tensor


@dataclasses.dataclass(frozen=True)
class GECO:
    """Minimises a loss subject to a constraint C ≤ 0 (Rezende and Viola 2018, https://arxiv.org/abs/1810.00597).

    λ · C is added to what is minimised. The step t of Algorithm 1 is, with the constraint C_t of its batch,

        C̄_t = α C̄_{t-1} + (1 - α) C_t,   C̄_0 = C_0
        loss_t + λ_{t-1} · (C_t + stop_gradient(C̄_t - C_t))    is what the parameters descend
        λ_t = clip(λ_{t-1} · exp(ν C̄_t))

    The loss of a step uses the multiplier from before that step's update, and the average from after it. λ rises
    while the constraint is violated (C̄ > 0) and falls while it is met. A step calls `lagrangian` and `update` with
    the same state. The clip and the warm-up are additions to Algorithm 1: they stop a poor start from driving λ so
    high that it takes long to come back.

    The constraint is a mean over the batch in any unit, and λ is in units of the loss per unit of the constraint. In
    the objectives of this library both are in nats per example, say the KL term and a target less the
    reconstruction log p(x|z); ν is then per nat.

    Args:
        rate: ν, the change of log λ in one step per unit of the constraint.
        decay: α of the moving average, from 0 (no memory) to less than 1.
        initial_multiplier: λ before the first update.
        min_multiplier: the lower end of the clip.
        max_multiplier: the upper end of the clip.
        warm_up_steps: how many updates leave λ as it is while the average is being formed.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> geco, kl, reconstruction = GECO(rate=0.01), torch.tensor(20.0), torch.tensor(-95.0)
        >>> state = geco.initial_state()
        >>> constraint = -90.0 - reconstruction  # at least -90 nats are wanted, 5 are missing
        >>> geco.lagrangian(kl, constraint, state)
        tensor(25.)
        >>> geco.update(state, constraint).multiplier
        tensor(1.0513)
    """

    rate: float
    decay: float = 0.99
    initial_multiplier: float = 1.0
    min_multiplier: float = 1e-6
    max_multiplier: float = 1e6
    warm_up_steps: int = 0

    def __post_init__(self) -> None:
        check_number("GECO.rate", self.rate, above=0.0)
        check_number("GECO.decay", self.decay, minimum=0.0, below=1.0)
        check_number("GECO.min_multiplier", self.min_multiplier, above=0.0)
        check_number("GECO.max_multiplier", self.max_multiplier, minimum=self.min_multiplier)
        check_number("GECO.initial_multiplier", self.initial_multiplier, self.min_multiplier, self.max_multiplier)
        check_integer("GECO.warm_up_steps", self.warm_up_steps, minimum=0)

    def initial_state(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> GECOState:
        """Returns the state before the first update.

        Args:
            device: where the state lives; by default where torch puts new tensors.
            dtype: of the multiplier and of the average.

        Raises:
            ArgumentError: if the bounds of the multiplier are outside the range of `dtype`.
        """
        limits = torch.finfo(dtype)
        if self.min_multiplier < limits.tiny or self.max_multiplier > limits.max:
            raise ArgumentError(
                f"GECO.min_multiplier and GECO.max_multiplier must be within [{limits.tiny}, {limits.max}], the range "
                f"of {dtype}, got {self.min_multiplier!r} and {self.max_multiplier!r}"
            )
        return GECOState(
            multiplier=torch.full((), self.initial_multiplier, dtype=dtype, device=device),
            constraint_average=torch.zeros((), dtype=dtype, device=device),
            num_updates=torch.zeros((), dtype=torch.int64, device=device),
        )

    def lagrangian(self, loss: Float[Tensor, ""], constraint: Float[Tensor, ""], state: GECOState) -> Float[Tensor, ""]:
        """Returns what the parameters descend, in the unit of the loss.

        Its value is loss + λ C̄, where C̄ already holds this constraint; its gradient is ∇loss + λ ∇constraint.
        Nothing flows into the state.

        Args:
            loss: what is minimised, a mean over the batch.
            constraint: C, a mean over the batch; at most 0 where it is met.
            state: as the step found it, before `update`.

        Raises:
            ArgumentError: if the loss or the constraint is not a scalar.
        """
        _check_scalar("loss", loss)
        smoothed = self._next_average(state, constraint) + (constraint - constraint.detach())
        return loss + state.multiplier.detach() * smoothed

    def update(self, state: GECOState, constraint: Float[Tensor, ""]) -> GECOState:
        """Returns the state after a step, detached, in new tensors.

        A constraint that is not a number makes the average, and after the warm-up the multiplier, not a number.

        Args:
            state: as the step found it.
            constraint: C of this step's batch.

        Raises:
            ArgumentError: if the constraint is not a scalar.
        """
        average = self._next_average(state, constraint)
        before = state.multiplier.detach()
        # λ is positive, so an exponential that overflows gives infinity, which the clip brings to its upper end.
        moved = (before * torch.exp(self.rate * average)).clamp(self.min_multiplier, self.max_multiplier)
        return GECOState(
            multiplier=torch.where(state.num_updates < self.warm_up_steps, before, moved),
            constraint_average=average,
            num_updates=state.num_updates + 1,
        )

    def _next_average(self, state: GECOState, constraint: Tensor) -> Tensor:
        """Returns the moving average with this constraint in it, detached, in the dtype of the state."""
        _check_scalar("constraint", constraint)
        before = state.constraint_average.detach()
        now = constraint.detach().to(before.dtype)
        return torch.where(state.num_updates == 0, now, self.decay * before + (1.0 - self.decay) * now)


def _check_scalar(name: str, value: Tensor) -> None:
    """Raises ArgumentError if there is more than one value: only a mean over the batch fits the state."""
    if value.shape != ():
        raise ArgumentError(f"{name} must be a scalar, its mean over the batch, got shape {tuple(value.shape)}")
