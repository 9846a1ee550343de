"""The Householder Sylvester flow against the formulas of its paper, written out matrix by matrix."""

import pytest
import torch
from torch import Tensor

from popgen.errors import ArgumentError
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.flows.hsnf import MAX_DIAGONAL

LATENT_DIM, CONTEXT_DIM = 5, 8


def make_flow(num_flows: int, num_reflections: int, latent_dim: int = LATENT_DIM) -> HouseholderSylvesterFlow:
    """Returns a flow in float64."""
    return HouseholderSylvesterFlow(latent_dim, CONTEXT_DIM, num_flows, num_reflections).double()


def make_context(batch: int) -> Tensor:
    """Returns a context large enough for the flow to bend."""
    return 3.0 * torch.randn(batch, CONTEXT_DIM, dtype=torch.float64)


def split_parameters(flow: HouseholderSylvesterFlow, context: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Returns square, reflectors, diagonal of R̃ and bias of each flow for one context, in the order they are stored."""
    layer = flow.parameters_of_context
    values = layer.weight @ context + layer.bias
    size, count = flow.latent_dim, flow.num_reflections
    each = []
    for chunk in values.reshape(flow.num_flows, -1):
        square, chunk = chunk[: size * size].reshape(size, size), chunk[size * size :]
        vectors, chunk = chunk[: count * size].reshape(count, size), chunk[count * size :]
        each.append((square, vectors, chunk[:size], chunk[size:]))
    return each


def textbook_orthogonal(vectors: Tensor) -> Tensor:
    """Returns Q = H_1 H_2 … H_H with H_i = I - 2 v_i v_iᵀ / |v_i|²: the first reflection is the leftmost factor.

    So Qᵀ z = H_H … H_2 H_1 z reflects z by the first vector first, and Q takes the reflections back in turn.
    """
    q = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    for v in vectors:
        q = q @ (torch.eye(len(v), dtype=v.dtype) - 2.0 * torch.outer(v, v) / (v @ v))
    return q


def textbook_flow(flow: HouseholderSylvesterFlow, context: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns z_K and log |det ∂z_K/∂z_0| for one point, with full matrices and a full determinant."""
    size = len(z)
    row, column = torch.arange(size)[:, None], torch.arange(size)
    log_det = torch.zeros((), dtype=z.dtype)
    for square, vectors, lower_diagonal, bias in split_parameters(flow, context):
        q = textbook_orthogonal(vectors)
        r = torch.where(row < column, square, 0.0) + torch.diag(MAX_DIAGONAL * torch.tanh(square.diagonal()))
        r_tilde = torch.where(row < column, square.T, 0.0) + torch.diag(MAX_DIAGONAL * torch.tanh(lower_diagonal))
        hidden = torch.tanh(r_tilde @ q.T @ z + bias)
        jacobian = torch.eye(size, dtype=z.dtype) + q @ r @ torch.diag(1.0 - hidden**2) @ r_tilde @ q.T
        log_det = log_det + torch.linalg.slogdet(jacobian).logabsdet
        z = z + q @ r @ hidden
    return z, log_det


def compact_orthogonal(flow: HouseholderSylvesterFlow, context: Tensor) -> Tensor:
    """Returns I - Vᵀ W of every flow and example, shape `(flows, batch, latent, latent)`."""
    bijection = flow(context)
    identity = torch.eye(flow.latent_dim, dtype=context.dtype)
    return identity - bijection.reflectors.mT @ bijection.solved_reflectors


@pytest.mark.parametrize("by_matrices", [False, True])
@pytest.mark.parametrize("num_flows", [1, 2, 4, 8])
@pytest.mark.parametrize("num_reflections", [1, 2, 4, 8])
def test_flow_equals_the_textbook(
    num_flows: int, num_reflections: int, by_matrices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points and log-determinants of equations 9, 10 and 13, for each sample of each example, as on either device."""
    monkeypatch.setattr("popgen.nn.flows.hsnf.is_launch_bound", lambda tensor: by_matrices)
    flow, context = make_flow(num_flows, num_reflections), make_context(2)
    z = 1.5 * torch.randn(2, 2, LATENT_DIM, dtype=torch.float64)
    moved, log_det = flow(context).forward_and_log_det(z)
    for sample in range(2):
        for example in range(2):
            point, point_log_det = textbook_flow(flow, context[example], z[sample, example])
            torch.testing.assert_close(moved[sample, example], point, rtol=0, atol=1e-9)
            torch.testing.assert_close(log_det[sample, example], point_log_det, rtol=0, atol=1e-9)


def test_gradients_and_scores_are_the_same_by_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, context, z = make_flow(3, 4), make_context(6), torch.randn(2, 6, LATENT_DIM, dtype=torch.float64)
    outcomes = []
    for by_matrices in (False, True):
        monkeypatch.setattr("popgen.nn.flows.hsnf.is_launch_bound", lambda tensor, answer=by_matrices: answer)
        moved, log_det = flow(context).forward_and_log_det(z)
        gradients = torch.autograd.grad(moved.sin().sum() + log_det.sum(), list(flow.parameters()))
        outcomes.append([flow(context).push_score(z, z.cos()), *gradients])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_reflections", [1, 2, 3, 8])
def test_compact_form_is_the_product_of_reflections_in_order(num_reflections: int) -> None:
    """I - Vᵀ W = H_1 H_2 … H_H, and from two reflections on not the reverse product."""
    flow, context = make_flow(2, num_reflections), make_context(3)
    compact = compact_orthogonal(flow, context)
    for example in range(3):
        for k, (_, vectors, _, _) in enumerate(split_parameters(flow, context[example])):
            torch.testing.assert_close(compact[k, example], textbook_orthogonal(vectors), rtol=0, atol=1e-12)
            if num_reflections > 1:
                assert (compact[k, example] - textbook_orthogonal(vectors.flip(0))).abs().max() > 1e-3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("num_reflections", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_compact_form_is_orthogonal(num_reflections: int, dtype: torch.dtype, tolerance: float, scale: float) -> None:
    """At the paper's size, whatever the length of the reflectors."""
    flow = HouseholderSylvesterFlow(40, CONTEXT_DIM, 4, num_reflections).to(dtype)
    q = compact_orthogonal(flow, scale * torch.randn(50, CONTEXT_DIM, dtype=dtype))
    assert (q @ q.mT - torch.eye(40, dtype=dtype)).abs().max() < tolerance
    sign = torch.linalg.slogdet(q.double()).sign
    assert (sign == (-1.0) ** num_reflections).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_repeated_reflectors_stay_orthogonal(dtype: torch.dtype, tolerance: float) -> None:
    """Parallel reflectors are the worst conditioned: an even number of them is the identity."""
    flow = HouseholderSylvesterFlow(LATENT_DIM, CONTEXT_DIM, num_flows=1, num_reflections=8).to(dtype)
    with torch.no_grad():
        for values in (flow.parameters_of_context.weight, flow.parameters_of_context.bias):
            vectors = values[LATENT_DIM**2 : LATENT_DIM**2 + 8 * LATENT_DIM].unflatten(0, (8, LATENT_DIM))
            vectors.copy_(vectors[:1].clone().expand_as(vectors))
    q = compact_orthogonal(flow, torch.randn(10, CONTEXT_DIM, dtype=dtype))
    assert (q - torch.eye(LATENT_DIM, dtype=dtype)).abs().max() < tolerance


def reflector_rows(flow: HouseholderSylvesterFlow) -> Tensor:
    """Returns a mask over the outputs of the linear layer that are reflectors."""
    size, count = flow.latent_dim, flow.num_reflections
    mask = torch.zeros(size * size + count * size + 2 * size, dtype=torch.bool)
    mask[size * size : size * size + count * size] = True
    return mask.repeat(flow.num_flows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_reflectors_reflect_nothing(dtype: torch.dtype) -> None:
    """A vector without a direction leaves Q at the identity, and nothing turns into NaN, gradients included."""
    flow = HouseholderSylvesterFlow(LATENT_DIM, CONTEXT_DIM, num_flows=2, num_reflections=3).to(dtype)
    with torch.no_grad():
        flow.parameters_of_context.weight[reflector_rows(flow)] = 0.0
        flow.parameters_of_context.bias[reflector_rows(flow)] = 0.0
    context = torch.randn(3, CONTEXT_DIM, dtype=dtype)
    identity = torch.eye(LATENT_DIM, dtype=dtype).expand(2, 3, LATENT_DIM, LATENT_DIM)
    assert torch.equal(compact_orthogonal(flow, context), identity)
    z, log_det = flow(context).forward_and_log_det(torch.randn(2, 3, LATENT_DIM, dtype=dtype))
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    (z.sum() + log_det.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in flow.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_stays_invertible_where_tanh_saturates(dtype: torch.dtype) -> None:
    """r_ii r̃_ii ≥ -1 + 1e-4 and a finite log-determinant, for weights ten thousand times too large."""
    flow = HouseholderSylvesterFlow(LATENT_DIM, CONTEXT_DIM, num_flows=4, num_reflections=2).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter *= 1e4
    bijection = flow(torch.randn(200, CONTEXT_DIM, dtype=dtype))
    product = bijection.upper_diagonal * bijection.lower_diagonal
    assert product.min() < -0.999
    assert product.min() >= -1.0 + 1e-4
    z, log_det = bijection.forward_and_log_det(torch.randn(3, 200, LATENT_DIM, dtype=dtype))
    assert z.isfinite().all()
    assert log_det.isfinite().all()


@pytest.mark.parametrize("by_matrices", [False, True])
@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
def test_float32_error_at_the_paper_s_size(scale: float, by_matrices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 flows of 8 reflections in 40 dimensions: log-determinants within 1e-3 nats of float64, 1e-5 on average."""
    monkeypatch.setattr("popgen.nn.flows.hsnf.is_launch_bound", lambda tensor: by_matrices)
    flow = HouseholderSylvesterFlow(40, CONTEXT_DIM, 4, 8)
    context, z = scale * torch.randn(100, CONTEXT_DIM), torch.randn(20, 100, 40)
    found = flow(context).forward_and_log_det(z)
    exact = flow.double()(context.double()).forward_and_log_det(z.double())
    points, log_det = ((one.double() - other).detach() for one, other in zip(found, exact, strict=True))
    assert points.abs().max() < 1e-3 and log_det.abs().max() < 1e-3 and log_det.mean().abs() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smallest_determinant_is_finite(dtype: torch.dtype) -> None:
    """Opposite saturated diagonals at the steepest point of tanh: log det = L K log(1 + min r r̃), gradients finite."""
    flow = HouseholderSylvesterFlow(LATENT_DIM, CONTEXT_DIM, num_flows=3, num_reflections=2).to(dtype)
    size = LATENT_DIM
    bias = torch.zeros(3, size * size + 2 * size + 2 * size, dtype=dtype)
    bias[:, : size * size] = 1e4 * torch.eye(size, dtype=dtype).flatten()
    bias[:, size * size + 2 * size : -size] = -1e4
    with torch.no_grad():
        flow.parameters_of_context.weight.zero_()
        flow.parameters_of_context.bias.copy_(bias.flatten())
    z, log_det = flow(torch.zeros(1, CONTEXT_DIM, dtype=dtype)).forward_and_log_det(
        torch.zeros(1, 1, size, dtype=dtype)
    )
    assert log_det.isfinite().all()
    exact = 3 * size * torch.log1p(torch.tensor(-(MAX_DIAGONAL**2), dtype=torch.float64))
    torch.testing.assert_close(log_det.double().squeeze(), exact, rtol=1e-3, atol=0)
    (z.sum() + log_det.sum()).backward()
    assert flow.parameters_of_context.bias.grad.isfinite().all()


def test_latent_space_of_one_dimension() -> None:
    """A reflection of the line is a change of sign, which the map undoes."""
    flow, context = make_flow(2, 3, latent_dim=1), make_context(4)
    z = torch.randn(2, 4, 1, dtype=torch.float64)
    bijection = flow(context)
    moved, log_det = bijection.forward_and_log_det(z)
    point, point_log_det = textbook_flow(flow, context[1], z[0, 1])
    torch.testing.assert_close(moved[0, 1], point)
    torch.testing.assert_close(log_det[0, 1], point_log_det)
    torch.testing.assert_close(bijection.inverse(moved), z)


@pytest.mark.parametrize("argument", ["latent_dim", "context_dim", "num_flows", "num_reflections"])
@pytest.mark.parametrize("value", [0, -3, True])
def test_bad_arguments_are_named(argument: str, value: int) -> None:
    """The message names the argument, its value and what it must be."""
    arguments = {"latent_dim": 5, "context_dim": 8, "num_flows": 2, "num_reflections": 2, argument: value}
    message = f"HouseholderSylvesterFlow.{argument} must be an integer of at least 1, got {value}"
    with pytest.raises(ArgumentError, match=message):
        HouseholderSylvesterFlow(**arguments)
