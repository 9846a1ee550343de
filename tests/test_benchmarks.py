"""The benchmarks: what they count and how they compare; their commands parse."""

import pytest
import torch

from benchmarks import replicas
from benchmarks.measure import bare_products, in_fresh_process, interleaved, markdown_table, prepared, ratio
from benchmarks.speed import CONFIGS, one_step
from popgen.training.loop import Hooks
from tests.commands import run_module

CPU = torch.device("cpu")


def test_bare_products_are_those_of_the_work_and_no_others():
    layer, x = torch.nn.Linear(30, 20), torch.randn(7, 30)

    def work() -> None:
        torch.autograd.grad((layer(x).sigmoid() @ torch.ones(20, 5)).sum(), layer.weight)

    repeat, flops = bare_products(work, CPU)
    assert flops == 2 * (7 * 30 * 20 + 7 * 20 * 5 + 7 * 5 * 20 + 20 * 7 * 30)  # forward, then the gradients
    again, same = bare_products(repeat, CPU)
    again()
    assert same == flops, "repeating the products makes exactly these products"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_has_the_products_that_its_formula_has(name: str, tmp_path_factory, monkeypatch):
    """Every layer's, with the gradients of its weights and inputs; the input of the first one is data for `vae`."""
    monkeypatch.setenv("POPGEN_DATA", str(tmp_path_factory.getbasetemp() / "digits"))
    _, flops = bare_products(one_step(name, "cpu"), CPU)
    latent, hidden, pixels = 40, 300, 784
    images, inputs, first = (100, 100, 2) if name == "vae" else (100, 600, 3)
    encoder = first * pixels * 2 * hidden + 3 * hidden * 2 * hidden + 3 * hidden * 2 * latent
    decoder = 3 * (latent * 2 * hidden + hidden * 2 * hidden + hidden * pixels)
    flow = 3 * hidden * 4 * (latent**2 + 8 * latent + 2 * latent) if name == "vamp_hsnf" else 0
    mixture = 0 if name == "vae" else 3 * 500 * 3 * latent
    assert flops == 2.0 * (inputs * encoder + images * (decoder + flow + mixture))


@pytest.mark.parametrize("num_replicas", [None, 2])
def test_the_cost_of_replicas_is_that_of_training(num_replicas: int | None, tmp_path_factory, monkeypatch):
    """The step trains: twice the work takes the state on from where it was."""
    monkeypatch.setenv("POPGEN_DATA", str(tmp_path_factory.getbasetemp() / "digits"))
    monkeypatch.setattr(replicas, "STEPS", 2)
    losses: list[float] = []

    def listening(log_every, log, *others):
        return Hooks(1, lambda step, means: losses.append(means["loss"]), *others)

    monkeypatch.setattr(replicas, "Hooks", listening)
    work = replicas.training("vae", "cpu", ("HIDDEN_DIM = 8", "Adam.lr = 1e-2"), num_replicas)
    work()
    work()
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_contenders_take_turns_and_are_compared_round_by_round():
    calls: list[str] = []
    work = {name: (lambda name=name: calls.append(name), 1) for name in ("one", "other")}
    times = interleaved(work, rounds=3, device=CPU, seconds=1e-9)
    assert [len(values) for values in times.values()] == [3, 3]
    turns = [name for name, previous in zip(calls, [None, *calls], strict=False) if name != previous]
    assert turns == ["one", "other"] * 4  # one turn to see how long each takes, then the rounds
    assert ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0


def test_the_peak_is_that_of_the_work():
    """40 MB that are held, and 400 MB in passing."""
    peak = in_fresh_process(hold_and_pass)
    assert 380 < peak < 600


def hold_and_pass() -> float:
    held = []
    work, peak = prepared(lambda: held.append(torch.ones(10_000_000)) or (lambda: torch.ones(90_000_000).sum()))
    work()
    return peak()


def test_table():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    with pytest.raises(ValueError, match="rows must have 2 cells"):
        markdown_table(["a", "b"], [["1"]])


@pytest.mark.parametrize("name", ["speed", "growth", "profile", "precision", "kills", "soak", "replicas", "scaling"])
def test_commands_parse(name: str):
    done = run_module(f"benchmarks.{name}", ["--help"])
    assert done.returncode == 0 and "python -m benchmarks." in done.stdout
    wrong = run_module(f"benchmarks.{name}", ["--nonsense"])
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
