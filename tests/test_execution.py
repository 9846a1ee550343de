"""Precision of matrix products, and compilation with its fall-back."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from popgen import execution
from popgen.distributions import Bernoulli, DiagonalNormal, GaussianMixture, StandardNormal
from popgen.errors import ArgumentError
from popgen.execution import (
    check_precision,
    commit,
    compile_or_fall_back,
    full_precision,
    matrix_products,
    rules_for_tracing,
)
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.flows.hsnf import HouseholderSylvesterBijection
from popgen.nn.vamp_prior import VampPrior
from popgen.training.importance_objectives import DoublyReparameterisedIWAE
from popgen.training.objectives import NegativeELBO
from popgen.training.state import initial_state
from popgen.training.step import make_train_step

CPU = torch.device("cpu")
INTEGERS = (torch.uint8, torch.int64, torch.bool)
COARSE = 1.0 + 2.0**-10  # needs ten bits after the point: bfloat16 has seven


def product_of_coarse() -> float:
    factor = torch.full((1, 1), COARSE)
    return (factor @ factor).item()


def make_vae(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return VAE(
        GaussianEncoder(16, 4, 12), BernoulliDecoder(4, 16, 12), VampPrior(16, 5), HouseholderSylvesterFlow(4, 12, 2, 3)
    )


# --- precision -------------------------------------------------------------------------------------------------------


def test_products_are_rounded_inside_and_only_inside():
    with matrix_products("bf16", CPU):
        assert product_of_coarse() == 1.0
        with full_precision(CPU):
            assert product_of_coarse() == pytest.approx(COARSE**2, rel=1e-6)
        assert product_of_coarse() == 1.0
    assert product_of_coarse() == pytest.approx(COARSE**2, rel=1e-6)


def test_full_precision_holds_under_a_setting_of_the_users_own():
    with torch.autocast("cpu", torch.bfloat16), full_precision(CPU):
        assert product_of_coarse() == pytest.approx(COARSE**2, rel=1e-6)
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_setting_before_comes_back_after_an_error(precision: str):
    with pytest.raises(KeyError), matrix_products(precision, CPU):
        assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32"), "convolutions have a switch of their own"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
    assert torch.backends.cudnn.allow_tf32 is True, "as the user had it"


def test_densities_do_not_depend_on_the_setting():
    """The mixture density, its gradients, the flow and its inverse give the same bits; networks do not."""
    mean, log_var = (torch.randn(50, 4, requires_grad=True) for _ in range(2))
    context, z = torch.randn(6, 12), torch.randn(3, 6, 4, requires_grad=True)
    bijection = HouseholderSylvesterFlow(4, 12, 2, 3)(context)
    vae, x = make_vae(), torch.rand(6, 16)

    def values() -> list[Tensor]:
        log_density = GaussianMixture(mean, log_var).log_density(z)
        gradients = torch.autograd.grad(log_density.sum(), (mean, log_var, z))
        moved = bijection.push_score(z.detach(), torch.ones_like(z))
        return [log_density, *gradients, *bijection.forward_and_log_det(z), bijection.inverse(z.detach()), moved]

    exact, exact_terms = values(), vae(x, z)
    with matrix_products("bf16", CPU):
        rounded, rounded_terms = values(), vae(x, z)
    assert all(torch.equal(one, other) for one, other in zip(exact, rounded, strict=True))
    for one, other in zip(rounded_terms, exact_terms, strict=True):
        assert one.dtype == torch.float32 and not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.2)


def test_densities_of_rounded_parameters_are_exact():
    """Whatever a network in bf16 hands to a density, its value is that of the same numbers in float64."""
    first, second = (torch.randn(6, 784).bfloat16() for _ in range(2))
    x, z = torch.rand(6, 784).round(), torch.randn(6, 784)
    drawn = DiagonalNormal(first, second).sample(z)
    cases = [
        (Bernoulli(4.0 * first), Bernoulli(4.0 * first.double()), x),
        (DiagonalNormal(first, second - 2.0), DiagonalNormal(first.double(), (second - 2.0).double()), z),
        (GaussianMixture(first, second), GaussianMixture(first.double(), second.double()), drawn),
    ]
    for rounded, exact, points in cases:
        for name in ("log_density", "sample", "sample_and_log_density"):
            if name == "log_density" or isinstance(rounded, DiagonalNormal):
                found, expected = getattr(rounded, name)(points), getattr(exact, name)(points.double())
                for one, other in zip(*map(tree_leaves, (found, expected)), strict=True):
                    assert one.dtype == torch.float32
                    torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_densities_of_rounded_points_are_exact(dtype: torch.dtype):
    """Whatever the type of the points, and of binary images; what is exact in float64 stays so."""
    parameters = torch.promote_types(dtype, torch.float32)
    mean, log_var = (torch.randn(6, 8, dtype=parameters) for _ in range(2))
    z, score = (torch.randn(3, 6, 8).to(dtype) for _ in range(2))
    normal, mixture = (kind(mean, log_var) for kind in (DiagonalNormal, GaussianMixture))
    exact_normal, exact_mixture = (kind(mean.double(), log_var.double()) for kind in (DiagonalNormal, GaussianMixture))
    flow = HouseholderSylvesterFlow(8, 12, 2, 3).to(parameters)(torch.randn(6, 12, dtype=parameters))
    exact_flow = HouseholderSylvesterBijection(*(getattr(flow, f.name).double() for f in dataclasses.fields(flow)))
    pairs = [
        (StandardNormal().log_density(z), StandardNormal().log_density(z.double())),
        (mixture.log_density(z), exact_mixture.log_density(z.double())),
        (normal.sample_and_log_density(z)[1], exact_normal.sample_and_log_density(z.double())[1]),
        (flow.inverse(z), exact_flow.inverse(z.double())),
        (flow.push_score(z, score), exact_flow.push_score(z.double(), score.double())),
        (flow.forward_and_log_det(z)[1], exact_flow.forward_and_log_det(z.double())[1]),
    ]
    logits, images = 4.0 * torch.randn(6, 784, dtype=parameters), torch.rand(6, 784).round()
    exact = Bernoulli(logits.double()).log_density(images.double())
    pairs += [(Bernoulli(logits).log_density(images.to(of)), exact) for of in (dtype, *INTEGERS)]
    for found, expected in pairs:
        assert found.dtype == parameters
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)


def test_a_step_along_the_path_in_bf16():
    vae, batch = make_vae(), torch.rand(8, 16).round()
    state = initial_state(vae, torch.optim.Adam, seed=0)
    _, metrics = make_train_step(vae, DoublyReparameterisedIWAE(num_samples=3), precision="bf16")(state, batch)
    assert metrics["loss"].isfinite() and not metrics["skipped_steps"]


def test_a_step_in_bf16_keeps_float32_and_follows_the_exact_step():
    vae, batch = make_vae(), torch.rand(8, 16).round()
    losses = {}
    for precision in ("fp32", "bf16"):
        state = initial_state(vae, lambda parameters: torch.optim.Adam(parameters, lr=1e-2), seed=0)
        step = make_train_step(vae, NegativeELBO(), precision=precision)
        losses[precision] = []
        for _ in range(20):
            state, metrics = step(state, batch)
            losses[precision].append(metrics["loss"].item())
        assert {p.dtype for p in state.parameters.values()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.usefixtures("as_a_user")
def test_a_precision_that_is_not_there_is_named():
    with pytest.raises(ArgumentError, match="Experiment.precision 'tf32' needs a CUDA device, got cpu"):
        check_precision("Experiment.precision", "tf32", CPU)
    with pytest.raises(ArgumentError, match="precision must be one of fp32, tf32, bf16, got 'half'"):
        check_precision("precision", "half", CPU)
    with (
        pytest.raises(ArgumentError, match="precision must be one of fp32, tf32, bf16, got 'bfloat16'"),
        matrix_products("bfloat16", CPU),
    ):
        pass
    assert check_precision("precision", "tf32", torch.device("cuda")) == "tf32"


# --- compilation -----------------------------------------------------------------------------------------------------


# Run in a process of its own, where nothing checks shapes at runtime and so nothing stands between the compiler and the
# code. Ten steps with annealing, plain and compiled, and an evaluation; one compilation serves all steps.
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
    monkeypatch.setattr(execution.torch, "compile", lambda function, **_: replacement(function))


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
        "from popgen.execution import compile_or_fall_back\n"
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

    monkeypatch.setattr(execution.torch, "compile", lambda function, **_: counts_twice)
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


def git(folder: pathlib.Path, *arguments: str) -> str:
    own = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *own, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_code(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own checkout alone: not of one that it is installed in, nor of what was edited after the first call."""
    package, installed = tmp_path / "package", tmp_path / "environment" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    git(tmp_path, "init")
    assert commit.__wrapped__(package) is None, "nothing is committed"
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "--message=First")
    git(tmp_path, "tag", "v1")
    name = git(tmp_path, "rev-parse", "HEAD")
    (package / "untracked.py").write_text("")
    assert commit(package) == name and len(name) == 40 and commit(installed) is None
    (package / "__init__.py").write_text("x = 1")
    assert commit.__wrapped__(package) == f"{name}-dirty" and commit(package) == name
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit.__wrapped__(package) is None, "there is no git"
