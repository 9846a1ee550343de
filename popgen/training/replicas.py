"""Replicas: runs that differ in their seed alone, trained side by side.

Each replica is an ordinary `TrainState` with an optimizer, generators, an average and counts of its own. Its
parameters, its buffers and the state of its objective are slices of tensors that are stacked along a first axis: on
those, loss and gradients of all replicas are formed at once. Then every replica takes its step by itself, as it would
alone: clipped by its own norm, or skipped.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from popgen.datasets.data import Batches
from popgen.errors import ArgumentError, DivergedError, reason_of
from popgen.precision import matrix_products
from popgen.streams import make_generator
from popgen.training.loop import mean_metrics
from popgen.training.objective import LossOutput, Metrics, Settings
from popgen.training.state import TrainState
from popgen.training.step import LossFunction, TrainStep, gradient_function


@dataclasses.dataclass(frozen=True)
class ReplicatedState(TrainState):
    """The states of several replicas after as many steps; `stack_states` makes one.

    Attributes:
        parameters: name to stacked leaf tensor.
        buffers: name to stacked tensor.
        auxiliary: name to stacked tensor.
        generators: purpose to the generators of all replicas.
        recent: the metrics of every step since the last point of the training curves, stacked.
        replicas: the states; `split_states` returns them with their step and their recent metrics.

    Example: `stack_states` returns one.
    """

    generators: dict[str, Any]  # of a tuple for each purpose
    replicas: tuple[TrainState, ...] = ()


def stack_states(states: Sequence[TrainState]) -> ReplicatedState:
    """Returns the states of replicas as one; their tensors become slices of stacked ones.

    Args:
        states: of the same model, optimizer and step; donated.

    Example:
        >>> from popgen.training.state import initial_state
        >>> states = [initial_state(torch.nn.Linear(2, 1), torch.optim.Adam, seed) for seed in range(3)]
        >>> stacked = stack_states(states)
        >>> stacked.parameters["weight"].shape
        torch.Size([3, 1, 2])
        >>> _ = states[2].parameters["weight"].data.fill_(5.0)
        >>> stacked.parameters["weight"][2].tolist()
        [[5.0, 5.0]]
    """
    first = states[0]
    return dataclasses.replace(
        ReplicatedState(**vars(first)),
        parameters={name: leaf.requires_grad_() for name, leaf in _stack_storage([s.parameters for s in states])},
        buffers=dict(_stack_storage([state.buffers for state in states])),
        auxiliary=dict(_stack_storage([state.auxiliary for state in states])),
        generators={name: tuple(state.generators[name] for state in states) for name in first.generators},
        recent=[stack(rows) for rows in zip(*(state.recent for state in states), strict=True)],
        replicas=tuple(states),
    )


def _stack_storage(each: Sequence[dict[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Returns the stacked tensors by name, and lets those that were given hold their slices."""
    stacked = [(name, torch.stack([tensors[name].detach() for tensors in each])) for name in each[0]]
    for name, whole in stacked:
        for tensors, part in zip(each, whole.unbind(), strict=True):
            tensors[name].data = part  # the optimizer knows the tensor, not its name
    return stacked


def split_states(state: ReplicatedState) -> list[TrainState]:
    """Returns the state of each replica, as if it had been trained alone; the tensors are shared.

    Example:
        >>> from popgen.training.state import initial_state
        >>> states = [initial_state(torch.nn.Linear(2, 1), torch.optim.Adam, seed) for seed in range(3)]
        >>> [one.parameters["weight"].shape for one in split_states(stack_states(states))][2]
        torch.Size([1, 2])
    """
    rows = [unstack(row, len(state.replicas)) for row in state.recent]
    return [
        dataclasses.replace(replica, step=state.step, recent=[row[index] for row in rows])
        for index, replica in enumerate(state.replicas)
    ]


def replicas_of(state: TrainState) -> tuple[TrainState, ...]:
    """Returns the states of all replicas; a run that stands alone is its own.

    Example: `CapturedStep` calls it.
    """
    return state.replicas if isinstance(state, ReplicatedState) else (state,)


def stack(trees: Sequence[Any]) -> Any:
    """Returns nested collections of tensors as one, its tensors stacked; what is no tensor is that of the first.

    Example:
        >>> stack([{"a": torch.tensor(1.0)}, {"a": torch.tensor(2.0)}])
        {'a': tensor([1., 2.])}
    """
    flattened = [tree_flatten(tree) for tree in trees]
    columns = zip(*(leaves for leaves, _ in flattened), strict=True)
    leaves = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return tree_unflatten(leaves, flattened[0][1])


def unstack(tree: Any, count: int) -> list[Any]:
    """Returns what `stack` was given.

    Example:
        >>> unstack({"a": torch.tensor([1.0, 2.0])}, 2)
        [{'a': tensor(1.)}, {'a': tensor(2.)}]
    """
    leaves, structure = tree_flatten(tree)
    columns = [leaf.unbind() if isinstance(leaf, Tensor) else (leaf,) * count for leaf in leaves]
    return [tree_unflatten([column[index] for column in columns], structure) for index in range(count)]


class ReplicatedBatches:
    """The batches of all replicas: a list of a batch for each, which belongs to its own seed.

    Args:
        batches: of each replica.

    Example:
        >>> from popgen.datasets.images import TrainBatches
        >>> images = torch.rand(10, 4)
        >>> batches = ReplicatedBatches([TrainBatches(images, batch_size=3, seed=seed) for seed in range(2)])
        >>> [batch.shape for batch in batches.draw(0, (torch.Generator(), torch.Generator()))]
        [torch.Size([3, 4]), torch.Size([3, 4])]
    """

    def __init__(self, batches: Sequence[Batches]) -> None:
        self.batches = batches

    def indices(self, step: int) -> Tensor:
        """Returns the indices of the examples of a step, shape `(replicas, batch_size)`."""
        return torch.stack([batches.indices(step) for batches in self.batches])

    def gather(self, indices: Tensor, generator: Any) -> list[Any]:
        """Returns the batches of some examples; each replica has a generator of its own."""
        rows = zip(self.batches, indices.unbind(), generator, strict=True)
        return [batches.gather(own, one) for batches, own, one in rows]

    def draw(self, step: int, generator: Any) -> list[Any]:
        """Returns the batches of a step."""
        return [batches.draw(step, one) for batches, one in zip(self.batches, generator, strict=True)]


class ReplicatedStep(TrainStep):
    """A training step of several replicas, `train_step(state, batches) -> (state, metrics)`, all metrics stacked.

    Example: `make_replicated_step` makes one.
    """

    def update(self, state: TrainState, batch: Any, settings: Settings) -> Metrics:
        """Forms the gradients of all replicas at once, and lets each take its step.

        Args:
            state: a `ReplicatedState`.
            batch: a list of the batches of all replicas.
            settings: which are the same for all.
        """
        if not isinstance(state, ReplicatedState):
            raise ArgumentError(f"the step of replicas takes a ReplicatedState, got {type(state).__name__}")
        replicas = state.replicas
        noise = stack(
            [
                self.objective.draw_noise(self.model, own, replica.generators["posterior noise"])
                for own, replica in zip(batch, replicas, strict=True)
            ]
        )
        parts = unstack(self.gradients(state, stack(batch), noise, settings), len(replicas))
        results, gradients = zip(*parts, strict=True)
        return stack(self.apply_together(replicas, results, gradients, settings))


def make_replicated_step(step: TrainStep, compiled: bool = False) -> ReplicatedStep:
    """Returns the training step of replicas, given that of one alone.

    Args:
        step: of one alone.
        compiled: whether torch.compile fuses the losses and their gradients; see `popgen.compilation`.

    Example:
        >>> from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> from popgen.training.objectives import NegativeELBO
        >>> from popgen.training.state import initial_state
        >>> from popgen.training.step import make_train_step
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> step = make_replicated_step(make_train_step(vae, NegativeELBO()))
        >>> state = stack_states([initial_state(vae, torch.optim.Adam, seed) for seed in range(3)])
        >>> state, metrics = step(state, [torch.zeros(5, 16)] * 3)
        >>> state.step, metrics["loss"].shape
        (1, torch.Size([3]))
    """
    mapped = mapped_over_replicas(step.loss_function)
    gradients = gradient_function(mapped, compiled)
    return ReplicatedStep(**{**vars(step), "loss_function": mapped, "gradient_function": gradients})


def mapped_over_replicas(loss_function: LossFunction) -> LossFunction:
    """Returns a loss function of stacked arguments, the settings excepted, whose results are stacked too.

    Example: `make_replicated_step` calls it.
    """

    def mapped(parameters, buffers, batch, noise, settings, state) -> LossOutput:
        axes = (0, 0, 0, None if noise is None else 0, None, 0)
        return torch.func.vmap(loss_function, axes)(parameters, buffers, batch, noise, settings, state)

    return mapped


def check_can_map(step: ReplicatedStep, state: ReplicatedState, batch_size: int, alone: Sequence[TrainStep]) -> None:
    """Forms the gradients of a blank batch for all replicas at once; the state stays as it is.

    Args:
        step: of all replicas.
        state: of all replicas.
        batch_size: examples in the blank batch.
        alone: the step of each replica by itself, whose loss is to be that of all.

    Raises:
        ArgumentError: if that is not possible for the model or the objective, or models differ in more than their
            tensors.

    Example: `run_replicas` calls it.
    """
    reference, objective = next(iter(state.parameters.values())), step.objective

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(reference.device, reference.dtype if tensor.is_floating_point() else None)

    blank = tree_map(place, objective.blank_batch(step.model, batch_size))
    generator = make_generator(reference.device, 0, "trial")
    count = len(state.replicas)
    noise = stack([objective.draw_noise(step.model, blank, generator) for _ in range(count)])
    settings = {name: torch.ones_like(reference[(0,) * reference.ndim]).detach() for name in step.settings(state)}
    try:
        step.gradients(state, stack([blank] * count), noise, settings)
    except Exception as error:  # whatever it is: the model itself need not foresee that it is mapped
        names = f"{type(step.model).__name__} with {type(objective).__name__}"
        raise ArgumentError(
            f"Experiment.num_replicas: {names} cannot be mapped over replicas ({reason_of(error)}): train one replica "
            "at a time, num_replicas = 1 under each seed"
        ) from error
    with torch.no_grad(), matrix_products("fp32", reference.device):
        mapped = step.loss_function(
            state.parameters, state.buffers, stack([blank] * count), noise, settings, state.auxiliary
        )
        for index, (own, one) in enumerate(zip(alone, state.replicas, strict=True)):
            tensors = one.parameters, one.buffers
            loss = own.loss_function(*tensors, blank, unstack(noise, count)[index], settings, one.auxiliary).loss
            if not torch.allclose(loss, mapped.loss[index], rtol=1e-5, atol=1e-5, equal_nan=True):
                raise ArgumentError(
                    f"Experiment.num_replicas: the {type(step.model).__name__} of replica {index} differs from that of "
                    "replica 0 in more than its parameters and buffers: what a seed decides belongs in these "
                    "(register_buffer), or train one replica at a time"
                )


class ReplicaMeans(dict[str, float]):
    """Means over replicas of their mean metrics, by name.

    Attributes:
        each: the mean metrics of each replica.

    Example:
        >>> means = ReplicaMeans([{"loss": 1.0}, {"loss": 3.0}])
        >>> means, means.each[1]
        ({'loss': 2.0}, {'loss': 3.0})
    """

    def __init__(self, each: Sequence[Mapping[str, float]]) -> None:
        super().__init__(spread(each)[0])
        self.each = list(each)


def mean_metrics_of_replicas(recent: Sequence[Metrics], step: int, max_skipped_steps: int) -> ReplicaMeans:
    """Returns what `popgen.training.loop.mean_metrics` does, for stacked metrics.

    Raises:
        DivergedError: naming the first replica that skipped more steps in a row than it may.

    Example:
        >>> row = {"loss": torch.tensor([1.0, 3.0])}
        >>> row |= {name: torch.zeros(2) for name in ("skipped_steps", "skipped_in_a_row")}
        >>> mean_metrics_of_replicas([row], step=1, max_skipped_steps=0)["loss"]
        2.0
    """
    count = len(next(iter(recent[0].values())))
    rows = [unstack(row, count) for row in recent]
    each = []
    for index in range(count):
        try:
            each.append(mean_metrics([row[index] for row in rows], step, max_skipped_steps))
        except DivergedError as error:
            raise DivergedError(f"replica {index}: {error}", error.step, index) from error
    return ReplicaMeans(each)


def spread(each: Sequence[Mapping[str, float | int]]) -> tuple[dict[str, float], dict[str, float]]:
    """Returns means and standard deviations (of a sample; none of a single one) of numbers, by name.

    A name that some have not is that of the others.

    Example:
        >>> spread([{"loss": 1.0}, {"loss": 3.0}])
        ({'loss': 2.0}, {'loss': 1.4142135623730951})
    """
    names = dict.fromkeys(name for numbers in each for name in numbers)
    columns = {name: [numbers[name] for numbers in each if name in numbers] for name in names}
    means = {name: statistics.fmean(column) for name, column in columns.items()}
    return means, {name: statistics.stdev(column) for name, column in columns.items() if len(column) > 1}
