"""What is checked before a run takes its first step: that steps can be repeated, skipped, saved and continued."""

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from popgen.errors import ArgumentError, reason_of
from popgen.precision import matrix_products
from popgen.streams import make_generator
from popgen.training.checkpoints import check_plain
from popgen.training.objective import LossOutput
from popgen.training.state import TrainState, state_from_tensors, state_to_tensors
from popgen.training.step import OF_THE_STEP, TrainStep, device_of
from popgen.training.update import supports_found_inf


def check_can_skip(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Raises ArgumentError if steps on a device cannot be skipped without waiting for it.

    Example:
        >>> check_can_skip(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), torch.device("cuda"))
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: SGD cannot be told on a GPU to skip a step whose gradient is not finite: bind
        fused = True if it has that, or Experiment.max_skipped_steps = 0, which stops at the first
    """
    if device.type != "cpu" and not supports_found_inf(optimizer):
        raise ArgumentError(
            f"{type(optimizer).__name__} cannot be told on a GPU to skip a step whose gradient is not finite: bind "
            "fused = True if it has that, or Experiment.max_skipped_steps = 0, which stops at the first"
        )


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises ArgumentError if an optimizer wants more for a step than gradients, or its options are of no checkpoint.

    Example:
        >>> check_optimizer(torch.optim.LBFGS([torch.nn.Parameter(torch.zeros(1))]))
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: LBFGS cannot be used: its step must be given a closure that forms the loss again
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ArgumentError(
            f"{type(optimizer).__name__} cannot be used: its step must be given a closure that forms the loss again"
        )
    if not all("lr" in group for group in optimizer.param_groups):
        raise ArgumentError(f"{type(optimizer).__name__} must have an option lr, which is shown and may be scheduled")
    options = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    check_plain(f"the options of {type(optimizer).__name__}", {"of its parameters": options})


def check_tensors(name: str, values: Any) -> None:
    """Raises ArgumentError if what a function returned is no dictionary of tensors.

    Example:
        >>> check_tensors("Mine.initial_state", {"average": 0.0})
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: Mine.initial_state must return tensors by name, got an object of type float as
        'average'
    """
    if not isinstance(values, dict):
        raise ArgumentError(f"{name} must return tensors by name, got {_described(values)}")
    for key, value in values.items():
        if not isinstance(value, Tensor):
            raise ArgumentError(f"{name} must return tensors by name, got {_described(value)} as {key!r}")


def check_settings(step: TrainStep, steps: Sequence[int]) -> None:
    """Checks that what a step is told by its number are finite numbers.

    Args:
        step: that is taken.
        steps: its numbers, some of them.

    Raises:
        ArgumentError: naming the schedule or the setting.

    Example: `check_steps` calls it.
    """
    for at in steps:
        settings: dict[str, Any] = dict(step.objective.settings(at))
        if step.learning_rate is not None:
            settings["learning_rate"] = step.learning_rate(at)
        for name, value in settings.items():
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError):
                number = math.nan
            if not math.isfinite(number):
                raise ArgumentError(f"{name} must be a finite number at every step, got {value!r} at step {at}")


def check_repeats(step: TrainStep, state: TrainState, batch: Any) -> None:
    """Forms the loss of a batch twice, and checks that it is the same again; the state stays as it is.

    Raises:
        ArgumentError: if the objective does not return what an `Objective` does, the model or the objective draws
            random numbers that are not those of the run, or the model changes its buffers as it is called.

    Example:
        >>> from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> from popgen.training.objectives import NegativeELBO
        >>> from popgen.training.state import initial_state
        >>> from popgen.training.step import make_train_step
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> _ = vae.decoder.hidden.append(torch.nn.Dropout(0.1))
        >>> state = initial_state(vae, torch.optim.Adam, seed=0)
        >>> check_repeats(make_train_step(vae, NegativeELBO()), state, torch.zeros(5, 16))
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: VAE with NegativeELBO draws random numbers that belong to no seed of the run, as
        dropout does: it could be neither repeated nor continued. Randomness comes from the objective's draw_noise
    """
    device = device_of(state)
    names = f"{type(step.model).__name__} with {type(step.objective).__name__}"
    buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
    before = _random_states(device)
    noise = step.objective.draw_noise(step.model, batch, make_generator(device, 0, "trial"))
    settings = step.settings_on_device(state)

    def form() -> Any:
        with matrix_products(step.precision, device):
            return step.loss_function(state.parameters, buffers, batch, noise, settings, state.auxiliary)

    first = form()
    check_result(type(step.objective).__name__, first)
    draws = _drawn_since(before, device)
    changed = [name for name, buffer in buffers.items() if not torch.equal(buffer, state.buffers[name])]
    if draws or (not changed and not _are_close(first, form())):
        raise ArgumentError(
            f"{names} draws random numbers that belong to no seed of the run, as dropout does: it could be neither "
            "repeated nor continued. Randomness comes from the objective's draw_noise"
        )
    if changed:
        raise ArgumentError(
            f"{names} changes {', '.join(changed)} as it is called, as batch normalisation does: a step that is "
            "skipped could not be undone. New values of buffers come from the objective's transition; other "
            "normalisations need none"
        )


def check_can_be_copied(model: nn.Module) -> None:
    """Checks that a model, after it was called, can be copied, as every evaluation does.

    Raises:
        ArgumentError: if it cannot, naming the modules that keep what they have computed.

    Example:
        >>> linear = nn.Linear(2, 1)
        >>> linear.last = linear(torch.ones(2))
        >>> check_can_be_copied(nn.Sequential(linear))
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: Sequential cannot be copied, as every evaluation does: Linear keeps what it has
        computed as 'last'
    """
    try:
        copy.deepcopy(model)
    except Exception as error:  # whatever the modules hold
        kept = [
            f"{type(module).__name__} keeps what it has computed as {name!r}"
            for module in model.modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        raise ArgumentError(
            f"{type(model).__name__} cannot be copied, as every evaluation does: {', '.join(kept) or reason_of(error)}"
        ) from error


def check_result(name: str, result: Any) -> None:
    """Checks the form of what an objective returns when it is called.

    Args:
        name: of the objective, for the error.
        result: what it returned.

    Raises:
        ArgumentError: if it is not a `LossOutput` of the right parts.

    Example:
        >>> check_result("Mine", LossOutput(torch.ones(5, requires_grad=True), {}))
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: Mine must return as its loss a scalar tensor of floating point, got a tensor of
        shape (5,) and type torch.float32
    """
    if not isinstance(result, LossOutput):
        raise ArgumentError(
            f"{name} must return a popgen.training.objectives.LossOutput(loss, metrics), got {_described(result)}"
        )
    loss, metrics, observed = result
    for what, found in (("metrics", metrics), ("what it has observed", observed)):
        if not isinstance(found, dict):
            raise ArgumentError(
                f"{name} must return {what} as a dictionary, which may be empty, got {_described(found)}"
            )
    for what, value in (("its loss", loss), *((f"the metric {key!r}", metric) for key, metric in metrics.items())):
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            raise ArgumentError(
                f"{name} must return as {what} a scalar tensor of floating point, got {_described(value)}"
            )
    reserved = sorted(OF_THE_STEP & metrics.keys())
    if reserved:
        raise ArgumentError(f"{name} must call its metrics otherwise than {', '.join(reserved)}, as those of the step")
    if not loss.requires_grad:
        raise ArgumentError(
            f"{name} must return a loss that depends on the parameters, got one without a gradient: is it detached?"
        )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    return f"an object of type {type(value).__name__}"


def _are_close(first: LossOutput, second: LossOutput) -> bool:
    """Returns whether loss and metrics are the same, up to the order in which a GPU sums."""
    if first.metrics.keys() != second.metrics.keys():
        return False
    one, other = (
        [float(value.detach()) for value in (found.loss, *found.metrics.values())] for found in (first, second)
    )
    rounding = 1e-4 * abs(one[0]) + 1e-6 if math.isfinite(one[0]) else 0.0  # a small KL is what large terms leave
    return all(
        math.isclose(a, b, rel_tol=1e-4, abs_tol=rounding) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(one, other, strict=True)
    )


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _drawn_since(before: list[Tensor], device: torch.device) -> bool:
    """Returns whether something was drawn from the global generators, since `_random_states` returned their states."""
    return not all(map(torch.equal, before, _random_states(device)))


def check_can_be_saved(state: TrainState, another: TrainState) -> None:
    """Checks that an optimizer which goes on from a checkpoint takes the steps of one that was never stopped.

    Args:
        state: before the first step; it is consumed.
        another: the same once more; it is given what a checkpoint of the first would hold, and consumed.

    Raises:
        ArgumentError: if the optimizer fails, keeps what no checkpoint may or does hold, or draws random numbers from
            torch's global generators.

    Example:
        >>> from popgen.training.state import initial_state
        >>> check_can_be_saved(*(initial_state(torch.nn.Linear(2, 1), torch.optim.SparseAdam, seed=0) for _ in "ab"))
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: SparseAdam cannot take a step: SparseAdam does not support dense gradients, please
        consider Adam instead
    """
    name = type(state.optimizer).__name__
    before = _random_states(device_of(state))
    try:
        _step_along(state, 0.0)
    except Exception as error:  # an optimizer of the user's own can raise what it likes
        raise ArgumentError(f"{name} cannot take a step: {reason_of(error)}") from error
    if _drawn_since(before, device_of(state)):
        raise ArgumentError(
            f"{name} draws random numbers that belong to no seed of the run: it could be neither repeated nor "
            "continued. What a generator of its own draws could, seeded at each step by the number of steps it keeps"
        )
    check_plain(f"what {name} keeps", state.optimizer.state_dict())
    restored = state_from_tensors(copy.deepcopy(state_to_tensors(state)), another)
    for one in (state, restored):
        _step_along(one, 1.0)
    for key, value in state.parameters.items():
        if not torch.allclose(value, restored.parameters[key], rtol=1e-5, atol=0.0, equal_nan=True):
            raise ArgumentError(
                f"{name} keeps what its state_dict does not hold, so that a run could not be continued: what its steps "
                "depend on belongs in its state or its options"
            )


def _step_along(state: TrainState, gradient: float) -> None:
    for parameter in state.parameters.values():
        parameter.grad = torch.full_like(parameter, gradient)
    state.optimizer.step()
