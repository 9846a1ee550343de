"""Whole runs of several replicas: against runs alone, killed, stopped, continued together and apart, and refused."""

import itertools
import json
import pathlib
import re
import shutil
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from launch import command
from popgen import config
from popgen.distributed import Processes
from popgen.errors import ArgumentError, CheckpointError, DivergedError, RunDirectoryError, StoppedError, TrainingError
from popgen.experiment import Configuration, Experiment, run
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import PlanarFlow
from popgen.nn.vamp_prior import VampPrior
from popgen.replicas import Replica, check_one_process, run_replicas
from popgen.training.run_directory import RunDirectory
from popgen.training.state import TrainState
from tests.test_commands import Workspace
from tests.training.test_runs import (
    CONFIGURATION,
    SometimesNan,
    StopsAt,
    assert_same_checkpoint,
    curves,
    flat,
    make_experiment,
)

SEEDS = (3, 4)
NAMES = ("latest", "best", "previous", "6", "12")


def experiments(**changes: Any) -> list[Experiment]:
    """Returns experiments whose models are built under their seeds, with pseudo-inputs from the data."""
    found = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = VAE(GaussianEncoder(16, 2, 6), BernoulliDecoder(2, 16, 6), VampPrior(16, 3, "data"), PlanarFlow(2, 6))
        found.append(make_experiment(**{"model": model, "seed": seed, **changes}))
    return found


def train_in(path: pathlib.Path, stop: Callable[[], bool] = lambda: False, **changes: Any) -> list[TrainState]:
    directory = RunDirectory(path)
    replicas = [Replica(one, Configuration(f"of seed {one.seed}", "", {})) for one in experiments(**changes)]
    with directory.locked():
        return run_replicas(replicas, directory, CONFIGURATION, stop)


def assert_same_runs(first: pathlib.Path, second: pathlib.Path) -> None:
    """Bit for bit: checkpoints of each replica, its curves, and those of the whole."""
    for replica in ("replica_0", "replica_1"):
        for name in NAMES:
            assert_same_checkpoint(first / replica, second / replica, name)
        assert curves(first / replica) == curves(second / replica)
    assert curves(first) == curves(second)
    files = [sorted(file.relative_to(path) for file in path.glob("*/*/*")) for path in (first, second)]
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of replicas that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole")
    train_in(path)
    return path


# --- what is left ----------------------------------------------------------------------------------------------------


def assert_close_checkpoint(first: pathlib.Path, second: pathlib.Path, name: str) -> None:
    one, other = (flat(RunDirectory(path).load_checkpoint(name)) for path in (first, second))
    assert one.keys() == other.keys() and len(one) > 40
    for key, value in one.items():
        if isinstance(value, Tensor | float):
            torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-5, msg=lambda text, key=key: key + text)
        else:
            assert value == other[key], key


def test_each_replica_leaves_the_run_that_it_is_alone(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Checkpoints, best of each, curves and files; in float32, where sums are rounded in another order."""
    for index, experiment in enumerate(experiments()):
        path, replica = tmp_path / str(index), whole / f"replica_{index}"
        with RunDirectory(path).locked():
            run(experiment, RunDirectory(path), CONFIGURATION)
        for name in NAMES:
            assert_close_checkpoint(replica, path, name)
        found, expected = curves(replica), curves(path)
        assert found.keys() == expected.keys()
        for tag, points in expected.items():
            assert found[tag] == [(step, pytest.approx(value, rel=1e-3, abs=1e-4)) for step, value in points], tag
        files = [sorted(file.relative_to(place) for file in place.glob("*/*")) for place in (replica, path)]
        assert files[0] == files[1]
        assert (replica / "config.gin").read_text() == f"of seed {experiment.seed}"


def test_the_whole_shows_means_and_standard_deviations(whole: pathlib.Path) -> None:
    found, each = curves(whole), [curves(whole / f"replica_{index}") for index in range(2)]
    tags = [tag for tag in found if "_std/" not in tag]
    assert set(tags) == set(each[0]) and {"train/loss", "test/loss", "best/loss"} <= set(tags)
    for tag in tags:
        group, name = tag.split("/")
        for point in zip(found[tag], found[f"{group}_std/{name}"], *(own[tag] for own in each), strict=True):
            (step, mean), (other_step, deviation), *values = point
            assert {step, other_step} == {one for one, _ in values} | {step}
            assert mean == pytest.approx(statistics.fmean(value for _, value in values), rel=1e-5)
            assert deviation == pytest.approx(statistics.stdev(value for _, value in values), rel=1e-3, abs=1e-5)
    assert found["train_std/loss"][-1][1] > 0.0


def test_an_evaluation_at_the_end_is_made_of_each(tmp_path: pathlib.Path) -> None:
    states = train_in(tmp_path, num_steps=3, final_num_samples=5)
    assert [state.step for state in states] == [3, 3]
    assert len(list(tmp_path.glob("replica_*/evaluation_*.json"))) == 2
    assert {"evaluation/log_p_x", "evaluation_std/log_p_x"} <= curves(tmp_path).keys()


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_at", [2, 6, 8])
def test_killed_replicas_end_like_those_that_were_not(killed_at: int, whole: pathlib.Path, tmp_path) -> None:
    with pytest.raises(ProcessLookupError):
        train_in(tmp_path, objective=StopsAt(killed_at))
    train_in(tmp_path)
    assert_same_runs(whole, tmp_path)


@pytest.mark.parametrize("name", ["latest", "best", "6"])
@pytest.mark.parametrize("save", [0, 1, 3], ids=["first", "second", "last"])
def test_a_process_killed_when_some_replicas_have_saved(name: str, save: int, whole, tmp_path, monkeypatch) -> None:
    """Those that have go back with the others, to a step that all of them have."""
    save_checkpoint, saves = RunDirectory.save_checkpoint, itertools.count()

    def killed(directory: RunDirectory, saved: str, contents: dict[str, Any]) -> None:
        if saved == name and directory.path.name == "replica_1" and next(saves) == (0 if name == "6" else save):
            raise ProcessLookupError("killed")
        save_checkpoint(directory, saved, contents)

    with monkeypatch.context() as patch, pytest.raises(ProcessLookupError):
        patch.setattr(RunDirectory, "save_checkpoint", killed)
        train_in(tmp_path)
    train_in(tmp_path)
    assert_same_runs(whole, tmp_path)


@pytest.mark.parametrize("steps", [1, 5])
def test_replicas_that_were_asked_to_stop_go_on(steps: int, whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    left = itertools.count(-steps)
    with pytest.raises(StoppedError, match=f"stopped at step {steps}, which is saved"):
        train_in(tmp_path, lambda: next(left) >= 0)
    train_in(tmp_path)
    for replica in ("replica_0", "replica_1"):
        for name in ("latest", "best", "6", "12"):
            assert_same_checkpoint(whole / replica, tmp_path / replica, name)
        assert curves(whole / replica) == curves(tmp_path / replica)


def test_a_replica_goes_on_alone_and_the_others_without_it_no_more(whole, tmp_path: pathlib.Path) -> None:
    train_in(tmp_path, num_steps=3)
    alone = RunDirectory(tmp_path / "replica_1")
    with alone.locked():
        run(experiments()[1], alone, CONFIGURATION)
    for name in NAMES:
        assert_close_checkpoint(whole / "replica_1", alone.path, name)
    for path in alone.path.glob("checkpoints/*.ckpt"):
        if path.name != "latest.ckpt":
            path.unlink()
    message = r"no step in common to go on from \(replica_0: 3, replica_1: 12\): continue each alone, with --run_dir="
    RunDirectory(tmp_path / "replica_0").save_checkpoint("previous", alone.load_checkpoint("latest"))
    with pytest.raises(CheckpointError, match=message):
        train_in(tmp_path)


def test_steps_of_one_replica_are_not_thrown_away_because_another_is_missing(tmp_path: pathlib.Path) -> None:
    train_in(tmp_path)
    (tmp_path / "replica_1/checkpoints/previous.ckpt").unlink()
    shutil.rmtree(tmp_path / "replica_0")
    with pytest.raises(CheckpointError, match=r"no step in common to go on from \(replica_0: none, replica_1: 12\)"):
        train_in(tmp_path)
    assert RunDirectory(tmp_path / "replica_1").load_checkpoint("latest")["step"] == 12


# --- numbers that go wrong -------------------------------------------------------------------------------------------


def test_a_replica_that_diverges_is_named(tmp_path: pathlib.Path) -> None:
    bad = SometimesNan(*range(5, 12))
    message = rf"^replica 0: the loss became nan at step 7.* --run_dir={tmp_path}/replica_0 --step=5 --trust_config$"
    with pytest.raises(DivergedError, match=message):
        train_in(tmp_path, objective=bad, max_skipped_steps=2)


def test_a_loss_that_is_not_finite_is_that_of_a_replica(tmp_path: pathlib.Path, monkeypatch) -> None:
    from popgen.evaluation.evaluator import VAEEvaluator

    def validate(self, model, examples, seed):
        return {"loss": float("nan") if seed == SEEDS[1] else 1.0}

    monkeypatch.setattr(VAEEvaluator, "validate", validate)
    with pytest.raises(TrainingError, match="^replica 1: the test loss is nan at step 3"):
        train_in(tmp_path)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
def test_the_number_of_replicas_is_a_positive_integer(value: Any) -> None:
    message = f"^Experiment.num_replicas must be an integer of at least 1, got {re.escape(repr(value))}$"
    with pytest.raises(ArgumentError, match=message):
        make_experiment(num_replicas=value)


def test_what_does_not_go_with_replicas_is_refused(tmp_path: pathlib.Path) -> None:
    with RunDirectory(tmp_path).locked(), pytest.raises(ArgumentError, match="num_replicas = 2: use run_replicas"):
        run(make_experiment(num_replicas=2), RunDirectory(tmp_path), CONFIGURATION)
    with pytest.raises(ArgumentError, match="num_replicas must be 1 where there are several processes"):
        check_one_process(2, Processes(rank=0, size=2))
    assert not list(tmp_path.glob("replica_*"))


def test_a_model_that_cannot_be_mapped_is_refused_before_anything_starts(tmp_path: pathlib.Path) -> None:
    class Looks(VAE):
        def forward(self, x, noise, path_weights=None):
            assert bool((x >= 0.0).all())
            return super().forward(x, noise, path_weights)

    model = Looks(GaussianEncoder(16, 2, 6), BernoulliDecoder(2, 16, 6), VampPrior(16, 3))
    message = r"^Experiment.num_replicas: Looks with NegativeELBO cannot be mapped over replicas \(.*\): train one"
    with pytest.raises(ArgumentError, match=message):
        train_in(tmp_path, model=model)
    assert not list(tmp_path.glob("replica_*"))


def test_another_number_of_replicas_does_not_go_on(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    directory = RunDirectory(whole)
    own = [Replica(one, CONFIGURATION) for one in [*experiments(), make_experiment(seed=5)]]
    with directory.locked():
        with pytest.raises(RunDirectoryError, match="num_replicas = 2, which cannot go on with 3: --overwrite"):
            run_replicas(own, directory, CONFIGURATION)
        with pytest.raises(RunDirectoryError, match="num_replicas = 2, which cannot go on with 1: --overwrite"):
            run(make_experiment(), directory, CONFIGURATION)
    with RunDirectory(tmp_path).locked():
        run(make_experiment(num_steps=3), RunDirectory(tmp_path), CONFIGURATION)
    with pytest.raises(RunDirectoryError, match="num_replicas = 1, which cannot go on with 2: --overwrite"):
        train_in(tmp_path)
    RunDirectory(tmp_path).clear()
    train_in(tmp_path, num_steps=3)
    RunDirectory(tmp_path).clear()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_replica_in_use_is_not_trained(tmp_path: pathlib.Path) -> None:
    with RunDirectory(tmp_path / "replica_1").locked(), pytest.raises(RunDirectoryError, match="replica_1 is in use"):
        train_in(tmp_path)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_the_configuration_of_a_replica_is_that_of_its_seed_alone() -> None:
    """Weights too, whichever way the seed is bound."""
    files, bindings = ["configs/vamp.gin"], ["HIDDEN_DIM = 8", "Experiment.seed = 7"]
    loaded = config.load(files, [*bindings, "Experiment.num_replicas = 2"])
    replicas = config.load_replicas(files, [*bindings, "Experiment.num_replicas = 2"], loaded.experiment)
    for seed, replica in zip((7, 8), replicas, strict=True):
        alone = config.load(files, [*bindings, f"Experiment.seed = {seed}"])
        assert replica.experiment.seed == seed and replica.experiment.num_replicas == 1
        changes = config.differences(alone.configuration.given, replica.configuration.given)
        assert changes == ["experiment.Experiment.num_replicas: (not set) -> 1"]
        weights = [one.experiment.model.state_dict() for one in (replica, alone)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    first, second = (replica.experiment.model.state_dict() for replica in replicas)
    assert not torch.equal(first["prior.logits"], second["prior.logits"])


# --- commands --------------------------------------------------------------------------------------------------------

TWO = ("--gin_bindings=Experiment.num_replicas = 2", "--gin_bindings=HIDDEN_DIM = 8", "--run_dir=runs")


def test_the_command_trains_replicas(tmp_path: pathlib.Path) -> None:
    workspace = Workspace(tmp_path)
    shown = workspace.succeed("train", "--gin_file=vae_squares.gin", *TWO)
    assert "2 replicas: lowest loss" in shown.splitlines()[-1]
    for index in range(2):
        assert f"evaluate: python -m launch.evaluate --run_dir=runs/replica_{index}" in shown
        written = (tmp_path / "runs" / f"replica_{index}" / "config.gin").read_text()
        assert f"Experiment.seed = {index}\n" in written and "Experiment.num_replicas = 1\n" in written
        assert RunDirectory(tmp_path / "runs" / f"replica_{index}").load_checkpoint("latest")["step"] == 4
    assert "Experiment.num_replicas = 2\n" in (tmp_path / "runs" / "config.gin").read_text()


@pytest.mark.slow
def test_the_other_commands_take_a_replica_for_the_run_that_it_is(tmp_path: pathlib.Path) -> None:
    workspace, train = Workspace(tmp_path), ("train", "--gin_file=vae_squares.gin", *TWO)
    workspace.succeed(*train)
    workspace.succeed("evaluate", "--run_dir=runs/replica_1", "--num_samples=5")
    (record,) = (tmp_path / "runs" / "replica_1").glob("evaluation_*.json")
    assert json.loads(record.read_text())["seed"] == 1
    workspace.succeed("sample", "--run_dir=runs/replica_0", "--out=samples.png")
    assert "to go on from" not in workspace.succeed(*train), "a finished run is finished"
    assert "holds several replicas; --run_dir names one" in workspace.fail("evaluate", "--run_dir=runs")
    for number in (1, 3):
        bindings = f"--gin_bindings=Experiment.num_replicas = {number}"
        for flag in ("--noreconfigure", "--reconfigure"):
            assert f"num_replicas = 2, which cannot go on with {number}" in workspace.fail(*train, bindings, flag)
    alone = ("--gin_file=runs/replica_1/config.gin", "--run_dir=runs/replica_1", "--reconfigure")
    workspace.succeed("train", *alone, "--gin_bindings=Experiment.num_steps = 6")
    continued = RunDirectory(tmp_path / "runs" / "replica_1")
    assert continued.load_checkpoint("latest")["step"] == 6
    assert "replica_1 holds a run with another configuration (experiment.Experiment.num_steps" in workspace.fail(*train)
    assert continued.load_checkpoint("latest")["step"] == 6, "it was not taken back"
    workspace.succeed(*train, "--overwrite", "--gin_bindings=Experiment.num_replicas = 3")
    assert RunDirectory(tmp_path / "runs" / "replica_2").load_checkpoint("latest")["step"] == 4


def test_a_command_on_the_whole_names_the_replicas(tmp_path: pathlib.Path) -> None:
    given = config.load(["configs/vae.gin"], ["HIDDEN_DIM = 8", "Experiment.num_replicas = 2"]).configuration.given
    for path in (tmp_path, tmp_path / "replica_0", tmp_path / "replica_1"):
        path.mkdir(exist_ok=True)
        (path / "config.gin").write_text(given)
    with pytest.raises(RunDirectoryError, match="holds several replicas; --run_dir names one of them: .*/replica_1$"):
        command.existing_run(str(tmp_path), "best", trust_config=False)
