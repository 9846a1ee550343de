"""The weight average against its recursion written out in float64."""

import pytest
import torch
from torch import Tensor, nn

from popgen.optim.weight_average import effective_decay, update_weight_average

SHAPES = {"weight": (3, 4), "bias": (3,), "scalar": ()}


def make_parameters(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Returns random parameters of several shapes."""
    return {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
def test_average_follows_its_recursion(dtype: torch.dtype, tolerance: float, decay: float) -> None:
    """With a ← d a + (1 - d) p, where d rises with the step until it meets the decay."""
    average = make_parameters(dtype)
    expected = {name: value.double() for name, value in average.items()}
    for step in range(60):
        parameters = make_parameters(dtype)
        d = (1.0 + step) / (10.0 + step)
        d = decay if d > decay else d
        for name in expected:
            expected[name] = d * expected[name] + (1.0 - d) * parameters[name].double()
        average = update_weight_average(average, parameters, weight=1.0 - effective_decay(decay, step))
        for name in expected:
            assert average[name].dtype == dtype
            torch.testing.assert_close(average[name].double(), expected[name], rtol=0, atol=tolerance)


def test_decay_rises_to_its_limit() -> None:
    """One tenth at first, never falling, never above the decay, and equal to it in the end."""
    decays = [effective_decay(0.99, step) for step in range(2_000)]
    assert decays[0] == pytest.approx(0.1)
    assert decays == sorted(decays)
    assert max(decays) == decays[-1] == 0.99
    assert effective_decay(0.05, 0) == 0.05


def test_no_decay_is_the_parameters_themselves() -> None:
    """With decay 0 nothing is remembered."""
    parameters = make_parameters()
    average = update_weight_average(make_parameters(), parameters, weight=1.0)
    for name, value in parameters.items():
        torch.testing.assert_close(average[name], value, rtol=0, atol=0)


def test_full_decay_hardly_moves() -> None:
    """With decay 1 and many steps behind it the average stays where it is."""
    before = make_parameters()
    average = {name: value.clone() for name, value in before.items()}
    average = update_weight_average(average, make_parameters(), weight=1.0 - effective_decay(1.0, 10**9))
    for name, value in before.items():
        torch.testing.assert_close(average[name], value, rtol=0, atol=1e-6)


def test_constant_parameters_are_reached_and_kept() -> None:
    """The average tends to parameters that no longer move, and stays within what it has seen."""
    parameters, average = make_parameters(), make_parameters()
    low = {name: torch.minimum(parameters[name], average[name]) for name in parameters}
    high = {name: torch.maximum(parameters[name], average[name]) for name in parameters}
    for _ in range(300):
        average = update_weight_average(average, parameters, weight=0.1)
        for name in parameters:
            assert (average[name] >= low[name] - 1e-6).all()
            assert (average[name] <= high[name] + 1e-6).all()
    for name, value in parameters.items():
        torch.testing.assert_close(average[name], value)


def test_storage_of_the_average_is_donated() -> None:
    """What is returned lives where the average lived; the parameters are only read."""
    average, parameters = make_parameters(), make_parameters()
    places = {name: value.data_ptr() for name, value in average.items()}
    before = {name: value.clone() for name, value in parameters.items()}
    updated = update_weight_average(average, parameters, weight=torch.tensor(0.1))
    assert list(updated) == list(SHAPES)
    for name in SHAPES:
        assert updated[name].data_ptr() == places[name]
        assert torch.equal(parameters[name], before[name])


def test_tensors_meet_by_name() -> None:
    """Two dictionaries in different order."""
    average, parameters = make_parameters(), make_parameters()
    reordered = {name: parameters[name] for name in reversed(SHAPES)}
    first = update_weight_average({name: value.clone() for name, value in average.items()}, parameters, 0.1)
    second = update_weight_average(average, reordered, 0.1)
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


def test_average_is_outside_the_graph() -> None:
    """Parameters in training leave no gradient behind in it."""
    layer = nn.Linear(4, 3)
    parameters = dict(layer.named_parameters())
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    average = update_weight_average(average, parameters, weight=0.1)
    assert not any(value.requires_grad for value in average.values())
