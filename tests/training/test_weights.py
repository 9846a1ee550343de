"""Where the weights of a model come from: other runs, the data, or its own checkpoint."""

import dataclasses
import functools
import pathlib
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from popgen.datasets.images import ImageData
from popgen.errors import ArgumentError, CheckpointError, PopgenError
from popgen.evaluation.vqvae import VQVAEEvaluator, VQVAEWithPriorEvaluator
from popgen.experiment import Configuration, Experiment, evaluate, run
from popgen.models.vqvae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder, VQVAEWithPrior
from popgen.nn.pixelcnn import GatedPixelCNN
from popgen.nn.vqvae import GradientQuantiser, MovingAverageQuantiser, Quantiser
from popgen.prepared import prepare
from popgen.training.objectives import VQVAELoss
from popgen.training.run_directory import RunDirectory
from popgen.training.state import initial_state, state_to_tensors, tensors_of
from popgen.training.weights import initialise

NUM_CODES = 4


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Binary 8 × 8 images of two halves."""

    def load(self) -> ImageData:
        halves = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)).round()
        images = halves.repeat_interleave(32, dim=1)
        return ImageData(images[:30], images[30:], (8, 8), "none")


def make_vqvae(seed: int = 0, quantiser: type[Quantiser] = MovingAverageQuantiser, code_dim: int = 3) -> VQVAE:
    torch.manual_seed(seed)
    encoder, decoder = (part(code_dim, (8, 8), 4, 1) for part in (ConvolutionalEncoder, ConvolutionalDecoder))
    return VQVAE(encoder, quantiser(NUM_CODES, code_dim), decoder)


def with_prior(vqvae: VQVAE) -> VQVAEWithPrior:
    return VQVAEWithPrior(vqvae, GatedPixelCNN(NUM_CODES, (2, 2), 4, 1))


def write_run(path: pathlib.Path, model: VQVAE, checkpoints: tuple[str, ...] = ("best", "latest")) -> dict[str, Tensor]:
    """Writes checkpoints as a run does, all but the best with other weights and averages, and returns the best's."""
    state = initial_state(model, torch.optim.Adam, seed=0)
    directory = RunDirectory(path)
    with directory.locked(), torch.no_grad():
        for name in checkpoints:
            for tensor in state.weight_average.values():
                tensor.add_(1.0)
            directory.save_checkpoint(name, state_to_tensors(state))
            for tensor in (*state.parameters.values(), *state.buffers.values()):
                tensor.add_(1.0)
    return {name: tensor.clone() for name, tensor in tensors_of(model).items()}


def make_experiment(**changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "model": with_prior(make_vqvae(seed=5)),
        "dataset": Blocks(),
        "evaluator": VQVAEWithPriorEvaluator(),
        "optimizer": functools.partial(torch.optim.Adam, lr=0.01),
        "num_steps": 4,
        "batch_size": 10,
        "eval_every": 2,
    }
    return Experiment(**(settings | changes))


def run_in(path: pathlib.Path, **changes: Any) -> RunDirectory:
    directory = RunDirectory(path)
    with directory.locked():
        run(make_experiment(**changes), directory, Configuration("given", "operative", {}))
    return directory


# --- pretrained parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantiser", [MovingAverageQuantiser, GradientQuantiser])
@pytest.mark.parametrize("by", ["path", "name", "name in the folder"])
def test_a_pretrained_part_gets_the_best_weights_of_its_run(
    by: str, quantiser: type[Quantiser], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raw ones, parameters and codebook alike, to the bit; the data starts it no more, and the prior stays."""
    expected = write_run(tmp_path / "codes", make_vqvae(1, quantiser))
    if by == "name":
        monkeypatch.setenv("EXPERIMENT_DIR", str(tmp_path))
    if by == "name in the folder":
        monkeypatch.chdir(tmp_path)
    model = with_prior(make_vqvae(2, quantiser))
    prior = {name: tensor.clone() for name, tensor in tensors_of(model.prior).items()}
    initialise(model, {"autoencoder": str(tmp_path / "codes") if by == "path" else "codes"}, Blocks().load().train, 0)
    found = tensors_of(model.autoencoder)
    assert found.keys() == expected.keys() and len(found) > 10
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert all(torch.equal(tensor, prior[name]) for name, tensor in tensors_of(model.prior).items())
    assert not any(parameter.requires_grad for parameter in model.autoencoder.parameters())


def test_a_whole_model_gets_the_best_weights_of_a_run(tmp_path: pathlib.Path) -> None:
    """And nothing of it starts from the data; another model is named."""
    expected = write_run(tmp_path / "codes", make_vqvae(1))
    model = make_vqvae(2)
    initialise(model, {"": str(tmp_path / "codes")}, Blocks().load().train, 0)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(model).items())
    with pytest.raises(CheckpointError, match="another model than Experiment.model, in the run "):
        initialise(with_prior(model), {"": str(tmp_path / "codes")}, Blocks().load().train, 0)


def test_what_is_not_pretrained_starts_from_the_data() -> None:
    """The parts of the model that ask for it, each once, with the images as they are; a seed gives the same."""
    calls: list[tuple[Tensor, int]] = []

    class Asks(nn.Linear):
        def initialise_from_data(self, images: Tensor, generator: torch.Generator) -> None:
            calls.append((images, int(torch.randint(10**6, (), generator=generator))))

    shared = Asks(2, 2)
    model = nn.Sequential(shared, nn.Sequential(Asks(2, 2), shared), nn.ReLU())
    levels = torch.tensor([[0, 255], [51, 255]], dtype=torch.uint8)
    for seed in (0, 0, 1):
        initialise(model, {}, levels, seed)
    assert len(calls) == 6
    assert all(images is levels for images, _ in calls)
    draws = [number for _, number in calls]
    assert draws[:2] == draws[2:4] != draws[4:]
    with pytest.raises(ArgumentError, match=r"Asks has a method initialise_from_data, which takes images: .* dict"):
        initialise(model, {}, {"values": levels}, seed=0)


def test_the_run_begins_with_the_pretrained_part_and_never_changes_it(tmp_path: pathlib.Path) -> None:
    expected = write_run(tmp_path / "codes", make_vqvae(1))
    directory = run_in(tmp_path / "prior", pretrained={"autoencoder": str(tmp_path / "codes")})
    latest = directory.load_checkpoint("latest")
    assert latest["step"] == 4 and not any(name.startswith("autoencoder.") for name in latest["parameters"])
    for name, tensor in expected.items():
        assert torch.equal(latest["buffers"][f"autoencoder.{name}"], tensor), name


def test_a_continued_run_and_its_evaluation_do_not_need_the_other_run_any_more(tmp_path: pathlib.Path) -> None:
    expected = write_run(tmp_path / "codes", make_vqvae(1))
    pretrained = {"autoencoder": str(tmp_path / "codes")}
    whole = run_in(tmp_path / "whole", pretrained=pretrained).load_checkpoint("latest")
    run_in(tmp_path / "prior", pretrained=pretrained, num_steps=2)
    shutil.rmtree(tmp_path / "codes")
    latest = run_in(tmp_path / "prior", pretrained=pretrained).load_checkpoint("latest")
    assert latest["step"] == 4
    for group in ("parameters", "buffers", "weight_average"):
        assert all(torch.equal(latest[group][name], tensor) for name, tensor in whole[group].items())
    plan = make_experiment(pretrained=pretrained)
    loaded = prepare(plan, torch.device("cpu")).with_checkpoint(latest, "averaged")
    assert all(torch.equal(tensors_of(loaded.model.autoencoder)[name], tensor) for name, tensor in expected.items())
    assert evaluate(loaded, 1, None, step=4)["elbo"] < 0.0


def test_a_run_that_began_without_the_other_one_is_not_given_its_weights_later(tmp_path: pathlib.Path) -> None:
    first = run_in(tmp_path / "prior", num_steps=2).load_checkpoint("latest")["buffers"]
    write_run(tmp_path / "codes", make_vqvae(1))
    second = run_in(tmp_path / "prior", pretrained={"autoencoder": str(tmp_path / "codes")}).load_checkpoint("latest")
    assert all(torch.equal(second["buffers"][name], tensor) for name, tensor in first.items())


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["nowhere", "no checkpoint", "only latest", "another size", "another kind", "no part"])
def test_what_cannot_be_loaded_is_one_line_before_anything_is_written(
    case: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERIMENT_DIR", str(tmp_path))
    codes, part = tmp_path / "codes", "autoencoder"
    missing = f"Experiment.pretrained['autoencoder']: there is no trained run in codes or {codes}; train it first"
    of_another = "the checkpoint is of another model than Experiment.model.autoencoder, in the run 'codes': "
    kind: type[PopgenError] = CheckpointError
    if case == "no checkpoint":
        with RunDirectory(codes).locked():
            (codes / "config.gin").write_text("")
    elif case == "only latest":
        write_run(codes, make_vqvae(1), ("latest",))
    elif case == "another size":
        write_run(codes, make_vqvae(1, code_dim=2))
        missing = of_another + "decoder.layers.0.weight: (4, 2, 3, 3) in the checkpoint, (4, 3, 3, 3) in the model"
    elif case == "another kind":
        write_run(codes, make_vqvae(1, GradientQuantiser))
        missing = of_another + "quantiser.counts: absent in the checkpoint, (4,) in the model"
    elif case == "no part":
        write_run(codes, make_vqvae(1))
        part, kind = "decoder", ArgumentError
        missing = (
            "Experiment.pretrained: VQVAEWithPrior has no part 'decoder'; it has autoencoder, prior, and '' is the "
            "whole of it"
        )
    with pytest.raises(kind) as caught:
        run_in(tmp_path / "prior", pretrained={part: "codes"})
    assert str(caught.value).startswith(missing) and "\n" not in str(caught.value)
    assert not RunDirectory(tmp_path / "prior").has_checkpoint()
    assert not [path for path in (tmp_path / "prior").rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("pretrained", ["vqvae", {"autoencoder": 3}, {3: "vqvae"}, ["autoencoder"], None])
def test_pretrained_is_a_dictionary_of_names(pretrained: Any) -> None:
    with pytest.raises(
        ArgumentError, match="Experiment.pretrained must be a dictionary of parts of the model and runs"
    ):
        make_experiment(pretrained=pretrained)


def test_a_model_that_the_data_is_too_small_for_is_refused_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    encoder, decoder = (part(3, (8, 8), 4, 1) for part in (ConvolutionalEncoder, ConvolutionalDecoder))
    model = VQVAE(encoder, MovingAverageQuantiser(121, 3), decoder)
    with pytest.raises(ArgumentError, match="num_codes must be at most the 120 vectors .* got 121") as caught:
        run_in(tmp_path / "run", model=model, objective=VQVAELoss(), evaluator=VQVAEEvaluator())
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"]
