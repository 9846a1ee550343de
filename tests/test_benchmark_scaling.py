"""The benchmark of several processes: its arithmetic, and that it runs."""

import pathlib
import subprocess
import sys

import pytest
import torch

from benchmarks.scaling import Network, measured, on_paper

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def test_a_ring_moves_each_byte_twice() -> None:
    """At most twice the message through each link, whatever the number of devices; nothing for one."""
    network = Network(bandwidth=1e9, latency=0.0)
    assert network.all_reduce(1, 1e9) == 0.0
    assert network.all_reduce(2, 1e9) == pytest.approx(1.0)
    assert network.all_reduce(1_000, 1e9) == pytest.approx(2.0, rel=1e-2)
    assert Network(1e9, latency=0.5).all_reduce(3, 0.0) == pytest.approx(2.0)


def test_what_does_not_scale_on_paper() -> None:
    """Nothing is lost where nothing is drawn and the network is free; the draw alone loses what it takes."""
    free = Network(float("inf"), 0.0)
    one = {"step": 0.1, "draw": 0.0, "bytes": 1e6}
    assert [row[-1] for row in on_paper("vae", one, 10, [1, 8, 512], [1.0, 50.0], free, free)] == ["100%"] * 6
    (row,) = on_paper("vae", one | {"draw": 0.01}, 10, [11], [1.0], free, free)
    assert row[-1] == "50%" and row[4] == "200"  # 90 ms of its own and 11 draws of 10 ms


@pytest.mark.slow
def test_it_measures() -> None:
    torch.set_num_threads(1)
    rows = measured("vae", [1, 2], batch_size=20, seconds=0.1)
    assert [row[1:4] for row in rows] == [
        ["strong", "1", "20"],
        ["strong", "2", "20"],
        ["weak", "1", "20"],
        ["weak", "2", "40"],
    ]


def test_the_command_parses() -> None:
    command = [sys.executable, "-m", "benchmarks.scaling", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m benchmarks.scaling" in done.stdout
