"""Evaluates a run on test data: python -m launch.evaluate --run_dir=experiments/vamp_hsnf.

Several processes share the images if torchrun starts them: torchrun --nproc_per_node=2 -m launch.evaluate --run_dir=...
"""

import contextlib
from typing import Any

from absl import flags

from launch import command
from popgen import rendezvous
from popgen.datasets.data import first_examples
from popgen.distributed import Processes
from popgen.errors import UnfinishedEvaluationError, check_integer
from popgen.evaluation.annealed import check_by_annealing, check_can_anneal, describe_check
from popgen.evaluation.image_table import ImageTable, Shard
from popgen.experiment import evaluate
from popgen.precision import PRECISIONS
from popgen.prepared import prepare
from popgen.summaries import Writer
from popgen.training.records import EvaluationFiles

FLAGS = flags.FLAGS
command.define_run_flags()
flags.DEFINE_integer("num_samples", None, "Samples for each example; default 5,000 for a VAE.")
flags.DEFINE_integer("num_examples", None, "Test examples, from the first; default all.")
flags.DEFINE_alias("num_images", "num_examples")
flags.DEFINE_enum("precision", "fp32", PRECISIONS, "Precision of the networks' matrix products.")
flags.DEFINE_string("shard", "1/1", "Which part of the images, such as 2/4; the last part to finish writes the record.")
flags.DEFINE_integer("annealed_images", 0, "Test images to check by annealed importance sampling (VAE only).")
flags.DEFINE_integer("num_temperatures", 1_000, "Annealed importance sampling: number of temperatures.")
flags.DEFINE_integer("num_chains", 16, "Annealed importance sampling: number of chains per image.")
command.define_process_timeout()

SAME = (  # in all of several processes
    *("run_dir", "checkpoint", "weights", "num_samples", "num_examples", "precision", "shard"),
    *("annealed_images", "num_temperatures", "num_chains"),
)


def main() -> None:
    """Evaluates a checkpoint and prints, logs and writes the record."""
    check_integer("annealed_images", FLAGS.annealed_images, minimum=0)
    shard = Shard.parse(FLAGS.shard)
    with rendezvous.joined(FLAGS.process_timeout) as processes:
        evaluate_together(shard, processes)


def evaluate_together(shard: Shard, processes: Processes) -> None:
    """Does the work of `main`, as one of several processes that share the images; the first one writes and prints."""
    processes.check_same({f"--{name}": FLAGS[name].value for name in SAME})
    directory, experiment, tensors = command.existing_run(FLAGS.run_dir, FLAGS.checkpoint, FLAGS.trust_config)
    tensors = processes.broadcast(tensors)
    device = processes.device("Experiment.device", experiment.torch_device())
    with processes.first_goes_ahead():
        prepared = prepare(experiment, device)
    trained = prepared.with_checkpoint(tensors, FLAGS.weights)
    data = trained.data
    if FLAGS.annealed_images:
        check_can_anneal(trained.model, FLAGS.num_temperatures, FLAGS.num_chains)
    num_samples = experiment.evaluator.default_num_samples if FLAGS.num_samples is None else FLAGS.num_samples
    num_examples = len(first_examples(data, FLAGS.num_examples))
    files = EvaluationFiles(directory.path, tensors["step"], FLAGS.weights, num_samples, num_examples, FLAGS.precision)
    tables = [ImageTable(path, shard, processes) for path in (files.images_path, files.annealed_path)]

    def evaluated() -> dict[str, Any]:
        return evaluate(trained, num_samples, num_examples, tensors["step"], FLAGS.precision, tables[0])

    def checked() -> dict[str, float | int]:
        if not FLAGS.annealed_images:
            return {}
        images = data.test[: min(FLAGS.annealed_images, num_examples)]
        settings = {"num_temperatures": FLAGS.num_temperatures, "num_chains": FLAGS.num_chains}
        return check_by_annealing(trained.model, images, num_samples, **settings, seed=experiment.seed, table=tables[1])

    try:
        record = {}
        with contextlib.suppress(UnfinishedEvaluationError):
            record = evaluated()
        check = checked()
        record = record or evaluated()  # other shards may have finished meanwhile
    except UnfinishedEvaluationError as unfinished:
        print(unfinished)
        return
    if not processes.first:
        return
    record |= {"checkpoint": FLAGS.checkpoint, "weights": FLAGS.weights, "command": command.as_typed()}
    record |= check or files.annealing_on_file(record)
    writer = Writer(directory.path)
    files.write(writer, record, experiment.evaluator)
    writer.close()
    print(experiment.evaluator.describe(record))
    if "annealed_log_p_x" in record:
        print(describe_check(record))
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in data.facts().items())
    print(f"step {record['step']}, {FLAGS.weights} weights, {facts}: {files.record_path}")


if __name__ == "__main__":
    command.start(main, required=("run_dir",), again=lambda: "goes on with an evaluation of images where it was")
