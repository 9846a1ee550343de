"""Fixtures, and a runtime check of every shape annotation: popgen is imported through jaxtyping's hook."""

import os
import pathlib

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("popgen", "beartype.beartype")

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several workers: each has a core, and so have the processes it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
MNIST_DIR = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, at the same number of threads."""
    torch.manual_seed(0)


@pytest.fixture
def as_a_user():
    """Switches the runtime check of annotations off, to see the project's own errors for arguments of a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def mnist_dir():
    """The folder that holds MNIST/raw; tests that need it are skipped where it is absent."""
    if not (MNIST_DIR / "MNIST" / "raw").is_dir():
        pytest.skip(f"needs the MNIST files in {MNIST_DIR}")
    return MNIST_DIR
