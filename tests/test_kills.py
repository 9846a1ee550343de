"""Runs that are killed at random, in the middle of writes too, and asked to stop: they end as if nothing had been."""

import logging
import pathlib
import random

import pytest
import torch

from benchmarks.kills import KINDS, WAYS, torment


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has several threads is not to be forked; TensorBoard logs what it hides of killed processes."""
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports what every child would import
    monkeypatch.setattr(logging.getLogger("tensorboard"), "level", logging.ERROR)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_a_few_times_ends_like_one_that_was_not(kind: str, tmp_path: pathlib.Path) -> None:
    happened = torment(kind, 3, tmp_path, random.Random(KINDS.index(kind)))
    assert sum(happened[way] for way in WAYS) >= 3 and happened["finished"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_often_ends_like_one_that_was_not(kind: str, tmp_path: pathlib.Path) -> None:
    happened = torment(kind, 50, tmp_path, random.Random(7))
    assert all(happened[way] > 5 for way in WAYS) and happened["cut"] > 5
