"""python -m launch.sweep as a user runs it, and what TensorBoard makes of it."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from tests.test_commands import REPOSITORY, Workspace

SMALL = ("--gin_file=vae_squares.gin", "--sweep_dir=swept", "--gin_bindings=HIDDEN_DIM = 8")
FAILING = "--sweep=Experiment.optimizer = [@torch.optim.Adam, @torch.optim.LBFGS]"  # only training refuses the second


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


def table_of(workspace: Workspace) -> dict[str, dict[str, str]]:
    with (workspace.path / "swept" / "table.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def hyper_parameter_rows(directory: pathlib.Path) -> tuple[list[str], list[str], dict[str, dict[str, object]]]:
    """Returns the columns of TensorBoard's HParams tab, its metrics, and its rows by run, from its own backend."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(directory))
    context = backend_context.Context(TBContext(data_provider=provider))
    request_context = RequestContext()
    metadata = context.hparams_metadata(request_context, "")
    experiment = context.experiment_from_metadata(request_context, "", True, metadata, [])
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING],
        col_params=[
            *(api_pb2.ColParams(hparam=info.name, include_in_result=True) for info in experiment.hparam_infos),
            *(api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos),
        ],
        start_index=0,
        slice_size=100,
        include_metrics=True,
    )
    groups = list_session_groups.Handler(request_context, context, "", request).run().session_groups
    rows = {}
    for group in groups:
        values = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
        metrics = {value.name.tag: value.value for value in group.metric_values}
        rows[group.sessions[0].name] = values | metrics
    columns = sorted(info.name for info in experiment.hparam_infos)
    return columns, [info.name.tag for info in experiment.metric_infos], rows


def test_a_sweep_with_a_point_that_fails_is_resumed_and_grows(workspace):
    done = workspace.run("sweep", *SMALL, FAILING, "--max_parallel=2")
    assert done.returncode == 1, (done.stdout, done.stderr)
    failure, last = done.stderr.splitlines()
    assert last.startswith("error: 1 of 2 runs failed") and "Experiment.optimizer=@torch.optim.LBFGS: " in failure
    assert "closure" in failure and "--run_dir" not in failure
    swept = workspace.path / "swept"
    good = swept / "Experiment.optimizer=@torch.optim.Adam"
    assert torch.load(good / "checkpoints/latest.ckpt", weights_only=True)["step"] == 4
    assert "finished at step 4" in (good / "train.log").read_text()
    assert "Experiment.optimizer = @torch.optim.Adam\n" in (good / "config.gin").read_text()
    rows = table_of(workspace)
    assert [row["state"] for row in rows.values()] == ["finished", "failed"]
    assert rows["Experiment.optimizer=@torch.optim.LBFGS"]["failure"] in failure
    before = (good / "train.log").read_text()

    done = workspace.run("sweep", *SMALL, FAILING.replace("]", ", @torch.optim.SGD]"), "--max_parallel=2")
    assert done.returncode == 1 and "1 of 3 runs failed" in done.stderr
    assert "3 points, 1 of them finished" in done.stdout
    assert (good / "train.log").read_text() == before  # not started again
    rows = table_of(workspace)
    assert {name: row["state"] for name, row in rows.items()} == {
        "Experiment.optimizer=@torch.optim.Adam": "finished",
        "Experiment.optimizer=@torch.optim.SGD": "finished",
        "Experiment.optimizer=@torch.optim.LBFGS": "failed",
    }
    losses = [float(row["best_loss"]) for row in list(rows.values())[:2]]
    assert losses == sorted(losses)

    columns, metrics, shown = hyper_parameter_rows(swept)
    assert columns == ["Experiment.optimizer"] and "best/loss" in metrics
    assert {name: row["Experiment.optimizer"] for name, row in shown.items()} == {
        "Experiment.optimizer=@torch.optim.Adam": "Adam",
        "Experiment.optimizer=@torch.optim.SGD": "SGD",
    }  # the one that failed did so before it wrote anything
    for name, row in shown.items():
        assert row["best/loss"] == pytest.approx(float(rows[name]["best_loss"]), rel=1e-6)


def test_a_mistake_is_one_line_and_nothing_starts(workspace):
    line = workspace.fail("sweep", *SMALL, "--sweep=LATENT_DIM = [2, 3]", "--sweep=Adam.lrate = [1e-3]")
    assert "did you mean lr?" in line and "at the point Adam.lrate=0.001,LATENT_DIM=2" in line
    line = workspace.fail("sweep", *SMALL, "--sweep=Experiment.batch_size = [10, 1000]")
    assert "at most the 100 training images, got 1000 (at the point Experiment.batch_size=1000; nothing was" in line
    assert not (workspace.path / "swept").exists()


@pytest.mark.slow
def test_more_mistakes(workspace):
    def refused(*arguments: str) -> str:
        return workspace.fail("sweep", *SMALL, *arguments)

    assert "LATENT_DIM twice" in refused("--sweep=LATENT_DIM = [2]", "--sweep=LATENT_DIM = [3]")
    assert "--gin_file and --sweep must be given" in refused()
    assert "--sweep_dir and --table_only must be given" in workspace.fail("sweep", "--table_only")
    assert "sort_by must be one of" in refused("--sweep=LATENT_DIM = [2]", "--sort_by=los")
    assert "max_parallel must be" in refused("--sweep=LATENT_DIM = [2]", "--max_parallel=0")
    assert "there is no sweep in 'swept'" in refused("--table_only")
    assert not (workspace.path / "swept").exists()


@pytest.mark.slow
def test_references_text_and_none_are_swept_and_shown(workspace):
    swept = (
        "--sweep=Experiment.optimizer = [@torch.optim.SGD, @torch.optim.Adamax]",
        "--sweep=Experiment.max_gradient_norm = [None, 1.5]",
        "--sweep=Experiment.selection_split = ['test']",
    )
    workspace.succeed("sweep", *SMALL, *swept, "--max_parallel=2")
    columns, _, rows = hyper_parameter_rows(workspace.path / "swept")
    names = ["Experiment.max_gradient_norm", "Experiment.optimizer", "Experiment.selection_split"]
    assert columns == names
    found = sorted(tuple(str(row[name]) for name in names) for row in rows.values())
    assert found == [(norm, optimizer, "test") for norm in ("1.5", "None") for optimizer in ("Adamax", "SGD")]
    name = "Experiment.max_gradient_norm=1.5,Experiment.optimizer=@torch.optim.SGD,Experiment.selection_split=test"
    workspace.succeed("evaluate", f"--run_dir=swept/{name}", "--num_samples=5", "--num_examples=8")
    assert workspace.succeed("sweep", "--sweep_dir=swept", "--table_only", "--sort_by=log_p_x")
    assert next(iter(table_of(workspace))) == name  # the only one with this result
    (record,) = (workspace.path / "swept" / name).glob("evaluation_*5x8.json")
    assert float(table_of(workspace)[name]["log_p_x"]) == json.loads(record.read_text())["log_p_x"]


@pytest.mark.slow
def test_a_sweep_over_random_points_and_seeds(workspace):
    swept = ("--sweep=Adam.lr = log_uniform(1e-4, 1e-2)", "--num_random=2")
    workspace.succeed("sweep", *SMALL, *swept, "--max_parallel=2")
    first = set(table_of(workspace))
    workspace.succeed("sweep", *SMALL, *swept[:1], "--num_random=3", "--max_parallel=2")
    assert len(first) == 2 and len(set(table_of(workspace))) == 3 and first < set(table_of(workspace))
    seeds = ("--gin_file=vae_squares.gin", "--sweep_dir=seeds", "--sweep=Experiment.seed = range(2)")
    printed = workspace.succeed("sweep", *seeds, "--max_parallel=2")
    assert "mean ± standard deviation over seeds" in printed and printed.count("finished  Experiment.seed=") == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_goes_on_as_if_it_had_not_been(workspace, number):
    lengthy = ("--gin_bindings=Experiment.num_steps = 3_000", "--gin_bindings=Experiment.eval_every = 100")
    arguments = ("sweep", *SMALL, *lengthy, "--sweep=LATENT_DIM = [2, 3]")
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{workspace.path}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.sweep", *arguments[1:]]
    sweep = subprocess.Popen(
        command, cwd=workspace.path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    latest = workspace.path / "swept" / "LATENT_DIM=2" / "checkpoints" / "latest.ckpt"
    deadline = time.monotonic() + 60
    while not latest.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    line = workspace.fail(*arguments)
    assert "another process runs the sweep" in line
    assert workspace.succeed("sweep", "--sweep_dir=swept", "--table_only").count("running") == 1
    sweep.send_signal(number)
    printed, error = sweep.communicate(timeout=60)
    assert sweep.returncode == 130 and "the same command goes on with the runs" in error
    assert printed.count("waiting") == 2
    assert not (workspace.path / "swept" / "LATENT_DIM=3").exists()
    assert 0 < torch.load(latest, weights_only=True)["step"] < 3_000
    workspace.succeed(*arguments)
    interrupted = torch.load(latest, weights_only=True)
    whole = ("--gin_file=vae_squares.gin", *SMALL[2:], *lengthy, "--gin_bindings=LATENT_DIM = 2", "--run_dir=whole")
    workspace.succeed("train", *whole)
    uninterrupted = torch.load(workspace.path / "whole/checkpoints/latest.ckpt", weights_only=True)
    assert interrupted["step"] == 3_000 and interrupted["best_loss"] == uninterrupted["best_loss"]
    for name, value in uninterrupted["parameters"].items():
        assert torch.equal(interrupted["parameters"][name], value), name


def test_a_run_that_another_process_trains_is_left_to_it(workspace):
    """Such as one that a sweep which was killed has left behind."""
    name = "LATENT_DIM=2"
    (workspace.path / "swept" / name).mkdir(parents=True)
    with FileLock(workspace.path / "swept" / name / ".lock"):
        done = workspace.run("sweep", *SMALL, "--sweep=LATENT_DIM = [2, 3]")
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert f"in use    {name}: another process trains it\n" in done.stdout
    assert done.stderr == "error: 1 of 2 runs are trained by other processes; the same command goes on with them\n"
    rows = table_of(workspace)
    assert rows["LATENT_DIM=3"]["state"] == "finished" and not rows[name]["failure"]
    assert not (workspace.path / "swept" / name / "train.log").exists()
