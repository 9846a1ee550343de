"""A run that an earlier popgen wrote is loaded, evaluated and continued, with the same numbers; see its stripes.gin."""

import dataclasses
import json
import pathlib
import shutil

import pytest
import torch

from popgen import config
from popgen.experiment import Configuration, Experiment, evaluate, run
from popgen.prepared import prepare
from popgen.training.run_directory import RunDirectory
from popgen.training.state import state_to_tensors

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
OLD_RUN = FIXTURES / "version1"
# What 20 more steps came to on the day it was made; its best loss was -ELBO then, and is the KL that meets the target.
CONTINUED = {
    "best_loss": 6.124511,
    "best_step": 420,
    "multiplier": 1.594837,
    "weights": 403.90452,
    "averages": 403.72246,
}


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """What the configuration in the run describes."""
    monkeypatch.syspath_prepend(FIXTURES)
    return config.load([OLD_RUN / "config.gin"]).experiment


@pytest.mark.parametrize("name", ["best", "latest"])
def test_checkpoints_are_read(name: str) -> None:
    contents = RunDirectory(OLD_RUN).load_checkpoint(name)
    assert contents["step"] == 400 and contents["optimizer_name"] == "Adam"
    assert contents["parameters"]["decoder.logits.weight"].shape == (16, 4)
    assert contents["auxiliary"]["multiplier"].item() > 0.0


def test_it_is_evaluated_as_it_was(experiment: Experiment) -> None:
    (path,) = OLD_RUN.glob("evaluation_*.json")
    recorded = json.loads(path.read_text())
    best = RunDirectory(OLD_RUN).load_checkpoint("best")
    found = evaluate(
        prepare(experiment, torch.device("cpu")).with_checkpoint(best), num_samples=50, num_examples=None, step=400
    )
    for name in ("model_sha256", "images_sha256", "num_examples", "active_units"):
        assert found[name] == recorded[name], name
    for name in ("elbo", "reconstruction", "kl", "log_p_z"):
        assert found[name] == pytest.approx(recorded[name], abs=1e-3), name
    assert found["log_p_x"] == pytest.approx(recorded["log_p_x"], abs=5 * recorded["monte_carlo_error"]), "other noise"


def test_it_is_continued_as_it_would_have_been(experiment: Experiment, tmp_path: pathlib.Path) -> None:
    shutil.copytree(OLD_RUN, tmp_path / "run")
    longer = dataclasses.replace(experiment, num_steps=420, eval_every=10)
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        state = run(longer, directory, Configuration("", "", {}))
    tensors = state_to_tensors(state)
    found = {
        "best_loss": state.best_loss,
        "best_step": state.best_step,
        "multiplier": state.auxiliary["multiplier"].item(),
        "weights": sum(tensor.abs().sum().item() for tensor in tensors["parameters"].values()),
        "averages": sum(tensor.abs().sum().item() for tensor in tensors["weight_average"].values()),
    }
    assert state.step == 420
    assert found == pytest.approx(CONTINUED, rel=1e-3)
