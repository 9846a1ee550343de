"""Probes what a CPC has learned: python -m launch.probe --run_dir=experiments/cpc_speech --target=speaker."""

import dataclasses
import re

from absl import flags

from launch import command
from popgen.errors import ArgumentError, check_integer
from popgen.evaluation.representations import (
    ProbeRow,
    check_can_be_probed,
    describe_row,
    probe_rows,
    representations,
    unseen_labels,
)
from popgen.files import write_json
from popgen.prepared import prepare
from popgen.provenance import surroundings
from popgen.summaries import Writer
from popgen.training.weights import model_of_checkpoint

FLAGS = flags.FLAGS
command.define_run_flags(checkpoint="latest", remark="; best was chosen on test data")
flags.DEFINE_string("target", None, "The label that is told from single frames, such as speaker or digit.")
flags.DEFINE_integer("frames_per_recording", 20, "Most frames of a recording, chosen at random, in training and test.")
flags.DEFINE_list("stacked", ["12", "24"], "Log-mel baselines: numbers of consecutive frames to concatenate.")
flags.DEFINE_integer("seed", 0, "Random seed of the choice of frames.")


def main() -> None:
    """Fits a probe to each representation, prints their table and writes it as JSON and as scalars."""
    check_integer("frames_per_recording", FLAGS.frames_per_recording, minimum=1)
    if not all(re.fullmatch(r"\s*[1-9][0-9]{0,4}\s*", text) for text in FLAGS.stacked):
        raise ArgumentError(f"stacked must be numbers such as 12,24, got {','.join(FLAGS.stacked)!r}")
    stacked = tuple(int(text) for text in FLAGS.stacked)
    directory, experiment, tensors = command.existing_run(FLAGS.run_dir, FLAGS.checkpoint, FLAGS.trust_config)
    prepared = prepare(experiment, experiment.torch_device())
    untrained, data = check_can_be_probed(prepared.model, prepared.data)
    model = model_of_checkpoint(untrained, tensors, FLAGS.weights)
    chosen = representations(model, untrained.eval(), data, stacked)

    target, unseen = FLAGS.target, unseen_labels(data)
    names = sorted(
        data.classes[label][value]
        for label, mask in unseen.items()
        if label != target
        for value in data.test.labels[label][mask].unique().tolist()
    )
    rows: list[ProbeRow] = []
    for row in probe_rows(chosen, data, target, FLAGS.frames_per_recording, FLAGS.seed):
        if not rows:
            print(f"{target} of single frames, {len(data.classes[target])} classes; means over recordings")
            heading = f"{'features':<22}{'number':>6}   {'held-out takes':<16}"
            print(f"{heading} {', '.join(names)}, never heard" if names else heading.rstrip())
        print(describe_row(row), flush=True)
        rows.append(row)

    record = {
        "target": target,
        "rows": [dataclasses.asdict(row) for row in rows],
        "unseen": names,
        "step": tensors["step"],
        "checkpoint": FLAGS.checkpoint,
        "weights": FLAGS.weights,
        "frames_per_recording": FLAGS.frames_per_recording,
        "probe_seed": FLAGS.seed,
        "seed": experiment.seed,
        "dataset": repr(experiment.dataset),
        **data.facts(),
        **surroundings(experiment.torch_device()),
        "command": command.as_typed(),
    }
    writer = Writer(directory.path)
    for row in rows:
        accuracies = {"accuracy": row.accuracy, "unseen_accuracy": row.unseen_accuracy}
        curves = {name: value for name, value in accuracies.items() if value is not None}
        writer.scalars(f"probe_{target}/{row.representation}", curves, tensors["step"])
    writer.close()
    path = directory.path / f"probe_{target}_step{tensors['step']:08d}_{FLAGS.weights}.json"
    write_json(path, record)
    print(f"step {tensors['step']}, {FLAGS.weights} weights: {path}")


if __name__ == "__main__":
    command.start(main, required=("run_dir", "target"))
