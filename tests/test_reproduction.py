"""Runs on real MNIST that take minutes: `pytest -m slow`."""

import pytest

from popgen import config
from popgen.experiment import run
from popgen.training.run_directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.mnist]


def test_vae_reaches_99_nats_in_20000_steps(mnist_dir, tmp_path):
    bindings = ["Experiment.num_steps = 20_000", f"BinaryMNIST.data_dir = '{mnist_dir}'"]
    loaded = config.load(["configs/vae.gin"], bindings)
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        state = run(loaded.experiment, directory, loaded.configuration)
    assert state.best_loss <= 99.0
