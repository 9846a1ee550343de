"""What CPC learns of speech: python -m benchmarks.cpc_speech --runs=experiments/cpc_speech_table.

Trains configs/cpc_speech.gin once for every seed and each of six speakers who is never heard, and once for every seed
on all speakers; probes each run, and prints and writes the table of the README. Runs and probes that are there already
are left as they are, so that a call that was cut off goes on, and several may share the work: --part=0/2 and 1/2.
About eight minutes a run on one core.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys

from benchmarks.measure import table as markdown

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
EVERYONE = "everyone"


def main() -> None:
    """Trains and probes what is missing, then prints the table if everything is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, required=True, help="where the runs are kept")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--part", default="0/1", help="i/n takes every n-th run, beginning with the i-th")
    parser.add_argument("--gin_bindings", action="append", default=[], help="a change of the config, for all runs")
    arguments = parser.parse_args()
    runs, seeds = arguments.runs, arguments.seeds
    part, parts = map(int, arguments.part.split("/"))
    wanted = [(seed, speaker) for seed in range(seeds) for speaker in (*SPEAKERS, EVERYONE)]
    for seed, speaker in wanted[part::parts]:
        train_and_probe(runs / f"{speaker}_{seed}", seed, speaker, arguments.gin_bindings)
    found = {key: record(runs / f"{key[1]}_{key[0]}", key[1]) for key in wanted}
    missing = [key for key, rows in found.items() if rows is None]
    if missing:
        print(f"{len(missing)} of {len(wanted)} runs are not there yet")
        return
    rows = means({key: rows for key, rows in found.items() if rows is not None}, seeds)
    (runs / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(text(rows))


def target_of(speaker: str) -> str:
    """Returns what a run is probed for: the digits of the speaker who is left out, or who speaks."""
    return "speaker" if speaker == EVERYONE else "digit"


def train_and_probe(run: pathlib.Path, seed: int, speaker: str, changes: list[str]) -> None:
    """Trains a run if it has not ended, and probes it if it has not been probed."""
    if record(run, speaker) is not None:
        return
    bindings = [f"Experiment.seed = {seed}", *changes]
    if speaker != EVERYONE:
        bindings.append(f"SpokenDigits.held_out_speaker = '{speaker}'")
    train = [f"--gin_bindings={binding}" for binding in bindings]
    call("train", "--gin_file=configs/cpc_speech.gin", f"--run_dir={run}", *train)
    call("probe", f"--run_dir={run}", f"--target={target_of(speaker)}")


def call(command: str, *arguments: str) -> None:
    """Runs a command of the project."""
    subprocess.run([sys.executable, "-m", f"launch.{command}", *arguments], check=True)


def record(run: pathlib.Path, speaker: str) -> dict[str, float] | None:
    """Returns the accuracy that counts of each representation of a run, or None if it has not been probed."""
    paths = sorted(run.glob(f"probe_{target_of(speaker)}_step*_raw.json"))
    if not paths:
        return None
    found = json.loads(paths[-1].read_text())
    which = "accuracy" if speaker == EVERYONE else "unseen_accuracy"
    return {row["representation"]: row[which] for row in found["rows"]}


def means(found: dict[tuple[int, str], dict[str, float]], seeds: int) -> list[dict[str, object]]:
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
    lines = []
    for row in rows:
        cells = [row["speaker"], row["digit"], *(row["digit_of"][who] for who in SPEAKERS)]
        lines.append([row["representation"], *(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in cells)])
    return markdown(["features of a frame", "speaker", "digit, never heard", *SPEAKERS], lines)


if __name__ == "__main__":
    main()
