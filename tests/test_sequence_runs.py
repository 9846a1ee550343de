"""Runs of models of sequences, as a user starts them: training, resumption, evaluation, sounds, probes, mistakes."""

import json
import pathlib
import shutil
import wave

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_commands import Workspace

STRINGS = """
from popgen.datasets import plucked_strings
experiment.Experiment.dataset = @plucked_strings.PluckedStrings()
experiment.Experiment.num_steps = %STEPS
experiment.Experiment.batch_size = 8
experiment.Experiment.eval_every = 3
experiment.Experiment.log_every = 1
experiment.Experiment.final_num_samples = 1
plucked_strings.PluckedStrings.num_train = 200
plucked_strings.PluckedStrings.num_test = 12
plucked_strings.PluckedStrings.seconds = 0.3
plucked_strings.PluckedStrings.window = 1_000
"""
WAVENET = """
from __gin__ import dynamic_registration
from popgen import experiment
from popgen.models import wavenet
from popgen.evaluation import wavenet as evaluation
include "configs/wavenet_quickstart.gin"
wavenet.WaveNet.hidden_dim = 8
wavenet.WaveNet.skip_dim = 8
wavenet.WaveNet.num_layers = 4
wavenet.WaveNet.dilation_cycle = 4
evaluation.WaveNetEvaluator.seconds = 0.1
STEPS = 6
"""
CPC = """
from __gin__ import dynamic_registration
from popgen import experiment
include "configs/cpc_speech.gin"
HIDDEN_DIM = 8
CONTEXT_DIM = 8
NUM_STEPS = 6
STEPS = %NUM_STEPS
"""


class SequenceWorkspace(Workspace):
    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(path)
        for name, text in (("wavenet", WAVENET), ("cpc", CPC)):
            (path / f"{name}.gin").write_text(text + STRINGS)

    def curve(self, run: str, tag: str) -> dict[int, float]:
        events = EventAccumulator(str(self.path / run))
        events.Reload()
        return {event.step: event.value for event in events.Scalars(tag)}

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        return torch.load(self.path / run / "checkpoints" / "latest.ckpt", weights_only=True)["parameters"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SequenceWorkspace:
    """A workspace with a finished run of each kind; tests do not change them."""
    workspace = SequenceWorkspace(tmp_path_factory.mktemp("trained"))
    for name in ("wavenet", "cpc"):
        workspace.succeed("train", f"--gin_file={name}.gin", f"--run_dir={name}")
    return workspace


@pytest.mark.parametrize("name", ["wavenet", "cpc"])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(trained: SequenceWorkspace, name: str) -> None:
    command = ("train", f"--gin_file={name}.gin", f"--run_dir={name}_cut_off")
    steps = "Experiment.num_steps"  # not NUM_STEPS, on which the learning rate depends too
    trained.succeed(*command, f"--gin_bindings={steps} = 3")
    trained.succeed(*command, "--reconfigure")
    for parameter, weight in trained.weights(name).items():
        assert torch.equal(trained.weights(f"{name}_cut_off")[parameter], weight), parameter
    assert trained.curve(f"{name}_cut_off", "train/loss") == trained.curve(name, "train/loss")
    rates = trained.curve(name, "train/learning_rate")
    assert len(set(rates.values())) == 6, "a rate for each step"


def test_a_wavenet_is_scored_and_heard(trained: SequenceWorkspace) -> None:
    printed = trained.succeed("evaluate", "--run_dir=wavenet")
    (path,) = (trained.path / "wavenet").glob("evaluation_*.json")
    record = json.loads(path.read_text())
    assert f"{record['bits_per_sample']:.3f}" in printed and "order-2 context model" in printed
    assert 0.0 < record["context_model_bits"] < record["unigram_bits"] < 8.0 < 2 * record["bits_per_sample"]
    printed = trained.succeed("sample", "--run_dir=wavenet", "--out=drawn.png", "--num_samples=3", "--seed=1")
    sounds = sorted(trained.path.glob("drawn_sample_*.wav"))
    assert len(sounds) == 3 and all(path.name in printed for path in sounds)
    with wave.open(str(sounds[0])) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (8_000, 1, 800)
        samples = np.frombuffer(file.readframes(800), np.int16)
    assert len(set(samples.tolist())) > 10
    with Image.open(trained.path / "drawn.png") as picture:
        assert picture.size[1] > 200
    events = EventAccumulator(str(trained.path / "wavenet"), size_guidance={"audio": 0, "images": 0})
    events.Reload()
    assert len(events.Tags()["audio"]) == 8 and {"samples", "recordings"} <= set(events.Tags()["images"])


def test_a_cpc_is_scored_and_probed(trained: SequenceWorkspace) -> None:
    printed = trained.succeed("evaluate", "--run_dir=cpc", "--num_samples=3")
    (path,) = (trained.path / "cpc").glob("evaluation_*_3x12.json")
    record = json.loads(path.read_text())
    assert f"{record['loss']:.3f}" in printed and "mutual information at least" in printed
    assert 0.0 < record["loss"] < 1.5 * record["loss_of_guessing"]
    printed = trained.succeed("probe", "--run_dir=cpc", "--target=chord", "--stacked=2,3", "--frames_per_recording=5")
    (path,) = (trained.path / "cpc").glob("probe_chord_step00000006_raw.json")
    probed = json.loads(path.read_text())
    names = [row["representation"] for row in probed["rows"]]
    assert names == [
        "context",
        "encoding",
        "log-mel, 1 frame",
        "log-mel, 2 frames",
        "log-mel, 3 frames",
        "context, untrained",
        "encoding, untrained",
    ]
    assert probed["step"] == 6 and probed["unseen"] == []
    assert probed["torch_version"] == torch.__version__ and probed["commit"] == record["commit"]
    assert "launch.probe --run_dir=cpc --target=chord" in probed["command"]
    for row in probed["rows"]:
        assert row["num_frames"] == 1_000 and row["unseen_accuracy"] is None
        assert 0.0 <= row["accuracy"] <= 1.0 and f"{row['accuracy']:.3f}" in printed
        curve = trained.curve("cpc", f"probe_chord/{row['representation']}/accuracy")
        assert curve == {6: pytest.approx(row["accuracy"])}


def test_a_probe_of_a_single_recording_is_strict_json(trained: SequenceWorkspace, tmp_path: pathlib.Path) -> None:
    """Its standard error cannot be told: `null` in the file, and left out of what is printed."""
    run = tmp_path / "run"
    shutil.copytree(trained.path / "cpc", run)
    config = run / "config.gin"
    config.write_text(config.read_text().replace("num_test = 12", "num_test = 1"))
    printed = trained.succeed("probe", f"--run_dir={run}", "--target=chord", "--stacked=2", "--frames_per_recording=5")
    (path,) = run.glob("probe_chord_*.json")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    rows = json.loads(path.read_text(), parse_constant=refuse)["rows"]
    assert [row["standard_error"] for row in rows] == [None] * 6
    assert "±" not in printed and f"{rows[0]['accuracy']:.3f}" in printed


def test_mistakes_are_one_line(trained: SequenceWorkspace) -> None:
    assert "target must be one of chord" in trained.fail("probe", "--run_dir=cpc", "--target=digit")
    assert "--target must be given" in trained.fail("probe", "--run_dir=cpc")
    assert "stacked must be numbers" in trained.fail("probe", "--run_dir=cpc", "--target=chord", "--stacked=two")
    assert "only a CPC can be probed" in trained.fail("probe", "--run_dir=wavenet", "--target=chord")
    assert "nothing to draw samples from" in trained.fail("sample", "--run_dir=cpc", "--out=drawn_cpc.png")
    assert not (trained.path / "drawn_cpc.png").exists()
    line = trained.fail("train", "--gin_file=cpc.gin", "--gin_bindings=PluckedStrings.window = 500")
    assert "at least 585 steps, two frames, got 500: use a longer window" in line
    line = trained.fail("train", "--gin_file=cpc.gin", "--gin_bindings=CPC.negatives = 'speakers'")
    assert "CPC.negatives must be one of batch, sequence, speaker" in line
    line = trained.fail("train", "--gin_file=cpc.gin", "--gin_bindings=SpokenDigits.held_out_speaker = 3")
    assert "SpokenDigits" in line
