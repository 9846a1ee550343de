"""An experiment with its data loaded and its model on a device: what training, evaluation and sampling start from."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch

from popgen.datasets.data import Batches, Data, first_examples
from popgen.description import Experiment
from popgen.distributed import ALONE, Processes
from popgen.errors import DataError
from popgen.models.model import Model
from popgen.streams import make_generator
from popgen.training import checks
from popgen.training.captured_step import functions_of_loop
from popgen.training.loop import DrawBatch, Step
from popgen.training.recorder import facts_of_run
from popgen.training.run_directory import Checkpoint
from popgen.training.state import TrainState, initial_state, state_from_tensors
from popgen.training.step import TrainStep, make_train_step
from popgen.training.weights import initialise, model_of_checkpoint


@dataclasses.dataclass(frozen=True)
class PreparedExperiment:
    """An experiment with its data and its model on a device.

    Attributes:
        experiment: what is prepared.
        data: that it loads, on the device, in the type of the model.
        model: its model; or, see `with_checkpoint`, the same with trained weights.
        processes: that train it together.

    Example: `prepare` returns one.
    """

    experiment: Experiment
    data: Data
    model: Model
    processes: Processes = ALONE

    @property
    def device(self) -> torch.device:
        """Where model and data are."""
        return next(self.model.parameters()).device

    def check_data(self) -> None:
        """Checks data and model against one another.

        Raises:
            DataError: if the data does not fit the model, or a split is missing.
            ArgumentError: if the parts of the model do not fit each other.
        """
        for examples in (self.data.train, self.data.split(self.experiment.selection_split), self.data.test):
            self.model.check_examples(examples)
        self.model.check_parts(self.data.train)

    def check_amounts(self) -> None:
        """Checks that there are examples enough for a batch, and for the evaluation that follows the last step.

        Raises:
            ArgumentError: if there are not.
        """
        self.batches()
        first_examples(self.data, self.experiment.final_num_examples)

    def check_steps(self) -> None:
        """Checks that a step is a function of state and batch alone, on the batch of the first step.

        Raises:
            ArgumentError: as the checks of `popgen.training.checks`.
        """
        batch = self.batches().draw(0, make_generator(self.device, 0, "trial"))
        state, step = self.initial_state(), dataclasses.replace(self, processes=ALONE).plain_step()
        checks.check_settings(step, (0, self.experiment.num_steps - 1))
        checks.check_repeats(step, state, batch)
        checks.check_can_be_copied(self.model)
        checks.check_can_be_saved(state, self.initial_state())

    def facts(self) -> dict[str, str]:
        """Returns what checkpoints hold of a run beside its state; that takes a pass through the training data."""
        experiment = self.experiment
        return facts_of_run(experiment.selection_split, experiment.evaluator, experiment.objective, self.data.train)

    def batches(self) -> Batches:
        """Returns the training batches.

        Raises:
            ArgumentError: if a batch is larger than the data.
        """
        return self.data.batches(self.experiment.batch_size, self.experiment.seed)

    def initial_state(self) -> TrainState:
        """Returns the state before the first step, with the weights of the model as they are.

        Raises:
            ArgumentError: if the optimizer is not fit for training steps or checkpoints, or steps may be skipped and
                it cannot be told on the device to skip one.
        """
        experiment = self.experiment
        auxiliary = experiment.objective.initial_state(next(self.model.parameters()))
        checks.check_tensors(f"{type(experiment.objective).__name__}.initial_state", auxiliary)
        average = experiment.weight_average_decay is not None
        state = initial_state(self.model, experiment.optimizer, experiment.seed, average, auxiliary)
        checks.check_optimizer(state.optimizer)
        if experiment.max_skipped_steps:
            checks.check_can_skip(state.optimizer, self.device)
        return state

    def state_to_start_from(self, found: Checkpoint | None) -> TrainState:
        """Returns the state that a checkpoint holds; for None that before the first step, its weights initialised.

        Where the objective's own state is of something else than in the checkpoint, that starts anew, as a line says.

        Raises:
            CheckpointError: if the checkpoint is of another model, optimizer or kind of device.
        """
        if found is not None:
            tensors, state = found.tensors, self.initial_state()
            state_of = self.experiment.objective.state_of
            if (before := tensors.get("state_of", state_of)) != state_of:  # earlier checkpoints do not say
                name = type(self.experiment.objective).__name__
                print(f"the state of {name} starts anew: it was of {before!r}, and is of {state_of!r}", file=sys.stderr)
                tensors = {**tensors, "auxiliary": {key: value.clone() for key, value in state.auxiliary.items()}}
            return state_from_tensors(tensors, state)
        initialise(self.model, self.experiment.pretrained, self.data.train, self.experiment.seed)
        return self.initial_state()

    def with_checkpoint(self, tensors: Mapping[str, Any], weights: str = "raw") -> "PreparedExperiment":
        """Returns the same with the raw or averaged weights of a loaded checkpoint, in evaluation mode.

        Raises:
            CheckpointError: if it is of another model, or has no averaged weights.
        """
        return dataclasses.replace(self, model=model_of_checkpoint(self.model, tensors, weights))

    def plain_step(self) -> TrainStep:
        """Returns the training step, which is not recorded."""
        experiment = self.experiment
        return make_train_step(
            self.model,
            experiment.objective,
            weight_average_decay=0.0 if experiment.weight_average_decay is None else experiment.weight_average_decay,
            max_gradient_norm=experiment.max_gradient_norm,
            compiled=experiment.compile,
            precision=experiment.precision,
            learning_rate=experiment.learning_rate,
            skip_gradient_norm=experiment.skip_gradient_norm,
            processes=self.processes,
        )

    def training_functions(self) -> tuple[Step, DrawBatch]:
        """Returns the training step and what draws its batches, for `popgen.training.loop.train`."""
        return functions_of_loop(self.plain_step(), self.batches(), self.experiment.cuda_graph)


def prepare(experiment: Experiment, device: torch.device, processes: Processes = ALONE) -> PreparedExperiment:
    """Returns an experiment with its data and its model on a device, checked against one another.

    Raises:
        DataError: if the data cannot be loaded, or does not fit the model.
        ArgumentError: if the parts of the model do not fit each other.

    Example:
        >>> from popgen.datasets.stroke_digits import StrokeDigits
        >>> from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(784, 40), BernoulliDecoder(40, 784), StandardNormalPrior())
        >>> prepared = prepare(Experiment(model=vae, dataset=StrokeDigits()), torch.device("cpu"))
        >>> prepared.data.train.shape[1:], prepared.initial_state().step
        (torch.Size([784]), 0)
    """
    model = experiment.model.to(device)
    prepared = PreparedExperiment(experiment, load_data(experiment, device), model, processes)
    prepared.check_data()
    return prepared


def load_data(experiment: Experiment, device: torch.device) -> Data:
    """Returns the data of an experiment on a device, in the type of its model.

    Raises:
        DataError: if it cannot be loaded.

    Example: `prepare` calls it.
    """
    data = experiment.dataset.load()
    if not isinstance(data, Data):
        raise DataError(
            f"{type(experiment.dataset).__name__}.load must return a Data (see popgen.datasets.data), such as an "
            f"ImageData, got an object of type {type(data).__name__}"
        )
    return data.to(device, next(experiment.model.parameters()).dtype)
