"""The update in one piece against the optimizer's own step; a CPU stands in for the GPU on which it is used."""

import dataclasses
import functools

import pytest
import torch

from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.vamp_prior import VampPrior
from popgen.optim.schedules import CosineAnnealing
from popgen.training.objectives import NegativeELBO
from popgen.training.replicas import make_replicated_step, split_states, stack_states, unstack
from popgen.training.state import TrainState, initial_state
from popgen.training.step import TrainStep, make_train_step
from popgen.training.update import Update, can_be_traced, traced_update

OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "fused Adam": functools.partial(torch.optim.Adam, fused=True),
    "AdamW": functools.partial(torch.optim.AdamW, weight_decay=0.1, amsgrad=True),
    "NAdam": torch.optim.NAdam,
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5),
}
NUM_STEPS, NOT_FINITE, TOO_LARGE = 8, 5, 6


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small operations cost their launch; and optimizers that count on the device are let to do so on a CPU."""
    monkeypatch.setattr("popgen.training.update.is_launch_bound", lambda tensor: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def setting(optimizer, **options) -> tuple[TrainStep, TrainState]:
    torch.manual_seed(0)
    flow = HouseholderSylvesterFlow(4, 12, 2, 3)
    vae = VAE(GaussianEncoder(16, 4, 12), BernoulliDecoder(4, 16, 12), VampPrior(16, 5), flow).double()
    step = make_train_step(vae, NegativeELBO(), weight_average_decay=0.9, max_gradient_norm=0.5, **options)
    return step, initial_state(vae, optimizer, seed=0)


def run(step: TrainStep, state: TrainState) -> tuple[TrainState, list[dict]]:
    history = []
    for number in range(NUM_STEPS):
        batch = torch.rand(10, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        state, metrics = step(state, {NOT_FINITE: torch.nan, TOO_LARGE: 5.0}.get(number, 1.0) * batch)
        history.append(metrics)
    return state, history


def assert_same(one: tuple[TrainState, list[dict]], other: tuple[TrainState, list[dict]], tolerance: float) -> None:
    compare = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, equal_nan=True)
    for group in ("parameters", "weight_average", "skipped"):
        for name, tensor in getattr(one[0], group).items():
            compare(tensor, getattr(other[0], group)[name])
    for leaf, twin in zip(one[0].parameters.values(), other[0].parameters.values(), strict=True):
        kept, others = one[0].optimizer.state[leaf], other[0].optimizer.state[twin]
        assert list(kept) == list(others) != []
        for name in kept:
            compare(kept[name], others[name])
    for metrics, others in zip(one[1], other[1], strict=True):
        for name in metrics:
            compare(metrics[name], others[name])


def without_compiler(step: TrainStep) -> TrainStep:
    """Returns the step whose update is that in one piece, as plain code."""
    update = traced_update(step.parameter_update)
    return dataclasses.replace(step, parameter_update=dataclasses.replace(update, on_tensors=update.on_tensors.plain))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("has_schedule", [False, True])
def test_the_update_in_one_piece_is_the_optimizers_own(name: str, has_schedule: bool, request) -> None:
    """Clipping, moments, counts, average and learning rate, with a step that is not finite and one that is too large.

    Counts are float32 on a device, and so is what corrects the first moments for their bias.
    """
    options = {"skip_gradient_norm": 10.0, "learning_rate": CosineAnnealing(1e-3, 1e-4, 10) if has_schedule else None}
    plain = run(*setting(OPTIMIZERS[name], **options))
    request.getfixturevalue("as_on_a_gpu")
    step, state = setting(OPTIMIZERS[name], **options)
    one_piece = run(without_compiler(step), state)
    assert_same(one_piece, plain, tolerance=1e-4)
    assert plain[0].skipped["total"] == 2
    assert [metrics["skipped_in_a_row"].item() for metrics in one_piece[1]] == [0, 0, 0, 0, 0, 1, 2, 0]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_gradients_below_the_limit_stay_as_they_are() -> None:
    """In one piece too: a limit that no step comes near changes nothing."""

    def trained(limit: float | None) -> tuple[TrainState, list[dict]]:
        step, state = setting(torch.optim.Adam)
        update = Update(max_gradient_norm=limit, skip_gradient_norm=None)
        return run(without_compiler(dataclasses.replace(step, parameter_update=update)), state)

    free = trained(None)
    largest = max(float(metrics["gradient_norm"]) for metrics in free[1] if metrics["gradient_norm"].isfinite())
    assert_same(free, trained(1.5 * largest), tolerance=0.0)


def test_it_is_compiled_and_traced(as_on_a_gpu, capsys: pytest.CaptureFixture) -> None:
    step, state = setting(OPTIMIZERS["Adam"], skip_gradient_norm=10.0)
    expected = run(without_compiler(step), state)
    step, state = setting(OPTIMIZERS["Adam"], skip_gradient_norm=10.0)
    update = traced_update(step.parameter_update)
    found = run(dataclasses.replace(step, parameter_update=update), state)
    assert_same(found, expected, tolerance=1e-6)
    assert update.on_tensors.checked and update.on_tensors.chosen is not update.on_tensors.plain
    assert "not used" not in capsys.readouterr().err


def test_replicas_are_updated_in_one_piece(as_on_a_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiled function for all of them, traced once; one replica's step is skipped, and the others' are not."""
    count, traced = 3, []
    monkeypatch.setattr("torch.compile", lambda graph, **_: traced.append(graph) or graph)

    def trained(used) -> tuple[list[TrainState], list[dict]]:
        step, _ = setting(OPTIMIZERS["Adam"], skip_gradient_norm=10.0)
        step = make_replicated_step(dataclasses.replace(step, parameter_update=used(step.parameter_update)))
        models = [setting(OPTIMIZERS["Adam"])[0].model for _ in range(count)]
        state = stack_states([initial_state(model, torch.optim.Adam, seed) for seed, model in enumerate(models)])
        history = []
        for number in range(NUM_STEPS):
            batches = torch.rand(count, 10, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            batches[1] *= torch.nan if number == NOT_FINITE else 1.0
            state, metrics = step(state, list(batches))
            history.append(metrics)
        return split_states(state), [unstack(row, count) for row in history]

    plain, found = trained(lambda update: update), trained(traced_update)
    assert len(traced) == 1
    for index in range(count):
        one, other = ((states[index], [row[index] for row in rows]) for states, rows in (found, plain))
        assert_same(one, other, tolerance=1e-4)
        assert one[0].skipped["total"] == (index == 1)


def test_groups_keep_their_options(as_on_a_gpu) -> None:
    """Each of two groups has its learning rate, and parameters come in another order than the model's."""

    def grouped(parameters):
        first, *rest = parameters
        return torch.optim.Adam([{"params": rest, "lr": 1e-2}, {"params": [first], "lr": 1e-4}])

    plain = run(*setting(grouped))
    step, state = setting(grouped)
    assert_same(run(without_compiler(step), state), plain, tolerance=1e-4)


class OwnAdam(torch.optim.Adam):
    """Not one of PyTorch's."""


def test_what_cannot_be_traced_takes_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def traced_after(optimizer, num_steps: int = 1, used: bool = True) -> bool:
        step, state = setting(optimizer)
        for _ in range(num_steps):
            state, _ = step(state, torch.rand(10, 16, dtype=torch.float64))
        gradients = tuple(torch.zeros_like(leaf) for leaf in state.parameters.values())
        return can_be_traced(state.optimizer, gradients if used else (None, *gradients[1:]))

    assert not traced_after(torch.optim.Adam)  # a CPU's own kernel is as good
    monkeypatch.setattr("popgen.training.update.is_launch_bound", lambda tensor: True)
    assert traced_after(torch.optim.Adam)
    assert not traced_after(torch.optim.Adam, num_steps=0)  # it has made nothing to keep yet
    assert not traced_after(torch.optim.Adam, used=False)
    assert not traced_after(OwnAdam)
    assert not traced_after(functools.partial(torch.optim.SGD, momentum=0.9))  # says not what it can do on a device
