"""One training step: noise, gradients, update, average."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from popgen.compilation import compile_or_fall_back
from popgen.distributed import ALONE, Processes
from popgen.errors import ArgumentError
from popgen.messages import packed, unpacked
from popgen.optim.schedules import Schedule
from popgen.optim.weight_average import effective_decay
from popgen.precision import matrix_products
from popgen.training.objective import LossOutput, Metrics, Objective, Settings, Tensors
from popgen.training.state import TrainState
from popgen.training.update import Gradients, Update, traced_update

OF_THE_STEP = frozenset({"gradient_norm", "learning_rate", "skipped_steps", "skipped_in_a_row"})  # its own metrics

LossFunction = Callable[[Tensors, Tensors, Any, Any, Settings, Tensors], LossOutput]
GradientFunction = Callable[[Tensors, Tensors, Any, Any, Settings, Tensors], tuple[LossOutput, Gradients]]


class PartialGradients(NamedTuple):
    """Loss, metrics and gradients of a process's part of a batch.

    Attributes:
        result: what the loss function returns.
        gradients: of the parameters.
        messages: both packed, to be added up over the processes; none where one has the whole batch.
    """

    result: LossOutput
    gradients: Gradients
    messages: list[Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A training step, `train_step(state, batch) -> (state, metrics)`; `make_train_step` makes one.

    Attributes:
        model: the architecture.
        objective: what is minimised.
        loss_function: the objective as a pure function of parameters, buffers, batch, noise, settings and its state.
        gradient_function: the same with the gradients of the parameters, compiled or not.
        weight_average_decay: decay of the weight average.
        parameter_update: what changes parameters, optimizer and weight average along the gradients, compiled or not.
        precision: of the matrix products.
        learning_rate: as a function of the steps taken; None for that of the optimizer.
        processes: among which every batch is shared out.

    Example: `make_train_step` shows one.
    """

    model: nn.Module
    objective: Objective
    loss_function: LossFunction
    gradient_function: GradientFunction
    parameter_update: Update
    weight_average_decay: float
    precision: str
    learning_rate: Schedule | None = None
    processes: Processes = ALONE

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Returns the next state and the metrics of a batch; the old state is consumed."""
        metrics = self.update(state, batch, self.settings_on_device(state))
        return dataclasses.replace(state, step=state.step + 1), metrics

    @property
    def exchanges_in_loss(self) -> bool:
        """Whether processes exchange something in the midst of the loss."""
        return self.processes.size > 1 and self.objective.exchanges_in_loss

    def settings(self, state: TrainState) -> dict[str, float]:
        """Returns every number that depends on the step alone."""
        own_rate = float(state.optimizer.param_groups[0]["lr"])
        return {
            **self.objective.settings(state.step),
            "averaging_rate": 1.0 - effective_decay(self.weight_average_decay, state.step),
            "learning_rate": own_rate if self.learning_rate is None else float(self.learning_rate(state.step)),
        }

    def settings_on_device(self, state: TrainState) -> dict[str, Tensor]:
        """Returns the same numbers as scalar tensors beside the parameters."""
        settings = self.settings(state)
        values = settings_tensor(settings, state).to(device_of(state), non_blocking=True)
        return dict(zip(settings, values.unbind(), strict=True))

    def update(self, state: TrainState, batch: Any, settings: Settings) -> Metrics:
        """Updates the tensors of a state in place and returns the metrics.

        Where the loss or the gradient is not finite, or the gradient too large, the step is skipped: parameters,
        optimizer, average and all that the objective changes stay as they were. All the work on the device is here, and
        nothing in it depends on the step's number or waits for the device.

        Every process is given the whole batch and draws all of the noise, so that both are what one process would have;
        each then takes its part of both. All that follows from the combined gradient is the same in every process.
        """
        found = self.local_gradients(state, batch, settings)
        self.processes.all_reduce(found.messages)
        return self.apply(state, *self.reduced(found), settings)

    def local_gradients(self, state: TrainState, batch: Any, settings: Settings) -> PartialGradients:
        """Returns what this process finds in its part of a batch; of the state only its generators move on."""
        noise = self.objective.draw_noise(self.model, batch, state.generators["posterior noise"])
        if self.processes.size == 1:
            return PartialGradients(*self.gradients(state, batch, noise, settings), [])
        batch = self.objective.part_of_batch(batch, self.processes)
        noise = self.objective.part_of_noise(noise, self.processes)
        result, gradients = self.gradients(state, batch, noise, settings)
        if result.observed and type(self.objective).transition is Objective.transition:
            raise ArgumentError(
                f"{type(self.objective).__name__} cannot be shared by {self.processes.size} processes: it must define "
                f"transition, which is given the sums over all of {', '.join(result.observed)}"
            )
        messages = packed(*_means_and_sums(result, gradients), self.objective.weight(batch))
        return PartialGradients(result, gradients, messages)

    def reduced(self, found: PartialGradients) -> tuple[LossOutput, Gradients]:
        """Returns what the loss function returns for the whole batch, given what was added up of all its parts."""
        result, gradients, messages = found
        if not messages:
            return result, gradients
        (_, metrics, observed), (means, sums) = result, unpacked(messages, *_means_and_sums(result, gradients))
        values, others = means[1 : 1 + len(metrics)], iter(means[1 + len(metrics) :])
        whole = LossOutput(means[0], dict(zip(metrics, values, strict=True)), dict(zip(observed, sums, strict=True)))
        return whole, tuple(None if gradient is None else next(others) for gradient in gradients)

    def gradients(self, state: TrainState, batch: Any, noise: Any, settings: Settings) -> tuple[LossOutput, Gradients]:
        """Returns what the loss function returns, and the gradients of the parameters."""
        with matrix_products(self.precision, device_of(state)):
            return self.gradient_function(state.parameters, state.buffers, batch, noise, settings, state.auxiliary)

    def apply(self, state: TrainState, result: LossOutput, gradients: Gradients, settings: Settings) -> Metrics:
        """Updates the tensors of a state in place along its gradients, and returns the metrics."""
        return self.apply_together([state], [result], [gradients], settings)[0]

    def apply_together(
        self,
        states: Sequence[TrainState],
        results: Sequence[LossOutput],
        gradients: Sequence[Gradients],
        settings: Settings,
    ) -> list[Metrics]:
        """Does the same for several states of one step."""
        changing, metrics = [], []
        for state, result in zip(states, results, strict=True):
            tensors = {**state.buffers, **state.auxiliary}
            changes, own_metrics = self.objective.transition(self.model, tensors, result.metrics, result.observed)
            changing.append([(_changeable(state, name, value), value.detach()) for name, value in changes.items()])
            metrics.append(own_metrics)
        rate = None if self.learning_rate is None else settings["learning_rate"]
        losses = [result.loss for result in results]
        outcomes = self.parameter_update(states, losses, gradients, settings["averaging_rate"], rate)
        for pairs, outcome in zip(changing, outcomes, strict=True):
            for tensor, value in pairs:
                tensor.copy_(torch.where(outcome.taken, value, tensor))
        return [
            own
            | {
                "gradient_norm": outcome.norm,
                "learning_rate": settings["learning_rate"],
                "skipped_steps": outcome.skipped_steps,
                "skipped_in_a_row": outcome.skipped_in_a_row,
            }
            for own, outcome in zip(metrics, outcomes, strict=True)
        ]


def _means_and_sums(result: LossOutput, gradients: Gradients) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what is averaged over the parts of a batch, and what is summed."""
    loss, metrics, observed = result
    used = [gradient for gradient in gradients if gradient is not None]
    return [loss, *metrics.values(), *used], list(observed.values())


def device_of(state: TrainState) -> torch.device:
    """Returns the device of a state's parameters.

    Example: `TrainStep` calls it.
    """
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
    *,
    weight_average_decay: float = 0.9999,
    max_gradient_norm: float | None = None,
    compiled: bool = False,
    precision: str = "fp32",
    learning_rate: Schedule | None = None,
    skip_gradient_norm: float | None = None,
    processes: Processes = ALONE,
) -> TrainStep:
    """Returns `train_step(state, batch) -> (state, metrics)`.

    The step consumes the state it is given (its tensors are updated in place); the metrics are detached scalars on the
    device, those of the objective with `gradient_norm` and `learning_rate`, and with the numbers of steps that were
    skipped until then, `skipped_steps`, and just before, `skipped_in_a_row`: 0 where this one was not.

    Args:
        model: the architecture; its own tensors are not used.
        objective: what is minimised.
        weight_average_decay: decay of the weight average, where the state has one.
        max_gradient_norm: gradients with a larger norm are scaled down to it; None for no limit.
        compiled: whether torch.compile fuses the loss and its gradient, and on a GPU the update; see
            `popgen.compilation` and `popgen.training.update.traced_update`.
        precision: of the matrix products; see `popgen.precision`.
        learning_rate: as a function of the steps taken; None for that of the optimizer.
        skip_gradient_norm: steps whose gradient has a larger norm are skipped, as are those whose loss or gradient is
            not finite; None for no limit.
        processes: among which every batch is shared out; each is given the whole of it.

    Raises:
        ArgumentError: if the objective has a setting of a name that the step needs. The step raises it where several
            processes cannot share the objective.

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

    reserved = {"averaging_rate", "learning_rate"} & set(objective.settings(0))
    if reserved:
        raise ArgumentError(f"the settings of {objective!r} must have other names than {', '.join(sorted(reserved))}")
    update = Update(max_gradient_norm=max_gradient_norm, skip_gradient_norm=skip_gradient_norm)
    return TrainStep(
        model=model,
        objective=objective,
        loss_function=loss_function,
        gradient_function=gradient_function(loss_function, compiled),
        parameter_update=traced_update(update) if compiled else update,
        weight_average_decay=weight_average_decay,
        precision=precision,
        learning_rate=learning_rate,
        processes=processes,
    )


def gradient_function(loss_function: LossFunction, compiled: bool) -> GradientFunction:
    """Returns a function of the same arguments that returns the results with the gradients of the parameters.

    Args:
        loss_function: a loss with several values is summed.
        compiled: whether torch.compile fuses the loss and its gradient; see `popgen.compilation`.

    Example: `make_train_step` calls it.
    """

    def gradients(parameters, buffers, batch, noise, settings, state):
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        loss, metrics, observed = loss_function(leaves, buffers, batch, noise, settings, state)
        found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
        return LossOutput(loss.detach(), metrics, observed), found

    return compile_or_fall_back(gradients, _with_settings_of_one, traced=True) if compiled else gradients


def _with_settings_of_one(arguments: tuple) -> tuple:
    """Returns the arguments of a loss function with which a mistake shows: a weight of zero hides what it weighs."""
    *others, settings, state = arguments
    return *others, {name: torch.ones_like(value) for name, value in settings.items()}, state
