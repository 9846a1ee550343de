"""GECO against its recursion in Python floats, its gradient by hand, and problems whose multiplier is known."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from popgen.errors import ArgumentError
from popgen.optim.geco import GECO, GECOState

CONSTRAINTS = [4.0, 2.5, -1.0, -3.0, 0.0, 0.5, -7.0, 1.25]


def scalar(value: float) -> Tensor:
    """Returns a scalar in float64."""
    return torch.tensor(value, dtype=torch.float64)


def make_state(multiplier: float, constraint_average: float, num_updates: int) -> GECOState:
    """Returns a state in float64."""
    return GECOState(scalar(multiplier), scalar(constraint_average), torch.tensor(num_updates))


def run(geco: GECO, constraints: list[float], dtype: torch.dtype = torch.float64) -> list[GECOState]:
    """Returns the states before and after each constraint."""
    states = [geco.initial_state(dtype=dtype)]
    for constraint in constraints:
        states.append(geco.update(states[-1], torch.tensor(constraint, dtype=dtype)))
    return states


def descend(
    geco: GECO, loss: Callable[[Tensor], Tensor], constraint: Callable[[Tensor], Tensor], num_steps: int
) -> tuple[float, GECOState]:
    """Returns where gradient descent on the Lagrangian ends, and the state there."""
    x = scalar(3.0).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.05)
    state = geco.initial_state(dtype=x.dtype)
    for _ in range(num_steps):
        violation = constraint(x)
        optimizer.zero_grad()
        geco.lagrangian(loss(x), violation, state).backward()
        optimizer.step()
        state = geco.update(state, violation)
    return x.item(), state


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-14)])
@pytest.mark.parametrize("rate, decay", [(0.1, 0.0), (0.3, 0.5), (0.02, 0.99)])
@pytest.mark.parametrize("warm_up_steps", [0, 3, 100])
def test_update_follows_its_recursion(
    dtype: torch.dtype, tolerance: float, rate: float, decay: float, warm_up_steps: int
) -> None:
    """The average starts at the first constraint; the multiplier moves by exp(ν C̄) once the warm-up is over."""
    geco = GECO(rate, decay, initial_multiplier=2.0, warm_up_steps=warm_up_steps)
    states = run(geco, CONSTRAINTS, dtype)
    average, multiplier = 123.0, 2.0
    for step, constraint in enumerate(CONSTRAINTS):
        average = constraint if step == 0 else decay * average + (1.0 - decay) * constraint
        if step >= warm_up_steps:
            multiplier *= math.exp(rate * average)
        state = states[step + 1]
        assert state.multiplier.dtype == state.constraint_average.dtype == dtype
        assert state.constraint_average.item() == pytest.approx(average, rel=tolerance, abs=tolerance)
        assert state.multiplier.item() == pytest.approx(multiplier, rel=tolerance)
        assert state.num_updates.item() == step + 1


def test_state_before_the_first_update() -> None:
    """The initial multiplier and nothing seen; a dictionary of tensors carries it and gives it back."""
    geco = GECO(rate=0.1, initial_multiplier=3.0)
    state = geco.initial_state()
    assert [value.item() for value in state] == [3.0, 0.0, 0]
    assert [value.dtype for value in state] == [torch.float32, torch.float32, torch.int64]
    assert all(value.shape == () for value in state)
    assert all(value.device.type == "meta" for value in geco.initial_state(device="meta"))
    assert GECOState(**state._asdict()) == state


@pytest.mark.parametrize("constraint, direction", [(2.0, 1), (-2.0, -1), (0.0, 0)])
def test_multiplier_rises_only_while_the_constraint_is_violated(constraint: float, direction: int) -> None:
    """At most zero is feasible; exactly zero leaves the multiplier alone."""
    multipliers = [state.multiplier.item() for state in run(GECO(rate=0.1), [constraint] * 5)]
    for before, after in zip(multipliers, multipliers[1:], strict=False):
        assert (after > before) - (after < before) == direction


def test_average_forms_during_the_warm_up() -> None:
    """The first move after it weighs everything seen so far, and is the same as without a warm-up."""
    warmed = run(GECO(rate=0.1, decay=0.5, warm_up_steps=4), CONSTRAINTS)
    plain = run(GECO(rate=0.1, decay=0.5), CONSTRAINTS)
    assert [state.multiplier.item() for state in warmed[:5]] == [1.0] * 5
    assert warmed[5].multiplier.item() != 1.0
    assert [state.constraint_average for state in warmed] == [state.constraint_average for state in plain]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
def test_multiplier_is_clipped(dtype: torch.dtype, size: float) -> None:
    """However large the constraint, the multiplier ends exactly at a bound, and comes back from it."""
    geco = GECO(rate=1.0, decay=0.0, min_multiplier=0.25, max_multiplier=8.0)
    _, up, _, down, _ = run(geco, [size, -1.0, -size, 1.0], dtype)
    assert up.multiplier.item() == 8.0
    assert down.multiplier.item() == 0.25
    assert geco.update(up, torch.tensor(-1.0, dtype=dtype)).multiplier.item() == pytest.approx(8.0 / math.e)
    assert geco.update(down, torch.tensor(1.0, dtype=dtype)).multiplier.item() == pytest.approx(math.e / 4.0)


@pytest.mark.parametrize("seen", [[], [1.0, -1.0]])
def test_not_a_number_stays_visible(seen: list[float]) -> None:
    """In the loss, in the average and in the multiplier: the clip does not hide it, and it does not go away."""
    geco = GECO(rate=0.1)
    state = run(geco, seen)[-1]
    assert geco.lagrangian(scalar(1.0), scalar(math.nan), state).isnan()
    state = geco.update(state, scalar(math.nan))
    assert state.multiplier.isnan() and state.constraint_average.isnan()
    assert geco.update(state, scalar(1.0)).multiplier.isnan()


@pytest.mark.parametrize("num_updates, average", [(0, 2.0), (5, 0.9 * 7.0 + 0.1 * 2.0)])
def test_value_of_the_lagrangian(num_updates: int, average: float) -> None:
    """Loss + λ C̄: the multiplier from before the step, and the average with the step's own constraint in it."""
    state = make_state(multiplier=3.0, constraint_average=7.0, num_updates=num_updates)
    value = GECO(rate=10.0, decay=0.9).lagrangian(scalar(11.0), scalar(2.0), state)
    assert value.item() == pytest.approx(11.0 + 3.0 * average, rel=1e-15)


@pytest.mark.parametrize("num_updates", [0, 5])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_gradient_of_the_lagrangian(num_updates: int, decay: float) -> None:
    """∇loss + λ ∇constraint, whatever the average; the state gets none."""
    parameters = torch.randn(5, dtype=torch.float64, requires_grad=True)
    loss, constraint = parameters.pow(2).sum(), (parameters.exp() - 0.5).mean()
    multiplier, average = scalar(3.0).requires_grad_(), scalar(7.0).requires_grad_()
    state = GECOState(multiplier, average, torch.tensor(num_updates))
    geco = GECO(rate=10.0, decay=decay)
    geco.lagrangian(loss, constraint, state).backward()
    expected = 2.0 * parameters.detach() + 3.0 * parameters.detach().exp() / 5.0
    torch.testing.assert_close(parameters.grad, expected, rtol=1e-14, atol=0)
    assert multiplier.grad is None and average.grad is None
    assert not any(value.requires_grad for value in geco.update(state, constraint))


def test_inputs_are_only_read() -> None:
    """Neither a state nor a constraint changes, and the new state shares no storage with them."""
    geco = GECO(rate=0.1, warm_up_steps=2)
    state, constraint = make_state(2.0, 1.0, 1), scalar(4.0)
    before = [value.clone() for value in (*state, constraint)]
    geco.lagrangian(scalar(1.0), constraint, state)
    for found in (state, geco.initial_state(dtype=torch.float64)):
        updated = geco.update(found, constraint)
        assert not {value.data_ptr() for value in updated} & {value.data_ptr() for value in (*found, constraint)}
    assert all(map(torch.equal, before, (*state, constraint)))


def test_state_keeps_its_dtype() -> None:
    """A constraint in another precision leaves the state as a checkpoint or a recorded step knows it."""
    geco = GECO(rate=0.1)
    state = geco.update(geco.update(geco.initial_state(), scalar(0.1)), scalar(0.2))
    assert [value.dtype for value in state] == [torch.float32, torch.float32, torch.int64]


def train_step(geco: GECO, x: Tensor, state: GECOState) -> tuple[Tensor, GECOState]:
    """Returns the Lagrangian of a small problem and the next state."""
    constraint = 1.0 - x.mean()
    return geco.lagrangian(x.pow(2).sum(), constraint, state), geco.update(state, constraint)


@pytest.mark.usefixtures("as_a_user")
def test_step_compiles_into_one_graph() -> None:
    """Without a break and once for all steps: the warm start and the warm-up are decided on the device."""
    geco = GECO(rate=0.1, warm_up_steps=2)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(train_step, backend=keep, fullgraph=True)
    state = expected_state = geco.initial_state(dtype=torch.float64)
    for _ in range(5):
        x = torch.randn(3, dtype=torch.float64)
        loss, state = compiled(geco, x, state)
        expected_loss, expected_state = train_step(geco, x, expected_state)
        torch.testing.assert_close((loss, *state), (expected_loss, *expected_state))
    assert len(graphs) == 1


def test_step_reads_no_value() -> None:
    """Fake tensors have none: to read one would make a GPU wait."""
    geco = GECO(rate=0.1, warm_up_steps=2)
    with FakeTensorMode():
        state = geco.initial_state()
        for _ in range(3):
            loss, state = train_step(geco, torch.ones(3), state)
        assert loss.shape == ()


def test_step_maps_over_seeds() -> None:
    """With states and parameters stacked, each seed is as if alone."""
    geco, x = GECO(rate=0.1, warm_up_steps=1), torch.randn(3, 4, dtype=torch.float64)
    states = [run(geco, CONSTRAINTS[:seed])[-1] for seed in range(3)]
    stacked = GECOState(*map(torch.stack, zip(*states, strict=True)))
    losses, updated = torch.func.vmap(lambda x, state: train_step(geco, x, state))(x, stacked)
    for seed, state in enumerate(states):
        loss, expected = train_step(geco, x[seed], state)
        torch.testing.assert_close((losses[seed], *(value[seed] for value in updated)), (loss, *expected))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_active_constraint_finds_its_lagrange_multiplier(decay: float) -> None:
    """Minimise x² where x is at least 1: x = 1, and 2x = λ."""
    x, state = descend(GECO(rate=0.02, decay=decay), lambda x: x**2, lambda x: 1.0 - x, num_steps=2_000)
    assert x == pytest.approx(1.0, abs=1e-6)
    assert state.multiplier.item() == pytest.approx(2.0, abs=1e-6)
    assert state.constraint_average.item() == pytest.approx(0.0, abs=1e-6)


def test_inactive_constraint_loses_its_weight() -> None:
    """Minimise (x - 2)² where x is at least 1: x = 2, as without the constraint, and λ as low as it may be."""
    x, state = descend(GECO(rate=0.05), lambda x: (x - 2.0) ** 2, lambda x: 1.0 - x, num_steps=500)
    assert state.multiplier.item() == 1e-6
    assert x == pytest.approx(2.0 + 0.5e-6, abs=1e-8)
    assert state.constraint_average.item() == pytest.approx(-1.0, abs=0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rate": 0.0}, "GECO.rate must be above 0, got 0.0"),
        ({"rate": math.inf}, "GECO.rate must be a finite number, got inf"),
        ({"decay": 1.0}, "GECO.decay must be at least 0 and below 1, got 1.0"),
        ({"decay": -0.1}, "GECO.decay must be at least 0 and below 1, got -0.1"),
        ({"decay": math.nan}, "GECO.decay must be a finite number, got nan"),
        ({"min_multiplier": 0.0}, "GECO.min_multiplier must be above 0, got 0.0"),
        ({"max_multiplier": 1e-7}, "GECO.max_multiplier must be at least 1e-06, got 1e-07"),
        (
            {"initial_multiplier": 2e6},
            "GECO.initial_multiplier must be at least 1e-06 and at most 1e+06, got 2000000.0",
        ),
        ({"initial_multiplier": 0.0}, "GECO.initial_multiplier must be at least 1e-06 and at most 1e+06, got 0.0"),
        ({"warm_up_steps": -1}, "GECO.warm_up_steps must be an integer of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    """The message names the argument and its value, when GECO is built."""
    with pytest.raises(ArgumentError) as error:
        GECO(**{"rate": 0.1, **arguments})
    assert str(error.value) == message


def test_bounds_must_fit_the_dtype() -> None:
    """A clip that the dtype rounds to infinity or to zero would not hold."""
    with pytest.raises(ArgumentError, match=r"the range of torch.float16, got 0.01 and 1000000.0"):
        GECO(rate=0.1, min_multiplier=0.01).initial_state(dtype=torch.float16)
    with pytest.raises(ArgumentError, match=r"the range of torch.float32, got 1e-50 and 1000000.0"):
        GECO(rate=0.1, min_multiplier=1e-50).initial_state()
    assert GECO(rate=0.1, min_multiplier=1e-50).initial_state(dtype=torch.float64).multiplier.item() == 1.0


@pytest.mark.usefixtures("as_a_user")
def test_only_means_over_the_batch_are_taken() -> None:
    """One value for each example would silently make one multiplier for each."""
    geco = GECO(rate=0.1)
    state = geco.initial_state()
    with pytest.raises(ArgumentError, match=r"constraint must be a scalar, its mean over the batch, got shape \(4,\)"):
        geco.update(state, torch.ones(4))
    with pytest.raises(ArgumentError, match=r"constraint must be a scalar"):
        geco.lagrangian(torch.tensor(1.0), torch.ones(4), state)
    with pytest.raises(ArgumentError, match=r"loss must be a scalar, its mean over the batch, got shape \(4, 1\)"):
        geco.lagrangian(torch.ones(4, 1), torch.tensor(1.0), state)
