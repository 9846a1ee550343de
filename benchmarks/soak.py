"""Trains and evaluates for a long time and reports what grows: python -m benchmarks.soak --minutes 60.

A training process evaluates, logs, draws pictures and saves far more often than usual, while evaluations of its
checkpoints come and go beside it. In the end it is asked to stop. The tables show its memory and open files over time,
and every part of what it wrote for TensorBoard.
"""

import argparse
import collections
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from benchmarks.measure import markdown_table
from launch.command import STOPPED
from popgen.summaries import EVENT_FILES

SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_BETWEEN_EVALUATIONS = 60.0


class Look(NamedTuple):
    """What a process holds at a time.

    Attributes:
        seconds: since it was started.
        mebibytes: of memory.
        open_files: how many.
    """

    seconds: float
    mebibytes: float
    open_files: int


def look_at(process: int, started: float) -> Look:
    """Returns what a process holds (Linux only)."""
    status = pathlib.Path(f"/proc/{process}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) / 2**10
    return Look(time.monotonic() - started, resident, len(os.listdir(f"/proc/{process}/fd")))


def slope(looks: list[Look]) -> float:
    """Returns by how many MiB an hour the memory grows, by least squares over the second half of the time.

    Example:
        >>> slope([Look(float(second), 500.0 + second, 10) for second in range(8)])
        3600.0
    """
    late = looks[len(looks) // 2 :]
    fitted = statistics.linear_regression([one.seconds for one in late], [one.mebibytes for one in late])
    return round(3_600.0 * fitted.slope, 6)


def written(run: pathlib.Path) -> dict[str, tuple[int, int, int]]:
    """Returns how many values of each kind are in the event files, of how many names, and their bytes."""
    numbers: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    names = collections.defaultdict(set)
    for path in sorted(run.glob(f"{EVENT_FILES}*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                kind = value.metadata.plugin_data.plugin_name or "other"
                kind += " of launch.evaluate" if value.tag.startswith("evaluation") else ""
                numbers[kind] += 1
                sizes[kind] += value.ByteSize()
                names[kind].add(value.tag)
    return {kind: (number, len(names[kind]), sizes[kind]) for kind, number in sorted(numbers.items())}


def soak(command: list[str], run: pathlib.Path, minutes: float) -> tuple[list[Look], int]:
    """Returns what a training process held at many times, and how many evaluations were made beside it.

    Raises:
        RuntimeError: if it or an evaluation fails, or it does not stop as it should.
    """
    started = time.monotonic()
    evaluate = [sys.executable, "-m", "launch.evaluate", f"--run_dir={run}", "--num_samples=4", "--num_examples=64"]
    looks: list[Look] = []
    evaluations = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while time.monotonic() - started < 60.0 * minutes:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                if process.poll() is not None:
                    raise RuntimeError(f"the training process ended with status {process.returncode}")
                looks.append(look_at(process.pid, started))
                due = looks[-1].seconds > SECONDS_BETWEEN_EVALUATIONS * (evaluations + 1)
                if due and (run / "checkpoints" / "best.ckpt").is_file():
                    subprocess.run(evaluate, check=True, stdout=subprocess.DEVNULL)
                    evaluations += 1
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    if process.returncode != STOPPED:
        raise RuntimeError(f"asked to stop, the training process ended with status {process.returncode}")
    return looks, evaluations


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--gin_file", default="configs/quickstart.gin")
    parser.add_argument("--gin_bindings", action="append", default=[], help="may be repeated")
    parser.add_argument("--eval_every", type=int, default=20, help="steps; default 20")
    parser.add_argument("--log_every", type=int, default=5, help="steps; default 5")
    parser.add_argument("--checkpoint_every", type=int, default=2_000, help="steps; default 2,000")
    parser.add_argument("--keep", type=pathlib.Path, help="where to leave the run; by default it is removed")
    arguments = parser.parse_args()
    fields = {name: getattr(arguments, name) for name in ("eval_every", "log_every", "checkpoint_every")}
    bindings = [
        *(f"Experiment.{name} = {value}" for name, value in fields.items()),
        "Experiment.num_steps = 1_000_000_000",
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder) / "run"
        command = [sys.executable, "-m", "launch.train", f"--gin_file={arguments.gin_file}", f"--run_dir={run}"]
        command += [f"--gin_bindings={binding}" for binding in [*bindings, *arguments.gin_bindings]]
        looks, evaluations = soak(command, run, arguments.minutes)
        step = torch.load(run / "checkpoints" / "latest.ckpt", weights_only=True)["step"]
        kinds = written(run)
        event_files = [path.stat().st_size for path in run.glob(f"{EVENT_FILES}*")]
        pictures = len(list((run / "samples").iterdir()))
        if arguments.keep:
            shutil.copytree(run, arguments.keep)
    own = step // arguments.eval_every
    print(f"{arguments.minutes:g} minutes, {step:,} steps, {own:,} evaluations, and {evaluations} by launch.evaluate;")
    print(f"{pictures} files in samples/, {len(event_files)} event files\n")
    tenth = max(len(looks) // 10, 1)
    rows = [[f"{one.seconds / 60:.1f}", f"{one.mebibytes:.1f}", str(one.open_files)] for one in looks[::tenth]]
    print(markdown_table(["minute", "memory, MiB", "open files"], rows))
    print(f"\ngrowth of memory over the second half: {slope(looks):+.2f} MiB an hour\n")
    rows = [
        [kind, str(names), f"{number:,}", f"{number / step:.4f}", f"{size / 1024:.1f}", f"{size / number:,.0f}"]
        for kind, (number, names, size) in kinds.items()
    ]
    print(markdown_table(["in event files", "names", "number", "a step", "KiB", "bytes each"], rows))


if __name__ == "__main__":
    main()
