"""Whole runs on tiny images: what they leave behind, which checkpoint is best, that interruption changes nothing."""

import dataclasses
import json
import math
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from popgen.datasets.images import ImageData, prepare_images
from popgen.distributed import Processes
from popgen.errors import ArgumentError, CheckpointError, DataError, TrainingError
from popgen.evaluation.likelihood import evaluate_elbo
from popgen.experiment import Configuration, Experiment, evaluate, run
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.vamp_prior import VampPrior
from popgen.optim.schedules import SigmoidAnnealing
from popgen.prepared import prepare
from popgen.training.captured_step import CapturedStep, functions_of_loop
from popgen.training.objectives import NegativeELBO
from popgen.training.run_directory import RunDirectory
from popgen.training.sequence_objectives import ContrastiveLoss
from popgen.training.step import make_train_step

CONFIGURATION = Configuration("given", "operative", {"Adam.lr": 1e-3})
TERMS = ("loss", "elbo", "reconstruction", "kl", "log_q_z_given_x", "log_p_z", "log_det", "beta", "active_units")


@dataclasses.dataclass(frozen=True)
class Bars:
    """Grey 4 × 4 images of horizontal bars."""

    validation_size: int = 0

    def load(self) -> ImageData:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, 2, (120, 4, 1), generator=generator).expand(-1, -1, 4).flatten(1)
        levels = (40 + 180 * rows).to(torch.uint8)
        return prepare_images(levels[:80], levels[80:], (4, 4), "dynamic", 0, self.validation_size)


def experiment(**changes) -> Experiment:
    torch.manual_seed(0)
    flow = HouseholderSylvesterFlow(3, 8, num_flows=1, num_reflections=2)
    vae = VAE(GaussianEncoder(16, 3, 8), BernoulliDecoder(3, 16, 8), VampPrior(16, 4, "data"), flow)
    settings = {
        "model": vae,
        "dataset": Bars(),
        "objective": NegativeELBO(beta=SigmoidAnnealing(rate=0.2)),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=5e-3, fused=True),
        "num_steps": 12,
        "batch_size": 16,
        "eval_every": 4,
        "log_every": 2,
        "checkpoint_every": 8,
    }
    return Experiment(**{**settings, **changes})


def run_in(path, **changes) -> RunDirectory:
    directory = RunDirectory(path)
    with directory.locked():
        run(experiment(**changes), directory, CONFIGURATION)
    return directory


def events_of(directory: RunDirectory) -> EventAccumulator:
    events = EventAccumulator(str(directory.path), size_guidance={"scalars": 0})
    events.Reload()
    return events


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDirectory:
    return run_in(tmp_path_factory.mktemp("finished") / "run", final_num_samples=30, final_num_examples=20)


def test_files(finished):
    names = {str(file.relative_to(finished.path)) for file in finished.path.rglob("*") if file.is_file()}
    expected = {f"checkpoints/{name}.ckpt" for name in ("latest", "best", "step_00000008", "step_00000012")}
    expected |= {"config.gin", "operative_config.gin", "samples/best.png", "samples/step_00000004.png"}
    assert expected <= names
    assert finished.config_path.read_text() == "given" and finished.operative_config_path.read_text() == "operative"
    with Image.open(finished.samples_path / "best.png") as picture:
        assert picture.mode == "L"


def test_curves_pictures_and_texts(finished):
    events = events_of(finished)
    tags = events.Tags()
    wanted = {f"{split}/{term}" for split in ("train", "test") for term in TERMS}
    wanted |= {"train/learning_rate", "train/gradient_norm", "train/steps_per_second", "evaluation/log_p_x"}
    assert wanted <= set(tags["scalars"])
    assert list(curve(events, "train/loss")) == [2, 4, 6, 8, 10, 12]
    assert list(curve(events, "test/loss")) == [4, 8, 12]
    pictures = {"originals", "reconstructions", "interpolations", "prior_samples", "pseudo_inputs", "evaluation"}
    assert pictures == set(tags["images"])
    assert {"config/text_summary", "operative_config/text_summary"} <= set(tags["tensors"])
    assert events.PluginTagToContent("hparams")


def test_the_best_checkpoint_has_the_lowest_loss_at_beta_one(finished):
    losses = curve(events_of(finished), "test/loss")
    best = finished.load_checkpoint("best")
    assert best["step"] == best["best_step"] == min(losses, key=losses.get)
    assert best["best_loss"] == pytest.approx(min(losses.values()), rel=1e-6)
    trained = prepare(experiment(), torch.device("cpu")).with_checkpoint(best)
    bound = evaluate_elbo(trained.model, trained.data.test, trained.experiment.seed)["elbo"]
    assert -bound.mean().item() == pytest.approx(best["best_loss"], rel=1e-6)
    assert set(curve(events_of(finished), "test/beta").values()) == {1.0}


def test_record_of_the_final_evaluation(finished):
    (path,) = finished.path.glob("evaluation_*.json")
    record = json.loads(path.read_text())
    assert (record["num_samples"], record["num_examples"], record["binarisation_protocol"]) == (30, 20, "dynamic")
    assert record["binarisation_seed"] == 0
    assert record["step"] == finished.load_checkpoint("best")["step"]
    assert record["elbo"] == pytest.approx(record["reconstruction"] - record["kl"], rel=1e-6)
    assert abs(record["elbo"] - record["log_p_x"]) < 1.0 and record["log_p_x_standard_error"] > 0


@pytest.mark.parametrize("stop", [4, 8, 10])
def test_interruption_changes_nothing(finished, stop, tmp_path):
    run_in(tmp_path / "run", num_steps=stop)
    resumed = run_in(tmp_path / "run")
    one, other = finished.load_checkpoint("latest"), resumed.load_checkpoint("latest")
    for part in ("parameters", "weight_average", "generators"):
        for name in one[part]:
            assert torch.equal(one[part][name], other[part][name]), (part, name)
    for index, moments in one["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["optimizer"]["state"][index][name]))
    if stop % 4 == 0:  # otherwise the interrupted run looked at the test images once more
        events = events_of(finished), events_of(resumed)
        for tag in ("train/loss", "train/kl", "test/loss", "test/elbo", "train/active_units"):
            assert curve(events[0], tag) == curve(events[1], tag), tag
        assert one["best_loss"] == other["best_loss"]


def test_selection_on_held_out_images_leaves_the_test_images_alone(tmp_path):
    directory = run_in(tmp_path / "run", dataset=Bars(validation_size=20), selection_split="validation")
    tags = events_of(directory).Tags()["scalars"]
    assert "validation/loss" in tags and not any(tag.startswith("test/") for tag in tags)
    with pytest.raises(DataError, match="no validation split"):
        run_in(tmp_path / "other", selection_split="validation")


def test_pseudo_inputs_start_at_training_images():
    prepared = prepare(experiment(), torch.device("cpu"))
    prepared.state_to_start_from(None)
    grey = (prepared.data.train.float() / 255).clamp(0.02, 0.98)
    for image in prepared.model.prior.pseudo_inputs():
        assert (grey - image).abs().amax(1).min() < 1e-6


def test_data_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Values:
        values: torch.Tensor

        def load(self) -> ImageData:
            side = int(self.values.shape[1] ** 0.5)
            return ImageData(self.values, self.values, (side, side), "none")

    for values, message in (
        (torch.full((40, 16), 1.5), r"values from 1.5 to 1.5.*\[0, 1\]"),
        (torch.full((40, 16), torch.nan), r"within \[0, 1\]"),
        (torch.zeros(40, 25), r"\(40, 25\).*\(count, 16\)"),
    ):
        with pytest.raises(DataError, match=message):
            run_in(tmp_path / "run", dataset=Values(values))
    with pytest.raises(ArgumentError, match="batch_size must be at most the 80 training images, got 81"):
        run_in(tmp_path / "run", batch_size=81)
    assert not RunDirectory(tmp_path / "run").has_checkpoint()


def test_a_test_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    parts = {"elbo": torch.tensor([1.0, torch.nan])}
    monkeypatch.setattr("popgen.evaluation.evaluator.evaluate_elbo", lambda *_, **__: parts)
    with pytest.raises(TrainingError, match="the test loss is nan at step 4"):
        run_in(tmp_path / "run")
    assert not RunDirectory(tmp_path / "run").has_checkpoint()


def test_evaluation_arguments_and_averaged_weights(finished):
    prepared = prepare(experiment(), torch.device("cpu"))
    best = finished.load_checkpoint("best")
    with pytest.raises(ArgumentError, match="num_examples must be at most the 40 test examples, got 41"):
        evaluate(prepared, 5, 41, step=0)
    raw, averaged = (prepared.with_checkpoint(best, weights).model for weights in ("raw", "averaged"))
    assert any(not torch.equal(a, b) for a, b in zip(raw.parameters(), averaged.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="kept no averaged weights"):
        prepared.with_checkpoint({**best, "weight_average": None}, "averaged")


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": "nine"}, "Experiment.num_steps must be an integer of at least 1, got 'nine'"),
        ({"batch_size": True}, "Experiment.batch_size must be an integer"),
        ({"seed": -1}, "Experiment.seed must be an integer of at least 0, got -1"),
        ({"weight_average_decay": 1.5}, "Experiment.weight_average_decay must be at least 0 and at most 1, got 1.5"),
        ({"model": None}, "Experiment.model must be a Model .* got None"),
        ({"dataset": Bars}, "Experiment.dataset must be an object with a load"),
        ({"optimizer": 0.1}, "Experiment.optimizer must be a function of the parameters"),
        ({"max_gradient_norm": 0}, r"Experiment.max_gradient_norm \(None for no limit\) must be above 0, got 0"),
        ({"objective": 3}, "Experiment.objective must be an Objective"),
        ({"device": "gpu"}, "Experiment.device 'gpu' cannot be used here"),
        ({"device": "meta"}, "Experiment.device 'meta' cannot be used here"),
    ],
)
def test_arguments(changes, message):
    with pytest.raises(ArgumentError, match=message):
        experiment(**changes)


def with_layer(layer: torch.nn.Module) -> VAE:
    vae = experiment().model
    vae.encoder.hidden.append(layer)
    return vae


@dataclasses.dataclass(frozen=True)
class Loads:
    """A dataset that loads what it is given."""

    loaded: Any

    def load(self) -> Any:
        return self.loaded


@pytest.mark.parametrize("loaded", [None, (torch.ones(2, 16), torch.ones(2, 16)), torch.ones(2, 16)])
def test_what_a_dataset_loads_is_checked(loaded, tmp_path):
    with pytest.raises(DataError, match=f"Loads.load must return a Data .* type {type(loaded).__name__}"):
        run_in(tmp_path / "run", dataset=Loads(loaded))


class Returning(NegativeELBO):
    """An objective that returns something else of the loss, metrics and observations of a batch."""

    def __init__(self, change: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "change", change)

    def __call__(self, *arguments: Any) -> Any:
        return self.change(super().__call__(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: tuple(out), r"LossOutput\(loss, metrics\), got an object of type tuple"),
        (lambda out: out.loss, r"LossOutput\(.*, got a tensor of shape \(\) and type torch.float32"),
        (lambda out: out._replace(observed=None), "what it has observed as a dictionary, .*NoneType"),
        (lambda out: out._replace(metrics=[]), "metrics as a dictionary, which may be empty, .* list"),
        (lambda out: out._replace(loss=out.loss.expand(4)), r"as its loss a scalar tensor .* shape \(4,\)"),
        (lambda out: out._replace(loss=out.loss.item()), "as its loss a scalar tensor .* type float"),
        (lambda out: out._replace(loss=out.loss.detach()), "a loss that depends on the parameters"),
        (lambda out: out._replace(metrics={"kl": 0.5}), "as the metric 'kl' a scalar tensor .* type float"),
        (lambda out: out._replace(metrics={"kl": torch.tensor(1)}), "the metric 'kl' .* torch.int64"),
        (lambda out: out._replace(metrics={"kl": torch.zeros(3)}), r"the metric 'kl' .* shape \(3,\)"),
    ],
)
def test_what_an_objective_returns_is_checked_before_anything_starts(change, message, tmp_path):
    with pytest.raises(ArgumentError, match=f"^Returning must return .*{message}"):
        run_in(tmp_path / "run", objective=Returning(change))
    assert not list((tmp_path / "run").glob("config.gin"))


class Forgetful(torch.optim.SGD):
    """Gradient descent whose rate falls with a count that no checkpoint holds."""

    def __init__(self, parameters, lr: float = 0.1) -> None:
        super().__init__(parameters, lr)
        self.count = 0

    def step(self, closure: None = None) -> None:
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.1
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=0.1 / self.count)


class Rateless(torch.optim.Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure: None = None) -> None:
        pass


class Counting(NegativeELBO):
    """An objective whose state is a number of Python's."""

    def initial_state(self, reference):
        return {"count": 0.0}


class Keeping(torch.nn.Module):
    """A layer that remembers what it has computed."""

    def forward(self, x):
        self.last = x * 1.0
        return self.last


class LangevinDynamics(torch.optim.SGD):
    """Gradient descent with noise, which no seed of the run decides."""

    def step(self, closure: None = None) -> None:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=(2.0 * group["lr"]) ** 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": Returning(lambda out: out._replace(loss=out.loss * (1 + random.random())))},
            "VAE with Returning draws random numbers that belong to no",
        ),
        (
            {"objective": Returning(lambda out: out._replace(metrics={"kl": out.loss.detach() * np.random.rand()}))},
            "VAE with Returning draws random numbers that belong to no",
        ),
        ({"model": with_layer(torch.nn.Dropout(0.5))}, "VAE with NegativeELBO draws random numbers that belong to no"),
        (
            {"model": with_layer(torch.nn.BatchNorm1d(8))},
            r"changes encoder\.hidden\.2\.running_mean, .* as it",
        ),
        ({"optimizer": LangevinDynamics}, "LangevinDynamics draws random numbers that belong to no seed of the run"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS cannot be used: its step must be given a closure"),
        (
            {"optimizer": lambda parameters: torch.optim.AdamW([{"params": list(parameters), "note": torch.float32}])},
            "the options of AdamW must be tensors, numbers and strings",
        ),
        (
            {"optimizer": Forgetful},
            "Forgetful keeps what its state_dict does not hold, so that",
        ),
        ({"optimizer": Rateless}, "Rateless must have an option lr"),
        ({"objective": Counting()}, r"Counting.initial_state must return tensors by name, got .* float as 'count'"),
        ({"model": with_layer(Keeping())}, "VAE cannot be copied, .* Keeping keeps what it has computed as 'last'"),
        (
            {"learning_rate": lambda step: None},
            "learning_rate must be a finite number at every step, got None",
        ),
        ({"learning_rate": lambda step: 0.1 if step == 0 else math.nan}, r"learning_rate must .* got nan at step \d+"),
        (
            {"objective": Returning(lambda out: out._replace(metrics={"gradient_norm": out.loss.detach()}))},
            "Returning must call its metrics otherwise than gradient_norm",
        ),
    ],
)
def test_what_could_not_be_continued_is_refused_before_anything_starts(changes, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        run_in(tmp_path / "run", **changes)
    assert not list((tmp_path / "run").glob("config.gin"))


class OnAGPU(torch.nn.Module):
    """Takes the place of a model on a GPU."""

    def parameters(self, recurse=True):
        yield types.SimpleNamespace(is_cuda=True)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("objective, exchanges", [(NegativeELBO(), False), (ContrastiveLoss(), True)])
def test_a_step_on_a_gpu_is_recorded(objective, exchanges, size, capsys):
    """Whatever the number of processes, unless they exchange something within the loss, which one of them says."""
    batches = Bars().load().batches(16, seed=0)
    exchanges = exchanges and size > 1
    for rank in range(size):
        step = make_train_step(OnAGPU(), objective, processes=Processes(rank, size))
        assert functions_of_loop(step, batches, cuda_graph=False)[0] is step
        taken, _ = functions_of_loop(step, batches, cuda_graph=True)
        assert taken is step if exchanges else isinstance(taken, CapturedStep)
    line = "Experiment.cuda_graph is not used: processes exchange something in a ContrastiveLoss\n"
    assert capsys.readouterr().out == (line if exchanges else "")
