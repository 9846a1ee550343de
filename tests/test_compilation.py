"""Compiled code equals the plain code, or is not used."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from popgen import compilation
from popgen.compilation import compile_or_fall_back, rules_for_tracing
from popgen.distributions import GaussianMixture
from popgen.errors import ArgumentError
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.vamp_prior import VampPrior
from popgen.precision import matrix_products
from popgen.training.objectives import NegativeELBO
from popgen.training.state import initial_state
from popgen.training.step import make_train_step

CPU = torch.device("cpu")


def make_vae(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return VAE(
        GaussianEncoder(16, 4, 12), BernoulliDecoder(4, 16, 12), VampPrior(16, 5), HouseholderSylvesterFlow(4, 12, 2, 3)
    )


COMPILED_RUN = """
import sys, torch, torch._dynamo.utils as utils
from popgen.evaluation.likelihood import estimate_log_likelihood
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.vamp_prior import VampPrior
from popgen.training.objectives import NegativeELBO
from popgen.training.state import initial_state
from popgen.training.step import make_train_step
torch.manual_seed(0)
flow = HouseholderSylvesterFlow(4, 12, 2, 3)
vae = VAE(GaussianEncoder(16, 4, 12), BernoulliDecoder(4, 16, 12), VampPrior(16, 5), flow)
batch, objective = torch.rand(8, 16).round(), NegativeELBO(beta=lambda step: step / 10)
states, losses = [], []
for compiled in (False, True):
    state = initial_state(vae, lambda parameters: torch.optim.SGD(parameters, lr=1e-2), seed=0)
    step = make_train_step(vae, objective, max_gradient_norm=9.0, compiled=compiled, precision=sys.argv[1])
    losses.append([])
    for _ in range(10):
        state, metrics = step(state, batch)
        losses[-1].append(metrics["loss"].item())
    states.append(state)
names = states[0].parameters
moved = max((states[0].parameters[n] - states[1].parameters[n]).abs().max().item() for n in names)
lost = max(abs(one - other) / abs(one) for one, other in zip(*losses))
plain, fused = (estimate_log_likelihood(vae, batch, 30, precision=sys.argv[1], compiled=flag) for flag in (False, True))
print(lost, moved, (plain - fused).abs().max().item(), utils.counters["stats"]["unique_graphs"],
      sum(utils.counters["graph_break"].values()))
"""


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_compiled_code_equals_plain_code(precision: str, tolerance: float):
    command = [sys.executable, "-c", COMPILED_RUN, precision]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "torch.compile is not used" not in done.stderr and done.stdout, done.stderr
    lost, moved, bound_moved, graphs, breaks = map(float, done.stdout.split())
    assert max(lost, moved) < tolerance and bound_moved < 100 * tolerance
    assert (graphs, breaks) == (2, 0), "one graph for the step and one for the evaluation, without a break"


def fake_compile(monkeypatch: pytest.MonkeyPatch, replacement) -> None:
    monkeypatch.setattr(compilation.torch, "compile", lambda function, **_: replacement(function))


@pytest.mark.usefixtures("as_a_user")
def test_a_mistake_in_what_an_annealed_weight_hides_is_found(monkeypatch: pytest.MonkeyPatch, capsys):
    """At the first step β is 0 and the KL term has no weight; the comparison gives it one."""
    # what is compiled has its arguments side by side: the settings come last, and of those β first
    fake_compile(monkeypatch, lambda function: lambda *a: (function(*a)[0] * (1.0 + a[-3]), *function(*a)[1:]))
    vae, batch = make_vae(), torch.rand(8, 16).round()
    state = initial_state(vae, torch.optim.SGD, seed=0)
    make_train_step(vae, NegativeELBO(beta=lambda step: 0.0), compiled=True)(state, batch)
    assert "its result differs" in capsys.readouterr().err


def square_and_gradient(weight: Tensor) -> tuple[Tensor, Tensor]:
    leaf = weight.detach().requires_grad_()
    value = leaf.square().sum()
    return value, torch.autograd.grad(value, leaf)[0]


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda value, gradient: (1.01 * value, gradient),
        lambda value, gradient: (value, 1.01 * gradient),
        lambda value, gradient: (value * torch.nan, gradient),
    ],
    ids=["value", "gradient", "not a number"],
)
def test_a_wrong_result_is_never_used(wrong, traced: bool, monkeypatch: pytest.MonkeyPatch, capsys):
    """Neither a wrong value nor a wrong gradient; the line is printed once."""
    fake_compile(monkeypatch, lambda function: lambda *arguments: wrong(*function(*arguments)))
    square = compile_or_fall_back(square_and_gradient, traced=traced)
    for _ in range(3):
        value, gradient = square(torch.ones(3))
        assert value.item() == 3.0 and torch.equal(gradient, torch.full((3,), 2.0))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torch.compile is not used: its result differs")


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(("moved_by", "used"), [(2e-4, True), (2e-3, False)])
def test_a_difference_of_large_numbers_may_be_rounded(moved_by, used, monkeypatch: pytest.MonkeyPatch, capsys):
    """A KL of 0.04 nats from densities of 544: a change of 2e-4 is what float32 leaves of it, ten times that is not."""
    fake_compile(monkeypatch, lambda function: lambda x: {**function(x), "kl": function(x)["kl"] + moved_by})
    metrics = compile_or_fall_back(lambda x: {"loss": x.sum(), "kl": x.sum() - 543.96})
    metrics(torch.full((4,), 136.0))
    assert (capsys.readouterr().err == "") == used


def test_an_error_of_the_function_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    fake_compile(monkeypatch, lambda function: function)
    with pytest.raises(ArgumentError, match="encoded must be"):
        compile_or_fall_back(VampPrior(16, 5).forward)(None)


def test_what_is_traced_is_traced_again_for_other_shapes(monkeypatch: pytest.MonkeyPatch, capsys):
    """Shapes are numbers in a trace: the mean over five would be wrong by the count of three."""
    fake_compile(monkeypatch, lambda function: function)
    mean = compile_or_fall_back(lambda x: {"mean": x.sum() / len(x), "none": None}, traced=True)
    for count in (3, 5, 3):
        assert mean(torch.ones(count)) == {"mean": torch.ones(()), "none": None}
    assert capsys.readouterr().err == ""


def test_what_is_traced_may_hold_tensors_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys):
    fake_compile(monkeypatch, lambda function: function)
    own = torch.arange(3.0)
    assert compile_or_fall_back(lambda x: x * own, traced=True)(torch.ones(3)).tolist() == [0.0, 1.0, 2.0]
    assert capsys.readouterr().err == ""


def test_what_looks_at_values_is_not_traced(capsys):
    """A trace would hold on to the branch that the first values chose."""
    sign = compile_or_fall_back(lambda x: x if x.sum() > 0 else -x, traced=True)
    assert sign(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    assert sign(-torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torch.compile is not used: ")


def test_without_a_compiler_one_line_says_so(tmp_path: pathlib.Path):
    """In a process whose C++ compiler is not there, with no compiled code to fall back on."""
    program = (
        "import torch, torch._inductor.config as config\n"
        "config.cpp.cxx = ('/nonexistent/c++',)\n"
        "from popgen.compilation import compile_or_fall_back\n"
        "square = compile_or_fall_back(lambda x: (x.sin() + x.square()).sum())\n"
        "print(square(torch.zeros(5)).item(), square(torch.zeros(5)).item())\n"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "0.0 0.0\n", done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("torch.compile is not used: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr


def test_buffers_and_modules_are_left_alone():
    """What is compiled is a function of its arguments: the module that it calls keeps its own tensors."""
    linear = nn.Linear(3, 1)
    before = linear.weight.detach().clone()
    value = compile_or_fall_back(lambda x: linear(x).sum())(torch.ones(2, 3))
    assert torch.isfinite(value) and torch.equal(linear.weight, before) and linear.weight.grad is None


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("wrong", [False, True])
def test_what_changes_its_arguments_is_compared_on_copies(wrong: bool, monkeypatch: pytest.MonkeyPatch, capsys):
    """The first call counts once; and a wrong change is found though what is returned is right."""

    def count(total: torch.Tensor) -> torch.Tensor:
        return total.add_(1.0).square()

    def counts_twice(total: torch.Tensor) -> torch.Tensor:
        return total.add_(2.0 if wrong else 1.0).sub(1.0 if wrong else 0.0).square()

    monkeypatch.setattr(compilation.torch, "compile", lambda function, **_: counts_twice)
    compiled, total = compile_or_fall_back(count, in_place=True), torch.zeros(3)
    for calls in (1.0, 2.0):
        assert compiled(total).tolist() == [calls**2] * 3 and total.tolist() == [calls] * 3
    assert ("its result differs" in capsys.readouterr().err) == wrong


def test_thin_products_are_recorded_as_sums_where_launches_are_dear():
    """Rows, columns and outer products, with their gradients; products of matrices stay with the library."""
    rules = rules_for_tracing(True, True)

    def gradients(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        product = a @ b
        return product.detach(), *torch.autograd.grad(product.sin().sum(), [a, b])

    for rows, columns, thin in ((1, 5, True), (5, 1, True), (4, 5, False)):
        factors = torch.randn(6, rows, 3), torch.randn(6, 3, columns)
        graph = make_fx(gradients, rules, tracing_mode="fake")(*factors)
        assert ("bmm" in graph.code) != thin
        for one, other in zip(graph(*factors), gradients(*factors), strict=True):
            torch.testing.assert_close(one, other)
    assert rules_for_tracing(False, True) == {}


def test_densities_stay_exact_in_what_is_traced_under_another_setting(monkeypatch: pytest.MonkeyPatch, capsys):
    """With the switch of tf32 on, the products of the network are recorded as they are, those of densities apart."""
    graphs = []
    fake_compile(monkeypatch, lambda graph: graphs.append(graph) or graph)
    monkeypatch.setattr("popgen.products.USES_ONEDNN", False)
    network, mixture = nn.Linear(4, 4), GaussianMixture(torch.randn(5, 4), torch.zeros(5, 4))

    def loss(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight.detach().requires_grad_()
        value = mixture.log_density(x @ weight).sum()
        return value.detach(), torch.autograd.grad(value, weight)[0]

    x, expected = torch.randn(7, 4), loss
    with matrix_products("tf32", CPU):
        found = compile_or_fall_back(loss, traced=True)(x, network.weight)
    assert capsys.readouterr().err == "", "what is recorded gives what the plain code gives"
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert targets.count("popgen.full_product.default") == 3, "of the density: its value, and two gradients"
    assert targets.count("aten.mm.default") == 2, "of the network: its value, and the gradient of the weight"
    for one, other in zip(found, expected(x, network.weight), strict=True):
        torch.testing.assert_close(one, other)
    full = torch.ops.popgen.full_product(x[None], network.weight.detach()[None])
    torch.testing.assert_close(full[0], x @ network.weight.detach())


def test_tf32_is_not_compiled_where_densities_would_not_stay_exact(capsys):
    calls = []
    with matrix_products("tf32", CPU):
        square = compile_or_fall_back(lambda weight: calls.append("plain") or weight.square().sum())
        assert square(torch.ones(3)).item() == 3.0
    assert calls == ["plain"], "neither compared nor compiled"
    assert capsys.readouterr().err.startswith("torch.compile is not used: it cannot keep densities exact")
