"""Whole runs of VQ-VAEs, of priors over their codes and of GECO: what they leave, resumption, and the commands."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from popgen import config
from popgen.datasets.images import ImageData, prepare_images
from popgen.errors import ArgumentError
from popgen.evaluation.evaluator import VAEEvaluator
from popgen.evaluation.vqvae import VQVAEEvaluator, VQVAEWithPriorEvaluator
from popgen.experiment import Configuration, Experiment, run
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.models.vqvae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder, VQVAEWithPrior
from popgen.nn.pixelcnn import GatedPixelCNN
from popgen.nn.priors import StandardNormalPrior
from popgen.nn.vqvae import GradientQuantiser, MovingAverageQuantiser, Quantiser, ResidualQuantiser
from popgen.optim.geco import GECO
from popgen.prepared import prepare
from popgen.training.objectives import ConstrainedELBO, NegativeELBO, VQVAELoss
from popgen.training.run_directory import RunDirectory
from tests.test_commands import Workspace

NUM_CODES = 8
NUM_STEPS = 12


@dataclasses.dataclass(frozen=True)
class Bars:
    """Grey 8 × 8 images, each quarter with a light bar along one of its sides."""

    def load(self) -> ImageData:
        quarters = torch.full((4, 4, 4), 20, dtype=torch.uint8)
        quarters[0, 0], quarters[1, -1], quarters[2, :, 0], quarters[3, :, -1] = 230, 230, 230, 230
        chosen = quarters[torch.randint(4, (90, 2, 2), generator=torch.Generator().manual_seed(0))]
        images = chosen.permute(0, 1, 3, 2, 4).reshape(90, 64)
        return prepare_images(images[:60], images[60:], (8, 8), "dynamic", 0)


def make_vqvae(quantiser: Quantiser) -> VQVAE:
    encoder, decoder = (part(3, (8, 8), 16, 1) for part in (ConvolutionalEncoder, ConvolutionalDecoder))
    return VQVAE(encoder, quantiser, decoder)


def make_experiment(kind: str, codes: pathlib.Path | None = None, **changes: Any) -> Experiment:
    """Returns a small experiment; that of the prior starts from the codes of another run."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "dataset": Bars(),
        "optimizer": functools.partial(torch.optim.Adam, lr=0.01),
        "num_steps": NUM_STEPS,
        "batch_size": 20,
        "eval_every": 3,
        "log_every": 1,
        "checkpoint_every": 6,
        "final_num_samples": 1,
    }
    if kind == "geco":
        geco = GECO(rate=0.01, decay=0.8, warm_up_steps=2)
        model = VAE(GaussianEncoder(64, 2, 8), BernoulliDecoder(2, 64, 8), StandardNormalPrior())
        settings |= {"model": model, "objective": ConstrainedELBO(geco, "reconstruction", -20.0)}
    elif kind == "prior":
        torch.manual_seed(1)  # nothing may come from these weights of the autoencoder
        model = VQVAEWithPrior(make_vqvae(MovingAverageQuantiser(NUM_CODES, 3)), GatedPixelCNN(NUM_CODES, (2, 2), 8, 1))
        settings |= {"model": model, "objective": NegativeELBO(), "evaluator": VQVAEWithPriorEvaluator()}
        settings |= {"pretrained": {"autoencoder": str(codes)}}
    else:
        quantisers = {
            "vqvae": lambda: MovingAverageQuantiser(NUM_CODES, 3, decay=0.9),
            "gradient": lambda: GradientQuantiser(NUM_CODES, 3),
            "residual": lambda: ResidualQuantiser(2, NUM_CODES, 3),
        }
        settings |= {"model": make_vqvae(quantisers[kind]()), "objective": VQVAELoss(), "evaluator": VQVAEEvaluator()}
    return Experiment(**(settings | changes))


def run_in(path: pathlib.Path, experiment: Experiment) -> RunDirectory:
    directory = RunDirectory(path)
    with directory.locked():
        run(experiment, directory, Configuration("given", "operative", {}))
    return directory


def events_of(directory: RunDirectory) -> EventAccumulator:
    events = EventAccumulator(str(directory.path), size_guidance={"scalars": 0})
    events.Reload()
    return events


def curves(directory: RunDirectory) -> dict[str, dict[int, float]]:
    """Returns every curve that TensorBoard shows of a run, but for the speed."""
    events = events_of(directory)
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith("steps_per_second")]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def record_of(directory: RunDirectory) -> dict[str, Any]:
    (path,) = directory.path.glob("evaluation_*.json")
    return json.loads(path.read_text())


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dictionaries and lists, by path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in flat(item, f"{name}/{key}").items()}
    return {name: value}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """Finished runs of every kind, by name; the prior is over the codes of "vqvae"."""
    folder = tmp_path_factory.mktemp("finished")
    kinds = ("vqvae", "gradient", "residual", "prior", "geco")
    return {kind: run_in(folder / kind, make_experiment(kind, codes=folder / "vqvae")) for kind in kinds}


def loaded_model(kind: str, directory: RunDirectory, checkpoint: str) -> tuple[ImageData, Any]:
    trained = prepare(make_experiment(kind), torch.device("cpu")).with_checkpoint(directory.load_checkpoint(checkpoint))
    return trained.data, trained.model


# --- what runs leave -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vqvae", "gradient", "residual"])
def test_curves_of_a_vqvae(kind: str, finished: dict[str, RunDirectory]) -> None:
    """The use of the codes is that of a whole pass through each split, by NumPy, in each codebook."""
    found = curves(finished[kind])
    for name in ("loss", "elbo", "reconstruction", "kl", "commitment_loss", "codebook_loss", "codes_revived"):
        assert list(found[f"train/{name}"]) == list(range(1, NUM_STEPS + 1)), name
    for name in ("loss", "elbo", "reconstruction", "kl", "codes_used", "perplexity"):
        assert list(found[f"test/{name}"]) == [3, 6, 9, 12], name
    assert list(found["train/codes_used"]) == list(found["train/perplexity"]) == [3, 6, 9, 12]
    data, model = loaded_model(kind, finished[kind], "latest")
    numbers, perplexities = [], []
    books = model.encode(data.test.float() / 255).numpy().reshape(-1, 2 if kind == "residual" else 1)
    for n, codes in enumerate(books.T, start=1):
        counts = np.bincount(codes, minlength=NUM_CODES)
        used = counts[counts > 0] / counts.sum()
        numbers.append(len(used))
        perplexities.append(math.exp(-(used * np.log(used)).sum()))
        if kind == "residual":
            assert found[f"test/codes_used_of_codebook_{n}"][NUM_STEPS] == numbers[-1]
            assert found[f"test/perplexity_of_codebook_{n}"][NUM_STEPS] == pytest.approx(perplexities[-1], rel=1e-5)
    assert found["test/codes_used"][NUM_STEPS] == sum(numbers)
    mean = math.exp(np.mean(np.log(perplexities)))
    assert found["test/perplexity"][NUM_STEPS] == pytest.approx(mean, rel=1e-5)
    assert all(1.0 <= value <= NUM_CODES for value in found["train/perplexity"].values())
    assert found["train/reconstruction"][NUM_STEPS] > found["train/reconstruction"][1]
    positions = 8 if kind == "residual" else 4
    assert list(found["test/kl"].values()) == pytest.approx([positions * math.log(NUM_CODES)] * 4)
    assert (max(found["train/codebook_loss"].values()) > 0.0) == (kind == "gradient")
    assert set(events_of(finished[kind]).Tags()["images"]) == {"originals", "reconstructions", "evaluation"}


def test_curves_of_a_prior(finished: dict[str, RunDirectory]) -> None:
    """The reconstruction is that of the other run's best weights throughout; the KL falls below the uniform prior's."""
    found, of_codes = curves(finished["prior"]), finished["vqvae"].load_checkpoint("best")
    _, vqvae = loaded_model("vqvae", finished["vqvae"], "best")
    data, model = loaded_model("prior", finished["prior"], "best")
    for name, tensor in {**of_codes["parameters"], **of_codes["buffers"]}.items():
        assert torch.equal(model.autoencoder.state_dict()[name], tensor), name
    expected = vqvae(data.test.float() / 255).log_p_x_given_z.mean().item()
    assert list(found["test/reconstruction"].values()) == pytest.approx([expected] * 4, rel=1e-5)
    assert list(found["test/kl"].values()) == sorted(found["test/kl"].values(), reverse=True)
    assert found["test/kl"][NUM_STEPS] < 4 * math.log(NUM_CODES) - 0.3
    assert set(events_of(finished["prior"]).Tags()["images"]) == {
        "originals",
        "reconstructions",
        "prior_samples",
        "evaluation",
    }
    names = {name.split(".")[0] for name in finished["prior"].load_checkpoint("latest")["weight_average"]}
    assert names == {"prior"}


def test_curves_of_geco(finished: dict[str, RunDirectory]) -> None:
    """At every step the multiplier is the one that it was weighed with; two steps of warm-up leave it alone."""
    found = curves(finished["geco"])
    average, multiplier = None, 1.0
    for step in range(1, NUM_STEPS + 1):
        constraint = -20.0 - found["train/reconstruction"][step]
        assert found["train/constraint"][step] == pytest.approx(constraint, rel=1e-5)
        average = constraint if average is None else 0.8 * average + 0.2 * constraint
        assert found["train/constraint_average"][step] == pytest.approx(average, rel=1e-5)
        assert found["train/multiplier"][step] == pytest.approx(multiplier, rel=1e-5)
        assert found["train/loss"][step] == pytest.approx(found["train/kl"][step] + multiplier * average, rel=1e-4)
        multiplier *= math.exp(0.01 * average) if step > 2 else 1.0
    assert multiplier > 1.5
    saved = finished["geco"].load_checkpoint("latest")["auxiliary"]
    assert saved["multiplier"].item() == pytest.approx(multiplier, rel=1e-5) and saved["num_updates"] == NUM_STEPS


@pytest.mark.parametrize("target, num_steps", [(-38.0, 21), (-20.0, 60)])
def test_the_best_checkpoint_of_geco_is_the_one_of_least_kl_that_meets_the_target(
    target: float, num_steps: int, tmp_path: pathlib.Path
) -> None:
    """Not the one of the highest ELBO; where none meets it, the nearest one. The final evaluation is of that one."""
    objective = ConstrainedELBO(GECO(rate=0.03, decay=0.8, warm_up_steps=2), "reconstruction", target)
    experiment = make_experiment("geco", objective=objective, num_steps=num_steps)
    directory = run_in(tmp_path, experiment)
    found, best = curves(directory), directory.load_checkpoint("best")
    reconstruction, kl = found["test/reconstruction"], found["test/kl"]
    meeting = [step for step in reconstruction if reconstruction[step] >= target]
    if target == -20.0:
        assert not meeting
        expected = max(reconstruction, key=reconstruction.__getitem__)
    else:
        assert 1 < len(meeting) < len(reconstruction)
        expected = min(meeting, key=kl.__getitem__)
        assert best["best_loss"] == pytest.approx(kl[expected], rel=1e-5)
    assert best["step"] == best["best_step"] == expected != max(reconstruction, key=found["test/elbo"].__getitem__)
    assert record_of(directory)["step"] == expected
    assert best["selected_by"] == f"test KL (penalised where the reconstruction is below {target:g})"


def test_a_multiplier_is_not_taken_from_one_constraint_to_the_other(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """It weighs the other term, and the average is of another quantity; another target keeps both."""
    reconstruction = make_experiment("geco", num_steps=9).objective
    run_in(tmp_path, make_experiment("geco", num_steps=9))
    nearer = dataclasses.replace(reconstruction, target=-30.0)
    run_in(tmp_path, make_experiment("geco", objective=nearer, num_steps=12))
    assert "starts anew" not in capsys.readouterr().err
    kl = ConstrainedELBO(reconstruction.geco, "kl", 1.0)
    run_in(tmp_path, make_experiment("geco", objective=kl, num_steps=15))
    assert "starts anew: it was of 'reconstruction', and is of 'kl'\n" in capsys.readouterr().err
    found = curves(RunDirectory(tmp_path))
    assert found["train/multiplier"][10] != 1.0 and found["train/multiplier"][13] == 1.0
    assert found["train/constraint_average"][13] == found["train/constraint"][13]


def test_the_mean_of_several_steps_is_logged(tmp_path: pathlib.Path, finished: dict[str, RunDirectory]) -> None:
    """Each step's metrics are its own, though the state that some are read from is overwritten."""
    coarse = curves(run_in(tmp_path, make_experiment("geco", log_every=3, final_num_samples=0)))
    fine = curves(finished["geco"])
    for name in ("multiplier", "constraint_average", "constraint", "loss"):
        for step in range(3, NUM_STEPS + 1, 3):
            expected = sum(fine[f"train/{name}"][step - i] for i in range(3)) / 3
            assert coarse[f"train/{name}"][step] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("kind", ["vqvae", "residual", "prior"])
def test_record_of_the_final_evaluation(kind: str, finished: dict[str, RunDirectory]) -> None:
    record = record_of(finished[kind])
    assert record["log_p_x"] == pytest.approx(record["elbo"]) == pytest.approx(record["reconstruction"] - record["kl"])
    assert record["elbo"] == pytest.approx(-finished[kind].load_checkpoint("best")["best_loss"], rel=1e-6)
    assert record["log_q_z_given_x"] == record["log_det"] == 0.0
    books = 2 if kind == "residual" else 1
    assert books <= record["codes_used"] <= books * NUM_CODES and 1.0 <= record["perplexity"] <= record["codes_used"]
    expected = record["reconstruction"] - record["kl_of_positionwise_prior"]
    assert record["elbo_of_positionwise_prior"] == pytest.approx(expected)
    with Image.open(finished[kind].samples_path / "best.png") as picture:
        assert picture.mode == "L" and len(picture.getcolors(256)) > 10


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vqvae", "residual", "prior", "geco"])
def test_interruption_changes_nothing(kind: str, finished: dict[str, RunDirectory], tmp_path: pathlib.Path) -> None:
    """Half of the run, and the rest under another model object: checkpoints and curves are the same bit for bit."""
    codes = finished["vqvae"].path
    run_in(tmp_path, make_experiment(kind, codes=codes, num_steps=6, final_num_samples=0))
    resumed = run_in(tmp_path, make_experiment(kind, codes=codes))
    for name in ("latest", "best", "12"):
        one, other = (flat(directory.load_checkpoint(name)) for directory in (finished[kind], resumed))
        assert one.keys() == other.keys() and len(one) > 20
        for key, value in one.items():
            assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], (name, key)
    assert curves(resumed) == curves(finished[kind])


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("geco", {"objective": VQVAELoss()}, "VQVAELoss trains a VQVAE, and the model is a VAE"),
        ("prior", {"objective": VQVAELoss()}, "VQVAELoss trains a VQVAE, and the model is a VQVAEWithPrior"),
        ("vqvae", {"objective": NegativeELBO()}, "NegativeELBO trains no codebook, .* a VQVAE: use VQVAELoss"),
        (
            "vqvae",
            {"objective": ConstrainedELBO(GECO(rate=0.1), "kl", 1.0)},
            "ConstrainedELBO trains no codebook, .* a VQVAE: use VQVAELoss",
        ),
        ("vqvae", {"evaluator": VAEEvaluator()}, "VAEEvaluator evaluates a VAE, and the model is a VQVAE"),
        ("geco", {"evaluator": VQVAEEvaluator()}, "VQVAEEvaluator evaluates a VQVAE, and the model is a VAE"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_what_does_not_go_together_is_refused_before_the_run(kind: str, changes: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_experiment(kind, pathlib.Path("codes"), **changes)


def test_more_samples_than_the_evaluator_takes_are_refused_before_the_run() -> None:
    with pytest.raises(ArgumentError, match="^Experiment.final_num_samples must be 1 for a VQ-VAE, got 5: "):
        make_experiment("vqvae", final_num_samples=5)
    assert make_experiment("vqvae", final_num_samples=0).final_num_samples == 0
    assert make_experiment("geco", final_num_samples=5).evaluator == VAEEvaluator()


# --- the commands ----------------------------------------------------------------------------------------------------

PARTS = """
import dataclasses, torch
from popgen.datasets.images import ImageData

@dataclasses.dataclass(frozen=True)
class Halves:
    def load(self):
        images = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)).round().repeat_interleave(32, dim=1)
        return ImageData(images[:40], images[40:], (8, 8), "halves")
"""
CONFIG = """
from __gin__ import dynamic_registration
import parts_of_vqvae_runs
from popgen import experiment
from popgen.models import vqvae
from popgen.nn import pixelcnn
include "configs/{base}.gin"
NUM_CODES = 4
CODE_DIM = 3
HIDDEN_DIM = 8
experiment.Experiment.dataset = @parts_of_vqvae_runs.Halves()
experiment.Experiment.num_steps = 4
experiment.Experiment.batch_size = 10
experiment.Experiment.eval_every = 2
experiment.Experiment.log_every = 1
vqvae.ConvolutionalEncoder.image_shape = (8, 8)
vqvae.ConvolutionalDecoder.image_shape = (8, 8)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with runs of both shipped configs on small images, in `codes` and `prior`."""
    workspace = Workspace(tmp_path_factory.mktemp("commands"))
    (workspace.path / "parts_of_vqvae_runs.py").write_text(PARTS)
    for base in ("vqvae", "vqvae_prior"):
        (workspace.path / f"{base}_halves.gin").write_text(CONFIG.format(base=base))
    bindings = ["GatedPixelCNN.map_shape = (2, 2)", "GatedPixelCNN.hidden_dim = 4", "CODES_RUN = 'codes'"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(workspace.path)
        monkeypatch.chdir(workspace.path)
        for name, base, bound in (("codes", "vqvae", []), ("prior", "vqvae_prior", bindings)):
            loaded = config.load([workspace.path / f"{base}_halves.gin"], bound)
            directory = RunDirectory(workspace.path / name)
            with directory.locked():
                run(loaded.experiment, directory, loaded.configuration)
    return workspace


@pytest.mark.parametrize("name", ["codes", "prior"])
def test_evaluate_prints_the_bound_and_the_use_of_the_codes(name: str, trained: Workspace) -> None:
    printed = trained.succeed("evaluate", f"--run_dir={name}", "--num_examples=20")
    record = record_of(RunDirectory(trained.path / name))
    assert f"log p(x)        {record['log_p_x']:9.3f}" in printed and "(ELBO, the posterior is a point" in printed
    assert f"KL              {record['kl']:9.3f}" in printed and record["dataset"] == "Halves()"
    lines = dict(line.rsplit(None, 1) for line in printed.splitlines())
    for statistic in ("codes_used", "perplexity", "kl_of_positionwise_prior", "elbo_of_positionwise_prior"):
        assert float(lines[statistic.replace("_", " ")]) == pytest.approx(record[statistic], rel=1e-5)


def test_sample_writes_every_picture_that_the_model_has(trained: Workspace) -> None:
    printed = trained.succeed("sample", "--run_dir=prior", "--out=grid.png", "--num_samples=16")
    assert printed == "wrote grid.png: prior samples, reconstructions, from the top\n"
    with Image.open(trained.path / "grid.png") as picture:
        assert picture.mode == "L" and len(picture.getcolors(256)) > 5


def test_several_samples_of_a_point_are_one_line(trained: Workspace) -> None:
    line = trained.fail("evaluate", "--run_dir=prior", "--num_samples=5")
    assert line.startswith("error: num_samples must be 1 for a VQ-VAE, got 5: ")
