"""Tables of a sweep, from run directories that are written here by hand."""

import csv
import json
import pathlib
import statistics
from typing import Any

import pytest
import torch

from popgen.errors import ArgumentError, RunDirectoryError
from popgen.sweeps.sweep import Run, SweepDirectory
from popgen.sweeps.table import check_result, over_seeds, rows_of, sorted_rows, table, write_csv
from popgen.training.run_directory import RunDirectory

HEADLINE = ("log_p_x", "elbo")


def add_run(
    sweep: SweepDirectory,
    values: dict[str, str],
    step: int | None,
    best_loss: float = 0.0,
    failure: str | None = None,
    final_num_samples: int = 0,
    **record: Any,
) -> None:
    name = ",".join(f"{key}={value}" for key, value in values.items())
    sweep.path.mkdir(exist_ok=True)
    sweep.record(Run(name, values, 10, final_num_samples, HEADLINE, failure))
    directory = RunDirectory(sweep.path / name)
    if step is None:
        return
    directory.checkpoints_path.mkdir(parents=True)
    numbers = {"step": step, "best_loss": best_loss, "best_step": step}
    directory.save_checkpoint("latest", {**numbers, "parameters": {"weight": torch.ones(3)}})
    if record:
        path = directory.path / f"evaluation_step{step:08d}_raw_{record['num_samples']}x7.json"
        path.write_text(json.dumps({"num_examples": 7, **record}))


@pytest.fixture
def sweep(tmp_path: pathlib.Path) -> SweepDirectory:
    return SweepDirectory(tmp_path / "sweep")


def states(sweep: SweepDirectory) -> list[str]:
    return [row.state for row in rows_of(sweep)]


def test_states(sweep: SweepDirectory) -> None:
    add_run(sweep, {"A.x": "1"}, step=None)
    add_run(sweep, {"A.x": "2"}, step=4)
    add_run(sweep, {"A.x": "3"}, step=10)
    add_run(sweep, {"A.x": "4"}, step=4, failure="the loss became nan")
    add_run(sweep, {"A.x": "5"}, step=10, final_num_samples=5)
    add_run(sweep, {"A.x": "6"}, step=10, final_num_samples=5, num_samples=5, log_p_x=-9.0)
    assert states(sweep) == ["waiting", "waiting", "finished", "failed", "waiting", "finished"]
    with RunDirectory(sweep.path / "A.x=4").locked():
        assert states(sweep)[3] == "running"
    assert states(sweep)[3] == "failed"


def test_the_best_is_first_and_what_has_no_result_last(sweep: SweepDirectory) -> None:
    add_run(sweep, {"A.x": "1"}, step=None)
    add_run(sweep, {"A.x": "2"}, 10, best_loss=95.0, num_samples=5, log_p_x=-90.0, elbo=None)
    add_run(sweep, {"A.x": "3"}, 10, best_loss=93.0)
    add_run(sweep, {"A.x": "4"}, 10, best_loss=94.0, num_samples=5, log_p_x=-91.0)

    def order(sort_by: str) -> str:
        return "".join(row.run.values["A.x"] for row in sorted_rows(rows_of(sweep), sort_by))

    assert order("best_loss") == "3421" and order("log_p_x") == "2413"
    printed = table(sorted_rows(rows_of(sweep), "best_loss"), "best_loss").splitlines()
    assert printed[0].split() == ["A.x", "best_loss", "best_step", "log_p_x", "steps", "state"]
    assert printed[3].split() == ["2", "95.000", "10", "-90.000", "10/10", "finished"]
    assert printed[4].split() == ["1", "0/10", "waiting"]
    check_result("elbo", list(sweep.runs().values()))
    with pytest.raises(ArgumentError, match="sort_by must be one of best_loss, best_step, log_p_x, elbo, got 'los'"):
        check_result("los", list(sweep.runs().values()))


def test_the_largest_evaluation_counts(sweep: SweepDirectory) -> None:
    add_run(sweep, {"A.x": "1"}, 10, num_samples=500, log_p_x=-90.0)
    smaller = {"num_examples": 7, "num_samples": 60, "log_p_x": -95.0}
    (sweep.path / "A.x=1" / "evaluation_step00000010_raw_60x7.json").write_text(json.dumps(smaller))
    (row,) = rows_of(sweep)
    assert row.results["log_p_x"] == -90.0


def test_the_evaluation_of_the_best_checkpoint_counts(sweep: SweepDirectory) -> None:
    """Not of one that was the best before, and of raw weights before averaged ones."""
    add_run(sweep, {"A.x": "1"}, 10)
    for step, weights, log_p_x in ((4, "raw", -99.0), (10, "averaged", -83.0), (10, "raw", -84.0), (6, "raw", -97.0)):
        record = {"num_examples": 7, "num_samples": 60, "step": step, "weights": weights, "log_p_x": log_p_x}
        (sweep.path / "A.x=1" / f"evaluation_step{step:08d}_{weights}_60x7.json").write_text(json.dumps(record))
    (row,) = rows_of(sweep)
    assert row.results["log_p_x"] == -84.0


def test_csv_is_read_back(sweep: SweepDirectory) -> None:
    add_run(sweep, {"A.x": "[1, 2]", "B.y": "'u,v'"}, 4, best_loss=95.125, failure='it said "no", twice')
    add_run(sweep, {"A.x": "3"}, step=None)
    write_csv(sweep.table_path, rows_of(sweep))
    with sweep.table_path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["A.x"], first["B.y"], first["best_loss"], first["step"]) == ("[1, 2]", "'u,v'", "95.125", "4")
    assert first["failure"] == 'it said "no", twice' and second["B.y"] == second["best_loss"] == ""


def test_statistics_over_seeds(sweep: SweepDirectory) -> None:
    losses = {"1": [79.0, 92.5, 91.0], "2": [80.0]}  # the best run has not the best mean
    for value, found in losses.items():
        for seed, loss in enumerate(found):
            add_run(sweep, {"A.x": value, "Experiment.seed": str(seed)}, 10, best_loss=loss)
    add_run(sweep, {"A.x": "2", "Experiment.seed": "1"}, 4, best_loss=200.0)  # not finished, so not counted
    rows = rows_of(sweep)
    groups = {values["A.x"]: numbers for values, *numbers in over_seeds(rows, "best_loss")}
    assert groups["1"] == [statistics.mean(losses["1"]), statistics.stdev(losses["1"]), 3]
    assert groups["2"][0] == 80.0 and groups["2"][2] == 1
    last = table(rows, "best_loss").splitlines()[-2:]
    assert [line.split() for line in last] == [["2", "80.000", "1"], ["1", "87.500", "±", "7.399", "3"]]


def test_only_seeds_and_no_seeds(sweep: SweepDirectory) -> None:
    add_run(sweep, {"Experiment.seed": "0"}, 10, best_loss=1.0)
    add_run(sweep, {"Experiment.seed": "1"}, 10, best_loss=3.0)
    assert over_seeds(rows_of(sweep), "best_loss") == [({}, 2.0, statistics.stdev([1.0, 3.0]), 2)]
    assert "2.000 ± 1.414" in table(rows_of(sweep), "best_loss")
    other = SweepDirectory(sweep.path / "other")
    add_run(other, {"A.seed": "0"}, 10, best_loss=1.0)
    assert over_seeds(rows_of(other), "best_loss") == []


def test_a_damaged_checkpoint_is_as_good_as_none(sweep: SweepDirectory) -> None:
    """Training says what is wrong with it, and goes on from one that is whole."""
    add_run(sweep, {"A.x": "1"}, 10)
    path = sweep.path / "A.x=1" / "checkpoints" / "latest.ckpt"
    path.write_bytes(path.read_bytes()[:100])
    (row,) = rows_of(sweep)
    assert (row.state, row.step, row.results) == ("waiting", 0, {})


@pytest.mark.parametrize("content", [b'{"log_p_x": ', b"\xff", b"[1]", b""])
def test_a_damaged_record_is_named(content: bytes, sweep: SweepDirectory) -> None:
    add_run(sweep, {"A.x": "1"}, 10)
    (sweep.path / "A.x=1" / "evaluation_step00000010_raw_60x7.json").write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"raw_60x7\.json is not the record of an evaluation: "):
        rows_of(sweep)


def test_later_runs_are_added_and_earlier_ones_replaced(sweep: SweepDirectory) -> None:
    add_run(sweep, {"A.x": "1"}, step=None, failure="no data")
    add_run(sweep, {"A.x": "2"}, step=None)
    sweep.record(Run("A.x=1", {"A.x": "1"}, 20, 0, HEADLINE))
    assert [(run.name, run.num_steps, run.failure) for run in sweep.runs().values()] == [
        ("A.x=1", 20, None),
        ("A.x=2", 10, None),
    ]
