"""Trains an experiment from Gin configs: python -m launch.train --gin_file=configs/vamp_hsnf.gin.

SIGTERM or Ctrl-C stops it after the step in progress, saved, with exit status 75; the same command goes on.
Several processes train together if torchrun starts them: torchrun --nproc_per_node=2 -m launch.train --gin_file=...
"""

import contextlib
import dataclasses
import pathlib
import statistics
from collections.abc import Iterator
from shlex import quote

import torch
from absl import flags

from launch import command
from popgen import config, rendezvous
from popgen.distributed import Processes
from popgen.errors import ConfigError, ProcessesError, RunDirectoryError, StoppedError
from popgen.experiment import Experiment, run
from popgen.replicas import Replica, check_one_process, run_replicas
from popgen.training.recorder import selected_by
from popgen.training.records import evaluation_records, read_record
from popgen.training.run_directory import RunDirectory, default_root
from popgen.training.state import TrainState, tensors_of

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("gin_file", [], "A config file; may be repeated, later files override earlier ones.")
flags.DEFINE_multi_string("gin_bindings", [], "A binding such as 'Experiment.num_steps = 1000'; may be repeated.")
flags.DEFINE_string("run_dir", None, "Where the run is kept; default $EXPERIMENT_DIR/<config name>.")
flags.DEFINE_bool("dry_run", False, "Print configuration, parameter counts and shapes; train nothing.")
flags.DEFINE_bool("overwrite", False, "Start from scratch, removing what an earlier run wrote.")
flags.DEFINE_bool("reconfigure", False, "Continue an earlier run under a changed configuration.")
command.define_process_timeout()
flags.DEFINE_multi_string("hparam", [], "A setting that is a column of TensorBoard's HParams tab; default all.")


def main() -> None:
    """Builds the experiment, then trains it or prints what would be trained."""
    if FLAGS.overwrite and FLAGS.reconfigure:
        raise ConfigError("--overwrite starts anew and --reconfigure continues: give one of them")
    with rendezvous.joined(FLAGS.process_timeout) as processes, without_overwrite():
        train_together(processes, anew=FLAGS.overwrite and not rendezvous.started_again())


@contextlib.contextmanager
def without_overwrite() -> Iterator[None]:
    """Adds to the advice that the same command goes on that it does so without --overwrite, if that was given."""
    try:
        yield
    except (StoppedError, ProcessesError) as error:
        error.args = (f"{error}{_not_again()}",)
        raise


def again() -> str:
    """Returns what the same command does after it was interrupted."""
    return f"continues the run from its latest checkpoint{_not_again()}"


def _not_again() -> str:
    """Returns how the same command is not the same, so that it goes on and does not remove what there is."""
    return ", without --overwrite" if FLAGS.overwrite else ""


def train_together(processes: Processes, anew: bool) -> None:
    """Does the work of `main`, as one of several processes; the first one holds the directory and prints."""
    loaded = config.load(FLAGS.gin_file, FLAGS.gin_bindings)
    configuration = dataclasses.replace(loaded.configuration, compared=tuple(FLAGS.hparam))
    check_same_configuration(processes.all_gather_object(configuration.given))
    check_one_process(loaded.experiment.num_replicas, processes)
    directory = RunDirectory(run_path())
    if not processes.first:
        if not FLAGS.dry_run:
            with command.stop_requests(quiet=True) as stop:
                run(loaded.experiment, directory, configuration, stop, processes, anew)
        return
    if loaded.orphans:
        print(f"not used by this configuration: {', '.join(loaded.orphans)}")
    if FLAGS.dry_run:
        print(configuration.operative)
        print(describe(loaded.experiment))
        return
    with directory.locked():
        if not anew:
            directory.check_num_replicas(loaded.experiment.num_replicas)
            check_as_it_was(directory, configuration.given)
        print(
            f"run directory: {directory.path}\nfollow it with: tensorboard --logdir {quote(str(directory.path))}",
            flush=True,
        )
        with command.stop_requests() as stop:
            if loaded.experiment.num_replicas == 1:
                state = run(loaded.experiment, directory, configuration, stop, processes, anew)
                results = [(directory, state)]
            else:
                replicas = configured_replicas(loaded.experiment)
                for index, replica in enumerate(replicas if not anew else ()):
                    check_as_it_was(directory.replica(index), replica.configuration.given)
                states = run_replicas(replicas, directory, configuration, stop, anew)
                results = list(zip(directory.replicas(), states, strict=True))
    for own, state in results:
        report(own, loaded.experiment, state)
    if len(results) > 1:
        losses = [state.best_loss for _, state in results]
        print(
            f"{len(losses)} replicas: lowest loss {statistics.fmean(losses):.3f} ± {statistics.stdev(losses):.3f} nats"
        )


def configured_replicas(experiment: Experiment) -> list[Replica]:
    """Returns the replicas of the experiment that the flags describe."""
    loaded = config.load_replicas(FLAGS.gin_file, FLAGS.gin_bindings, experiment)
    return [
        Replica(one.experiment, dataclasses.replace(one.configuration, compared=tuple(FLAGS.hparam))) for one in loaded
    ]


def report(directory: RunDirectory, experiment: Experiment, state: TrainState) -> None:
    """Prints what a run came to, the table of its evaluation if there was one, and what can be done with it."""
    selected = selected_by(experiment.selection_split, experiment.evaluator, experiment.objective)
    lowest = f"{state.best_loss:.3f} nats, at step {state.best_step}"
    print(f"finished at step {state.step}; the lowest {selected} was {lowest}")
    records = evaluation_records(directory.path, state.best_step, "raw", experiment.final_num_samples)
    for path in sorted(records, key=lambda path: path.stat().st_mtime)[-1:]:  # earlier ones are of other examples
        print(f"{experiment.evaluator.describe(read_record(path))}\nevaluation: {path}")
    for path in sorted(directory.samples_path.glob("best*")):
        print(f"samples: {path}")
    trust = " --trust_config" if own_modules(experiment) else ""
    print(f"evaluate: python -m launch.evaluate --run_dir={quote(str(directory.path))}{trust}")


def own_modules(experiment: Experiment) -> set[str]:
    """Returns the packages beside popgen and PyTorch that the parts of an experiment are of."""
    parts = (*experiment.model.modules(), experiment.dataset, experiment.objective, experiment.evaluator)
    return {type(part).__module__.partition(".")[0] for part in parts} - {"popgen", "torch"}


def check_same_configuration(given: list[str]) -> None:
    """Raises ConfigError if the processes of a run were not given the same configuration."""
    for rank, text in enumerate(given):
        if text != given[0]:
            listed = "; ".join(config.differences(given[0], text))
            raise ConfigError(f"process {rank} was given another configuration than process 0 ({listed})")


def run_path() -> pathlib.Path:
    """Returns `--run_dir`, or the configs' names under `$EXPERIMENT_DIR` or `experiments`."""
    if FLAGS.run_dir:
        return pathlib.Path(FLAGS.run_dir)
    return default_root() / command.config_name(FLAGS.gin_file)


def check_as_it_was(directory: RunDirectory, given: str) -> None:
    """Raises RunDirectoryError if the configuration of a run has changed and no flag says what is meant."""
    changed = config.changes_since(directory, given)
    if changed and not FLAGS.reconfigure:
        raise RunDirectoryError(
            f"{directory.path} holds a run with another configuration ({'; '.join(changed)}): --reconfigure continues "
            "it under the new one, --overwrite starts anew, --run_dir names another place"
        )


def describe(experiment: Experiment) -> str:
    """Returns the parameter count and the tensors of each part of the model, and the shapes of a batch on its way."""
    model, lines = experiment.model, ["parameters:"]
    for name, part in [*model.named_children(), ("total", model)]:
        lines.append(f"  {name:<12}{sum(p.numel() for p in part.parameters()):>12,}")
        if part is not model:
            lines += [f"    {key:<38}{tuple(t.shape)!s:>16}{remark(t)}" for key, t in tensors_of(part).items()]
    lines.append(f"shapes, for a batch of {experiment.batch_size}:")
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: lines.extend(shape_lines(name, inputs, output))
        )
    objective = experiment.objective
    batch = objective.blank_batch(model, experiment.batch_size)
    settings = {name: torch.tensor(value) for name, value in objective.settings(0).items()}
    with torch.no_grad():
        noise = objective.draw_noise(model, batch, torch.Generator())
        objective(model, batch, noise, settings, objective.initial_state(next(model.parameters())))
    return "\n".join(lines)


def remark(tensor: torch.Tensor) -> str:
    """Returns what is to be said of a tensor that no optimizer moves."""
    if not isinstance(tensor, torch.nn.Parameter):
        return "  buffer"
    return "" if tensor.requires_grad else "  frozen"


def shape_lines(name: str, inputs: tuple, output: object) -> list[str]:
    """Returns the line of a module that maps one tensor to another; other modules have none."""
    if len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor) or not isinstance(output, torch.Tensor):
        return []
    return [f"  {name:<40}{tuple(inputs[0].shape)!s:>18} -> {tuple(output.shape)}"]


if __name__ == "__main__":
    command.start(main, required=("gin_file",), again=again)
