"""Whole runs that are killed, continued, continued differently, or go wrong."""

import dataclasses
import functools
import itertools
import math
import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from popgen.datasets.images import ImageData, binarise_once, prepare_images
from popgen.errors import ArgumentError, CheckpointError, DivergedError, StoppedError, TrainingError
from popgen.evaluation.evaluator import VAEEvaluator
from popgen.evaluation.likelihood import evaluate_elbo
from popgen.experiment import Configuration, Experiment, run
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import PlanarFlow
from popgen.nn.vamp_prior import VampPrior
from popgen.prepared import prepare
from popgen.replay import replay
from popgen.training import checkpoints
from popgen.training.diagnosis import diagnose
from popgen.training.objectives import LossOutput, NegativeELBO
from popgen.training.run_directory import RunDirectory
from popgen.training.state import TrainState
from popgen.training.weights import model_of_checkpoint

CONFIGURATION = Configuration(given="given", operative="operative", settings={"Adam.lr": 0.01})


def columns(count: int, seed: int) -> Tensor:
    """Returns 4 × 4 grey levels of light and dark columns."""
    generator = torch.Generator().manual_seed(seed)
    light = torch.randint(0, 2, (count, 1, 4), generator=generator).expand(-1, 4, -1).flatten(1)
    return (30 + 200 * light).to(torch.uint8)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Grey levels, binarised at every visit."""

    num_test: int = 12
    num_train: int = 30

    def load(self) -> ImageData:
        return prepare_images(
            columns(self.num_train, 0), columns(self.num_test, 1), (4, 4), "dynamic", 0, validation_size=6
        )


@dataclasses.dataclass(frozen=True)
class Values:
    """The same images as floating-point values, binarised once."""

    dtype: torch.dtype

    def load(self) -> ImageData:
        train, test = (binarise_once(columns(count, 0), seed=count).to(self.dtype) / 255 for count in (24, 12))
        return ImageData(train, test, (4, 4), "fixed")


class StopsAt(NegativeELBO):
    """The objective of a process that dies at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        object.__setattr__(self, "last_step", step)

    def settings(self, step: int) -> dict[str, float]:
        if step == self.last_step:
            raise ProcessLookupError("killed")
        return super().settings(step)


def make_experiment(**changes: Any) -> Experiment:
    torch.manual_seed(0)
    vae = VAE(GaussianEncoder(16, 2, 6), BernoulliDecoder(2, 16, 6), VampPrior(16, 3, "data"), PlanarFlow(2, 6))
    settings: dict[str, Any] = {
        "model": vae,
        "dataset": Columns(),
        "optimizer": functools.partial(torch.optim.Adam, lr=0.01),
        "num_steps": 12,
        "batch_size": 8,
        "eval_every": 3,
        "log_every": 2,
        "checkpoint_every": 6,
    }
    return Experiment(**(settings | changes))


def run_in(path: pathlib.Path, **changes: Any) -> TrainState:
    directory = RunDirectory(path)
    with directory.locked():
        return run(make_experiment(**changes), directory, CONFIGURATION)


def curves(path: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """Returns every curve that TensorBoard shows of a run, but for the speed."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith("steps_per_second")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dictionaries and lists, by path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in flat(item, f"{name}/{key}").items()}
    return {name: value}


def assert_same_checkpoint(first: pathlib.Path, second: pathlib.Path, name: str) -> None:
    one, other = (flat(RunDirectory(path).load_checkpoint(name)) for path in (first, second))
    assert one.keys() == other.keys() and len(one) > 40
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        assert same, f"{name}: {key}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole")
    run_in(path)
    return path


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_at", [2, 3, 5, 6, 11])
def test_a_killed_run_ends_like_one_that_was_not(killed_at: int, whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Whatever was written after the last checkpoint: weights, moments, random states, best and curves are the same."""
    with pytest.raises(ProcessLookupError):
        run_in(tmp_path, objective=StopsAt(killed_at))
    run_in(tmp_path)
    for name in ("latest", "best", "12"):
        assert_same_checkpoint(whole, tmp_path, name)
    assert curves(tmp_path) == curves(whole)
    files = [{file.name for file in path.glob("*/*")} for path in (whole, tmp_path)]
    assert files[0] == files[1]


def test_a_run_killed_many_times(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for killed_at in (4, 4, 8, 10):
        with pytest.raises(ProcessLookupError):
            run_in(tmp_path, objective=StopsAt(killed_at))
    run_in(tmp_path)
    for name in ("latest", "best", "6"):
        assert_same_checkpoint(whole, tmp_path, name)
    assert curves(tmp_path) == curves(whole)


@pytest.mark.parametrize("first", [3, 9])
def test_a_longer_run_is_a_shorter_one_continued(first: int, whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert run_in(tmp_path, num_steps=first).step == first
    assert run_in(tmp_path).step == 12
    for name in ("latest", "best"):
        assert_same_checkpoint(whole, tmp_path, name)


def test_a_finished_run_started_again_changes_nothing(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run_in(tmp_path, final_num_samples=3)
    once = curves(tmp_path)
    again = run_in(tmp_path, final_num_samples=3)
    assert again.step == 12
    for name in ("latest", "best"):
        assert_same_checkpoint(whole, tmp_path, name)
    assert curves(tmp_path) == once and len(once["evaluation/log_p_x"]) == 1


def test_a_run_is_a_function_of_its_seed_alone(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    experiment = make_experiment()
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    with RunDirectory(tmp_path / "same").locked():
        run(experiment, RunDirectory(tmp_path / "same"), CONFIGURATION)
    assert torch.equal(before, torch.get_rng_state())
    assert_same_checkpoint(whole, tmp_path / "same", "latest")
    other = run_in(tmp_path / "other", seed=1)
    latest = RunDirectory(whole).load_checkpoint("latest")["parameters"]
    assert not torch.equal(other.parameters["decoder.logits.bias"], latest["decoder.logits.bias"])


# --- continuing differently ------------------------------------------------------------------------------------------


def test_a_changed_learning_rate_counts(tmp_path: pathlib.Path) -> None:
    run_in(tmp_path, num_steps=6)
    run_in(tmp_path, optimizer=functools.partial(torch.optim.Adam, lr=0.001))
    rates = dict(curves(tmp_path)["train/learning_rate"])
    assert rates == pytest.approx({step: 0.01 if step <= 6 else 0.001 for step in rates}, rel=1e-6)
    assert {6, 12} <= rates.keys()


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_another_model_or_optimizer_is_refused_and_nothing_is_lost(what: str, tmp_path: pathlib.Path) -> None:
    run_in(tmp_path, num_steps=3)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    wider = VAE(GaussianEncoder(16, 2, 7), BernoulliDecoder(2, 16, 6), VampPrior(16, 3, "data"), PlanarFlow(2, 7))
    changes = {"model": wider} if what == "model" else {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)}
    with pytest.raises(CheckpointError, match=f"another {what}"):
        run_in(tmp_path, **changes)
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# --- bad disks -------------------------------------------------------------------------------------------------------


def flip_a_bit(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [flip_a_bit, cut, pathlib.Path.unlink])
@pytest.mark.parametrize(
    "damaged, newest",
    [
        (["latest"], "best"),
        (["latest", "best"], "previous"),
        (["latest", "previous", "best"], "6"),
        (["best"], "latest"),
    ],
)
def test_the_newest_whole_checkpoint_is_continued_from(
    damage: Callable, damaged: list[str], newest: str, whole: pathlib.Path, tmp_path: pathlib.Path, capsys
) -> None:
    """One line says so, and the end is that of a run whose files were never damaged."""
    left = itertools.count(-9)
    with pytest.raises(StoppedError):
        stopped_in(tmp_path, lambda: next(left) >= 0)
    directory = RunDirectory(tmp_path)
    steps = {name: directory.load_checkpoint(name)["step"] for name in directory.checkpoint_names()}
    assert steps == {"latest": 9, "previous": 6, "6": 6, "best": 9}
    for name in damaged:
        damage(directory.checkpoint_path(name))
    capsys.readouterr()
    run_in(tmp_path)
    line = capsys.readouterr().err
    if damage is not pathlib.Path.unlink and newest != "latest":
        assert line.count("\n") == 1 and f"; continuing from {newest}, step {steps[newest]}" in line
        assert all(f"{directory.checkpoint_path(name)} is" in line for name in damaged)
        assert directory.checkpoint_path("latest").with_suffix(".damaged").is_file()
        directory.checkpoint_path("latest").with_suffix(".damaged").unlink()
    else:
        assert line == ""
    for name in ("latest", "best", "previous", "6", "12"):
        assert_same_checkpoint(whole, tmp_path, name)
    assert curves(tmp_path) == curves(whole)
    assert {file.name for file in tmp_path.glob("*/*")} == {file.name for file in whole.glob("*/*")}


def test_when_no_checkpoint_is_whole_nothing_is_touched(tmp_path: pathlib.Path) -> None:
    run_in(tmp_path, num_steps=3)
    for path in tmp_path.glob("checkpoints/*.ckpt"):
        flip_a_bit(path)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is whole: .*latest\.ckpt is damaged.*best\.ckpt is"
    ):
        run_in(tmp_path)
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


WORSE = {"optimizer": functools.partial(torch.optim.Adam, lr=0.01, maximize=True)}  # best at the first evaluation


@pytest.mark.parametrize("killed_before", ["latest", "best"])
def test_a_run_killed_around_latest_has_its_best_checkpoint(killed_before: str, tmp_path, monkeypatch) -> None:
    """Between the two, `latest` is already of a step whose `best` was never written."""
    run_in(tmp_path / "whole", **WORSE)
    save = RunDirectory.save_checkpoint

    def killed(directory: RunDirectory, name: str, contents: dict[str, Any]) -> None:
        if name == killed_before:
            raise ProcessLookupError("killed")
        save(directory, name, contents)

    with monkeypatch.context() as patch, pytest.raises(ProcessLookupError):
        patch.setattr(RunDirectory, "save_checkpoint", killed)
        run_in(tmp_path / "run", **WORSE)
    run_in(tmp_path / "run", **WORSE)
    for name in ("latest", "best", "previous", "6", "12"):
        assert_same_checkpoint(tmp_path / "whole", tmp_path / "run", name)
    assert RunDirectory(tmp_path / "run").load_checkpoint("best")["step"] == 3
    assert curves(tmp_path / "run") == curves(tmp_path / "whole")


@pytest.mark.parametrize("damaged", [True, False])
def test_a_best_checkpoint_that_is_lost_is_sought_anew(damaged: bool, tmp_path: pathlib.Path, capsys) -> None:
    """Its loss would otherwise never be reached again, and the run end without a best checkpoint."""
    run_in(tmp_path, num_steps=9, **WORSE)
    best = RunDirectory(tmp_path).checkpoint_path("best")
    flip_a_bit(best) if damaged else best.unlink()
    capsys.readouterr()
    run_in(tmp_path, **WORSE)
    assert f"{best} is missing or damaged; the lowest loss is sought anew from step 9 on\n" == capsys.readouterr().err
    found = RunDirectory(tmp_path).load_checkpoint("best")
    assert found["step"] == found["best_step"] == 12
    assert found["best_loss"] == pytest.approx(dict(curves(tmp_path)["test/loss"])[12], rel=1e-6)


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error_that_names_the_others(tmp_path: pathlib.Path) -> None:
    run_in(tmp_path)
    directory = RunDirectory(tmp_path)
    flip_a_bit(directory.checkpoint_path("best"))
    cut(directory.checkpoint_path("6"))
    for name in ("best", "6"):
        with pytest.raises(CheckpointError, match=rf"{directory.checkpoint_path(name).name} is .*") as caught:
            directory.load_checkpoint(name)
        assert str(caught.value).endswith("; these are whole: latest, previous, 12")


def test_a_thousand_random_places_of_a_checkpoint(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """No change of a byte, no cut and no run of zeros, as of a lost block, is ever taken for another content."""
    good, choice = RunDirectory(whole).checkpoint_path("latest").read_bytes(), random.Random(0)
    wanted, path, refused = flat(RunDirectory(whole).load_checkpoint("latest")), tmp_path / "latest.ckpt", 0
    for trial in range(1_000):
        content, place = bytearray(good), choice.randrange(len(good))
        if trial % 3 == 0:
            content[place] ^= choice.randrange(1, 256)
        elif trial % 3 == 1:
            del content[place:]
        else:
            content[place : place + 512] = bytes(len(content[place : place + 512]))
        path.write_bytes(content)
        try:
            found = flat(checkpoints.load(path))
        except CheckpointError:
            refused += 1
            continue
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items() if isinstance(value, Tensor))
    assert refused > 950


# --- requests to stop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 11])
def test_a_run_that_was_asked_to_stop_goes_on_as_if_it_had_not_been(
    steps: int, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Wherever that is: also between two points of the curves, whose means are of steps before and after it."""
    left = itertools.count(-steps)
    saved = ", which is saved" if steps else ""
    with pytest.raises(StoppedError, match=f"stopped at step {steps}{saved}; the same command goes on"):
        stopped_in(tmp_path, lambda: next(left) >= 0)
    if steps:
        assert RunDirectory(tmp_path).load_checkpoint("latest")["step"] == steps
    run_in(tmp_path)
    for name in ("latest", "best", "6", "12"):
        assert_same_checkpoint(whole, tmp_path, name)
    assert curves(tmp_path) == curves(whole)


def stopped_in(path: pathlib.Path, stop: Callable[[], bool], **changes: Any) -> None:
    directory = RunDirectory(path)
    with directory.locked():
        run(make_experiment(**changes), directory, CONFIGURATION, stop)


def test_a_stop_in_the_final_evaluation(tmp_path: pathlib.Path) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 13  # 12 steps, once before the evaluation, and then within it

    with pytest.raises(StoppedError, match="stopped during the evaluation; the same command goes on with it"):
        stopped_in(tmp_path, stop, final_num_samples=5)
    assert not list(tmp_path.glob("evaluation_*.json"))
    run_in(tmp_path, final_num_samples=5)
    assert len(list(tmp_path.glob("evaluation_*.json"))) == 1


# --- numbers that go wrong -------------------------------------------------------------------------------------------


class SometimesNan(NegativeELBO):
    """Has a loss that is not a number in some steps."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        object.__setattr__(self, "steps", steps)

    def settings(self, step: int) -> dict[str, float]:
        return {**super().settings(step), "scale": torch.nan if step + 1 in self.steps else 1.0}

    def __call__(self, forward: Callable[..., Any], batch: Tensor, noise: Tensor, settings, state):
        loss, metrics, changes = super().__call__(forward, batch, noise, settings, state)
        scaled = metrics | {"loss": metrics["loss"] * settings["scale"]}
        return LossOutput(loss * settings["scale"], scaled, changes)


def test_a_few_bad_steps_are_skipped_and_counted(tmp_path: pathlib.Path) -> None:
    state = run_in(tmp_path, objective=SometimesNan(2, 5, 6, 7))
    assert state.step == 12 and state.skipped["total"] == 4
    found = curves(tmp_path)
    counts = [(2, 1), (3, 1), (4, 1), (6, 3), (8, 4), (9, 4), (10, 4), (12, 4)]
    assert found["train/skipped_steps"] == counts
    losses = dict(found["train/loss"])
    assert 6 not in losses and all(math.isfinite(loss) for loss in losses.values()) and 8 in losses
    assert "train/skipped_in_a_row" not in found


def test_skipped_steps_and_an_interruption(tmp_path: pathlib.Path) -> None:
    """The count in a row goes on over the interruption, as do the means."""
    bad = SometimesNan(2, 4, 5, 6, 7, 8)
    run_in(tmp_path / "whole", objective=bad)
    left = itertools.count(-5)
    with pytest.raises(StoppedError):
        stopped_in(tmp_path / "run", lambda: next(left) >= 0, objective=bad)
    assert RunDirectory(tmp_path / "run").load_checkpoint("latest")["skipped"]["in a row"] == 2
    run_in(tmp_path / "run", objective=bad)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "run", "latest")
    assert curves(tmp_path / "run") == curves(tmp_path / "whole")
    with pytest.raises(DivergedError, match="5 steps in a row were skipped") as caught:
        run_in(tmp_path / "other", objective=bad, max_skipped_steps=4)
    assert caught.value.step == 4
    assert str(caught.value).endswith(f"python -m launch.replay --run_dir={tmp_path / 'other'} --step=4 --trust_config")


def test_a_replay_names_what_was_not_finite_first(tmp_path: pathlib.Path) -> None:
    """State and batch are those of the run: the loss is that of the curve, before and after a checkpoint."""
    run_in(tmp_path, log_every=1)
    losses = dict(curves(tmp_path)["train/loss"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for step in (1, 3, 4, 8, 12):
        diagnosis = replay(make_experiment(), RunDirectory(tmp_path), step)
        assert diagnosis.loss == pytest.approx(losses[step], rel=1e-6) and diagnosis.not_finite == ()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = replay(make_experiment(objective=SometimesNan(5)), RunDirectory(tmp_path), 5)
    assert math.isnan(found.loss) and math.isnan(found.gradient_norm)
    assert (
        found.not_finite[0] == ("metric", "loss")
        and ("gradient", "encoder.mean_and_log_var.weight") in found.not_finite
    )
    assert not any(kind in ("parameter", "batch", "noise", "output") for kind, _ in found.not_finite)


def test_a_replay_names_the_module(tmp_path: pathlib.Path) -> None:
    run_in(tmp_path, num_steps=3)
    experiment = make_experiment()

    class Overflows(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.inf

    encoder = experiment.model.encoder
    encoder.mean_and_log_var = torch.nn.Sequential(encoder.mean_and_log_var, Overflows())
    prepared = prepare(experiment, torch.device("cpu"))
    state = prepared.initial_state()
    batch = prepared.batches().draw(0, state.generators["binarisation"])
    found = diagnose(prepared.plain_step(), state, batch)
    assert found.not_finite[:2] == (
        ("output", "encoder.mean_and_log_var.1"),
        ("output", "encoder.mean_and_log_var"),
    )


# --- the best checkpoint ---------------------------------------------------------------------------------------------


def test_the_best_checkpoint_stays_when_things_get_worse(tmp_path: pathlib.Path) -> None:
    """A run that climbs the loss has its best checkpoint at the first evaluation."""
    state = run_in(tmp_path, optimizer=functools.partial(torch.optim.Adam, lr=0.01, maximize=True))
    losses = [value for _, value in curves(tmp_path)["test/loss"]]
    assert losses == sorted(losses) and losses[-1] > losses[0]
    directory = RunDirectory(tmp_path)
    assert (
        state.best_step,
        directory.load_checkpoint("best")["step"],
        directory.load_checkpoint("latest")["step"],
    ) == (
        3,
        3,
        12,
    )
    assert [step for step, _ in curves(tmp_path)["best/loss"]] == [3, 6, 9, 12]
    assert len({value for _, value in curves(tmp_path)["best/loss"]}) == 1


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_best_loss_is_that_of_the_selection_split(split: str, tmp_path: pathlib.Path) -> None:
    run_in(tmp_path, selection_split=split)
    best, data, experiment = RunDirectory(tmp_path).load_checkpoint("best"), Columns().load(), make_experiment()
    losses = {}
    for name in ("test", "validation"):
        parts = evaluate_elbo(model_of_checkpoint(experiment.model, best), data.split(name), experiment.seed)
        losses[name] = -parts["elbo"].double().mean().item()
    assert best["best_loss"] == pytest.approx(losses[split], rel=1e-6)
    assert losses["test"] != pytest.approx(losses["validation"], rel=1e-4)


def test_a_best_checkpoint_of_another_loss_is_sought_anew(tmp_path: pathlib.Path, capsys) -> None:
    """The bound of 50 samples is a lower loss than the ELBO's: by that the old best would stay for good."""
    first = run_in(tmp_path, num_steps=6, evaluator=VAEEvaluator(selection_samples=50))
    assert "sought" not in capsys.readouterr().err
    second = run_in(tmp_path, num_steps=12)
    said = capsys.readouterr().err
    assert "chosen by the test loss of 50 samples: the lowest test loss is sought from step 6 on" in said
    assert second.best_step > 6 and second.best_loss > first.best_loss
    best = RunDirectory(tmp_path).load_checkpoint("best")
    assert (best["step"], best["selected_by"]) == (second.best_step, "test loss")
    run_in(tmp_path, num_steps=12)
    assert "sought" not in capsys.readouterr().err


def test_train_active_units_and_speed_are_written(whole: pathlib.Path) -> None:
    found = curves(whole)
    assert [step for step, _ in found["train/active_units"]] == [3, 6, 9, 12]
    assert all(value in (0, 1, 2) for _, value in found["train/active_units"])
    events = EventAccumulator(str(whole))
    events.Reload()
    assert all(event.value > 0 for event in events.Scalars("train/steps_per_second"))


# --- runs that go wrong ----------------------------------------------------------------------------------------------


class BecomesInfinite(NegativeELBO):
    """Has an infinite loss from the eighth step on."""

    def settings(self, step: int) -> dict[str, float]:
        return {**super().settings(step), "scale": 1e39 if step >= 7 else 1.0}  # infinite in float32

    def __call__(self, forward: Callable[..., Any], batch: Tensor, noise: Tensor, settings, state):
        loss, metrics, changes = super().__call__(forward, batch, noise, settings, state)
        scaled = metrics | {"loss": metrics["loss"] * settings["scale"]}
        return LossOutput(loss * settings["scale"], scaled, changes)


def test_a_diverged_run_keeps_what_was_good(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TrainingError, match="the loss became inf at step 8"):
        run_in(tmp_path, objective=BecomesInfinite(), max_skipped_steps=0)
    latest = RunDirectory(tmp_path).load_checkpoint("latest")
    assert latest["step"] == 6
    assert all(bool(torch.isfinite(tensor).all()) for tensor in latest["parameters"].values())
    assert max(step for step, _ in curves(tmp_path)["train/loss"]) == 6


class Remembers(torch.optim.SGD):
    """An optimizer that keeps the steps it took as a set."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = {1, 2}


class OfNumpy(VAEEvaluator):
    """An evaluator that forms its loss with NumPy."""

    def validate(self, model: Any, examples: Any, seed: int) -> dict[str, float]:
        results = super().validate(model, examples, seed)
        return {**results, "loss": np.float64(results["loss"])}


def test_a_loss_of_numpy_is_a_number_in_the_checkpoint(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run_in(tmp_path, evaluator=OfNumpy())
    assert_same_checkpoint(whole, tmp_path, "latest")


class Answers(VAEEvaluator):
    """An evaluator that returns whatever it is told."""

    def __init__(self, **returned: Any) -> None:
        super().__init__()
        object.__setattr__(self, "returned", returned)

    def validate(self, model: Any, examples: Any, seed: int) -> Any:
        return self.returned.get("validate", {"loss": 1.0})

    def curves(self, model: Any, examples: Any) -> Any:
        return self.returned["curves"]


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "returned, message",
    [
        ({"curves": None}, "Answers.curves must return numbers by name, got None"),
        ({"curves": {"use": torch.zeros(2)}}, r"Answers.curves must return numbers by name, got tensor\(.*\) as 'use'"),
        ({"curves": {}, "validate": {"elbo": 1.0}}, "Answers.validate must return a loss, which chooses the best"),
        ({"curves": {}, "validate": {"loss": "low"}}, "Answers.validate must return numbers by name, got 'low'"),
    ],
)
def test_what_an_evaluator_returns_is_named_where_it_is_no_curve(returned, message, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        run_in(tmp_path, evaluator=Answers(**returned))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": Remembers}, r"what Remembers keeps must be tensors, .*; state\.\d+\.history is a set"),
        (
            {"final_num_samples": 5, "final_num_examples": 13},
            "num_examples must be at most the 12 test examples, got 13",
        ),
        ({"batch_size": 25}, "batch_size must be at most the 24 training images, got 25"),
    ],
)
def test_what_cannot_end_well_does_not_begin(changes: dict, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        run_in(tmp_path, **changes)
    assert not RunDirectory(tmp_path).has_checkpoint()


def test_a_run_that_goes_on_with_other_data_says_so(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    run_in(tmp_path, num_steps=3)
    run_in(tmp_path, num_steps=6)
    assert "training data" not in capsys.readouterr().err
    run_in(tmp_path, num_steps=9, dataset=Columns(num_train=26))
    assert f"{tmp_path}: the training data is not that of the first 6 steps" in capsys.readouterr().err


# --- unusual data ----------------------------------------------------------------------------------------------------


def test_one_test_image_is_enough(tmp_path: pathlib.Path) -> None:
    state = run_in(tmp_path, dataset=Columns(num_test=1), final_num_samples=5)
    assert state.step == 12
    assert {value for _, value in curves(tmp_path)["test/active_units"]} == {0.0}
    assert (tmp_path / "samples" / "best.png").is_file()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_of_any_floating_point_type(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    """NumPy's own type is float64; zeros and ones are the same in all of them, and so is the run."""
    single, other = (run_in(tmp_path / str(each), dataset=Values(each)) for each in (torch.float32, dtype))
    for name, parameter in single.parameters.items():
        assert torch.equal(parameter, other.parameters[name])
    assert single.best_loss == other.best_loss
