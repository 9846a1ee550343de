"""One training step: noise, gradients, update, average."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from popgen.errors import ArgumentError
from popgen.execution import compile_or_fall_back, matrix_products
from popgen.optim.schedules import Schedule
from popgen.optim.weight_average import effective_decay, update_weight_average
from popgen.training.objectives import Metrics, Objective, Result, Settings, Tensors
from popgen.training.state import TrainState

LossFunction = Callable[[Tensors, Tensors, Any, Any, Settings, Tensors], Result]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A training step, `train_step(state, batch) -> (state, metrics)`; `make_train_step` makes one.

    Attributes:
        model: the architecture.
        objective: what is minimised.
        loss_function: the objective as a pure function of parameters, buffers, batch, noise, settings and its state.
        weight_average_decay: decay of the weight average.
        max_gradient_norm: gradients with a larger norm are scaled down to it.
        precision: of the matrix products.
        learning_rate: as a function of the steps taken; None for that of the optimizer.

    Example: `make_train_step` shows one.
    """

    model: nn.Module
    objective: Objective
    loss_function: LossFunction
    weight_average_decay: float
    max_gradient_norm: float | None
    precision: str
    learning_rate: Schedule | None = None

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Returns the next state and the metrics of a batch; the old state is consumed."""
        settings = self.settings(state)
        values = settings_tensor(settings, state).to(_device(state), non_blocking=True)
        metrics = self.update(state, batch, dict(zip(settings, values.unbind(), strict=True)))
        return dataclasses.replace(state, step=state.step + 1), metrics

    def settings(self, state: TrainState) -> dict[str, float]:
        """Returns every number that depends on the step alone."""
        own_rate = float(state.optimizer.param_groups[0]["lr"])
        return {
            **self.objective.settings(state.step),
            "average_weight": 1.0 - effective_decay(self.weight_average_decay, state.step),
            "learning_rate": own_rate if self.learning_rate is None else float(self.learning_rate(state.step)),
        }

    def update(self, state: TrainState, batch: Any, settings: Settings) -> Metrics:
        """Updates the tensors of a state in place and returns the metrics.

        All the work on the device is here, and nothing in it depends on the step's number or waits for the device.
        """
        noise = self.objective.draw_noise(self.model, batch, state.generators["posterior noise"])
        with matrix_products(self.precision, _device(state)):
            loss, metrics, changes = self.loss_function(
                state.parameters, state.buffers, batch, noise, settings, state.auxiliary
            )
            gradients = torch.autograd.grad(loss, list(state.parameters.values()), allow_unused=True)
        changing = [(_changeable(state, name, value), value.detach()) for name, value in changes.items()]
        with _learning_rate(state.optimizer, None if self.learning_rate is None else settings["learning_rate"]):
            metrics["gradient_norm"] = self._apply(gradients, state)
        metrics["learning_rate"] = settings["learning_rate"]
        if state.weight_average is not None:
            update_weight_average(state.weight_average, state.parameters, settings["average_weight"])
        for tensor, value in changing:
            tensor.copy_(value)
        return metrics

    def _apply(self, gradients: tuple[Tensor | None, ...], state: TrainState) -> Tensor:
        """Lets the optimizer take its step along the clipped gradients and returns their norm before clipping."""
        leaves: list[Tensor] = list(state.parameters.values())
        optimizer: Any = state.optimizer  # fused ones take an attribute that the base class does not know
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([g for g in gradients if g is not None])))
        if self.max_gradient_norm is None:
            optimizer.step()
        elif getattr(optimizer, "_step_supports_amp_scaling", False):  # fused kernels divide by `grad_scale` in passing
            optimizer.grad_scale = (norm / self.max_gradient_norm).clamp_min(1.0).float()
            optimizer.step()
            del optimizer.grad_scale
        else:
            torch.nn.utils.clip_grads_with_norm_(leaves, self.max_gradient_norm, norm)
            optimizer.step()
        for leaf in leaves:
            leaf.grad = None
        return norm


@contextlib.contextmanager
def _learning_rate(optimizer: torch.optim.Optimizer, rate: Tensor | None) -> Iterator[None]:
    """Lends an optimizer a learning rate; on a GPU as a tensor there, from which a recorded step reads it anew."""
    if rate is None:
        yield
        return
    own_rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = rate if rate.is_cuda else rate.item()
        yield
    finally:
        for group, own_rate in zip(optimizer.param_groups, own_rates, strict=True):
            group["lr"] = own_rate


def _device(state: TrainState) -> torch.device:
    return next(iter(state.parameters.values())).device


def _changeable(state: TrainState, name: str, value: Tensor) -> Tensor:
    tensor = state.auxiliary.get(name, state.buffers.get(name))
    if tensor is None:
        raise ArgumentError(
            f"the objective changes {name!r}, which is neither its own state ({', '.join(state.auxiliary) or 'none'}) "
            f"nor a buffer of the model ({', '.join(state.buffers) or 'none'})"
        )
    if value.shape != tensor.shape:
        raise ArgumentError(f"the objective changes {name!r} from shape {tuple(tensor.shape)} to {tuple(value.shape)}")
    return tensor


def settings_tensor(settings: dict[str, float], state: TrainState) -> Tensor:
    """Returns the values of settings on the CPU, in the dtype of the parameters.

    Example: `TrainStep` calls it.
    """
    return torch.tensor(list(settings.values()), dtype=next(iter(state.parameters.values())).dtype)


def make_train_step(
    model: nn.Module,
    objective: Objective,
    weight_average_decay: float = 0.9999,
    max_gradient_norm: float | None = None,
    compiled: bool = False,
    precision: str = "fp32",
    learning_rate: Schedule | None = None,
) -> TrainStep:
    """Returns `train_step(state, batch) -> (state, metrics)`.

    The step consumes the state it is given (its tensors are updated in place); the metrics are detached scalars on the
    device, those of the objective with `gradient_norm` and `learning_rate`.

    Args:
        model: the architecture; its own tensors are not used.
        objective: what is minimised.
        weight_average_decay: decay of the weight average, where the state has one.
        max_gradient_norm: gradients with a larger norm are scaled down to it; None for no limit.
        compiled: whether torch.compile fuses the loss and its gradient; see `popgen.execution`.
        precision: of the matrix products; see `popgen.execution`.
        learning_rate: as a function of the steps taken; None for that of the optimizer.

    Raises:
        ArgumentError: if the objective has a setting of a name that the step needs.

    Example:
        >>> from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> from popgen.training.objectives import NegativeELBO
        >>> from popgen.training.state import initial_state
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> step = make_train_step(vae, NegativeELBO())
        >>> state, metrics = step(initial_state(vae, torch.optim.Adam, seed=0), torch.zeros(5, 16))
        >>> state.step, bool(metrics["loss"] > 0)
        (1, True)
    """

    def loss_function(parameters, buffers, batch, noise, settings, state):
        def forward(*inputs):
            return functional_call(model, (parameters, buffers), inputs)

        return objective(forward, batch, noise, settings, state)

    reserved = {"average_weight", "learning_rate"} & set(objective.settings(0))
    if reserved:
        raise ArgumentError(f"the settings of {objective!r} must have other names than {', '.join(sorted(reserved))}")
    if compiled:
        loss_function = compile_or_fall_back(loss_function, _with_settings_of_one)
    return TrainStep(model, objective, loss_function, weight_average_decay, max_gradient_norm, precision, learning_rate)


def _with_settings_of_one(arguments: tuple) -> tuple:
    """Returns the arguments of a loss function with which a mistake shows: a weight of nought hides what it weighs."""
    *others, settings, state = arguments
    return *others, {name: torch.ones_like(value) for name, value in settings.items()}, state
