"""The planar flow against the formulas of its paper."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from popgen.errors import ArgumentError
from popgen.nn.flows import PlanarFlow
from popgen.nn.flows.planar import MIN_SLOPE

LATENT_DIM, CONTEXT_DIM = 5, 8


def make_flow(num_flows: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> PlanarFlow:
    """Returns a flow whose parameters are scaled."""
    flow = PlanarFlow(LATENT_DIM, CONTEXT_DIM, num_flows).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter *= scale
    return flow


def textbook_flow(flow: PlanarFlow, context: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns z_K and log |det ∂z_K/∂z_0| for one point; u is corrected as in appendix A.1, plus the margin."""
    layer = flow.parameters_of_context
    values = (layer.weight @ context + layer.bias).reshape(flow.num_flows, 2 * flow.latent_dim + 1)
    log_det = torch.zeros((), dtype=z.dtype)
    for row in values:
        u, w, b = row[: flow.latent_dim], row[flow.latent_dim : -1], row[-1]
        corrected = -1.0 + torch.log(1.0 + torch.exp(w @ u)) + MIN_SLOPE
        u = u + (corrected - w @ u) * w / (w @ w)
        psi = (1.0 - torch.tanh(w @ z + b) ** 2) * w
        log_det = log_det + torch.linalg.slogdet(torch.eye(len(z), dtype=z.dtype) + torch.outer(u, psi)).logabsdet
        z = z + u * torch.tanh(w @ z + b)
    return z, log_det


@pytest.mark.parametrize("num_flows", [1, 2, 4, 8])
def test_flow_equals_the_textbook(num_flows: int) -> None:
    """Points and log-determinants, for each sample of each example."""
    flow, context = make_flow(num_flows), torch.randn(2, CONTEXT_DIM, dtype=torch.float64)
    z = torch.randn(3, 2, LATENT_DIM, dtype=torch.float64)
    moved, log_det = flow(context).forward_and_log_det(z)
    for sample in range(3):
        for example in range(2):
            point, point_log_det = textbook_flow(flow, context[example], z[sample, example])
            torch.testing.assert_close(moved[sample, example], point, rtol=0, atol=1e-8)
            torch.testing.assert_close(log_det[sample, example], point_log_det, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 10.0), (torch.float64, 10.0), (torch.float64, 1e4)])
def test_slope_stays_above_minus_one(dtype: torch.dtype, scale: float) -> None:
    """wᵀ u > -1 though the uncorrected products reach far below it."""
    flow, context = make_flow(8, scale, dtype), torch.randn(500, CONTEXT_DIM, dtype=dtype)
    bijection = flow(context)
    assert ((bijection.normal * bijection.direction).sum(-1) > -1.0).all()
    values = flow.parameters_of_context(context).unflatten(-1, (8, -1))
    uncorrected = (values[..., :LATENT_DIM] * values[..., LATENT_DIM:-1]).sum(-1)
    assert uncorrected.min() < -10.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_log_det_is_bounded_where_the_map_is_steepest(dtype: torch.dtype, scale: float) -> None:
    """On the plane wᵀ z + b = 0 the log-determinant is log(1 + wᵀ u) ≥ log MIN_SLOPE, rounding or not."""
    flow, context = make_flow(1, scale, dtype), torch.randn(500, CONTEXT_DIM, dtype=dtype)
    bijection = flow(context)
    normal, bias = bijection.normal[0], bijection.bias[0]
    on_plane = -bias[:, None] * normal / normal.square().sum(-1, keepdim=True)
    z, log_det = bijection.forward_and_log_det(on_plane[None])
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    assert log_det.min() >= math.log(MIN_SLOPE) - 1e-2
    assert bijection.inverse(z).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_normal_moves_nothing_out_of_its_plane(dtype: torch.dtype) -> None:
    """With w = 0 the map is a shift by u tanh(b): no determinant, no NaN, gradients included."""
    flow = make_flow(2, 0.0, dtype)
    bijection = flow(torch.randn(3, CONTEXT_DIM, dtype=dtype))
    z = torch.randn(2, 3, LATENT_DIM, dtype=dtype)
    moved, log_det = bijection.forward_and_log_det(z)
    assert torch.equal(moved, z)
    assert torch.equal(log_det, torch.zeros_like(log_det))
    (moved.sum() + log_det.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in flow.parameters())


# Run in a process of its own, where nothing checks shapes at runtime.
COMPILED = """
import torch
from popgen.nn.flows import PlanarFlow
bijection, z = PlanarFlow(5, 8, 2)(torch.randn(3, 8)), torch.randn(2, 3, 5)
compiled = torch.compile(bijection.forward_and_log_det, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(z), bijection.forward_and_log_det(z))
"""


def test_the_compiler_takes_the_flow() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argument", ["latent_dim", "context_dim", "num_flows"])
@pytest.mark.parametrize("value", [0, -3, True])
def test_bad_arguments_are_named(argument: str, value: int) -> None:
    """The message names the argument, its value and what it must be."""
    arguments = {"latent_dim": 5, "context_dim": 8, "num_flows": 2, argument: value}
    with pytest.raises(ArgumentError, match=f"PlanarFlow.{argument} must be an integer of at least 1, got {value}"):
        PlanarFlow(**arguments)
