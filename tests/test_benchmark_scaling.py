"""The benchmark of several processes: its arithmetic, and that it runs."""

import pathlib

import pytest
import torch

from benchmarks.scaling import Network, exchanges, measured, on_paper
from tests.commands import run_module

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def test_a_ring_moves_each_byte_twice() -> None:
    """At most twice the message through each link, whatever the number of devices; nothing for one."""
    network = Network(bandwidth=1e9, latency=0.0)
    assert network.all_reduce(1, 1e9) == 0.0
    assert network.all_reduce(2, 1e9) == pytest.approx(1.0)
    assert network.all_reduce(1_000, 1e9) == pytest.approx(2.0, rel=1e-2)
    assert Network(1e9, latency=0.5).all_reduce(3, 0.0) == pytest.approx(2.0)


def test_trees_are_better_where_messages_are_many() -> None:
    """They take as many steps as the logarithm of the number of devices, and a ring sends less."""
    slow, narrow = Network(float("inf"), latency=1.0), Network(1.0, latency=0.0)
    assert [slow.all_reduce(size, 1.0) for size in (1, 2, 8, 64)] == [0.0, 2.0, 6.0, 12.0]
    assert narrow.all_reduce(64, 1.0) == pytest.approx(2 * 63 / 64)


def test_what_does_not_scale_on_paper() -> None:
    """Nothing is lost where memory and network are free; the draw alone, or the exchange alone, loses what it takes."""
    free, infinity = Network(float("inf"), 0.0), float("inf")
    rows = on_paper("vae", 0.1, 1_000_000, 10, [1, 8, 512], free, free, memory=infinity)
    assert [row[-1] for row in rows] == ["100%"] * 3 and [row[3] for row in rows] == ["10", "80", "5,120"]
    drawn = 10 * 18 * 784 * 10 / 0.1  # so much a second that ten other batches take as long as the step
    (row,) = on_paper("vae", 0.1, 0, 10, [11], free, free, memory=drawn)
    assert row[-1] == "50%" and row[-2] == "550"
    (row,) = on_paper("vae", 0.1, 1_000_000, 10, [2], Network(1e7, 0.0), free, memory=infinity)
    assert row[-1] == "50%"
    (row,) = on_paper("vae", 0.1, 1_000_000, 10, [16], free, Network(1.25e6, 0.0), memory=infinity)
    assert row[-1] == "50%", "each of eight devices of a node sends an eighth"


def test_the_table_on_paper_is_what_the_command_prints() -> None:
    done = run_module("benchmarks.scaling", ["--only", "paper"])
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert done.returncode == 0 and len(table) == 14
    assert "\n".join(table) in (REPOSITORY / "docs" / "processes.md").read_text()


@pytest.mark.slow
def test_the_ways_to_exchange_are_measured() -> None:
    torch.set_num_threads(1)
    (row,) = exchanges("vae", [2], batch_size=4, bucket_mb=[1.0], seconds=0.1)
    assert row[:3] == ["vae", "2", "4"] and len(row) == 7 and all(float(cell) > 0 for cell in row[3:])


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
    done = run_module("benchmarks.scaling", ["--help"])
    assert done.returncode == 0 and "python -m benchmarks.scaling" in done.stdout
