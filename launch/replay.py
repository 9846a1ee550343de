"""Takes one step of a run again and says what in it is not finite: python -m launch.replay --run_dir=… --step=1234."""

from absl import flags

from launch import command
from popgen.errors import ArgumentError, check_integer
from popgen.replay import replay

FLAGS = flags.FLAGS
flags.DEFINE_string("run_dir", None, "The run directory that training wrote; nothing in it is changed.")
flags.DEFINE_bool("trust_config", False, command.TRUST_CONFIG)
flags.DEFINE_integer("step", None, "The step to look at; 1 is the first.")

SHOWN = 5  # names of each kind


def main() -> None:
    """Recomputes state and batch from the last good checkpoint before the step, and prints what goes wrong in it."""
    check_integer("step", FLAGS.step, minimum=1)
    directory, experiment, _ = command.existing_run(FLAGS.run_dir, None, FLAGS.trust_config)
    if FLAGS.step > experiment.num_steps:
        raise ArgumentError(f"step must be at most the {experiment.num_steps:,} of the run, got {FLAGS.step}")
    diagnosis = replay(experiment, directory, FLAGS.step)
    print(f"step {FLAGS.step}: loss {diagnosis.loss:.6g}, gradient norm {diagnosis.gradient_norm:.6g}")
    if not diagnosis.not_finite:
        print("everything in it is finite")
        return
    kind, name = diagnosis.not_finite[0]
    print(f"the first that is not finite: {kind} {name}")
    for kind in dict.fromkeys(kind for kind, _ in diagnosis.not_finite):
        names = [name for other, name in diagnosis.not_finite if other == kind]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        print(f"  {kind}: {', '.join(names[:SHOWN])}{more}")


if __name__ == "__main__":
    command.start(main, required=("run_dir", "step"))
