"""Laws that every posterior flow obeys."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from popgen.errors import ArgumentError
from popgen.nn.flows import Bijection, HouseholderSylvesterFlow, PlanarFlow, PosteriorFlow
from popgen.nn.flows.flow import solve_residual_tanh

LATENT_DIM, CONTEXT_DIM = 5, 8
Factory = Callable[[], PosteriorFlow]


def sylvester(num_flows: int, num_reflections: int, latent_dim: int = LATENT_DIM) -> HouseholderSylvesterFlow:
    """Returns a Sylvester flow in float64."""
    return HouseholderSylvesterFlow(latent_dim, CONTEXT_DIM, num_flows, num_reflections).double()


def planar(num_flows: int, latent_dim: int = LATENT_DIM) -> PlanarFlow:
    """Returns a planar flow in float64."""
    return PlanarFlow(latent_dim, CONTEXT_DIM, num_flows).double()


ALL_SIZES = [
    *(
        pytest.param(lambda k=k, h=h: sylvester(k, h), id=f"sylvester-K{k}-H{h}")
        for k in (1, 2, 4, 8)
        for h in (1, 2, 4, 8)
    ),
    *(pytest.param(lambda k=k: planar(k), id=f"planar-K{k}") for k in (1, 2, 4, 8)),
]
BOTH = [
    pytest.param(lambda: sylvester(4, 3), id="sylvester"),
    pytest.param(lambda: planar(4), id="planar"),
]
every_size = pytest.mark.parametrize("make_flow", ALL_SIZES)
both_flows = pytest.mark.parametrize("make_flow", BOTH)


def make_context(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns a context that makes the flows bend without sending their points into the flat parts of tanh."""
    return torch.randn(batch, CONTEXT_DIM, dtype=dtype)


def make_points(samples: int, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns points of the latent space."""
    return torch.randn(samples, batch, LATENT_DIM, dtype=dtype)


def jacobian(bijection: Bijection, z: Tensor) -> Tensor:
    """Returns ∂f/∂z at each point by automatic differentiation, shape `(samples, batch, latent, latent)`."""
    z = z.clone().requires_grad_()
    moved, _ = bijection.forward_and_log_det(z)
    rows = [torch.autograd.grad(moved[..., i].sum(), z, retain_graph=True)[0] for i in range(z.shape[-1])]
    return torch.stack(rows, dim=-2)


@every_size
def test_log_det_is_that_of_the_jacobian(make_flow: Factory) -> None:
    """The map bends space, and its log-determinant says by how much."""
    bijection = make_flow()(make_context(3))
    z = make_points(5, 3)
    _, log_det = bijection.forward_and_log_det(z)
    assert log_det.shape == (5, 3)
    assert log_det.abs().max() > 1e-2
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian(bijection, z)).logabsdet, rtol=0, atol=1e-8)


@every_size
def test_inverse_round_trip(make_flow: Factory) -> None:
    """There and back, and back and there."""
    bijection = make_flow()(make_context(3))
    z = make_points(4, 3)
    moved, _ = bijection.forward_and_log_det(z)
    assert (moved - z).abs().max() > 0.1
    torch.testing.assert_close(bijection.inverse(moved), z, rtol=0, atol=1e-8)
    torch.testing.assert_close(bijection.forward_and_log_det(bijection.inverse(z))[0], z, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "make_flow",
    [
        pytest.param(lambda: sylvester(3, 2, latent_dim=2), id="sylvester"),
        pytest.param(lambda: planar(3, 2), id="planar"),
    ],
)
def test_density_of_moved_noise_integrates_to_one(make_flow: Factory) -> None:
    """With log q(f(z)) = log N(z) - log det; the wrong sign, or an inverse of another map, would not sum to one."""
    flow = make_flow()
    bijection = flow(0.5 * make_context(1))
    axis = torch.linspace(-9.0, 9.0, 181, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)[:, None]
    z = bijection.inverse(grid)
    log_density = Independent(Normal(torch.zeros_like(z), 1.0), 1).log_prob(z) - bijection.forward_and_log_det(z)[1]
    total = log_density.exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1.0, abs=1e-3)


@both_flows
@pytest.mark.parametrize("batch", [1, 3])
def test_many_samples_are_moved_as_one_at_a_time(make_flow: Factory, batch: int) -> None:
    """Samples and examples do not meet, and a batch of one is a batch."""
    flow, context, z = make_flow(), make_context(batch), make_points(4, batch)
    moved, log_det = flow(context).forward_and_log_det(z)
    back = flow(context).inverse(z)
    for example in range(batch):
        bijection = flow(context[example : example + 1])
        for sample in range(4):
            point = z[sample : sample + 1, example : example + 1]
            alone, alone_log_det = bijection.forward_and_log_det(point)
            torch.testing.assert_close(alone[0, 0], moved[sample, example])
            torch.testing.assert_close(alone_log_det[0, 0], log_det[sample, example])
            torch.testing.assert_close(bijection.inverse(point)[0, 0], back[sample, example])


@both_flows
def test_every_parameter_gets_a_gradient(make_flow: Factory) -> None:
    """Every single number of the flow's parameters: none is generated and then thrown away."""
    flow = make_flow()
    moved, log_det = flow(make_context(3)).forward_and_log_det(make_points(2, 3))
    (moved.square().sum() + log_det.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0.0).all(), name


@both_flows
def test_log_det_gets_the_right_gradient(make_flow: Factory) -> None:
    """Its gradient with respect to points and context agrees with finite differences."""
    flow, context, z = make_flow(), make_context(2).requires_grad_(), make_points(2, 2).requires_grad_()
    torch.autograd.gradcheck(lambda c, point: flow(c).forward_and_log_det(point), (context, z))


@pytest.mark.parametrize(
    "make_flow",
    [
        pytest.param(lambda: sylvester(2, 3, latent_dim=3), id="sylvester"),
        pytest.param(lambda: sylvester(2, 1, latent_dim=1), id="sylvester-L1"),
        pytest.param(lambda: planar(2, latent_dim=3), id="planar"),
    ],
)
def test_inverse_gets_the_right_gradient(make_flow: Factory) -> None:
    """With respect to points and context, though the solution comes from a search; values are those without one."""
    flow, context = make_flow(), make_context(2).requires_grad_()
    z = make_points(2, 2)[..., : flow.latent_dim].requires_grad_()
    torch.autograd.gradcheck(lambda c, point: flow(c).inverse(point), (context, z))
    found = flow(context).inverse(z)
    with torch.no_grad():
        assert torch.equal(flow(context).inverse(z), found)


@every_size
def test_score_is_pushed_by_the_transposed_inverse_of_the_jacobian(make_flow: Factory) -> None:
    """J⁻ᵀ (score - ∇ log det), with the full Jacobian and the gradient from automatic differentiation."""
    bijection = make_flow()(make_context(3).requires_grad_())
    z, score = make_points(5, 3).requires_grad_(), make_points(5, 3)
    (rise,) = torch.autograd.grad(bijection.forward_and_log_det(z)[1].sum(), z)
    expected = torch.linalg.solve(jacobian(bijection, z.detach()).mT, score - rise)
    pushed = bijection.push_score(z, score)
    assert not pushed.requires_grad
    assert (pushed - score).abs().max() > 0.1
    torch.testing.assert_close(pushed, expected, rtol=1e-7, atol=1e-7)


@both_flows
def test_score_is_the_slope_of_the_density(make_flow: Factory) -> None:
    """Finite differences of the density of moved noise, which the inverse gives, need no Jacobian at all."""
    bijection = make_flow()(make_context(2))
    z, width = make_points(3, 2), 1e-5

    def log_density(moved: Tensor) -> Tensor:
        origin = bijection.inverse(moved)
        return -0.5 * origin.square().sum(-1) - bijection.forward_and_log_det(origin)[1]

    moved, _ = bijection.forward_and_log_det(z)
    steps = width * torch.eye(LATENT_DIM, dtype=z.dtype)
    slopes = torch.stack([(log_density(moved + s) - log_density(moved - s)) / (2.0 * width) for s in steps], dim=-1)
    torch.testing.assert_close(bijection.push_score(z, -z), slopes, rtol=1e-4, atol=1e-4)


@both_flows
def test_saved_flow_is_the_same_flow(make_flow: Factory) -> None:
    """A state dictionary holds all there is."""
    saved, loaded = make_flow(), make_flow()
    context, z = make_context(3), make_points(2, 3)
    assert not torch.equal(saved(context).forward_and_log_det(z)[0], loaded(context).forward_and_log_det(z)[0])
    loaded.load_state_dict(saved.state_dict())
    for before, after in zip(
        saved(context).forward_and_log_det(z), loaded(context).forward_and_log_det(z), strict=True
    ):
        assert torch.equal(before, after)


@both_flows
def test_float32_agrees_with_float64(make_flow: Factory) -> None:
    """Points and log-determinants, to single precision."""
    flow, context, z = make_flow(), 0.5 * make_context(50), make_points(3, 50)
    exact = flow(context).forward_and_log_det(z)
    rounded = flow.float()(context.float()).forward_and_log_det(z.float())
    for value, reference in zip(rounded, exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "shape", [(5, LATENT_DIM), (LATENT_DIM, LATENT_DIM), (2, 5, 1), (2, 4, LATENT_DIM), (1, 2, 5, LATENT_DIM)]
)
@both_flows
def test_points_of_another_shape_are_refused(make_flow: Factory, shape: tuple[int, ...]) -> None:
    """Where they would be broadcast, too."""
    batch = LATENT_DIM if shape == (LATENT_DIM, LATENT_DIM) else 5
    bijection, z = make_flow()(make_context(batch)), torch.zeros(shape, dtype=torch.float64)
    for call in (bijection.forward_and_log_det, bijection.inverse, lambda z: bijection.push_score(z, z)):
        with pytest.raises(ArgumentError, match=r"z must have shape \(samples, \d+, \d+\), got \("):
            call(z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both_flows
def test_a_flow_of_half_precision_moves_points_at_full(make_flow: Factory, dtype: torch.dtype) -> None:
    """Its weights are rounded, and nothing after its linear layer is."""
    flow, context, z = make_flow().to(dtype), 0.5 * make_context(5).to(dtype), make_points(3, 5).to(dtype)
    parameters = flow.parameters_of_context(context)
    flow.parameters_of_context.forward = lambda _: parameters.double()
    exact = flow.double()(context).forward_and_log_det(z.double())
    flow.parameters_of_context.forward = lambda _: parameters
    for value, reference in zip(flow.to(dtype)(context).forward_and_log_det(z), exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 50.0, 1_000.0])
def test_the_root_is_found_to_the_rounding_of_what_it_is_found_from(dtype: torch.dtype, size: float) -> None:
    root = torch.linspace(-1.0, 1.0, 101, dtype=torch.float64)
    outer, inner, shift = size * torch.ones_like(root), 0.3 * torch.ones_like(root), 0.1 * torch.ones_like(root)
    target = root + outer * torch.tanh(inner * root + shift)
    found = solve_residual_tanh(*(tensor.to(dtype) for tensor in (target, outer, inner, shift)))
    assert (found - root).abs().max() <= 2 * torch.finfo(dtype).eps * (outer + target.abs()).max()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_residual_equation_is_solved(dtype: torch.dtype, tolerance: float) -> None:
    """The equation u + outer tanh(inner u + shift) = target holds for gentle, steep and nearly flat left sides."""
    target, shift = 3.0 * torch.randn(1000, dtype=dtype), 3.0 * torch.randn(1000, dtype=dtype)
    inner = torch.randn(1000, dtype=dtype).exp() * torch.randn(1000, dtype=dtype).sign()
    for product in (-0.9998, -0.5, 0.0, 0.5, 10.0):
        outer = product / inner
        u = solve_residual_tanh(target, outer, inner, shift)
        residual = u + outer * torch.tanh(inner * u + shift) - target
        assert (residual.abs() <= tolerance * (1.0 + target.abs() + outer.abs())).all()


def test_contracts_are_abstract() -> None:
    """Neither a flow nor a bijection can be built without its methods."""
    for contract in (PosteriorFlow, Bijection):
        with pytest.raises(TypeError, match="abstract"):
            contract()
