"""Draws from a trained model: python -m launch.sample --run_dir=experiments/vamp_hsnf --out=samples.png."""

import pathlib

from absl import flags

from launch import command
from popgen.errors import RunDirectoryError, check_integer
from popgen.evaluation.shown import picture_names, save_shown
from popgen.prepared import prepare
from popgen.streams import make_generator

FLAGS = flags.FLAGS
command.define_run_flags()
flags.DEFINE_string("out", None, "The PNG to write; sounds go beside it as WAV files.")
flags.DEFINE_integer("num_samples", None, "Samples, and at most as many other pictures; default 64 images or 8 sounds.")
flags.DEFINE_integer("seed", 0, "Random seed of the samples.")


def main() -> None:
    """Writes every picture that the model has, one below another, and every sound."""
    if FLAGS.num_samples is not None:
        check_integer("num_samples", FLAGS.num_samples, minimum=2)
    out = pathlib.Path(FLAGS.out)
    if out.suffix.lower() != ".png":
        raise RunDirectoryError(f"out must be the name of a PNG, such as samples.png, got {str(out)!r}")
    if out.is_dir():
        raise RunDirectoryError(f"out must be a file to write, got the folder {str(out)!r}")
    check_integer("seed", FLAGS.seed, minimum=0)
    if not out.parent.is_dir():
        raise RunDirectoryError(f"there is no folder {str(out.parent)!r} to write {out.name} in")
    _, experiment, tensors = command.existing_run(FLAGS.run_dir, FLAGS.checkpoint, FLAGS.trust_config)
    trained = prepare(experiment, experiment.torch_device()).with_checkpoint(tensors, FLAGS.weights)
    generator = make_generator(trained.device, FLAGS.seed, "samples")
    evaluator = experiment.evaluator
    num_samples = evaluator.num_shown if FLAGS.num_samples is None else FLAGS.num_samples
    shown = evaluator.show(trained.model, trained.data, num_samples, generator)
    if not shown:
        raise RunDirectoryError(f"a {type(trained.model).__name__} has nothing to draw samples from")
    for path in save_shown(out, shown):
        names = ", ".join(name.replace("_", " ") for name in picture_names(shown))
        print(f"wrote {path}{f': {names}, from the top' if path == out else ''}")


if __name__ == "__main__":
    command.start(main, required=("run_dir", "out"))
