"""Estimates test log p(x) of a run: python -m launch.evaluate --run_dir=experiments/vamp_hsnf."""

from absl import flags

from launch import command
from popgen.execution import PRECISIONS
from popgen.experiment import evaluate_model, prepare
from popgen.summaries import Writer
from popgen.training.records import write_record
from popgen.training.weights import WEIGHTS, model_of_checkpoint

STATISTICS = ("active_units", "codes_used", "perplexity", "kl_of_positionwise_prior", "elbo_of_positionwise_prior")

FLAGS = flags.FLAGS
flags.DEFINE_string("run_dir", None, "The run directory that training wrote.")
flags.DEFINE_string("checkpoint", "best", "best, latest, or a step that was kept.")
flags.DEFINE_integer("num_samples", None, "Importance samples for each image; default 5,000 for a VAE.")
flags.DEFINE_integer("num_images", None, "Test images, from the first; default all.")
flags.DEFINE_enum("precision", "fp32", PRECISIONS, "Of the networks' matrix products.")
flags.DEFINE_enum("weights", "raw", WEIGHTS, "The weights as trained, or their moving average.")


def main() -> None:
    """Evaluates a checkpoint and prints, logs and writes the record."""
    directory, loaded = command.existing_run(FLAGS.run_dir)
    experiment = loaded.experiment
    tensors = directory.load_checkpoint(FLAGS.checkpoint)
    data, model = prepare(experiment, experiment.torch_device())
    model = model_of_checkpoint(model, tensors, FLAGS.weights)
    num_samples = experiment.evaluator.default_num_samples if FLAGS.num_samples is None else FLAGS.num_samples
    record = evaluate_model(experiment, model, data, num_samples, FLAGS.num_images, tensors["step"], FLAGS.precision)
    record.update(checkpoint=FLAGS.checkpoint, weights=FLAGS.weights)
    writer = Writer(directory.path)
    path = write_record(directory, writer, record)
    writer.close()
    print(
        f"log p(x)        {record['log_p_x']:9.3f} ± {record['log_p_x_standard_error']:.3f} nats "
        f"({experiment.evaluator.bound_name}, {record['num_samples']} samples, {record['num_images']} test images)"
    )
    print(f"ELBO            {record['elbo']:9.3f} ± {record['elbo_standard_error']:.3f}")
    print(f"reconstruction  {record['reconstruction']:9.3f}\nKL              {record['kl']:9.3f}")
    for name in (name for name in STATISTICS if name in record):
        print(f"{name.replace('_', ' '):<28}{record[name]:9.6g}")
    print(f"step {record['step']}, {FLAGS.weights} weights, protocol {record['binarisation_protocol']}: {path}")


if __name__ == "__main__":
    command.start(main, required=("run_dir",))
