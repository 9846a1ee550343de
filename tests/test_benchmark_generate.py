"""The benchmark of generation: what is timed generates the same codes; its command parses."""

import argparse
import functools

import torch

from benchmarks import generate
from benchmarks.generate import positions, random_model, recomputed, speed, stepping
from benchmarks.measure import interleaved
from tests.commands import run_module


def test_recomputing_the_receptive_field_gives_the_codes_of_generation():
    """Also where the window no longer begins with the first code."""
    model = random_model(num_layers=3, channels=4, cycle=2, device="cpu").double()
    uniform = torch.rand(2, 4 * model.receptive_field, dtype=torch.float64)
    codes = torch.zeros(2, 0, dtype=torch.int64)
    for now in uniform.T:
        codes = torch.cat([codes, recomputed(model, codes, now)[:, None]], 1)
    assert torch.equal(codes, model.generate(uniform))


def test_later_steps_go_on_from_the_first_ones():
    """They are the steps that come after so many others, and the first ones always start anew."""
    model = random_model(num_layers=3, channels=4, cycle=2, device="cpu").double()
    uniform = torch.rand(10, 2, dtype=torch.float64)
    whole = model.generate(uniform.repeat(4, 1).T)
    first, later = stepping(model, uniform, None), stepping(model, uniform, 20)
    for _ in range(2):
        assert torch.equal(first()[0], whole[:, 9])
    for end in (29, 39):
        assert torch.equal(later()[0], whole[:, end])


def test_rows_have_what_their_headings_say(monkeypatch):
    """A tiny model, without a compiler: the fields, and rates that are positive."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(generate, "interleaved", functools.partial(interleaved, seconds=1e-3))
    monkeypatch.setattr(generate, "STEPS", 10)
    arguments = argparse.Namespace(
        num_layers=2, channels=4, batch_size=1, samples=5, later=7, rounds=1, threads=1, device="cpu"
    )
    cycle, field, *rates = speed(2, arguments)
    assert (cycle, field) == ("2", "4") and len(rates) == 5
    assert all(float(rate.replace(",", "")) > 0 for rate in rates[:3])
    cycle, *times, quotient = positions(2, arguments)
    assert cycle == "2" and len(times) == 2 and float(quotient) > 0


def test_command_parses():
    done = run_module("benchmarks.generate", ["--help"])
    assert done.returncode == 0 and "python -m benchmarks.generate" in done.stdout
    wrong = run_module("benchmarks.generate", ["--nonsense"])
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
