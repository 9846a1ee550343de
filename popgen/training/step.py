"""One training step: noise, gradients, update, average."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from popgen.optim.weight_average import update_weight_average
from popgen.training.objectives import Metrics, Objective
from popgen.training.state import TrainState

TrainStep = Callable[[TrainState, Tensor], tuple[TrainState, Metrics]]


def make_train_step(
    model: nn.Module,
    objective: Objective,
    weight_average_decay: float = 0.9999,
    max_gradient_norm: float | None = None,
) -> TrainStep:
    """Returns `train_step(state, batch) -> (state, metrics)`.

    The step consumes the state it is given (its tensors are updated in place); the metrics are detached scalars on the
    device, those of the objective with `gradient_norm` and `learning_rate`.

    Args:
        model: the architecture; its own tensors are not used.
        objective: what is minimised.
        weight_average_decay: decay of the weight average, where the state has one.
        max_gradient_norm: gradients with a larger norm are scaled down to it; None for no limit.

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

    def train_step(state: TrainState, batch: Tensor) -> tuple[TrainState, Metrics]:
        noise = objective.draw_noise(model, batch, state.generators["posterior noise"])
        forward = functools.partial(_call_with_state, model, state)
        loss, metrics = objective(forward, batch, noise, state.step)
        metrics["gradient_norm"] = _form_gradients(loss, state.parameters, max_gradient_norm)
        metrics["learning_rate"] = loss.new_tensor(state.optimizer.param_groups[0]["lr"])
        state.optimizer.step()
        average = state.weight_average
        if average is not None:
            average = update_weight_average(average, state.parameters, weight_average_decay, state.step)
        return dataclasses.replace(state, step=state.step + 1, weight_average=average), metrics

    return train_step


def _call_with_state(model: nn.Module, state: TrainState, *inputs: Tensor):
    return functional_call(model, (state.parameters, state.buffers), inputs)


def _form_gradients(loss: Tensor, parameters: dict[str, Tensor], max_norm: float | None) -> Tensor:
    """Sets every parameter's gradient and returns their norm before clipping. Gradients are formed here alone."""
    leaves = list(parameters.values())
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(leaves, max_norm, norm)
    return norm
