"""The two distances of a VQ-VAE by hand, and whom their gradients reach."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from popgen.errors import ArgumentError
from popgen.losses import codebook_loss, commitment_loss

Loss = Callable[[Tensor, Tensor], Tensor]


def make_pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Returns vectors and codes that ask for gradients."""
    return torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("loss", [commitment_loss, codebook_loss])
@pytest.mark.parametrize("shape", [(3, 4), (1, 2), (3, 5, 4), (2, 3, 5, 4), (0, 3, 4), (3, 0, 4)])
def test_one_squared_distance_for_each_example(loss: Loss, shape: tuple[int, ...]) -> None:
    """Summed over positions and dimensions, element by element, and never over the batch."""
    vectors, codes = make_pair(shape)
    found = loss(vectors, codes)
    assert found.shape == shape[:1]
    for i in range(shape[0]):
        differences = zip(vectors[i].flatten().tolist(), codes[i].flatten().tolist(), strict=True)
        assert found[i].item() == pytest.approx(sum((z - e) ** 2 for z, e in differences), rel=1e-12)


@pytest.mark.parametrize("loss, sign", [(commitment_loss, 1.0), (codebook_loss, -1.0)])
def test_gradient_moves_one_side_alone(loss: Loss, sign: float) -> None:
    """2 (z - e) for the encoder by commitment, its negative for the codebook, and nothing at all for the other."""
    vectors, codes = make_pair((3, 5, 4))
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (weights * loss(vectors, codes)).sum().backward()
    moved, fixed = (vectors, codes) if loss is commitment_loss else (codes, vectors)
    torch.testing.assert_close(moved.grad, 2.0 * sign * weights[:, None, None] * (vectors - codes).detach())
    assert fixed.grad is None


@pytest.mark.parametrize("loss", [commitment_loss, codebook_loss])
def test_nought_where_the_two_agree(loss: Loss) -> None:
    """And only there: the loss of one moved example is its alone."""
    codes = torch.randn(3, 5, 4)
    vectors = codes.clone()
    vectors[1, 2, 3] += 0.5
    torch.testing.assert_close(loss(vectors, codes), torch.tensor([0.0, 0.25, 0.0]))


@pytest.mark.parametrize("loss", [commitment_loss, codebook_loss])
def test_shapes_must_agree(loss: Loss) -> None:
    """Broadcasting would silently count a code many times; the message gives each shape to its owner."""
    with pytest.raises(ArgumentError) as error:
        inspect.unwrap(loss)(torch.zeros(3, 7, 4), torch.zeros(3, 1, 4))
    assert str(error.value) == "vectors and codes must have one shape, got (3, 7, 4) and (3, 1, 4)"
