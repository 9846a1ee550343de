"""The gated dense layer against two explicit linear layers."""

import pytest
import torch
import torch.nn.functional as F

from popgen.errors import ArgumentError
from popgen.nn.gated_dense import GatedDense


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
def test_layer_is_one_linear_map_gated_by_another(shape: tuple[int, ...]) -> None:
    """(W x + b) ⊙ sigmoid(V x + c): the first rows of the weight are W, the last ones V."""
    layer = GatedDense(4, 6).double()
    x = torch.randn(*shape, 4, dtype=torch.float64)
    weight, bias = layer.linear.weight, layer.linear.bias
    expected = F.linear(x, weight[:6], bias[:6]) * (1.0 / (1.0 + torch.exp(-F.linear(x, weight[6:], bias[6:]))))
    output = layer(x)
    assert output.shape == (*shape, 6)
    torch.testing.assert_close(output, expected)


def test_gate_opens_and_shuts() -> None:
    """A gate far to one side passes the linear map on, or nothing."""
    layer = GatedDense(4, 6)
    x = torch.randn(3, 4)
    with torch.no_grad():
        layer.linear.weight[6:] = 0.0
        layer.linear.bias[6:] = 100.0
    torch.testing.assert_close(layer(x), F.linear(x, layer.linear.weight[:6], layer.linear.bias[:6]))
    with torch.no_grad():
        layer.linear.bias[6:] = -200.0
    assert layer(x).abs().max() == 0.0


def test_every_parameter_gets_a_gradient() -> None:
    """Values and gates alike."""
    layer = GatedDense(4, 6)
    layer(torch.randn(3, 4)).square().sum().backward()
    assert all((parameter.grad != 0.0).all() for parameter in layer.parameters())


@pytest.mark.parametrize("argument", ["input_dim", "output_dim"])
@pytest.mark.parametrize("value", [0, -1])
def test_bad_arguments_are_named(argument: str, value: int) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ArgumentError, match=f"GatedDense.{argument} must be an integer of at least 1, got {value}"):
        GatedDense(**{"input_dim": 4, "output_dim": 6, argument: value})
