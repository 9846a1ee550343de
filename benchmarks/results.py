"""Collects evaluated runs in results/, and writes the README's tables from them: log-likelihoods, and other models.

    python -m benchmarks.results collect experiments/vae --name vae
    python -m benchmarks.results table

A run is collected with its configuration, the record of each evaluation and its figure, its curves, and the time that
training took and where, in a folder of its name and seed; a run of replicas as all of them. The tables take every
number from there; a number is not claimed for more steps than it had. Where there are several seeds, the mean of their
log-likelihoods comes last.
"""

import argparse
import csv
import itertools
import json
import pathlib
import re
import shutil
import statistics
import sys
from typing import Any, NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.measure import markdown_table
from popgen.errors import ArgumentError, PopgenError, RunDirectoryError, reason_of
from popgen.evaluation.likelihood import bounds_by_size
from popgen.training.records import evaluation_records
from popgen.training.run_directory import RunDirectory

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "results"
README = REPOSITORY / "README.md"
TABLES = ("results", "other results")  # as the marks in README.md name them
# At a million steps, nats; https://github.com/Popgun-Labs/popgen
PUBLISHED = {"vae": -84.04, "vamp": -81.96, "vamp_hsnf": -80.69}
SAME = ("config", "steps", "chosen", "weights", "num_samples", "num_examples", "precision", "trained_at")
SAME += ("dtype", "device", "binarisation_protocol", "images_sha256")
COLUMNS = ["config", "seed", "steps", "checkpoint", "chosen by", "weights", "published", "log p(x)"]
COLUMNS += ["samples × images", "last rise", "k̂ < 0.7", "hours", "trained on"]
OTHER_COLUMNS = ["config", "seed", "steps", "checkpoint", "chosen by", "weights", "results", "test examples"]
OTHER_COLUMNS += ["hours", "trained on"]
CURVES = ("train/loss", "test/loss", "validation/loss", "validation/elbo", "validation/iwae", "best/loss")
CURVES += ("test/reconstruction", "test/kl", "test/perplexity", "test/accuracy", "test/bits_per_sample")


class Training(NamedTuple):
    """What the event files of a run tell of its training.

    Attributes:
        curves: values by step, at its evaluations.
        seconds: that its steps took.
        hardware: what `popgen.provenance.hardware` said at each start, once; empty for a run that does not tell.
        precision: of the products, and the steps from which it was another; empty too where nothing tells.
    """

    curves: dict[int, dict[str, float]]
    seconds: float
    hardware: str
    precision: str


def training_of(path: pathlib.Path) -> Training:
    """Returns what the event files of a run tell."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if "best/loss" not in tags:
        raise RunDirectoryError(f"there are no curves of a run in {str(path)!r}")
    points: dict[int, dict[str, float]] = {event.step: {} for event in events.Scalars("best/loss")}
    for tag in CURVES:
        for event in events.Scalars(tag) if tag in tags else ():
            if event.step in points:
                points[event.step][tag] = event.value
    seconds, before = 0.0, 0
    for event in events.Scalars("train/steps_per_second"):
        seconds += (event.step - before) / event.value
        before = event.step
    hardware = " and ".join(dict.fromkeys(name for _, name in _said(events, "trained_on", r"hardware: (.+)")))
    starts = _said(events, "operative_config", r"\.Experiment\.precision = '(\w+)'")
    changes = [next(same) for _, same in itertools.groupby(starts, key=lambda start: start[1])]
    precision = "".join(
        f" to step {step:,}, then {name}" if index else name for index, (step, name) in enumerate(changes)
    )
    return Training(dict(sorted(points.items())), seconds, hardware, precision)


def _said(events: EventAccumulator, name: str, pattern: str) -> list[tuple[int, str]]:
    """Returns what a pattern finds in a text that was written at each start of a run, and the steps of these starts."""
    tag = f"{name}/text_summary"
    found = []
    for event in events.Tensors(tag) if tag in events.Tags()["tensors"] else ():
        text = event.tensor_proto.string_val[0].decode()
        found += [(event.step, match) for match in re.findall(pattern, text)]
    return found


def collect(run_dir: pathlib.Path, name: str, trained_on: str | None = None) -> pathlib.Path:
    """Copies what a run has to show into results/<name>/seed_<seed>, and returns that folder.

    Args:
        run_dir: of the run.
        name: of the result.
        trained_on: the hardware, for a run that does not tell.
    """
    directory = RunDirectory(run_dir)
    if not name or pathlib.Path(name).name != name or name.startswith("."):
        raise ArgumentError(f"name must be that of one folder in results, got {name!r}")
    records = evaluation_records(run_dir)
    if not records:
        raise RunDirectoryError(f"{str(run_dir)!r} has no evaluation; python -m launch.evaluate --run_dir makes one")
    told = training_of(run_dir)
    needed = {"log_p_x", "log_p_x_standard_error"} if published_name(name) in PUBLISHED else {"headline"}
    found = [_record_of(path, needed) for path in records]  # before anything of an earlier time is removed
    configuration = {}
    for path in (directory.config_path, directory.operative_config_path):
        if not path.is_file():
            raise RunDirectoryError(f"{path} is missing")
        configuration[path.name] = path.read_bytes()
    folder = RESULTS / name / f"seed_{found[0]['seed']}"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("evaluation_*"):
        stale.unlink()
    for file_name, contents in configuration.items():
        (folder / file_name).write_bytes(contents)
    for path, record in zip(records, found, strict=True):
        if "command" in record:  # where the run lay on somebody's disk tells nobody anything
            record["command"] = record["command"].replace(str(run_dir), f"experiments/{name}")
        (folder / path.name).write_text(json.dumps(record, indent=2) + "\n")
    for path in run_dir.glob("evaluation_step*.png"):
        shutil.copyfile(path, folder / path.name)
    with (folder / "curve.csv").open("w", newline="") as file:
        tags = [tag for tag in CURVES if any(tag in point for point in told.curves.values())]
        writer = csv.DictWriter(file, ["step", *tags], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": step, **point} for step, point in told.curves.items())
    training = {"steps": max(told.curves), "seconds_of_steps": round(told.seconds, 1)}
    training |= {"trained_on": told.hardware or trained_on} if told.hardware or trained_on else {}
    training |= {"trained_at": told.precision} if told.precision else {}
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    return folder


def _record_of(path: pathlib.Path, needed: set[str]) -> dict[str, Any]:
    """Returns the record of an evaluation, which holds what is needed.

    Raises:
        RunDirectoryError: if the file is none.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise RunDirectoryError(f"{path} is damaged: {reason_of(error)}") from error
    needed = {"seed", "step", *needed}
    lacking = needed - set(record if isinstance(record, dict) else ())
    if lacking:
        raise RunDirectoryError(f"{path} lacks {', '.join(sorted(lacking))}: evaluate the run again")
    return record


def rows_of(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns a row for each evaluation of a result, with what training took.

    What was the best checkpoint once, and is no more, has no row.
    """
    training = json.loads((folder / "training.json").read_text())
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("evaluation_*.json"))]
    best = max((record["step"] for record in records if record["checkpoint"] == "best"), default=0)
    rows = [
        {"config": folder.parent.name, "trained_at": record["training_precision"], **training, **record}
        for record in records
    ]
    return [{**row, "chosen": _chosen(row)} for row in rows if row["checkpoint"] != "best" or row["step"] == best]


def _chosen(row: dict[str, Any]) -> str:
    """Returns how the evaluated checkpoint was chosen."""
    if row["checkpoint"] == "best":
        return row.get("selected_by", f"{row['selection_split']} loss")  # earlier records do not say
    return "last" if row["step"] == row["steps"] else f"step {row['step']:,}"


def _evidence(row: dict[str, Any]) -> list[str]:
    """Returns how many samples a bound had, how much it rose at the last growth of their number, and where k̂ is low."""
    size = f"{row['num_samples']:,} × {row['num_examples']:,}"
    bounds = list(bounds_by_size(row).values())
    rise = f"{bounds[-1] - bounds[-2]:.2f}" if len(bounds) > 1 else ""
    reliable = row.get("images_of_reliable_pareto_shape")
    return [size, rise, "" if reliable is None else f"{reliable / row['num_examples']:.0%}"]


def groups_of(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Returns rows together that differ in their seed alone, each in the order of seeds."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in SAME), []).append(row)
    return [sorted(group, key=lambda row: row["seed"]) for group in groups.values()]


def published_name(name: str) -> str:
    """Returns the configuration that one varies, as its `_best` and `_tuned` do, or itself."""
    return name.removesuffix("_best").removesuffix("_tuned")


def all_rows(results: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of all results, those with a published number first."""
    order = list(PUBLISHED)

    def place(folder: pathlib.Path) -> tuple[int, str, int]:
        name = folder.parent.name
        return order.index(name) if name in order else len(order), name, int(folder.name.removeprefix("seed_"))

    folders = [path.parent for path in results.glob("*/seed_*/training.json")]
    return [row for folder in sorted(folders, key=place) for row in rows_of(folder)]


def table(results: pathlib.Path = RESULTS) -> str:
    """Returns the table of the log-likelihoods with which a published number can be compared.

    What is published stands beside a configuration, and beside its `_best` and `_tuned` variants too. Behind the number
    of a seed stands its standard error over images, behind a mean the standard deviation over seeds. Rows that differ
    in anything but the seed have no mean in common.
    """
    rows: list[list[str]] = []
    for group in groups_of([row for row in all_rows(results) if published_name(row["config"]) in PUBLISHED]):
        shown = _signed(f"{PUBLISHED[published_name(group[0]['config'])]:.2f}")
        for row in group:
            log_p_x = _signed(f"{row['log_p_x']:.2f} ± {row['log_p_x_standard_error']:.2f}")
            rows.append([*_identity(row), shown, log_p_x, *_evidence(row), _hours(row), _trained_on(row)])
        if len(group) > 1:
            first, values = group[0], [row["log_p_x"] for row in group]
            made = [f"{first['steps']:,}", "", first["chosen"], first["weights"], shown]
            mean = _signed(f"**{statistics.fmean(values):.2f}** ± {statistics.stdev(values):.2f} over seeds")
            size = _evidence(first)[0]
            rows.append(
                [f"`{first['config']}`", f"{len(group)} seeds", *made, mean, size, "", "", "", _trained_on(first)]
            )
    return markdown_table(COLUMNS, rows)


def other_table(results: pathlib.Path = RESULTS) -> str:
    """Returns the table of all other results, each with what the headline of its evaluator names."""
    rows = []
    for row in all_rows(results):
        if published_name(row["config"]) not in PUBLISHED:
            rows.append([*_identity(row), _headline(row), f"{row['num_examples']:,}", _hours(row), _trained_on(row)])
    return markdown_table(OTHER_COLUMNS, rows)


def _identity(row: dict[str, Any]) -> list[str]:
    """Returns the link of a row, its seed, its steps, its checkpoint, how that was chosen, and its weights."""
    link = f"[`{row['config']}`](results/{row['config']}/seed_{row['seed']})"
    return [link, str(row["seed"]), f"{row['steps']:,}", f"{row['step']:,}", row["chosen"], row["weights"]]


def _hours(row: dict[str, Any]) -> str:
    """Returns how long the steps took."""
    return f"{row['seconds_of_steps'] / 3600.0:.1f}"


def _headline(row: dict[str, Any]) -> str:
    """Returns what the headline of an evaluator names, with standard errors where the record has them."""
    found = []
    for name in row["headline"]:
        error = row.get(f"{name}_standard_error")
        if not name.endswith("_standard_error"):
            value = str(row[name]) if isinstance(row[name], int) else f"{row[name]:.2f}"
            found.append(_signed(f"`{name}` {value}" + ("" if error is None else f" ± {error:.2f}")))
    return ", ".join(found)


def _trained_on(row: dict[str, Any]) -> str:
    """Returns where a run was trained, a dash if that is not recorded, and the precision of its products."""
    return f"{row.get('trained_on', '—')}, {row['trained_at']}"


def _signed(number: str) -> str:
    return number.replace("-", "−")


def in_readme(readme: str, text: str, name: str) -> str:
    """Returns the README with a table between the two marks of its name."""
    first, last = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise PopgenError(f"README.md has no table to replace; it lies between {first} and {last}")
    return f"{before}{first}\n\n{text}\n\n{last}{after}"


def readme_with_tables(readme: str, results: pathlib.Path = RESULTS) -> str:
    """Returns the README with both tables."""
    for name, text in zip(TABLES, (table(results), other_table(results)), strict=True):
        readme = in_readme(readme, text, name)
    return readme


def main() -> None:
    """Collects a run, or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("run_dir", type=pathlib.Path)
    collecting.add_argument("--name", required=True)
    collecting.add_argument("--trained_on", help="the hardware, for a run that does not tell")
    commands.add_parser("table")
    arguments = parser.parse_args()
    try:
        if arguments.command == "collect":
            replicas = [replica.path for replica in RunDirectory(arguments.run_dir).replicas()]
            for path in replicas or [arguments.run_dir]:
                print(f"collected in {collect(path, arguments.name, arguments.trained_on)}")
        else:
            README.write_text(readme_with_tables(README.read_text()))
            print(f"{table()}\n\n{other_table()}")
    except PopgenError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
