"""Objective, training step, resumption and loop."""

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from popgen.errors import ArgumentError
from popgen.losses import elbo
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow, PlanarFlow
from popgen.nn.priors import GaussianMixturePrior, StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior
from popgen.optim.schedules import Constant, CosineAnnealing, SigmoidAnnealing, WarmUp
from popgen.training import checkpoints
from popgen.training.checks import check_can_skip
from popgen.training.loop import Hooks, train
from popgen.training.objectives import LossOutput, NegativeELBO, Objective
from popgen.training.state import TrainState, initial_state, model_with_weights, state_from_tensors, state_to_tensors
from popgen.training.step import make_train_step
from popgen.training.update import Update

FLOWS = {
    "none": lambda: None,
    "sylvester": lambda: HouseholderSylvesterFlow(4, 12, num_flows=2, num_reflections=3),
    "planar": lambda: PlanarFlow(4, 12, num_flows=2),
}
PRIORS = {
    "standard": StandardNormalPrior,
    "mixture": lambda: GaussianMixturePrior(5, 4),
    "vamp": lambda: VampPrior(16, num_components=5),
}


def fused_adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, fused=True)


def tiny_vae(flow: str = "none", prior: str = "standard", seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return VAE(GaussianEncoder(16, 4, 12), BernoulliDecoder(4, 16, 12), PRIORS[prior](), FLOWS[flow]())


def batch_of(step: int) -> torch.Tensor:
    return torch.rand(6, 16, generator=torch.Generator().manual_seed(step)).round()


def assert_same(first, second) -> None:
    """Bit for bit, through nested dictionaries and lists."""
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def test_objective_is_the_annealed_bound():
    vae = tiny_vae("sylvester", "vamp")
    batch, noise = batch_of(0), torch.randn(3, 6, 4)
    objective = NegativeELBO(beta=SigmoidAnnealing(rate=0.1), num_samples=3)
    settings = {name: torch.tensor(value) for name, value in objective.settings(step=7).items()}
    loss, metrics, changes = objective(vae, batch, noise, settings, {})
    assert changes == {}
    terms = vae(batch, noise)
    beta = 2 * (1 / (1 + math.exp(-0.7)) - 0.5)
    bound = elbo(terms.log_p_x_given_z, terms.log_p_z, terms.log_q_z_given_x, beta)
    assert loss.item() == pytest.approx(-bound.mean().item(), rel=1e-6)
    assert metrics["elbo"].item() == pytest.approx(terms.log_w.mean().item(), rel=1e-5)
    assert metrics["beta"].item() == pytest.approx(beta)
    assert metrics["kl"].item() == pytest.approx((terms.log_q_z_given_x - terms.log_p_z).mean().item(), abs=1e-4)
    assert all(not value.requires_grad and value.ndim == 0 for value in metrics.values())
    assert objective.draw_noise(vae, batch, torch.Generator()).shape == (3, 6, 4)


@pytest.mark.usefixtures("as_a_user")
def test_objective_arguments():
    with pytest.raises(ArgumentError, match=r"NegativeELBO.beta .* got 0.5"):
        NegativeELBO(beta=0.5)
    with pytest.raises(ArgumentError, match="num_samples"):
        NegativeELBO(num_samples=0)


def test_step_equals_plain_autograd_and_optimizer_in_float64():
    vae = tiny_vae("sylvester", "vamp").double()
    state = initial_state(vae, lambda parameters: torch.optim.Adam(parameters, lr=1e-2), seed=3)
    step = make_train_step(vae, NegativeELBO(beta=Constant(0.5)), weight_average_decay=0.5)
    plain = model_with_weights(vae, state.parameters, state.buffers).requires_grad_(True)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    average = {name: p.detach().clone() for name, p in plain.named_parameters()}
    noise_generator = torch.Generator()
    noise_generator.set_state(state.generators["posterior noise"].get_state())
    for index in range(5):
        batch = batch_of(index).double()
        state, metrics = step(state, batch)
        noise = torch.randn(1, 6, 4, generator=noise_generator, dtype=torch.float64)
        terms = plain(batch, noise)
        loss = -(terms.log_p_x_given_z - 0.5 * (terms.log_q_z_given_x - terms.log_p_z)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in plain.parameters()))
        optimizer.step()
        decay = min(0.5, (1 + index) / (10 + index))
        assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-12)
        assert metrics["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-10)
        for name, p in plain.named_parameters():
            torch.testing.assert_close(state.parameters[name].detach(), p.detach(), rtol=1e-10, atol=1e-12)
            average[name] = decay * average[name] + (1 - decay) * p.detach()
            torch.testing.assert_close(state.weight_average[name], average[name], rtol=1e-10, atol=1e-12)
    assert state.step == 5


def test_step_leaves_the_model_and_the_global_random_state_alone():
    vae = tiny_vae()
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    state = initial_state(vae, torch.optim.Adam, seed=0)
    random_state = torch.get_rng_state()
    state, _ = make_train_step(vae, NegativeELBO())(state, batch_of(0))
    assert torch.equal(random_state, torch.get_rng_state())
    for name, p in vae.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    assert any(not torch.equal(state.parameters[name], before[name]) for name in before)


def test_gradients_are_clipped_to_the_largest_norm():
    def updated(max_norm: float | None) -> tuple[dict, float]:
        vae = tiny_vae()
        state = initial_state(vae, lambda parameters: torch.optim.SGD(parameters, lr=1.0), seed=0)
        first = {name: p.detach().clone() for name, p in state.parameters.items()}
        state, metrics = make_train_step(vae, NegativeELBO(), max_gradient_norm=max_norm)(state, batch_of(0))
        return {n: p.detach() - first[n] for n, p in state.parameters.items()}, metrics["gradient_norm"].item()

    free, norm = updated(None)
    clipped, reported = updated(norm / 4)
    assert reported == pytest.approx(norm), "the norm before clipping is reported"
    for name in free:
        torch.testing.assert_close(clipped[name], free[name] / 4, rtol=1e-3, atol=1e-6)
    for factor in (1.5, 3.0):
        below, _ = updated(factor * norm)
        assert all(torch.equal(below[name], free[name]) for name in free), "smaller gradients stay as they are"


class ByColumns(Objective):
    """Has a known gradient, which lies in memory column by column where the parameter lies row by row."""

    def draw_noise(self, model, batch, generator):
        return None

    def __call__(self, forward, batch, noise, settings, state):
        loss = (forward() * batch).sum()
        return LossOutput(loss, {"loss": loss.detach()})


@pytest.mark.parametrize("fused", [False, True])
def test_each_weight_moves_by_its_own_gradient_however_it_lies_in_memory(fused: bool):
    """Fused kernels go by memory alone, and torch.autograd.grad promises nothing of it."""

    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self):
            return self.weight.t() * 1.0

    model, batch = Transposed(), torch.randn(4, 3)
    state = initial_state(model, functools.partial(torch.optim.SGD, lr=0.5, fused=fused), seed=0)
    before = state.parameters["weight"].detach().clone()
    (gradient,) = torch.autograd.grad((model() * batch).sum(), model.weight)
    assert gradient.stride() != model.weight.stride(), "or else nothing is tested"
    state, _ = make_train_step(model, ByColumns())(state, batch)
    torch.testing.assert_close(state.parameters["weight"].detach(), before - 0.5 * batch.t())


@pytest.mark.parametrize(("flow", "prior"), list(itertools.product(FLOWS, PRIORS)))
def test_every_pair_trains_and_resumes_bit_for_bit(flow, prior, tmp_path):
    vae = tiny_vae(flow, prior)
    step = make_train_step(vae, NegativeELBO(beta=SigmoidAnnealing(rate=0.3)))

    def advance(state, until):
        while state.step < until:
            state, metrics = step(state, batch_of(state.step))
        return state, metrics

    whole, expected = advance(initial_state(vae, fused_adam, seed=0), 4)
    half, _ = advance(initial_state(vae, fused_adam, seed=0), 2)
    checkpoints.save(tmp_path / "half.ckpt", state_to_tensors(dataclasses.replace(half, best_loss=1.5, best_step=2)))
    other = tiny_vae(flow, prior, seed=9)  # nothing may be left of what the state was restored into
    restored = state_from_tensors(checkpoints.load(tmp_path / "half.ckpt"), initial_state(other, fused_adam, 9))
    assert (restored.best_loss, restored.best_step) == (1.5, 2)
    resumed, metrics = advance(restored, 4)
    assert_same(metrics, expected)
    tensors = [state_to_tensors(state) for state in (resumed, whole)]
    for each in tensors:
        del each["best_loss"], each["best_step"]
    assert_same(*tensors)
    first = dict(tiny_vae(flow, prior).named_parameters())
    for name, p in whole.parameters.items():
        assert not torch.equal(p, first[name]), f"{name} did not move"


def test_averaging_may_be_switched_on_and_off_between_runs():
    with_average = initial_state(tiny_vae(), torch.optim.Adam, seed=0)
    without = initial_state(tiny_vae(), torch.optim.Adam, seed=0, average_weights=False)
    tensors = [state_to_tensors(state) for state in (with_average, without)]
    fresh = [initial_state(tiny_vae(), torch.optim.Adam, seed=0, average_weights=flag) for flag in (False, True)]
    assert state_from_tensors(tensors[0], fresh[0]).weight_average is None
    assert_same(state_from_tensors(tensors[1], fresh[1]).weight_average, tensors[1]["parameters"])


NOTHING_SKIPPED = {"skipped_steps": torch.tensor(0.0), "skipped_in_a_row": torch.tensor(0.0)}


class Calls:
    """Hooks that write down when they were called."""

    def __init__(self, log_every: int, eval_every: int, checkpoint_every: int) -> None:
        self.logged: dict[int, dict[str, float]] = {}
        self.evaluated: list[int] = []
        self.saved: list[int] = []
        self.hooks = Hooks(
            log_every,
            self.logged.__setitem__,
            eval_every,
            lambda state: self.evaluated.append(state.step) or state,
            checkpoint_every,
            lambda state: self.saved.append(state.step),
        )


def test_loop_calls_each_hook_when_it_says():
    vae = tiny_vae()
    calls = Calls(log_every=3, eval_every=4, checkpoint_every=5)
    draw_batch = lambda step, generator: batch_of(step)  # noqa: E731
    state = initial_state(vae, torch.optim.Adam, seed=0)
    state = train(state, make_train_step(vae, NegativeELBO()), draw_batch, 11, calls.hooks)
    assert state.step == 11
    assert list(calls.logged) == [3, 4, 5, 6, 8, 9, 10, 11]
    assert calls.evaluated == [4, 8, 11]
    assert calls.saved == [5, 10, 11]


def test_loop_logs_the_mean_since_the_last_time():
    losses = iter(range(1, 7))

    def step(state, batch):
        metrics = {"loss": torch.tensor(float(next(losses))), "gradient_norm": torch.tensor(1.0)}
        return dataclasses.replace(state, step=state.step + 1), metrics | NOTHING_SKIPPED

    calls = Calls(2, 100, 100)
    state = initial_state(tiny_vae(), torch.optim.Adam, seed=0)
    train(state, step, lambda step, generator: batch_of(step), 6, calls.hooks)
    assert [means["loss"] for means in calls.logged.values()] == [1.5, 3.5, 5.5]
    assert all(means["steps_per_second"] > 0 for means in calls.logged.values())


class WithBuffers(nn.Module):
    """A linear map of what is left of the input after two buffers and a frozen scale."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 1)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("centre", torch.zeros(16))
        self.register_buffer("untouched", torch.full((3,), 5.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.scale * (x - self.centre))


class Changing(Objective):
    """Moves the model's centre to the batch's mean and doubles its scale, and counts what it has seen."""

    def __init__(self, **others: Tensor) -> None:
        self.others = others

    def draw_noise(self, model, batch, generator):
        return None

    def initial_state(self, reference: Tensor) -> dict[str, Tensor]:
        return {"seen": torch.zeros((), dtype=torch.int64), "mean": torch.zeros(())}

    def __call__(self, forward, batch, noise, settings, state):
        loss = forward(batch).square().mean()
        changes = {
            "seen": state["seen"] + len(batch),
            "mean": loss,
            "centre": batch.mean(0),
            "scale": 2 * batch[0, 0] + 1,
        }
        metrics = {"loss": loss.detach(), "seen_before": state["seen"].float()}
        return LossOutput(loss, metrics, {**changes, **self.others})


def test_what_an_objective_changes_is_found_by_the_next_step():
    """Its own state, buffers of the model and what is frozen there; the gradient is that of the values before."""
    model, objective = WithBuffers(), Changing()
    state = initial_state(model, torch.optim.SGD, 0, auxiliary=objective.initial_state(torch.zeros(())))
    places = {name: tensor.data_ptr() for name, tensor in (state.buffers | state.auxiliary).items()}
    step, centre, scale = make_train_step(model, objective), torch.zeros(16), 1.0
    for index in range(4):
        weight, bias = (state.parameters[f"linear.{name}"].detach().clone() for name in ("weight", "bias"))
        state, metrics = step(state, batch_of(index))
        expected = ((scale * (batch_of(index) - centre)) @ weight[0] + bias).square().mean()
        assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        assert metrics["seen_before"] == 6 * index
        centre, scale = batch_of(index).mean(0), 2 * batch_of(index)[0, 0].item() + 1
        assert torch.equal(state.buffers["centre"], centre) and state.buffers["scale"] == scale
        assert state.auxiliary["seen"] == 6 * (index + 1)
        assert state.auxiliary["mean"].item() == metrics["loss"].item() and not state.auxiliary["mean"].requires_grad
        assert state.buffers["untouched"].tolist() == [5.0] * 3
    assert {name: tensor.data_ptr() for name, tensor in (state.buffers | state.auxiliary).items()} == places
    assert model.centre.tolist() == [0.0] * 16 and model.scale == 1.0, "the model itself stays as it was"


def test_a_change_of_another_shape_is_refused_before_anything_moves():
    model, objective = WithBuffers(), Changing(centre=torch.zeros(1))
    state = initial_state(model, torch.optim.SGD, 0, auxiliary=objective.initial_state(torch.zeros(())))
    with pytest.raises(ArgumentError, match=r"changes 'centre' from shape \(16,\) to \(1,\)"):
        make_train_step(model, objective)(state, batch_of(0))
    assert torch.equal(state.parameters["linear.weight"], model.linear.weight)


def test_a_change_of_nothing_that_there_is_is_refused():
    model = WithBuffers()
    for name in ("center", "linear.weight"):
        objective = Changing(**{name: torch.zeros(16)})
        state = initial_state(model, torch.optim.SGD, 0, auxiliary=objective.initial_state(torch.zeros(())))
        with pytest.raises(ArgumentError) as caught:
            make_train_step(model, objective)(state, batch_of(0))
        assert str(caught.value) == (
            f"the objective changes '{name}', which is neither its own state (seen, mean) nor a buffer of the model "
            "(scale, centre, untouched)"
        )


@pytest.mark.parametrize(
    "factory", [torch.optim.SGD, torch.optim.Adam, functools.partial(torch.optim.Adam, fused=True)]
)
def test_a_scheduled_learning_rate_is_that_of_torchs_scheduler(factory) -> None:
    """The rates of every step, the parameters they lead to, and an optimizer whose own rate stays what it was."""
    schedule = WarmUp(CosineAnnealing(0.1, 0.0, num_steps=6), num_steps=3)
    objective, batches = NegativeELBO(), [batch_of(seed) for seed in range(8)]
    vae = tiny_vae()
    state = initial_state(vae, functools.partial(factory, lr=5.0), seed=0)
    step = make_train_step(vae, objective, learning_rate=schedule)
    other = initial_state(vae, functools.partial(factory, lr=1.0), seed=0)
    plain = make_train_step(vae, objective)
    rates = torch.optim.lr_scheduler.LambdaLR(other.optimizer, schedule)
    for batch in batches:
        state, metrics = step(state, batch)
        other, _ = plain(other, batch)
        assert metrics["learning_rate"].item() == pytest.approx(schedule(state.step - 1), rel=1e-6)
        assert state.optimizer.param_groups[0]["lr"] == 5.0
        rates.step()
    for name, parameter in state.parameters.items():
        torch.testing.assert_close(parameter, other.parameters[name], rtol=1e-5, atol=1e-6)


# --- skipped steps ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scaled(Changing):
    """Multiplies the loss of some steps by something, or has a gradient that is not finite although the loss is."""

    scales: dict[int, float] = dataclasses.field(default_factory=dict)
    infinite_gradient_at: int | None = None
    others: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def settings(self, step: int) -> dict[str, float]:
        return {"scale": self.scales.get(step, 1.0), "root": float(step == self.infinite_gradient_at)}

    def __call__(self, forward, batch, noise, settings, state):
        loss, metrics, changes = super().__call__(forward, batch, noise, settings, state)
        loss = loss * settings["scale"]
        if settings["root"]:  # a root whose value is 0 and whose derivative is infinite
            loss = loss + (loss - loss.detach()).sqrt()
        return (
            loss,
            metrics | {"loss": loss.detach()},
            {name: value * settings["scale"] for name, value in changes.items()},
        )


OPTIMIZERS = {
    "Adam": functools.partial(torch.optim.Adam, lr=0.01),
    "fused Adam": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
    "fused AdamW": functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True, fused=True),
    "momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "fused momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "fused Adagrad": functools.partial(torch.optim.Adagrad, lr=0.01, fused=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01),
}


def steps_of(objective: Scaled, optimizer, batches: list[Tensor], **arguments):
    """Returns the state before and after each step, as copies, and the metrics."""
    torch.manual_seed(0)
    model = WithBuffers()
    state = initial_state(model, optimizer, 0, auxiliary=objective.initial_state(torch.zeros(())))
    step, tensors, history = make_train_step(model, objective, **arguments), [], []
    for batch in [*batches, None]:
        tensors.append(copy.deepcopy(state_to_tensors(state)))
        if batch is not None:
            state, metrics = step(state, batch)
            history.append(metrics)
    return tensors, history


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_leaves_everything_as_it_was(optimizer: str, bad: int, max_norm: float | None) -> None:
    """And the steps after it are those of a run that never saw its batch, bit for bit."""
    batches = [batch_of(index) for index in range(5)]
    for objective in (Scaled({bad: math.nan}), Scaled({bad: math.inf}), Scaled(infinite_gradient_at=bad)):
        found, metrics = steps_of(objective, OPTIMIZERS[optimizer], batches, max_gradient_norm=max_norm)
        good = batches[:bad] + batches[bad + 1 :]
        expected, _ = steps_of(Scaled(), OPTIMIZERS[optimizer], good, max_gradient_norm=max_norm)
        for name in ("parameters", "buffers", "auxiliary", "weight_average"):
            assert_same(found[bad + 1][name], found[bad][name])
            if name != "weight_average":  # whose decay follows the number of the step
                assert_same(found[-1][name], expected[-1][name])
        assert_same(found[-1]["optimizer"], expected[-1]["optimizer"])
        assert [int(tensors["skipped"]["total"]) for tensors in found] == [int(i > bad) for i in range(6)]
        assert [int(each["skipped_in_a_row"]) for each in metrics] == [int(i == bad) for i in range(5)]
        assert not math.isfinite(metrics[bad]["gradient_norm"])


def updated(state: TrainState, update: Update, loss: float, *gradients: Tensor | None) -> None:
    with torch.no_grad():
        update([state], [torch.tensor(loss)], [gradients], torch.tensor(0.0), None)


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_in_which_a_weight_first_has_a_gradient_leaves_the_others(fused: bool) -> None:
    adam, gradient = functools.partial(torch.optim.Adam, lr=0.1, fused=fused), torch.full((3,), 0.5)
    model = nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(3)})
    state, update = initial_state(model, adam, 0), Update()
    for _ in range(5):
        updated(state, update, 1.0, gradient, None)
    kept = state.optimizer.state[state.parameters["a"]]
    before = copy.deepcopy(kept)
    updated(state, update, math.nan, gradient, gradient)
    assert before["step"] == 5.0 and before["exp_avg"].abs().min() > 0.1
    assert_same(kept, before)
    updated(state, update, 1.0, None, gradient)
    alone = initial_state(nn.ParameterDict({"b": torch.ones(3)}), adam, 0)
    updated(alone, update, 1.0, gradient)
    assert torch.equal(state.parameters["b"], alone.parameters["b"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_has_the_precision_of_the_gradients(name: str) -> None:
    """Fused kernels divide by a float32, which is not exact for gradients of float64."""
    model = nn.ParameterDict({"a": torch.linspace(-1.0, 1.0, 7, dtype=torch.float64)})
    state, reference = initial_state(model, OPTIMIZERS[name], 0), OPTIMIZERS[name](model.parameters())
    for index in range(5):
        gradient = torch.randn(7, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        updated(state, Update(max_gradient_norm=0.3), 1.0, gradient)
        model["a"].grad = gradient * (0.3 / gradient.norm())
        reference.step()
    torch.testing.assert_close(state.parameters["a"], model["a"], rtol=1e-13, atol=1e-14)


def test_steps_skipped_in_a_row_are_counted() -> None:
    objective = Scaled({step: math.nan for step in (1, 2, 4)})
    tensors, metrics = steps_of(objective, torch.optim.Adam, [batch_of(index) for index in range(6)])
    assert [int(each["skipped_in_a_row"]) for each in metrics] == [0, 1, 2, 0, 1, 0]
    assert [int(each["skipped_steps"]) for each in metrics] == [0, 1, 2, 2, 3, 3]
    assert {name: int(count) for name, count in tensors[-1]["skipped"].items()} == {"total": 3, "in a row": 0}


def test_a_gradient_above_the_limit_skips_the_step() -> None:
    batches = [batch_of(index) for index in range(4)]
    _, free = steps_of(Scaled({2: 1e3}), torch.optim.SGD, batches)
    norms = [metrics["gradient_norm"].item() for metrics in free]
    limit = 20 * max(norms[:2])
    assert norms[2] > 5 * limit
    tensors, metrics = steps_of(Scaled({2: 1e3}), torch.optim.SGD, batches, skip_gradient_norm=limit)
    assert [int(each["skipped_steps"]) for each in metrics] == [0, 0, 1, 1]
    assert_same(tensors[3]["parameters"], tensors[2]["parameters"])


def test_counts_and_metrics_since_the_last_point_are_in_the_checkpoint(tmp_path) -> None:
    state = initial_state(tiny_vae(), fused_adam, seed=0)
    step = make_train_step(tiny_vae(), NegativeELBO())
    for index in range(3):
        state, metrics = step(state, batch_of(index))
        state.recent.append(metrics)
    state.skipped["total"].fill_(7)
    checkpoints.save(tmp_path / "some.ckpt", state_to_tensors(state))
    restored = state_from_tensors(checkpoints.load(tmp_path / "some.ckpt"), initial_state(tiny_vae(), fused_adam, 1))
    assert_same(restored.recent, state.recent)
    assert restored.skipped["total"] == 7 and restored.skipped["in a row"] == 0


def test_a_checkpoint_from_before_steps_were_skipped_is_read() -> None:
    tensors = state_to_tensors(initial_state(tiny_vae(), fused_adam, seed=0))
    older = {name: value for name, value in tensors.items() if name not in ("skipped", "recent")}
    restored = state_from_tensors(older, initial_state(tiny_vae(), fused_adam, seed=1))
    assert restored.recent == [] and restored.skipped["total"] == 0
    assert_same({name: p.detach() for name, p in restored.parameters.items()}, tensors["parameters"])


def test_on_a_gpu_only_an_optimizer_that_can_be_told_may_skip() -> None:
    for name, factory in OPTIMIZERS.items():
        optimizer, gpu = factory([nn.Parameter(torch.zeros(1))]), torch.device("cuda")
        check_can_skip(optimizer, torch.device("cpu"))
        if name == "fused Adagrad":  # whether it can be told depends on the version of torch
            continue
        if name.startswith("fused"):
            check_can_skip(optimizer, gpu)
        else:
            with pytest.raises(ArgumentError, match="cannot be told on a GPU .* fused = True .*max_skipped_steps = 0"):
                check_can_skip(optimizer, gpu)
