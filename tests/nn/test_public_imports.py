"""Public modules stand alone: a researcher's own code imports one without the experiment runner's packages."""

import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RUNNER_PACKAGES = ("gin", "absl", "tensorboard")
PROGRAM = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[2:])))
"""


@pytest.mark.parametrize(
    "module",
    [
        "popgen.nn.causal_conv",
        "popgen.nn.cpc",
        "popgen.nn.flows.hsnf",
        "popgen.nn.vamp_prior",
        "popgen.nn.vqvae",
        "popgen.optim.geco",
        "popgen.models.vae",
        "popgen.datasets.binary_mnist",
    ],
)
def test_module_imports_alone(module: str) -> None:
    """In a fresh interpreter it imports, silently, and brings none of the runner's packages with it."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM, module, *RUNNER_PACKAGES]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
