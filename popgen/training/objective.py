"""What an objective is: what a training step minimises, and all that the step must know of it.

An objective is called as `objective(forward, batch, noise, settings, state)` and returns a `LossOutput`: the scalar
loss, metrics, and by name what else it has observed of the batch. `forward` calls the model with the parameters of the
training state. The loss is formed here, and here alone the mean over the batch is taken. Then `transition` makes
of what was observed the new values of whatever else the step changes: its own state and buffers of the model.

Several processes each call an objective with a part of the batch. Loss, gradient and metrics are then averaged, what
was observed is summed, and `transition` sees the results alone; so it may do what is not linear, and the call may not.

The step number itself does not reach it: its `settings(step)` do, as tensors on the device, so that one compiled
function or one CUDA graph serves every step.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from popgen.distributed import Processes
from popgen.errors import ArgumentError

Metrics = dict[str, Tensor]
Settings = Mapping[str, Tensor]
Tensors = Mapping[str, Tensor]


class LossOutput(NamedTuple):
    """What an objective returns of a batch.

    Attributes:
        loss: a scalar, whose gradient is taken.
        metrics: detached scalars by name, `loss` among them.
        observed: by name what `transition` is to know of the batch.

    Example:
        >>> LossOutput(torch.tensor(90.0), {"loss": torch.tensor(90.0)}).observed
        {}
    """

    loss: Tensor
    metrics: Metrics
    observed: Tensors = {}


class Objective(abc.ABC):
    """What a training step minimises. Subclasses define `draw_noise` and `__call__`; the rest has defaults.

    Attributes:
        model_type: what it trains.
        state_of: what its own state is of, where that depends on its arguments: a run that goes on with another one
            starts that state anew.
        selected_by: in words, the loss that `selection_loss` returns, if it is not that of the evaluator.
        exchanges_in_loss: whether `part_of_batch` gives each of several processes more than its examples, so that they
            exchange something in the midst of the loss.
    """

    model_type: ClassVar[type] = nn.Module
    exchanges_in_loss: ClassVar[bool] = False

    @property
    def state_of(self) -> str:
        """What its own state is of."""
        return ""

    @property
    def selected_by(self) -> str:
        """Which loss chooses the best checkpoint, in words; "" for that of the evaluator."""
        return ""

    def selection_loss(self, results: Mapping[str, float]) -> float:
        """Returns the loss that chooses the best checkpoint, of what the evaluator found on the selection split."""
        return results["loss"]

    def check_model(self, model: Any) -> None:
        """Raises ArgumentError if it cannot train a model: one of another type, unless a subclass says more."""
        if not isinstance(model, self.model_type):
            raise ArgumentError(
                f"{type(self).__name__} trains a {self.model_type.__name__}, and the model is a {type(model).__name__}"
            )

    def settings(self, step: int) -> dict[str, float]:
        """Returns the numbers that depend on the step alone, such as an annealed weight."""
        return {}

    def initial_state(self, reference: Tensor) -> dict[str, Tensor]:
        """Returns the objective's own state before the first step, on the device and in the dtype of a reference."""
        return {}

    def blank_batch(self, model: Any, batch_size: int) -> Any:
        """Returns a batch of the right shapes that is zero throughout: images, unless a subclass says otherwise.

        Raises:
            ArgumentError: if the model is not one of images.
        """
        if not hasattr(model, "input_dim"):
            raise ArgumentError(
                f"{type(self).__name__} must define blank_batch(model, batch_size): {type(model).__name__} has no "
                "input_dim, as models of images do, so the shape of its batches is not known"
            )
        return torch.zeros(batch_size, model.input_dim)

    @abc.abstractmethod
    def draw_noise(self, model: Any, batch: Any, generator: torch.Generator) -> Any:
        """Returns the noise of one step."""

    def part_of_batch(self, batch: Any, processes: Processes) -> Any:
        """Returns what this process sees of a batch: its share of the examples, unless a subclass says otherwise."""
        return processes.part(batch)

    def part_of_noise(self, noise: Any, processes: Processes) -> Any:
        """Returns what of the noise of a whole batch belongs to this process's part of it.

        Several processes can train an objective only if it defines this, for its loss is then a mean over examples.

        Raises:
            ArgumentError: unless a subclass defines it.
        """
        raise ArgumentError(
            f"{type(self).__name__} cannot be shared by {processes.size} processes: it does not say which part of its "
            "noise belongs to which part of a batch (part_of_noise)"
        )

    def weight(self, batch: Any) -> Tensor | float:
        """Returns what this part of a batch counts in the means over all parts: as much as any other."""
        return 1.0

    @abc.abstractmethod
    def __call__(
        self, forward: Callable[..., Any], batch: Any, noise: Any, settings: Settings, state: Tensors
    ) -> LossOutput:
        """Returns the scalar loss, detached scalar metrics, and by name what `transition` is to know of the batch.

        Args:
            forward: the model, with the parameters and buffers of the training state.
            batch: what the batches of the data drew.
            noise: what `draw_noise` drew.
            settings: scalar tensors, those of `settings(step)`.
            state: the objective's own state.
        """

    def transition(
        self, model: Any, tensors: Tensors, metrics: Metrics, observed: Tensors
    ) -> tuple[dict[str, Tensor], Metrics]:
        """Returns the new values of its state and of buffers of the model by name, and all metrics of the step.

        Unless a subclass defines it, what was observed is itself the new values.

        Args:
            model: the architecture; its own tensors are not used.
            tensors: its own state and the buffers of the model, as the step found them.
            metrics: what calling it returned, means over the whole batch.
            observed: what calling it returned, summed over the parts of the batch.
        """
        return dict(observed), metrics
