"""The training state: everything that a run's future depends on."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from popgen.errors import ArgumentError, CheckpointError, reason_of
from popgen.streams import make_generator

STREAMS = ("binarisation", "posterior noise")

AnyModule = TypeVar("AnyModule", bound=nn.Module)
OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run after `step` steps.

    A training step consumes the state it is given: torch.optim updates tensors in place, so callers rebind and never
    use the old one again. The order of the data is a function of the seed and `step`.

    Example: `initial_state` returns one.

    Attributes:
        step: steps taken.
        parameters: name to leaf tensor, of what is trained.
        buffers: name to tensor; the model's buffers, and those of its parameters that do not require gradients.
        auxiliary: name to tensor; the objective's own state.
        optimizer: holds the moments of `parameters`.
        weight_average: name to averaged parameter, or None.
        generators: purpose to generator.
        skipped: how many steps were skipped, "total" and "in a row", integers on the device.
        recent: the metrics of every step since the last point of the training curves.
        best_loss: the lowest selection loss so far, nats; infinite before the first evaluation.
        best_step: the step it was seen at.
    """

    step: int
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    auxiliary: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    weight_average: dict[str, Tensor] | None
    generators: dict[str, torch.Generator]
    skipped: dict[str, Tensor]
    recent: list[dict[str, Tensor]]
    best_loss: float = math.inf
    best_step: int = 0


def initial_state(
    model: nn.Module,
    optimizer_factory: OptimizerFactory,
    seed: int,
    average_weights: bool = True,
    auxiliary: dict[str, Tensor] | None = None,
) -> TrainState:
    """Returns the state before the first step, with copies of the model's tensors, on their device.

    Args:
        model: gives the first parameters and buffers; it is not changed.
        optimizer_factory: called with the parameters, for example `torch.optim.Adam`.
        seed: of the random streams.
        average_weights: whether to keep an average of the parameters.
        auxiliary: the first state of the objective, if it has one; donated.

    Raises:
        ArgumentError: if nothing in the model is trained, or its buffers and the auxiliary state share a name.

    Example:
        >>> state = initial_state(nn.Linear(2, 1), torch.optim.SGD, seed=0)
        >>> state.step, sorted(state.parameters)
        (0, ['bias', 'weight'])
    """
    trained, fixed = trained_and_fixed(model)
    if not trained:
        raise ArgumentError(f"nothing in {type(model).__name__} is trained: none of its parameters requires gradients")
    parameters = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
    buffers = {name: b.detach().clone() for name, b in fixed.items()}
    auxiliary = auxiliary or {}
    shared = sorted(set(auxiliary) & set(buffers))
    if shared:
        raise ArgumentError(f"the state of the objective must not have names of the model's buffers: {shared}")
    device = next(iter(parameters.values())).device
    optimizer = optimizer_factory(parameters.values())
    for group in optimizer.param_groups:
        group["as_built"] = {key: value for key, value in group.items() if key != "params"}
    return TrainState(
        step=0,
        parameters=parameters,
        buffers=buffers,
        auxiliary=auxiliary,
        optimizer=optimizer,
        weight_average={name: p.detach().clone() for name, p in parameters.items()} if average_weights else None,
        generators={name: make_generator(device, seed, name) for name in STREAMS},
        skipped={name: torch.zeros((), dtype=torch.int64, device=device) for name in ("total", "in a row")},
        recent=[],
    )


def trained_and_fixed(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the parameters of a model that require gradients, and all its other tensors, by name.

    Example:
        >>> linear = nn.Linear(2, 1)
        >>> _ = linear.bias.requires_grad_(False)
        >>> [list(tensors) for tensors in trained_and_fixed(linear)]
        [['weight'], ['bias']]
    """
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained, {name: tensor for name, tensor in tensors_of(model).items() if name not in trained}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a model by name.

    Example:
        >>> list(tensors_of(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def state_to_tensors(state: TrainState) -> dict[str, Any]:
    """Returns the state as nested dictionaries of tensors and numbers, fit for a checkpoint.

    Example: `state_from_tensors` shows both.
    """
    return {
        "step": state.step,
        "parameters": {name: p.detach() for name, p in state.parameters.items()},
        "buffers": state.buffers,
        "auxiliary": state.auxiliary,
        "optimizer": state.optimizer.state_dict(),
        "optimizer_name": type(state.optimizer).__name__,
        "weight_average": state.weight_average,
        "generators": {name: generator.get_state() for name, generator in state.generators.items()},
        "skipped": state.skipped,
        "recent": {name: torch.stack([row[name] for row in state.recent]) for name in next(iter(state.recent), {})},
        "best_loss": state.best_loss,
        "best_step": state.best_step,
    }


def state_from_tensors(tensors: dict[str, Any], template: TrainState) -> TrainState:
    """Returns the state that a checkpoint holds.

    Args:
        tensors: what `state_to_tensors` returned.
        template: an initial state of the same model; it is consumed. Optimizer options, such as the learning rate, in
            which it was built differently keep its values.

    Raises:
        CheckpointError: if the checkpoint is of another model, optimizer or kind of device.

    Example:
        >>> first, second = (initial_state(nn.Linear(2, 1), torch.optim.Adam, seed=seed) for seed in (0, 1))
        >>> restored = state_from_tensors(state_to_tensors(first), template=second)
        >>> torch.equal(restored.parameters["weight"], first.parameters["weight"])
        True
    """
    check_same_tensors(tensors["parameters"], template.parameters)
    check_same_tensors(tensors["buffers"], template.buffers)
    auxiliary = tensors.get("auxiliary", {})
    check_same_tensors(auxiliary, template.auxiliary, "objective")
    for values, into in (
        (tensors["parameters"], template.parameters),
        (tensors["buffers"], template.buffers),
        (auxiliary, template.auxiliary),
        (tensors.get("skipped", template.skipped), template.skipped),  # earlier checkpoints have none
    ):
        copy_by_name(values, into)
    _load_optimizer(template.optimizer, tensors)
    device = next(iter(template.parameters.values())).device
    average = template.weight_average
    if average is not None:
        source = tensors["weight_average"] or tensors["parameters"]  # averaging may have been switched on since
        check_same_tensors(source, template.parameters)
        average = {name: source[name].to(device).clone() for name in average}
    missing = sorted(set(template.generators) - set(tensors["generators"]))
    if missing:
        raise CheckpointError(f"the checkpoint has no random state of {' and '.join(missing)}")
    for name, generator in template.generators.items():
        try:
            generator.set_state(tensors["generators"][name].cpu())
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint was written on another kind of device, whose random state does not fit {device}: "
                "continue the run there (Experiment.device)"
            ) from error
    recent = {name: values.to(device).unbind() for name, values in tensors.get("recent", {}).items()}
    return dataclasses.replace(
        template,
        step=tensors["step"],
        weight_average=average,
        recent=[dict(zip(recent, row, strict=True)) for row in zip(*recent.values(), strict=True)],
        best_loss=tensors["best_loss"],
        best_step=tensors["best_step"],
    )


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Any]) -> None:
    """Loads what an optimizer has gathered; options that were built differently since keep their new values."""
    name = type(optimizer).__name__
    found = tensors.get("optimizer_name", name)
    if found != name:
        raise CheckpointError(f"the checkpoint is of another optimizer: {found}, where the experiment has {name}")
    built = [group["as_built"] for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(tensors["optimizer"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint is of another optimizer: {error}") from error
    defaults = tensors.get("optimizer_defaults")  # all that earlier checkpoints say of how an optimizer was built
    any_changed = False
    for group, options in zip(optimizer.param_groups, built, strict=True):
        before = group.get("as_built", options if defaults is None else defaults)
        changed = {key: value for key, value in options.items() if key not in before or before[key] != value}
        group.update(changed, as_built=options)
        any_changed = any_changed or bool(changed)
    if any_changed:
        _check_can_step(optimizer)


def _check_can_step(optimizer: torch.optim.Optimizer) -> None:
    """Takes a step on copies: an option that is new may ask for what the checkpoint does not hold."""
    trial = copy.deepcopy(optimizer)
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        trial.step()
    except Exception as error:  # of whatever kind, as optimizers are
        name = type(optimizer).__name__
        raise CheckpointError(
            f"the checkpoint does not hold what {name} keeps under the options that it has now ({reason_of(error)}): "
            "take back the change of its options, or start anew"
        ) from error


def check_same_tensors(
    found: dict[str, Tensor], wanted: dict[str, Tensor], kind: str = "model", where: str = ""
) -> None:
    """Compares names and shapes of tensors.

    Args:
        found: in a checkpoint.
        wanted: by what it is loaded into.
        kind: of what they are, for the error.
        where: which of that kind, for the error.

    Raises:
        CheckpointError: naming the first tensors that differ.

    Example:
        >>> check_same_tensors({"a": torch.zeros(2)}, {"a": torch.ones(2)})
    """
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (found, wanted)]
    if shapes[0] != shapes[1]:
        differing = sorted(name for name in {*found, *wanted} if shapes[0].get(name) != shapes[1].get(name))
        listed = "; ".join(
            f"{name}: {shapes[0].get(name, 'absent')} in the checkpoint, {shapes[1].get(name, 'absent')} in the {kind}"
            for name in differing[:3]
        )
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(f"the checkpoint is of another {kind}{where}: {listed}{more}")


def model_with_weights(model: AnyModule, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> AnyModule:
    """Returns a copy of the model that has these parameters and buffers, in evaluation mode.

    Example:
        >>> linear = nn.Linear(2, 1)
        >>> model_with_weights(linear, {"weight": torch.ones(1, 2), "bias": torch.ones(1)}, {})(torch.zeros(2)).item()
        1.0
    """
    loaded = copy.deepcopy(model)
    copy_by_name({**parameters, **buffers}, into=tensors_of(loaded))
    return loaded.requires_grad_(False).eval()


@torch.no_grad()
def copy_by_name(values: dict[str, Tensor], into: dict[str, Tensor]) -> None:
    """Copies values into the tensors of the same names.

    Example: `model_with_weights` calls it.
    """
    for name, tensor in into.items():
        tensor.copy_(values[name])
