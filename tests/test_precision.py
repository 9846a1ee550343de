"""The precision of matrix products: rounded inside the setting and only there, and never in densities."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from popgen.distributions import Bernoulli, DiagonalNormal, GaussianMixture, StandardNormal
from popgen.errors import ArgumentError
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.flows.hsnf import HouseholderSylvesterBijection
from popgen.nn.vamp_prior import VampPrior
from popgen.precision import check_precision, full_precision, matrix_products
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


# Run in a process of its own, where nothing checks shapes at runtime and so nothing stands between the compiler and the
# code. Ten steps with annealing, plain and compiled, and an evaluation; one compilation serves all steps.
