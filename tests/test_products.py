"""The linear product by either library: values, gradients, mapping over replicas, compilation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from popgen import products
from popgen.products import linear

SHAPES = [((7, 5), 3), ((2, 4, 5), 3), ((5,), 3), ((1, 1, 1, 5), 1), ((0, 5), 3), ((100, 784), 600)]


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def library(request, monkeypatch):
    """Either library, whatever the processor prefers."""
    monkeypatch.setattr(products, "USES_ONEDNN", request.param)


def arguments(shape: tuple[int, ...], output_dim: int, bias: bool = True) -> list[Tensor | None]:
    x, weight = torch.randn(shape), torch.randn(output_dim, shape[-1])
    return [x.requires_grad_(), weight.requires_grad_(), torch.randn(output_dim).requires_grad_() if bias else None]


@pytest.mark.usefixtures("library", "as_a_user")
def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied .*3x4 and 5x2"):
        linear(torch.randn(3, 4), torch.randn(2, 5))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape, output_dim", SHAPES)
def test_values_and_gradients_are_those_of_float64(shape: tuple[int, ...], output_dim: int, bias: bool):
    given = arguments(shape, output_dim, bias)
    exact = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in given]
    value, expected = linear(*given), F.linear(*exact)
    gradient = torch.randn_like(value)
    found = torch.autograd.grad(value, [t for t in given if t is not None], gradient)
    wanted = torch.autograd.grad(expected, [t for t in exact if t is not None], gradient.double())
    for one, other in zip([value, *found], [expected, *wanted], strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("library")
def test_other_dtypes_and_reduced_precision_are_untouched():
    x, weight, bias = (tensor.double() for tensor in arguments((7, 5), 3))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float(), bias.float()).dtype == torch.bfloat16


@pytest.mark.usefixtures("library")
def test_transposed_factors():
    x, weight = torch.randn(5, 7).T, torch.randn(5, 3).T
    torch.testing.assert_close(linear(x, weight), F.linear(x.contiguous(), weight.contiguous()))


@pytest.mark.usefixtures("library")
def test_second_derivatives():
    x, weight, bias = arguments((3, 2), 2)
    loss = linear(x, weight, bias).pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    (found,) = torch.autograd.grad(gradient.pow(2).sum(), weight)
    other_loss = F.linear(x, weight, bias).pow(3).sum()
    (other,) = torch.autograd.grad(other_loss, weight, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(other.pow(2).sum(), weight)[0])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (0, 0, None), (1, 2, 1), (None, None, 0)]
)
@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 6, 5)])
@pytest.mark.parametrize("one_by_one", [0, products.ONE_BY_ONE])
def test_mapped_over_replicas(
    in_dims: tuple[int | None, ...], shape: tuple[int, ...], one_by_one: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "ONE_BY_ONE", one_by_one)
    single = [torch.randn(shape), torch.randn(3, 5), torch.randn(3)]
    if any(dim is not None and dim > tensor.ndim for dim, tensor in zip(in_dims, single, strict=True)):
        pytest.skip("no such axis")
    given = [
        tensor if dim is None else torch.randn(*tensor.shape[:dim], 4, *tensor.shape[dim:])
        for dim, tensor in zip(in_dims, single, strict=True)
    ]

    def loss(*tensors: Tensor) -> Tensor:
        return linear(*tensors).square().sum()

    def of_replica(i: int) -> list[Tensor]:
        return [t if dim is None else t.select(dim, i) for dim, t in zip(in_dims, given, strict=True)]

    values = torch.vmap(linear, in_dims)(*given)
    gradients = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims)(*given)
    for i in range(4):
        torch.testing.assert_close(values[i], F.linear(*of_replica(i)), rtol=1e-4, atol=1e-4)
        replica = [tensor.clone().requires_grad_() for tensor in of_replica(i)]
        expected = torch.autograd.grad(F.linear(*replica).square().sum(), replica)
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found[i], wanted, rtol=1e-4, atol=1e-4)


def test_the_operator_keeps_its_promises():
    """Schema and fake tensors, by PyTorch's own checks of an operator."""
    given = tuple(tensor.detach() for tensor in arguments((2, 4, 5), 3))
    torch.library.opcheck(torch.ops.popgen.linear.default, given)
