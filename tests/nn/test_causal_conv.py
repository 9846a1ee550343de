"""The causal convolution: its formula, its blindness to the future, and steps against whole sequences."""

import pytest
import torch
from torch import Tensor, nn

from popgen.errors import ArgumentError
from popgen.nn.causal_conv import CausalConv1d, PastInputs, no_past_inputs

KERNELS, DILATIONS = (1, 2, 3, 5), (1, 2, 3, 8)


def stepped(convolution: CausalConv1d, x: Tensor, state: PastInputs | None = None) -> Tensor:
    """Returns what the convolution makes of x, a step at a time."""
    state = convolution.initial_state(len(x)) if state is None else state
    steps = []
    for now in x.unbind(-1):
        y, state = convolution.step(now, state)
        steps.append(y)
    return torch.stack(steps, -1)


def relative_difference(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", DILATIONS)
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_forward_is_the_formula(kernel_size: int, dilation: int, groups: int, bias: bool) -> None:
    """Position by position and tap by tap, with zeros before the first."""
    convolution = CausalConv1d(4, 6, kernel_size, dilation, groups, bias).double()
    x = torch.randn(2, 4, 11, dtype=torch.float64)
    expected = torch.zeros(2, 6, 11, dtype=torch.float64)
    for t in range(11):
        for out in range(6):
            first = (out // (6 // groups)) * (4 // groups)
            if bias:
                expected[:, out, t] += convolution.bias[out]
            for j in range(kernel_size):
                then = t - (kernel_size - 1 - j) * dilation
                if then >= 0:
                    expected[:, out, t] += x[:, first : first + 4 // groups, then] @ convolution.weight[out, :, j]
    torch.testing.assert_close(convolution(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", DILATIONS)
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_steps_equal_the_whole(kernel_size: int, dilation: int, groups: int, batch: int) -> None:
    """To the last digits of each type, and long after the ring has come round."""
    convolution = CausalConv1d(4, 6, kernel_size, dilation, groups).double()
    x = torch.randn(batch, 4, 3 * convolution.reach + 4, dtype=torch.float64)
    exact = convolution(x)
    torch.testing.assert_close(stepped(convolution, x), exact, rtol=0, atol=1e-12)
    convolution.float()
    torch.testing.assert_close(stepped(convolution, x.float()), convolution(x.float()), rtol=1e-5, atol=1e-5)
    convolution.bfloat16()
    y = stepped(convolution, x.bfloat16())
    assert y.dtype == torch.bfloat16 and relative_difference(y, exact) < 2e-2
    assert relative_difference(y, convolution(x.bfloat16())) < 2e-2


@pytest.mark.parametrize("dilation", DILATIONS)
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_gradients_come_from_the_taps_alone(kernel_size: int, dilation: int) -> None:
    """None from the future, and from the past only those of the kernel."""
    convolution = CausalConv1d(2, 3, kernel_size, dilation).double()
    x = torch.randn(1, 2, 40, dtype=torch.float64, requires_grad=True)
    for t in (0, 1, 20, 39):
        gradient = torch.autograd.grad(convolution(x)[0, :, t].sum(), x)[0][0]
        seen = [t - j * dilation for j in range(kernel_size) if t - j * dilation >= 0]
        assert gradient.abs().sum(0).nonzero().flatten().tolist() == sorted(seen)
    assert convolution.reach == (kernel_size - 1) * dilation


@pytest.mark.parametrize("kernel_size, dilation", [(1, 1), (1, 9), (2, 4), (3, 3)])
def test_state_is_one_ring_that_is_overwritten(kernel_size: int, dilation: int) -> None:
    """Nothing is shifted or copied: each step changes one slot, in place, and comes round to it again."""
    convolution = CausalConv1d(2, 3, kernel_size, dilation)
    state = convolution.initial_state(batch_size=4)
    slots = (kernel_size - 1) * dilation
    assert state.values.shape == (slots, 4, 2) and not state.values.any()
    addresses, written = [tensor.data_ptr() for tensor in state], []
    for _ in range(2 * slots + 1):
        before = state.values.clone()
        _, state = convolution.step(torch.randn(4, 2), state)
        assert [tensor.data_ptr() for tensor in state] == addresses
        written.append((state.values != before).flatten(1).any(1).nonzero().flatten().tolist())
    assert written == [[step % slots] if slots else [] for step in range(2 * slots + 1)]


def test_one_state_serves_several_convolutions() -> None:
    """Rings of different lengths, one after another, move on together and do not meet."""
    dilations = (1, 4, 2)
    convolutions = [CausalConv1d(5, 5, 3, dilation).double() for dilation in dilations]
    x = torch.randn(3, 2, 5, 30, dtype=torch.float64)
    together = no_past_inputs(3, dilations, channels=5, batch_size=2, dtype=torch.float64)
    apart = [convolution.initial_state(2) for convolution in convolutions]
    for t in range(30):
        past = together.read()
        for n, convolution in enumerate(convolutions):
            assert torch.equal(past[n], apart[n].read()[0])
            convolution.step(x[n, :, :, t], apart[n])
        together.write(x[..., t])


def test_weights_are_read_at_every_step() -> None:
    """Those that are loaded or changed after the state was made, or half way, count from then on."""
    convolution, other = (CausalConv1d(2, 3, 2, 4).double() for _ in range(2))
    x = torch.randn(2, 2, 20, dtype=torch.float64)
    state = convolution.initial_state(2)
    convolution.load_state_dict(other.state_dict())
    torch.testing.assert_close(stepped(convolution, x[..., :10], state), other(x)[..., :10], rtol=0, atol=1e-12)
    with torch.no_grad():
        convolution.weight.mul_(2.0)
        other.weight.mul_(2.0)
    torch.testing.assert_close(stepped(convolution, x[..., 10:], state), other(x)[..., 10:], rtol=0, atol=1e-12)
    assert list(convolution.state_dict()) == ["weight", "bias"], "no state in the module"


def test_weights_are_those_of_a_conv1d() -> None:
    """A checkpoint of torch.nn.Conv1d loads, and without dilation across the start the result is its own."""
    convolution, conv1d = CausalConv1d(4, 6, 3, dilation=2, groups=2), nn.Conv1d(4, 6, 3, dilation=2, groups=2)
    convolution.load_state_dict(conv1d.state_dict())
    x = torch.randn(2, 4, 20)
    torch.testing.assert_close(convolution(x)[..., 4:], conv1d(x))


def test_sequences_in_a_batch_do_not_meet() -> None:
    convolution = CausalConv1d(2, 3, 2, 3).double()
    x = torch.randn(4, 2, 15, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([stepped(convolution, one[None]) for one in x]), stepped(convolution, x))
    assert convolution(x[:0]).shape == (0, 3, 15)
    assert stepped(convolution, x[:0]).shape == (0, 3, 15)


def test_steps_have_no_gradient_and_the_whole_has() -> None:
    convolution = CausalConv1d(2, 3, 2, 2)
    x = torch.randn(1, 2, 6, requires_grad=True)
    assert not stepped(convolution, x).requires_grad
    convolution(x).sum().backward()
    assert all(p.grad is not None and (p.grad != 0.0).all() for p in convolution.parameters())


def test_state_can_be_of_another_type_and_place() -> None:
    convolution = CausalConv1d(2, 3, 2, 2)
    state = convolution.initial_state(3, device="meta", dtype=torch.float64)
    assert {tensor.device.type for tensor in state} == {"meta"} and state.values.dtype == torch.float64
    assert convolution.double().initial_state(3).values.dtype == torch.float64


def test_products_are_rounded_under_autocast() -> None:
    """Steps and whole sequences alike, to the precision of bfloat16."""
    convolution = CausalConv1d(16, 16, 2, 3)
    x = torch.randn(2, 16, 12)
    exact = convolution(x)
    with torch.autocast("cpu", torch.bfloat16):
        whole, steps = convolution(x), stepped(convolution, x)
    assert whole.dtype == steps.dtype == torch.bfloat16
    assert relative_difference(whole, exact) < 2e-2 and relative_difference(steps, whole) < 2e-2


def test_one_compilation_serves_all_steps(as_a_user) -> None:
    """Where the ring stands is a tensor: the compiler sees the same step every time."""
    convolution = CausalConv1d(2, 3, 2, 4)
    x = torch.randn(2, 2, 20)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    step = torch.compile(convolution.step, dynamic=False, fullgraph=True, backend=backend)
    state, steps = convolution.initial_state(2), []
    for now in x.unbind(-1):
        y, state = step(now, state)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, -1), convolution(x), rtol=1e-5, atol=1e-5)
    assert len(compilations) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_channels": 0}, "CausalConv1d.in_channels must be an integer of at least 1, got 0"),
        ({"out_channels": 2.0}, "CausalConv1d.out_channels must be an integer of at least 1, got 2.0"),
        ({"kernel_size": 0}, "CausalConv1d.kernel_size must be an integer of at least 1, got 0"),
        ({"dilation": 0}, "CausalConv1d.dilation must be an integer of at least 1, got 0"),
        ({"groups": 0}, "CausalConv1d.groups must be an integer of at least 1, got 0"),
        ({"groups": 4}, "CausalConv1d.out_channels must be a multiple of groups = 4, got 6"),
        ({"groups": 3}, "CausalConv1d.in_channels must be a multiple of groups = 3, got 4"),
    ],
)
def test_bad_arguments_are_named(as_a_user, arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        CausalConv1d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 2, **arguments})


def test_shapes_that_do_not_fit_are_refused(as_a_user) -> None:
    convolution = CausalConv1d(4, 6, 2)
    for shape in ((2, 3, 5), (4, 5), (2, 4, 0)):
        with pytest.raises(ArgumentError, match=r"x must have shape \(batch, 4, time\) with a time of at least 1") as e:
            convolution(torch.zeros(shape))
        assert str(e.value).endswith(f"got {shape}")
    for shape in ((2, 4), (3, 5), (3, 4, 1)):
        with pytest.raises(ArgumentError, match=r"x must have shape \(batch, channels\) = \(3, 4\), got ") as e:
            convolution.step(torch.zeros(shape), convolution.initial_state(3))
        assert str(e.value).endswith(f"got {shape}")
    with pytest.raises(ArgumentError, match="batch_size must be an integer of at least 0, got -1"):
        convolution.initial_state(-1)
