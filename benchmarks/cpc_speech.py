"""What CPC learns of speech: python -m benchmarks.cpc_speech --runs=experiments/cpc_speech_table.

Trains configs/cpc_speech.gin once for every seed and each of six speakers who is never heard, and once for every seed
on all speakers; probes each run, and prints and writes the table of the README. Runs and probes that are there already
are left as they are, so that a call that was cut off goes on, and several may share the work: --part=0/2 and 1/2.
About eight minutes a run on one core.
"""

import json
import math
import pathlib
import subprocess
import sys

from absl import app, flags

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
EVERYONE = "everyone"

FLAGS = flags.FLAGS
flags.DEFINE_string("runs", None, "Where the runs are kept.", required=True)
flags.DEFINE_integer("seeds", 3, "How many.")
flags.DEFINE_string("part", "0/1", "Which runs: i/n takes every n-th, beginning with the i-th.")
flags.DEFINE_multi_string("gin_bindings", [], "Changes of the config, the same for all runs.")


def main(arguments: list[str]) -> None:
    """Trains and probes what is missing, then prints the table of what is there."""
    runs = pathlib.Path(FLAGS.runs)
    part, parts = map(int, FLAGS.part.split("/"))
    wanted = [(seed, speaker) for seed in range(FLAGS.seeds) for speaker in (*SPEAKERS, EVERYONE)]
    for seed, speaker in wanted[part::parts]:
        train_and_probe(runs / f"{speaker}_{seed}", seed, speaker)
    found = {key: record(runs / f"{key[1]}_{key[0]}", *key) for key in wanted}
    missing = [key for key, rows in found.items() if rows is None]
    if missing:
        print(f"{len(missing)} of {len(wanted)} runs are not there yet")
        return
    rows = table({key: rows for key, rows in found.items() if rows is not None}, FLAGS.seeds)
    (runs / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(text(rows))


def target_of(speaker: str) -> str:
    """Returns what a run is probed for: the digits of the speaker who is left out, or who speaks."""
    return "speaker" if speaker == EVERYONE else "digit"


def train_and_probe(run: pathlib.Path, seed: int, speaker: str) -> None:
    """Trains a run if it has not ended, and probes it if it has not been probed."""
    if record(run, seed, speaker) is not None:
        return
    bindings = [f"Experiment.seed = {seed}", *FLAGS.gin_bindings]
    if speaker != EVERYONE:
        bindings.append(f"SpokenDigits.held_out_speaker = '{speaker}'")
    train = [f"--gin_bindings={binding}" for binding in bindings]
    call("train", "--gin_file=configs/cpc_speech.gin", f"--run_dir={run}", *train)
    call("probe", f"--run_dir={run}", f"--target={target_of(speaker)}")


def call(command: str, *arguments: str) -> None:
    """Runs a command of the project."""
    subprocess.run([sys.executable, "-m", f"launch.{command}", *arguments], check=True)


def record(run: pathlib.Path, seed: int, speaker: str) -> dict[str, float] | None:
    """Returns the accuracy that counts of each representation of a run, or None if it has not been probed."""
    paths = sorted(run.glob(f"probe_{target_of(speaker)}_step*_raw.json"))
    if not paths:
        return None
    found = json.loads(paths[-1].read_text())
    which = "accuracy" if speaker == EVERYONE else "unseen_accuracy"
    return {row["representation"]: row[which] for row in found["rows"]}


def table(found: dict[tuple[int, str], dict[str, float]], seeds: int) -> list[dict[str, object]]:
    """Returns, of each representation, means and standard deviations over seeds; of digits also for each speaker."""
    rows = []
    for name in found[0, EVERYONE]:
        speaker = [found[seed, EVERYONE][name] for seed in range(seeds)]
        digit = [sum(found[seed, who][name] for who in SPEAKERS) / len(SPEAKERS) for seed in range(seeds)]
        each = {who: mean_and_deviation([found[seed, who][name] for seed in range(seeds)]) for who in SPEAKERS}
        rows.append(
            {
                "representation": name,
                "speaker": mean_and_deviation(speaker),
                "digit": mean_and_deviation(digit),
                "digit_of": each,
            }
        )
    return rows


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Returns the mean and the standard deviation of a sample."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def text(rows: list[dict]) -> str:
    """Returns the table in Markdown."""
    heads = ("features of a frame", "speaker", "digit, speaker never heard", *SPEAKERS)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["speaker"], row["digit"], *(row["digit_of"][who] for who in SPEAKERS)]
        shown = [f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in cells]
        lines.append("| " + " | ".join((row["representation"], *shown)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
