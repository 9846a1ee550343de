"""The kernels of Householder Sylvester flows on a CPU; `test_hsnf_kernels.py` runs this file in the interpreter."""

import pytest
import torch

from popgen.nn.flows import HouseholderSylvesterFlow, hsnf

SIZES = [(5, 2, 3, 2, 3), (40, 2, 8, 1, 2), (4, 3, 1, 2, 1), (1, 2, 1, 1, 2)]


def values_and_gradients(flow, context, z, weights, by_kernels: bool, monkeypatch) -> list[torch.Tensor]:
    """Returns moved points, log-determinants, and the gradients of points, context and parameters."""
    monkeypatch.setattr(hsnf, "is_launch_bound", lambda tensor: by_kernels)
    context, z = context.clone().requires_grad_(), z.clone().requires_grad_()
    moved, log_det = flow(context).forward_and_log_det(z)
    loss = (weights[0] * moved).sum() + (weights[1] * log_det).sum()
    return [moved, log_det, *torch.autograd.grad(loss, [z, context, *flow.parameters()])]


@pytest.mark.parametrize("latent_dim, num_flows, num_reflections, samples, batch", SIZES)
def test_points_and_gradients_equal_those_of_float64(
    latent_dim: int, num_flows: int, num_reflections: int, samples: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = HouseholderSylvesterFlow(latent_dim, 8, num_flows, num_reflections)
    context, z = torch.randn(batch, 8), torch.randn(samples, batch, latent_dim)
    weights = torch.randn_like(z), torch.randn(samples, batch)
    found = values_and_gradients(flow, context, z, weights, True, monkeypatch)
    exact = [tensor.double() for tensor in (context, z)], [tensor.double() for tensor in weights]
    expected = values_and_gradients(flow.double(), *exact[0], exact[1], False, monkeypatch)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_few_samples_of_small_models_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where launches cost; in float32."""
    from popgen.nn.flows import hsnf_kernels

    counted, move = [], hsnf_kernels.move
    monkeypatch.setattr(hsnf_kernels, "move", lambda *arguments: counted.append(1) or move(*arguments))
    most, widest = hsnf.MAX_SAMPLES_OF_KERNELS, hsnf.MAX_LATENT_OF_KERNELS

    def kernels(samples: int, latent_dim: int, dtype: torch.dtype = torch.float32, is_launch_bound: bool = True) -> int:
        monkeypatch.setattr(hsnf, "is_launch_bound", lambda tensor: is_launch_bound)
        counted.clear()
        flow, z = HouseholderSylvesterFlow(latent_dim, 8, 1, 1).to(dtype), torch.randn(samples, 1, latent_dim).to(dtype)
        moved, log_det = flow(torch.randn(1, 8).to(dtype)).forward_and_log_det(z)
        assert moved.shape == z.shape and log_det.shape == z.shape[:2]
        return len(counted)

    assert [kernels(samples, 2) for samples in (0, 1, most, most + 1)] == [1, 1, 1, 0]
    assert [kernels(1, size) for size in (widest, widest + 1)] == [1, 0]
    assert kernels(1, 2, torch.float64) == kernels(1, 2, is_launch_bound=False) == 0


def test_copies_are_moved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.vmap, inside and outside of the gradient, with a context of each copy or one for all."""
    flow = HouseholderSylvesterFlow(3, 8, 2, 2)
    context, z = torch.randn(3, 2, 8), torch.randn(3, 2, 2, 3)

    def loss(z, context):
        moved, log_det = flow(context).forward_and_log_det(z)
        return moved.sin().sum() + log_det.cos().sum()

    outcomes = []
    for by_kernels in (True, False):
        monkeypatch.setattr(hsnf, "is_launch_bound", lambda tensor, answer=by_kernels: answer)
        leaves = [tensor.clone().requires_grad_() for tensor in (z, context)]
        outside = torch.autograd.grad(torch.vmap(loss)(*leaves).sum(), leaves)
        inside = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(z, context)
        shared = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(z, context[0])
        outcomes.append([*outside, *inside, *shared])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
