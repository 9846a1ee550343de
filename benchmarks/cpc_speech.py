"""What CPC learns of speech: python -m benchmarks.cpc_speech --runs=experiments/cpc_speech_table.

For every seed and both kinds of negatives, trains configs/cpc_speech.gin on all speakers, and on all but one for each
of the six; probes each run for who speaks, or for the digits of the speaker who was never heard; and prints and writes
the table of docs/sequences.md from the runs that are there. Finished runs and probes are left as they are, so that a
call that was cut off goes on, and several may share the work: --part=0/2 and --part=1/2. Six minutes a run on one core.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.measure import markdown_table

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
TRAINED = ("context", "encoding")  # the representations that depend on the negatives of a run
NEGATIVES = {"batch": [], "speaker": ["CPC.negatives = 'speaker'", "CPC.label = 'speaker'"]}


class Run(NamedTuple):
    """A run of the table: trained without `left_out` if that is not None."""

    negatives: str
    left_out: str | None
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.negatives}_{self.left_out or 'everyone'}_{self.seed}"

    @property
    def target(self) -> str:
        """What it is probed for."""
        return "digit" if self.left_out else "speaker"


def main() -> None:
    """Trains and probes what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, required=True, help="where the runs are kept")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--negatives", nargs="+", choices=NEGATIVES, default=list(NEGATIVES), help="which kinds")
    parser.add_argument("--targets", nargs="+", choices=["digit", "speaker"], default=["digit", "speaker"])
    parser.add_argument("--part", default="0/1", help="i/n takes every n-th run, beginning with the i-th")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    wanted = [
        Run(negatives, left_out, seed)
        for seed in range(arguments.seeds)
        for negatives in arguments.negatives
        for left_out in (*SPEAKERS, None)
        if ("digit" if left_out else "speaker") in arguments.targets
    ]
    for run in wanted[part::parts]:
        train_and_probe(arguments.runs, run)
    rows = summary(arguments.runs, arguments.seeds)
    (arguments.runs / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(text(rows))


def train_and_probe(folder: pathlib.Path, run: Run) -> None:
    """Trains a run if it has not ended, and probes it if it has not been probed."""
    if accuracies(folder, run) is not None:
        return
    bindings = [f"Experiment.seed = {run.seed}", *NEGATIVES[run.negatives]]
    if run.left_out:
        bindings.append(f"SpokenDigits.held_out_speaker = '{run.left_out}'")
    directory = f"--run_dir={folder / run.name}"
    call("train", "--gin_file=configs/cpc_speech.gin", directory, *(f"--gin_bindings={text}" for text in bindings))
    stacked = "12,24" if run.seed == 0 else "1"  # plain features are the same whatever the seed of training
    call("probe", directory, f"--target={run.target}", f"--stacked={stacked}")


def call(command: str, *arguments: str) -> None:
    """Runs a command of the project."""
    subprocess.run([sys.executable, "-m", f"launch.{command}", *arguments], check=True)


def accuracies(folder: pathlib.Path, run: Run) -> dict[str, float] | None:
    """Returns the accuracy that counts of each representation of a run, or None if it has not been probed."""
    paths = sorted((folder / run.name).glob(f"probe_{run.target}_step*_raw.json"))
    if not paths:
        return None
    which = "unseen_accuracy" if run.left_out else "accuracy"
    found = {row["representation"]: row[which] for row in json.loads(paths[-1].read_text())["rows"]}
    return {f"{name}, negatives of the {run.negatives}" if name in TRAINED else name: found[name] for name in found}


def summary(folder: pathlib.Path, seeds: int) -> list[dict]:
    """Returns, of each representation, the accuracies for each seed, those for digits also of each speaker."""
    digits: dict[str, dict[str, dict[int, float]]] = {}
    speakers: dict[str, dict[int, float]] = {}
    for run, found in probed(folder, seeds):
        for name, value in found.items():
            if run.left_out:
                digits.setdefault(name, {}).setdefault(run.left_out, {})[run.seed] = value
            else:
                speakers.setdefault(name, {})[run.seed] = value
    rows = []
    for name in sorted({*speakers, *digits}, key=order):
        each = digits.get(name, {})
        complete = [seed for seed in range(seeds) if all(seed in each.get(who, {}) for who in SPEAKERS)]
        rows.append(
            {
                "features": name,
                "speaker": list(speakers.get(name, {}).values()),
                "digit": [statistics.fmean(each[who][seed] for who in SPEAKERS) for seed in complete],
                "digit_of": {who: list(each.get(who, {}).values()) for who in SPEAKERS},
            }
        )
    return rows


def probed(folder: pathlib.Path, seeds: int) -> Iterator[tuple[Run, dict[str, float]]]:
    """Yields the runs that are there, and their accuracies."""
    for seed in range(seeds):
        for negatives in NEGATIVES:
            for left_out in (*SPEAKERS, None):
                found = accuracies(folder, run := Run(negatives, left_out, seed))
                if found is not None:
                    yield run, found


def order(name: str) -> tuple[bool, bool, str]:
    """Returns the place of a representation: what was trained, then the plain features, then what was not trained."""
    return "untrained" in name, name.startswith("log-mel"), name


def text(rows: list[dict]) -> str:
    """Returns the table in Markdown: means and standard deviations over seeds, and how many those are."""
    cells = [
        [row["features"], *(cell(row[name]) for name in ("speaker", "digit")), *map(cell, row["digit_of"].values())]
        for row in rows
    ]
    return markdown_table(["features of a frame", "speaker", "digit, speaker never heard", *SPEAKERS], cells)


def cell(values: list[float]) -> str:
    """Returns the mean of some seeds, with the standard deviation if there are several different ones."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(set(values)) == 1 else f"{mean} ± {statistics.stdev(values):.3f} ({len(values)})"


if __name__ == "__main__":
    main()
