"""How the runs of a sweep compare: one sorted table, on the screen and as CSV."""

import csv
import dataclasses
import io
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from popgen.errors import RunDirectoryError, check_choice
from popgen.files import write_whole
from popgen.sweeps.points import SEED
from popgen.sweeps.sweep import Run, SweepDirectory
from popgen.training.records import evaluation_records
from popgen.training.run_directory import RunDirectory

OWN_RESULTS = ("best_loss", "best_step")
LOWER_IS_BETTER = ("loss", "kl", "bits", "error")  # in the name of a result; others are better higher


@dataclasses.dataclass(frozen=True)
class Row:
    """What a run of a sweep has come to.

    Attributes:
        run: of the sweep.
        state: "finished", "running", "failed" or "waiting", which a run is too that was interrupted.
        step: steps taken, at its latest checkpoint.
        results: numbers by name: `best_loss`, `best_step`, and those of its largest evaluation.

    Example: `rows_of` returns them.
    """

    run: Run
    state: str
    step: int
    results: Mapping[str, int | float]


def check_result(sort_by: str, runs: Sequence[Run]) -> None:
    """Checks that runs have, or will have once they are evaluated, a result of this name.

    Raises:
        ArgumentError: if they do not.

    Example:
        >>> check_result("log_p_x", [Run("a", {}, num_steps=9, final_num_samples=0, headline=["log_p_x", "elbo"])])
    """
    check_choice(
        "sort_by", sort_by, tuple(dict.fromkeys([*OWN_RESULTS, *(name for run in runs for name in run.headline)]))
    )


def rows_of(sweep: SweepDirectory) -> list[Row]:
    """Returns a row for every run of a sweep, from what lies in its run directory.

    Raises:
        RunDirectoryError: if the list of runs, or the record of an evaluation, cannot be read.

    Example:
        >>> rows_of(SweepDirectory(pathlib.Path("nowhere")))
        []
    """
    return [_row(sweep.path, run) for run in sweep.runs().values()]


def sorted_rows(rows: Sequence[Row], sort_by: str) -> list[Row]:
    """Returns rows with the best first, and those without the result last.

    Example:
        >>> elbos = {"a": -9.0, "b": -8.0}
        >>> rows = [Row(Run(name, {}, 9, 0, []), "finished", 9, {"elbo": elbo}) for name, elbo in elbos.items()]
        >>> [row.run.name for row in sorted_rows(rows, "elbo")]
        ['b', 'a']
    """
    sign = _sign(sort_by)
    return sorted(rows, key=lambda row: sign * row.results[sort_by] if sort_by in row.results else math.inf)


def table(rows: Sequence[Row], sort_by: str) -> str:
    """Returns the rows as text, in their order, and means of a result over seeds where those were swept.

    Example:
        >>> run = Run("Adam.lr=0.1", {"Adam.lr": "0.1"}, num_steps=9, final_num_samples=0, headline=["log_p_x"])
        >>> print(table([Row(run, "running", 3, {"best_loss": 98.76543, "best_step": 3})], "best_loss"))
        Adam.lr  best_loss  best_step  steps  state
        0.1         98.765          3  3/9    running
    """
    names = list(dict.fromkeys(name for row in rows for name in row.run.values))
    wanted = [*OWN_RESULTS, *(row.run.headline[0] for row in rows if row.run.headline), sort_by]
    results = [name for name in dict.fromkeys(wanted) if any(name in row.results for row in rows)]
    lines = [[*names, *results, "steps", "state"]]
    for row in rows:
        numbers = [_shown(row.results.get(name)) for name in results]
        lines.append([*_values(row, names), *numbers, f"{row.step:,}/{row.run.num_steps:,}", row.state])
    text = _aligned(lines, len(names), len(names) + len(results))
    groups = over_seeds(rows, sort_by)
    if groups:
        others = [name for name in names if not _is_seed(name)]
        lines = [[*others, sort_by, "seeds"]]
        for values, mean, deviation, count in groups:
            spread = f"{mean:.3f} ± {deviation:.3f}" if count > 1 else f"{mean:.3f}"
            lines.append([*(values.get(name, "") for name in others), spread, str(count)])
        text += f"\n\nfinished runs, mean ± standard deviation over seeds:\n{_aligned(lines, len(others), len(others))}"
    return text


def over_seeds(rows: Sequence[Row], result: str) -> list[tuple[dict[str, str], float, float, int]]:
    """Returns values other than the seed, mean and standard deviation of a result, and how many finished runs had it.

    The best mean is first; nothing is returned where no seed was swept.

    Example:
        >>> def row(seed, loss):
        ...     run = Run(f"s{seed}", {"Adam.lr": "0.1", "Experiment.seed": str(seed)}, 9, 0, [])
        ...     return Row(run, "finished", 9, {"best_loss": loss})
        >>> over_seeds([row(0, 90.0), row(1, 94.0)], "best_loss")
        [({'Adam.lr': '0.1'}, 92.0, 2.8284271247461903, 2)]
    """
    groups: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for row in rows:
        others = tuple((name, value) for name, value in row.run.values.items() if not _is_seed(name))
        if len(others) < len(row.run.values) and row.state == "finished" and result in row.results:
            groups.setdefault(others, []).append(row.results[result])
    summaries = [
        (dict(others), statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else math.nan, len(found))
        for others, found in groups.items()
    ]
    return sorted(summaries, key=lambda summary: _sign(result) * summary[1])


def write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Writes rows with all of their results; a reader finds the old file or the whole new one.

    Raises:
        RunDirectoryError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> run = Run("Adam.lr=0.1", {"Adam.lr": "0.1"}, num_steps=9, final_num_samples=0, headline=["log_p_x"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_csv(pathlib.Path(folder) / "table.csv", [Row(run, "running", 3, {"best_loss": 98.7})])
        ...     print((pathlib.Path(folder) / "table.csv").read_text())
        run,Adam.lr,best_loss,step,num_steps,state,failure
        Adam.lr=0.1,0.1,98.7,3,9,running,
    """
    names = list(dict.fromkeys(name for row in rows for name in row.run.values))
    results = list(dict.fromkeys(name for row in rows for name in row.results))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *names, *results, "step", "num_steps", "state", "failure"])
    for row in rows:
        values = [*_values(row, names), *(row.results.get(name) for name in results)]
        writer.writerow([row.run.name, *values, row.step, row.run.num_steps, row.state, row.run.failure])
    write_whole(path, text.getvalue().encode())


def _record(path: pathlib.Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        return {"num_examples": 0, "num_samples": 0, "step": 0, "weights": "", **record}
    except (OSError, ValueError, TypeError) as error:
        raise RunDirectoryError(f"{path} is not the record of an evaluation: {error}") from error


def _row(sweep: pathlib.Path, run: Run) -> Row:
    numbers = run.numbers(sweep)
    results = {name: numbers[name] for name in OWN_RESULTS if math.isfinite(numbers.get(name, math.nan))}
    records = [_record(path) for path in evaluation_records(sweep / run.name)]
    if records:
        best = numbers.get("best_step")

        def worth(record: dict[str, Any]) -> tuple[bool, int, int, bool]:
            of_best = record["step"] == best
            return of_best, record["num_examples"], record["num_samples"], record["weights"] == "raw"

        shown = max(records, key=worth)
        results |= {name: shown[name] for name in run.headline if shown.get(name) is not None}
    if RunDirectory(sweep / run.name).is_in_use():
        state = "running"
    elif run.is_finished(sweep):
        state = "finished"
    else:
        state = "failed" if run.failure else "waiting"
    return Row(run, state, numbers.get("step", 0), results)


def _sign(result: str) -> float:
    """Returns 1 for a result that is better lower, -1 for one that is better higher."""
    return 1.0 if any(part in result for part in LOWER_IS_BETTER) else -1.0


def _values(row: Row, names: Sequence[str]) -> list[str]:
    return [row.run.values.get(name, "") for name in names]


def _is_seed(name: str) -> bool:
    return name == SEED or name.endswith(f".{SEED}")


def _shown(value: int | float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _aligned(lines: Sequence[Sequence[str]], first_number: int, end_of_numbers: int) -> str:
    """Returns lines in columns; those from the first number to the last are flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = []
    for line in lines:
        cells = [
            cell.rjust(width) if first_number <= i < end_of_numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)
