"""What in a training step is not finite, in the order in which it comes about."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from popgen.errors import DivergedError
from popgen.training.state import TrainState
from popgen.training.step import TrainStep


class Diagnosis(NamedTuple):
    """What a step would have done.

    Attributes:
        loss: of the batch, nats.
        gradient_norm: before clipping.
        not_finite: kind and name of all that is not finite, in the order in which it came about; the kinds are
            "parameter", "buffer", "batch", "noise", "output", "metric", "change" and "gradient".

    Example: `diagnose` returns one.
    """

    loss: float
    gradient_norm: float
    not_finite: tuple[tuple[str, str], ...]


def diagnose(train_step: TrainStep, state: TrainState, batch: Any) -> Diagnosis:
    """Returns what is not finite in a step that is not taken; the state's noise is drawn.

    Args:
        train_step: not compiled, or else modules are not seen.
        state: before the step.
        batch: of the step.

    Example:
        >>> from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> from popgen.training.objectives import NegativeELBO
        >>> from popgen.training.state import initial_state
        >>> from popgen.training.step import make_train_step
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> state = initial_state(vae, torch.optim.Adam, seed=0)
        >>> diagnose(make_train_step(vae, NegativeELBO()), state, torch.zeros(5, 16)).not_finite
        ()
        >>> _ = state.parameters["decoder.logits.bias"].data.fill_(torch.nan)
        >>> diagnose(make_train_step(vae, NegativeELBO()), state, torch.zeros(5, 16)).not_finite[:2]
        (('parameter', 'decoder.logits.bias'), ('output', 'decoder.logits'))
    """
    found: list[tuple[str, str]] = []

    def look(kind: str, name: str, value: Any) -> None:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(value)):
            found.append((kind, name))

    def look_at_output(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _, inputs, output: look("output", name, output))

    model = train_step.model
    for kind, tensors in (("parameter", state.parameters), ("buffer", state.buffers), ("buffer", state.auxiliary)):
        for name, tensor in tensors.items():
            look(kind, name, tensor)
    look("batch", type(batch).__name__, batch)
    noise = train_step.objective.draw_noise(model, batch, state.generators["posterior noise"])
    look("noise", type(noise).__name__, noise)
    handles = [look_at_output(name or type(model).__name__, module) for name, module in model.named_modules()]
    try:
        (loss, metrics, observed), gradients = train_step.gradients(
            state, batch, noise, train_step.settings_on_device(state)
        )
    finally:
        for handle in handles:
            handle.remove()
    tensors = {**state.buffers, **state.auxiliary}
    changes, metrics = train_step.objective.transition(model, tensors, metrics, observed)
    for kind, results in (
        ("metric", metrics),
        ("change", changes),
        ("gradient", dict(zip(state.parameters, gradients, strict=True))),
    ):
        for name, result in results.items():
            look(kind, name, result)
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    return Diagnosis(loss.item(), norm.item(), tuple(found))


def with_replay(error: DivergedError, run_dir: pathlib.Path) -> DivergedError:
    """Returns the same error, which also says what command shows what went wrong in a run.

    Example:
        >>> print(with_replay(DivergedError("the loss became nan", step=8), pathlib.Path("runs/vae")))
        the loss became nan. What went wrong where: python -m launch.replay --run_dir=runs/vae --step=8 --trust_config
    """
    replay = f"python -m launch.replay --run_dir={run_dir} --step={error.step} --trust_config"
    return DivergedError(f"{error}. What went wrong where: {replay}", error.step, error.replica)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors of what a module returns: a tensor, a collection, or an object that holds some.

    Example:
        >>> from popgen.distributions import DiagonalNormal
        >>> len(list(tensors_in({"a": [torch.zeros(1)], "b": DiagonalNormal(torch.zeros(2), torch.zeros(2))})))
        3
    """
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, nn.Module | type):
        parts = value if isinstance(value, list | tuple) else value if isinstance(value, Mapping) else vars_of(value)
        for part in parts.values() if isinstance(parts, Mapping) else parts:
            yield from tensors_in(part)


def vars_of(value: Any) -> Mapping[str, Any]:
    """Returns the attributes of an object, none where it has no dictionary of them.

    Example:
        >>> vars_of(3.0)
        {}
    """
    return getattr(value, "__dict__", {})
