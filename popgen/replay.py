"""A step of a run, taken again to see what goes wrong in it."""

import dataclasses

from tqdm import tqdm

from popgen.experiment import Experiment, plain_step, prepare, restored_or_initial_state, training_functions
from popgen.training.diagnosis import Diagnosis, diagnose
from popgen.training.run_directory import RunDirectory


def replay(experiment: Experiment, directory: RunDirectory, step: int) -> Diagnosis:
    """Returns what is not finite in a step of a run, recomputed from the last good checkpoint before it.

    The steps on the way are taken as the run takes them, the last one plainly: only so are its modules seen.

    Raises:
        CheckpointError: if there are checkpoints before the step, and all are damaged or of another model.

    Example: `main` of `launch.replay` prints it.
    """
    data, model = prepare(experiment, experiment.torch_device())
    state = restored_or_initial_state(experiment, model, data, directory.newest_checkpoint(step - 1))
    train_step, draw_batch = training_functions(experiment, model, data)
    for _ in tqdm(range(state.step, step - 1), unit="step", disable=None, dynamic_ncols=True):
        state, _ = train_step(state, draw_batch(state.step, state.generators["binarisation"]))
    last_step = plain_step(dataclasses.replace(experiment, compile=False), model)
    batches = data.batches(experiment.batch_size, experiment.seed)
    return diagnose(last_step, state, batches.draw(state.step, state.generators["binarisation"]))
