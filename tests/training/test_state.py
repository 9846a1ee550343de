"""What a checkpoint may be loaded into, and what of it counts when the configuration has changed since."""

import dataclasses
import functools
import itertools
import math
import pathlib

import pytest
import torch
from torch import Tensor, nn

from popgen.errors import ArgumentError, CheckpointError
from popgen.training import checkpoints
from popgen.training.objectives import LossOutput, Objective
from popgen.training.state import (
    TrainState,
    check_same_tensors,
    initial_state,
    model_with_weights,
    state_from_tensors,
    state_to_tensors,
)
from popgen.training.step import make_train_step

OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adafactor")


class WithBuffer(nn.Module):
    """A linear map of centred inputs, with a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.unused = nn.Parameter(torch.ones(4))
        self.register_buffer("centre", torch.full((3,), 0.5))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.linear(x - self.centre) + noise


class Squares(Objective):
    """The mean square of the output, with a little noise of its own."""

    def draw_noise(self, model: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        return 0.1 * torch.randn(len(batch), 2, generator=generator)

    def __call__(self, forward, batch: Tensor, noise: Tensor, settings, state):
        loss = forward(batch, noise).square().mean()
        return LossOutput(loss, {"loss": loss.detach()})


def advance(state: TrainState, num_steps: int) -> tuple[TrainState, list[float]]:
    step, rates = make_train_step(WithBuffer(), Squares()), []
    for _ in range(num_steps):
        state, metrics = step(state, torch.rand(5, 3, generator=torch.Generator().manual_seed(state.step)))
        rates.append(metrics["learning_rate"].item())
    return state, rates


def through_a_file(state: TrainState, folder: pathlib.Path) -> dict:
    checkpoints.save(folder / "state.ckpt", state_to_tensors(state))
    return checkpoints.load(folder / "state.ckpt")


def test_the_initial_state_is_a_copy() -> None:
    model = WithBuffer()
    state = initial_state(model, torch.optim.SGD, seed=0)
    assert (state.step, state.best_loss, state.best_step) == (0, math.inf, 0)
    for named, tensors in ((model.named_parameters(), state.parameters), (model.named_buffers(), state.buffers)):
        for name, tensor in named:
            assert torch.equal(tensor, tensors[name]) and tensor.data_ptr() != tensors[name].data_ptr()
    for name, average in state.weight_average.items():
        assert torch.equal(average, state.parameters[name]) and not average.requires_grad
        assert average.data_ptr() != state.parameters[name].data_ptr()
    assert initial_state(model, torch.optim.SGD, seed=0, average_weights=False).weight_average is None


def test_random_streams_differ_by_purpose_and_seed() -> None:
    states = [initial_state(WithBuffer(), torch.optim.SGD, seed) for seed in (0, 1)]
    draws = [tuple(torch.rand(4, generator=g).tolist()) for state in states for g in state.generators.values()]
    assert len(set(draws)) == len(draws) == 4


def test_a_step_replaces_the_frozen_state() -> None:
    state = initial_state(WithBuffer(), torch.optim.Adam, seed=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = 3
    after, _ = advance(state, 1)
    assert after is not state and (state.step, after.step) == (0, 1)
    assert torch.equal(after.parameters["unused"], torch.ones(4)), "what has no gradient stays as it is"
    assert torch.equal(after.buffers["centre"], torch.full((3,), 0.5))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_resumes_bit_for_bit(optimizer: str, tmp_path: pathlib.Path) -> None:
    factory = functools.partial(getattr(torch.optim, optimizer), lr=0.01)
    model = WithBuffer()
    whole, _ = advance(initial_state(model, factory, seed=0), 6)
    half, _ = advance(initial_state(model, factory, seed=0), 3)
    resumed, _ = advance(state_from_tensors(through_a_file(half, tmp_path), initial_state(WithBuffer(), factory, 5)), 3)
    for name in whole.parameters:
        assert torch.equal(whole.parameters[name], resumed.parameters[name])
        assert torch.equal(whole.weight_average[name], resumed.weight_average[name])


@pytest.mark.parametrize("saved, wanted", list(itertools.permutations(OPTIMIZERS, 2)))
def test_another_optimizer_is_refused_by_name(saved: str, wanted: str, tmp_path: pathlib.Path) -> None:
    state, _ = advance(initial_state(WithBuffer(), functools.partial(getattr(torch.optim, saved), lr=0.1), 0), 2)
    tensors = through_a_file(state, tmp_path)
    with pytest.raises(CheckpointError, match=rf"of another optimizer: {saved}, where the experiment has {wanted}\b"):
        state_from_tensors(tensors, initial_state(WithBuffer(), getattr(torch.optim, wanted), 0))


def test_options_that_were_changed_since_count_and_others_are_kept(tmp_path: pathlib.Path) -> None:
    """A run that is continued under a new learning rate takes it; what the optimizer itself has changed stays."""
    factory = functools.partial(torch.optim.Adam, lr=0.1, betas=(0.8, 0.9))
    state, rates = advance(initial_state(WithBuffer(), factory, 0), 2)
    assert rates == pytest.approx([0.1, 0.1])
    state.optimizer.param_groups[0]["eps"] = 0.125  # as an optimizer with a schedule of its own would
    changed = functools.partial(torch.optim.Adam, lr=0.02, betas=(0.8, 0.9))
    restored = state_from_tensors(through_a_file(state, tmp_path), initial_state(WithBuffer(), changed, 0))
    group = restored.optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.9), 0.125)
    moments = restored.optimizer.state[restored.parameters["linear.weight"]]
    expected = state.optimizer.state[state.parameters["linear.weight"]]
    assert torch.equal(moments["exp_avg"], expected["exp_avg"]) and moments["step"] == 2
    assert advance(restored, 1)[1] == pytest.approx([0.02])


def test_options_of_one_group_that_were_changed_since_count(tmp_path: pathlib.Path) -> None:
    """They stand in no default of the optimizer."""

    def factory(parameters: list[Tensor], decay: float, rate: float) -> torch.optim.Optimizer:
        first, *others = parameters
        return torch.optim.AdamW([{"params": [first], "weight_decay": decay}, {"params": others, "lr": rate}])

    state, _ = advance(initial_state(WithBuffer(), functools.partial(factory, decay=0.5, rate=0.1), 0), 2)
    state.optimizer.param_groups[1]["eps"] = 0.125
    changed = initial_state(WithBuffer(), functools.partial(factory, decay=0.0, rate=0.2), 0)
    restored = state_from_tensors(through_a_file(state, tmp_path), changed)
    first, others = restored.optimizer.param_groups
    assert (first["weight_decay"], others["lr"], others["eps"]) == (0.0, 0.2, 0.125)
    again = state_from_tensors(through_a_file(restored, tmp_path), changed)
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.0


def test_another_model_is_refused_by_the_names_of_its_tensors() -> None:
    class Renamed(WithBuffer):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(3, 5)
            del self.unused

    class Wider(WithBuffer):
        def __init__(self) -> None:
            super().__init__()
            self.centre = torch.zeros(4)

    tensors = state_to_tensors(initial_state(WithBuffer(), torch.optim.SGD, 0))
    with pytest.raises(CheckpointError, match=r"another model: other.bias: absent in the checkpoint, \(5,\) in the"):
        state_from_tensors(tensors, initial_state(Renamed(), torch.optim.SGD, 0))
    with pytest.raises(CheckpointError, match=r"centre: \(3,\) in the checkpoint, \(4,\) in the model"):
        state_from_tensors(tensors, initial_state(Wider(), torch.optim.SGD, 0))


def test_long_lists_of_differences_are_cut() -> None:
    with pytest.raises(CheckpointError, match="^the checkpoint is of another model: a: .*; b: .*; c: .*; and 2 more$"):
        check_same_tensors({name: torch.zeros(1) for name in "abcde"}, {})


def test_random_state_of_another_kind_of_device_is_refused() -> None:
    tensors = state_to_tensors(initial_state(WithBuffer(), torch.optim.SGD, 0))
    tensors["generators"] = {name: state[:16] for name, state in tensors["generators"].items()}  # as long as CUDA's
    with pytest.raises(CheckpointError, match="another kind of device.*cpu.*Experiment.device"):
        state_from_tensors(tensors, initial_state(WithBuffer(), torch.optim.SGD, 0))


def test_a_restored_state_shares_nothing_with_the_checkpoint() -> None:
    tensors = state_to_tensors(initial_state(WithBuffer(), torch.optim.Adam, 0))
    restored = state_from_tensors(tensors, initial_state(WithBuffer(), torch.optim.Adam, 1))
    before = {name: tensor.clone() for name, tensor in tensors["weight_average"].items()}
    advance(restored, 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors["weight_average"].items())


def test_a_model_with_other_weights_is_a_copy_for_evaluation() -> None:
    model = WithBuffer().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = {name: torch.full_like(p, 2.0) for name, p in model.named_parameters()}
    loaded = model_with_weights(model, parameters, {"centre": torch.zeros(3)})
    assert torch.equal(loaded(torch.ones(1, 3), torch.zeros(1, 2)), torch.full((1, 2), 8.0))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- what is not trained by the optimizer ----------------------------------------------------------------------------


class Frozen(WithBuffer):
    """The same with a bias that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear.bias.requires_grad_(False)


def test_frozen_parameters_are_kept_but_neither_trained_nor_averaged(tmp_path: pathlib.Path) -> None:
    model = Frozen()
    state = initial_state(model, functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.5), seed=0)
    assert set(state.parameters) == set(state.weight_average) == {"linear.weight", "unused"}
    assert set(state.buffers) == {"linear.bias", "centre"} and not state.buffers["linear.bias"].requires_grad
    assert state.buffers["linear.bias"].data_ptr() != model.linear.bias.data_ptr()
    assert [p.shape for p in state.optimizer.param_groups[0]["params"]] == [(4,), (2, 3)]
    step = make_train_step(model, Squares())
    for _ in range(3):
        state, _ = step(state, torch.rand(5, 3))
    assert torch.equal(state.buffers["linear.bias"], model.linear.bias)
    assert not torch.equal(state.parameters["linear.weight"], model.linear.weight)
    restored = state_from_tensors(through_a_file(state, tmp_path), initial_state(Frozen(), torch.optim.SGD, 1))
    assert torch.equal(restored.buffers["linear.bias"], model.linear.bias)
    loaded = model_with_weights(Frozen(), restored.parameters, restored.buffers)
    assert torch.equal(loaded.linear.bias, model.linear.bias)


def test_a_checkpoint_in_which_another_part_was_trained_is_refused() -> None:
    tensors = state_to_tensors(initial_state(Frozen(), torch.optim.SGD, 0))
    with pytest.raises(
        CheckpointError, match=r"another model: linear.bias: absent in the checkpoint, \(2,\) in the model"
    ):
        state_from_tensors(tensors, initial_state(WithBuffer(), torch.optim.SGD, 0))


def test_a_model_in_which_nothing_is_trained_is_refused() -> None:
    for model in (WithBuffer().requires_grad_(False), nn.ReLU()):
        with pytest.raises(ArgumentError, match=f"nothing in {type(model).__name__} is trained"):
            initial_state(model, torch.optim.SGD, seed=0)


def auxiliary(value: float, **others: Tensor) -> dict[str, Tensor]:
    """Returns the state of an objective that counts and keeps an average."""
    return {"average": torch.full((2,), value), "count": torch.tensor(int(value)), **others}


@pytest.mark.parametrize("name", ["centre", "linear.bias"])
def test_an_objective_may_not_have_names_of_the_models_buffers(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"must not have names of the model's buffers: \['{name}'\]"):
        initial_state(Frozen(), torch.optim.SGD, 0, auxiliary=auxiliary(1.0, **{name: torch.zeros(3)}))


def test_the_objectives_state_is_restored(tmp_path: pathlib.Path) -> None:
    state = initial_state(WithBuffer(), torch.optim.SGD, 0, auxiliary=auxiliary(3.0))
    template = initial_state(WithBuffer(), torch.optim.SGD, 0, auxiliary=auxiliary(8.0))
    restored = state_from_tensors(through_a_file(state, tmp_path), template)
    assert restored.auxiliary.keys() == {"average", "count"}
    assert restored.auxiliary["average"].tolist() == [3.0, 3.0] and restored.auxiliary["count"] == 3
    assert restored.auxiliary["count"].dtype == torch.int64
    restored.auxiliary["average"].zero_()
    assert state.auxiliary["average"].tolist() == [3.0, 3.0]


def test_a_checkpoint_of_another_objective_is_refused_and_one_of_before_there_were_any_is_read() -> None:
    def fresh(own: dict[str, Tensor] | None = None) -> TrainState:
        return initial_state(WithBuffer(), torch.optim.SGD, 0, auxiliary=own)

    without, with_one = (state_to_tensors(fresh(own)) for own in (None, auxiliary(3.0)))
    earlier = {name: value for name, value in without.items() if name != "auxiliary"}
    assert state_from_tensors(earlier, fresh()).auxiliary == {} == state_from_tensors(without, fresh()).auxiliary
    wrong_shape = auxiliary(3.0) | {"average": torch.zeros(5)}
    for tensors, own, message in (
        (earlier, auxiliary(3.0), r"average: absent in the checkpoint, \(2,\) in the objective; count: absent"),
        (without, auxiliary(3.0), r"average: absent in the checkpoint, \(2,\) in the objective; count: absent"),
        (with_one, None, r"average: \(2,\) in the checkpoint, absent in the objective; count: "),
        (with_one, wrong_shape, r"average: \(2,\) in the checkpoint, \(5,\) in the objective$"),
    ):
        with pytest.raises(CheckpointError, match=f"^the checkpoint is of another objective: {message}"):
            state_from_tensors(tensors, fresh(own))
