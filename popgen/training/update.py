"""The update at the end of a training step: clipping, the optimizer, the weight average, and whether it is taken."""

import collections
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popgen.compilation import compile_or_fall_back
from popgen.optim.weight_average import update_weight_average
from popgen.tensors import is_launch_bound
from popgen.training.state import TrainState

Gradients = tuple[Tensor | None, ...]


class Outcome(NamedTuple):
    """What an update found.

    Attributes:
        norm: of the gradient, before clipping.
        taken: whether the step was taken.
        skipped_steps: how many were not, until now, in the dtype of the norm.
        skipped_in_a_row: how many were not, just before and now.
    """

    norm: Tensor
    taken: Tensor
    skipped_steps: Tensor
    skipped_in_a_row: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """An update of the tensors of states in place, `update(states, losses, gradients, averaging_rate, rate)`.

    Where the loss or the gradient is not finite, or the gradient too large, parameters, optimizer and average stay as
    they were; what a fused optimizer first keeps of a parameter in such a step is zero. Nothing waits for the device,
    but a plain step of an optimizer that cannot be told there to skip it.

    Attributes:
        max_gradient_norm: gradients with a larger norm are scaled down to it.
        skip_gradient_norm: a step whose gradient has a larger norm is not taken.
        on_tensors: the whole of it as one compiled function, for optimizers that can be traced; see `traced_update`.

    Example: `make_train_step` makes one.
    """

    max_gradient_norm: float | None = None
    skip_gradient_norm: float | None = None
    on_tensors: Callable[..., list[Outcome]] | None = None

    def __call__(
        self,
        states: Sequence[TrainState],
        losses: Sequence[Tensor],
        gradients: Sequence[Gradients],
        averaging_rate: Tensor,
        rate: Tensor | None,
    ) -> list[Outcome]:
        """Updates parameters, optimizer and weight average of each state, and returns what it found.

        Args:
            states: are updated; of the same model and optimizer.
            losses: of the step of each.
            gradients: of the parameters of each.
            averaging_rate: of the new parameters in the weight average.
            rate: the learning rate; None for that of the optimizer.
        """
        each = list(zip(states, losses, gradients, strict=True))
        if self.on_tensors is not None and all(can_be_traced(state.optimizer, own) for state, _, own in each):
            tensors = [(*_tensors_of(state, own), loss) for state, loss, own in each]
            return self.on_tensors(tensors, averaging_rate, rate, states[0].optimizer)
        return [self._one(*one, averaging_rate, rate) for one in each]

    def _one(
        self, state: TrainState, loss: Tensor, gradients: Gradients, averaging_rate: Tensor, rate: Tensor | None
    ) -> Outcome:
        norm = gradient_norm(gradients)
        taken = self.is_taken(loss, norm)
        with _learning_rate(state.optimizer, rate):
            self._apply(gradients, norm, taken, state)
        if state.weight_average is not None:
            update_weight_average(state.weight_average, state.parameters, averaging_rate * taken)
        return Outcome(norm, taken, *count_skipped(state.skipped, taken, norm.dtype))

    def is_taken(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Returns whether a step with this loss and gradient norm is taken."""
        taken = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        return taken if self.skip_gradient_norm is None else taken & (norm <= self.skip_gradient_norm)

    def divisor(self, norm: Tensor) -> Tensor | None:
        """Returns what clipping divides gradients of this norm by; None where there is no limit."""
        return None if self.max_gradient_norm is None else (norm / self.max_gradient_norm).clamp_min(1.0)

    def _apply(self, gradients: Gradients, norm: Tensor, taken: Tensor, state: TrainState) -> None:
        """Lets the optimizer take its step along the clipped gradients, unless it is skipped."""
        leaves: list[Tensor] = list(state.parameters.values())
        optimizer: Any = state.optimizer  # fused ones take attributes that the base class does not know
        divisor, told = self.divisor(norm), supports_found_inf(optimizer)
        in_passing = told and norm.dtype != torch.float64  # fused kernels divide by a `grad_scale` of type float32
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None and divisor is not None and not in_passing:
                gradient = gradient / divisor
            leaf.grad = None if gradient is None else match_strides(leaf, gradient)
        if told:  # they do nothing at `found_inf`
            optimizer.grad_scale = divisor.float() if in_passing and divisor is not None else None
            optimizer.found_inf = (~taken).float()
            known = {leaf: set(kept) for leaf, kept in optimizer.state.items()}
            optimizer.step()
            for leaf, kept in optimizer.state.items():
                for name in kept.keys() - known.get(leaf, ()):  # made just now, and left unset if the step was skipped
                    kept[name].copy_(torch.where(taken, kept[name], torch.zeros_like(kept[name])))
            optimizer.grad_scale = optimizer.found_inf = None
        elif is_recorded() or taken:  # asking waits for a GPU, and a recorded step cannot: see `check_can_skip`
            optimizer.step()
        for leaf in leaves:
            leaf.grad = None


def is_recorded() -> bool:
    """Returns whether what is done now is recorded as a CUDA graph.

    Example:
        >>> is_recorded()
        False
    """
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def traced_update(update: Update) -> Update:
    """Returns the same update, compiled in one piece with the optimizer's step where the optimizer can be traced.

    On a GPU each of PyTorch's fused kernels passes over all tensors with few threads, and clipping, moments and average
    take one after another. Here all that happens to a parameter happens in one pass, and replicas are updated together.

    Example: `make_train_step` calls it.
    """

    def one(tensors: tuple, averaging_rate: Tensor, rate: Tensor | None, like: torch.optim.Optimizer) -> Outcome:
        parameters, gradients, kept, average, skipped, loss = tensors
        squares = [norm.square() for norm in torch._foreach_norm(gradients)]
        norm = functools.reduce(torch.add, squares).sqrt()  # in one kernel, unlike what `gradient_norm` stacks
        taken, divisor = update.is_taken(loss, norm), update.divisor(norm)
        if divisor is not None:
            gradients = list(torch._foreach_div(gradients, divisor))
        changing = [*parameters.values(), *(value for values in kept for value in values.values())]
        before = [tensor.clone() for tensor in changing]
        optimizer_of(like, list(parameters.values()), gradients, kept, rate).step()
        for tensor, value in zip(changing, before, strict=True):
            tensor.copy_(torch.where(taken, tensor, value))
        if average is not None:
            update_weight_average(average, parameters, averaging_rate * taken)
        return Outcome(norm, taken, *count_skipped(skipped, taken, norm.dtype))

    @torch.no_grad()
    def on_tensors(
        each: list[tuple], averaging_rate: Tensor, rate: Tensor | None, like: torch.optim.Optimizer
    ) -> list[Outcome]:
        return [one(own, averaging_rate, rate, like) for own in each]

    compiled = compile_or_fall_back(on_tensors, traced=True, in_place=True)
    return dataclasses.replace(update, on_tensors=compiled)


def can_be_traced(optimizer: torch.optim.Optimizer, gradients: Gradients) -> bool:
    """Returns whether a step of an optimizer depends on tensors beside the parameters alone, and pays to be traced.

    It is one of PyTorch's, can count on the device, has taken its first step, and every parameter has a gradient.

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(1))
        >>> can_be_traced(torch.optim.Adam([parameter]), (torch.ones(1),))  # on a CPU it would not pay
        False
    """
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    return (
        is_launch_bound(leaves[0])
        and type(optimizer).__module__.startswith("torch.optim.")
        and all("capturable" in group for group in optimizer.param_groups)
        and all(gradient is not None for gradient in gradients)
        and all(optimizer.state.get(leaf) for leaf in leaves)
        and all(
            isinstance(value, Tensor) and value.device == leaf.device
            for leaf in leaves
            for value in optimizer.state[leaf].values()
        )
    )


def optimizer_of(
    like: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    kept: Sequence[dict[str, Tensor]],
    rate: Tensor | None,
) -> torch.optim.Optimizer:
    """Returns an optimizer of the same kind and options of other tensors, in the order of its groups.

    Args:
        like: the optimizer.
        parameters: given their gradients.
        gradients: of them.
        kept: what it keeps of each.
        rate: the learning rate; None for that of each group.

    Example: `traced_update` traces a step of it.
    """
    optimizer, given = copy.copy(like), iter(parameters)
    optimizer.param_groups = [
        {
            **group,
            "params": [next(given).detach() for _ in group["params"]],
            "lr": group["lr"] if rate is None else rate,
            "fused": False,
            "foreach": True,
            "capturable": True,
        }
        for group in like.param_groups
    ]
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
    optimizer.state = collections.defaultdict(dict, zip(leaves, map(dict, kept), strict=True))
    return optimizer


def _tensors_of(state: TrainState, gradients: Gradients) -> tuple:
    """Returns parameters, gradients, what the optimizer keeps of each, the average, and the counts of skipped steps.

    The first three come in the order of the optimizer's groups.
    """
    leaves = [leaf for group in state.optimizer.param_groups for leaf in group["params"]]
    names = {leaf: name for name, leaf in state.parameters.items()}
    of_leaf: dict[Tensor, Any] = dict(zip(state.parameters.values(), gradients, strict=True))
    return (
        {names[leaf]: leaf for leaf in leaves},
        [match_strides(leaf, of_leaf[leaf]) for leaf in leaves],
        [dict(state.optimizer.state[leaf]) for leaf in leaves],
        state.weight_average,
        state.skipped,
    )


def gradient_norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """Returns the norm of all gradients together.

    Example:
        >>> gradient_norm([torch.tensor([3.0]), None, torch.tensor([4.0])])
        tensor(5.)
    """
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([g for g in gradients if g is not None])))


def count_skipped(skipped: dict[str, Tensor], taken: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Counts a step that was not taken, in place, and returns how many there were in all and in a row, as numbers.

    Example:
        >>> counts = {"total": torch.tensor(4), "in a row": torch.tensor(2)}
        >>> count_skipped(counts, torch.tensor(False), torch.float32)
        (tensor(5.), tensor(3.))
    """
    total, in_a_row = skipped["total"].add_(~taken), skipped["in a row"].add_(1).mul_(~taken)
    return total.to(dtype), in_a_row.to(dtype)


def match_strides(leaf: Tensor, gradient: Tensor) -> Tensor:
    """Returns a gradient that lies in memory as its parameter does: fused kernels go by memory alone.

    Example:
        >>> match_strides(torch.zeros(2, 3), torch.zeros(3, 2).T).stride()
        (3, 1)
    """
    return gradient if gradient.stride() == leaf.stride() else torch.empty_like(leaf).copy_(gradient)


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether an optimizer can be told on the device to leave a step out; fused ones can.

    Example:
        >>> parameters = [torch.nn.Parameter(torch.zeros(1))]
        >>> [supports_found_inf(torch.optim.Adam(parameters, fused=fused)) for fused in (True, False)]
        [True, False]
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False)


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
