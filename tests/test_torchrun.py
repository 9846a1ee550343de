"""The commands under torchrun, as a user runs them."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.together import free_port
from tests.test_commands import REPOSITORY, Workspace

pytestmark = pytest.mark.slow

DYING = """
import os, signal
from popgen.training.objectives import NegativeELBO

class DiesOnce(NegativeELBO):
    def settings(self, step):
        if step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().settings(step)
"""
DYING_CONFIG = """
from __gin__ import dynamic_registration
import own_objective
from popgen import experiment
include "vae_squares.gin"
experiment.Experiment.objective = @own_objective.DiesOnce()
experiment.Experiment.num_steps = 8
"""


class Together(Workspace):
    """Runs commands by two processes."""

    def start(self, command: str, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
        path = os.pathsep.join((str(REPOSITORY), str(self.path)))
        if not any(option.startswith("--rdzv_backend") for option in options):
            options = ("--standalone", *options)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *options]
        return subprocess.Popen(
            [*launcher, "-m", f"launch.{command}", *arguments],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def together(tmp_path: pathlib.Path) -> Together:
    return Together(tmp_path)


def latest_step(path: pathlib.Path) -> int:
    return torch.load(path / "checkpoints" / "latest.ckpt", weights_only=True)["step"]


def test_train_and_evaluate(together: Together) -> None:
    """What is printed is printed once, and the record is that of one process to 1e-5 nats."""
    out, err = together.start("train", "--gin_file=vae_squares.gin", "--run_dir=run").communicate(timeout=300)
    assert out.count("finished at step 4") == 1 and out.count("run directory: run\n") == 1, err
    arguments = ("--run_dir=run", "--num_samples=20", "--trust_config")
    out, err = together.start("evaluate", *arguments).communicate(timeout=300)
    assert out.count("log p(x)") == 1, err
    (path,) = (together.path / "run").glob("evaluation_*.json")
    shared = json.loads(path.read_text())
    for file in (together.path / "run").glob("evaluation_*"):
        file.unlink()
    together.succeed("evaluate", *arguments)
    alone = json.loads(path.read_text())
    assert (shared["processes"], alone["processes"]) == (2, 1)
    for name in ("log_p_x", "elbo", "log_p_x_of_1_samples", "log_p_x_standard_error"):
        assert shared[name] == pytest.approx(alone[name], abs=1e-5), name


@pytest.mark.parametrize("rendezvous", ["standalone", "static"])
def test_a_worker_that_dies_is_started_again(rendezvous: str, together: Together) -> None:
    (together.path / "own_objective.py").write_text(DYING)
    (together.path / "dying.gin").write_text(DYING_CONFIG)
    command = ("train", "--gin_file=dying.gin", "--run_dir=run")
    static = ("--rdzv_backend=static", f"--master_port={free_port()}") if rendezvous == "static" else ()
    process = together.start(*command, options=("--max_restarts=1", *static))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("finished at step 8") == 1 and "failed (exitcode: -9) local_rank: 1" in err
    assert latest_step(together.path / "run") == 8


@pytest.mark.parametrize("attempt", range(2))
def test_the_one_that_is_left_says_that_another_has_ended(attempt: int, together: Together) -> None:
    """Though torchrun asks it to end at once."""
    (together.path / "own_objective.py").write_text(DYING)
    (together.path / "dying.gin").write_text(DYING_CONFIG)
    process = together.start("train", "--gin_file=dying.gin", "--run_dir=run")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and err.count("error: another process of this run has ended") == 1, err


def test_torchrun_passes_a_request_to_stop_on(together: Together) -> None:
    many = "--gin_bindings=Experiment.num_steps = 1_000_000"
    process = together.start("train", "--gin_file=vae_squares.gin", "--run_dir=run", many)
    run = together.path / "run"
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "latest.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert err.count("which is saved; the same command goes on from there") == 1, err
    stopped = latest_step(run)
    few = f"--gin_bindings=Experiment.num_steps = {stopped + 2}"
    out, err = together.start("train", "--gin_file=vae_squares.gin", "--run_dir=run", few, "--reconfigure").communicate(
        timeout=300
    )
    assert f"finished at step {stopped + 2}" in out, err
