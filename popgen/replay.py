"""A step of a run, taken again to see what goes wrong in it."""

import dataclasses

from tqdm import tqdm

from popgen.description import Experiment
from popgen.prepared import prepare
from popgen.training.diagnosis import Diagnosis, diagnose
from popgen.training.run_directory import RunDirectory


def replay(experiment: Experiment, directory: RunDirectory, step: int) -> Diagnosis:
    """Returns what is not finite in a step of a run, recomputed from the last good checkpoint before it.

    The steps on the way are taken as the run takes them, the last one plainly: only so are its modules seen.

    Raises:
        CheckpointError: if there are checkpoints before the step, and all are damaged or of another model.

    Example: `main` of `launch.replay` prints it.
    """
    prepared = prepare(experiment, experiment.torch_device())
    state = prepared.state_to_start_from(directory.newest_checkpoint(step - 1))
    train_step, draw_batch = prepared.training_functions()
    for _ in tqdm(range(state.step, step - 1), unit="step", disable=None, dynamic_ncols=True):
        state, _ = train_step(state, draw_batch(state.step, state.generators["binarisation"]))
    plain = dataclasses.replace(prepared, experiment=dataclasses.replace(experiment, compile=False))
    batch = plain.batches().draw(state.step, state.generators["binarisation"])
    return diagnose(plain.plain_step(), state, batch)
