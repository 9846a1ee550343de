"""Replicas side by side against the same runs alone: tensors, moments, counts, random states and metrics."""

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from popgen.datasets.data import Batches
from popgen.datasets.images import TrainBatches
from popgen.datasets.sequences import Sequences, WindowBatches
from popgen.distributions import Bernoulli
from popgen.distributions.codes import CategoricalOutput
from popgen.errors import ArgumentError, DivergedError
from popgen.models.cpc import CPC
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.models.vqvae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder, VQVAEWithPrior
from popgen.models.wavenet import WaveNet
from popgen.nn.cpc import CausalConvContext, GRUContext, LinearPredictors, StridedConvEncoder, TransformerPredictors
from popgen.nn.flows import HouseholderSylvesterFlow, PlanarFlow
from popgen.nn.pixelcnn import GatedPixelCNN
from popgen.nn.priors import GaussianMixturePrior, StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior
from popgen.nn.vqvae import GradientQuantiser, MovingAverageQuantiser, ResidualQuantiser
from popgen.optim.geco import GECO
from popgen.optim.schedules import CosineAnnealing, SigmoidAnnealing
from popgen.training.captured_step import WARM_UP_STEPS, CapturedStep
from popgen.training.importance_objectives import DoublyReparameterisedIWAE, NegativeIWAE, StickingTheLanding
from popgen.training.objectives import ConstrainedELBO, NegativeELBO, Objective, VQVAELoss
from popgen.training.replicas import (
    ReplicatedBatches,
    ReplicatedState,
    check_can_map,
    make_replicated_step,
    mean_metrics_of_replicas,
    split_states,
    stack,
    stack_states,
)
from popgen.training.sequence_objectives import ContrastiveLoss, NegativeLogLikelihood
from popgen.training.state import TrainState, initial_state, state_from_tensors, state_to_tensors
from popgen.training.step import TrainStep, make_train_step

SEEDS = (4, 5, 6)
TOLERANCE = 1e-9
FUSED_ADAM = functools.partial(torch.optim.Adam, lr=1e-2, fused=True)


def vae(prior: Callable[[], nn.Module], flow: Callable[[], nn.Module | None] = lambda: None) -> VAE:
    return VAE(GaussianEncoder(16, 4, 12), BernoulliDecoder(4, 16, 12), prior(), flow())


def vqvae(quantiser: nn.Module) -> VQVAE:
    encoder, decoder = (part(3, (4, 4), 4, 1) for part in (ConvolutionalEncoder, ConvolutionalDecoder))
    return VQVAE(encoder, quantiser, decoder)


def sylvester() -> nn.Module:
    return HouseholderSylvesterFlow(4, 12, num_flows=2, num_reflections=3)


def planar() -> nn.Module:
    return PlanarFlow(4, 12, num_flows=2)


def vamp() -> nn.Module:
    return VampPrior(16, 5)


def mixture() -> nn.Module:
    return GaussianMixturePrior(5, 4)


def cpc(context: nn.Module, predictors: nn.Module, negatives: str = "batch", label: str | None = None) -> CPC:
    encoder = StridedConvEncoder(6, kernel_sizes=(4, 2), strides=(2, 1))
    return CPC(encoder, context, predictors, negatives, num_negatives=7, label=label)


ANNEALED = SigmoidAnnealing(rate=0.1)
# A code that is revived twice, at one vector, leaves a tie that rounding decides: hence no revival of residual codes.
KINDS: dict[str, Callable[[], tuple[Any, Objective]]] = {
    "vamp sylvester": lambda: (vae(vamp, sylvester), NegativeELBO(ANNEALED)),
    "standard": lambda: (vae(StandardNormalPrior), NegativeELBO(ANNEALED, num_samples=2)),
    "mixture planar": lambda: (vae(mixture, planar), NegativeELBO()),
    "constrained reconstruction": lambda: (vae(vamp), ConstrainedELBO(GECO(rate=0.1), "reconstruction", -5.0)),
    "constrained kl": lambda: (vae(vamp, planar), ConstrainedELBO(GECO(rate=0.1, warm_up_steps=5), "kl", 1.0)),
    "path derivative": lambda: (vae(vamp, sylvester), StickingTheLanding(ANNEALED)),
    "importance weighted": lambda: (vae(mixture, sylvester), NegativeIWAE(ANNEALED, num_samples=3)),
    "doubly reparameterised": lambda: (vae(vamp, planar), DoublyReparameterisedIWAE(ANNEALED, num_samples=3)),
    "moving average": lambda: (vqvae(MovingAverageQuantiser(4, 3, decay=0.8)), VQVAELoss()),
    "residual": lambda: (vqvae(ResidualQuantiser(2, 4, 3, decay=0.8, least_usage=0.0)), VQVAELoss()),
    "learned codes": lambda: (vqvae(GradientQuantiser(4, 3)), VQVAELoss()),
    "prior over codes": lambda: (
        VQVAEWithPrior(vqvae(MovingAverageQuantiser(4, 3)), GatedPixelCNN(4, (1, 1), hidden_dim=4, num_layers=2)),
        NegativeELBO(),
    ),
    "wavenet": lambda: (
        WaveNet(CategoricalOutput(), 6, 8, num_layers=3, dilation_cycle=3, classes={"speaker": 2}),
        NegativeLogLikelihood(),
    ),
    "contrastive recurrent": lambda: (cpc(GRUContext(6, 8), LinearPredictors(8, 6, num_steps=3)), ContrastiveLoss()),
    "contrastive attention": lambda: (
        cpc(CausalConvContext(6, 8, num_layers=2), TransformerPredictors(8, 6, num_steps=2), "speaker", "speaker"),
        ContrastiveLoss(),
    ),
}
QUICK = ("vamp sylvester", "constrained reconstruction")


@pytest.fixture(autouse=True)
def float64():
    """Everything is formed in float64, where rounding does not hide a mistake."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batches_of(model: Any, seed: int) -> Batches:
    """Returns batches of grey images, binarised at every visit, or of windows of waveforms."""
    generator = torch.Generator().manual_seed(1)
    if not isinstance(model, WaveNet | CPC):
        return TrainBatches(torch.randint(0, 256, (20, 16), generator=generator, dtype=torch.uint8), 6, seed)
    values = torch.rand(800, generator=generator) - 0.5
    return WindowBatches(Sequences(values, torch.full((20,), 40), {"speaker": torch.arange(20) % 2}), 30, 6, seed)


def setting(
    kind: str = "standard", optimizer: Callable[..., torch.optim.Optimizer] = FUSED_ADAM, **options: Any
) -> tuple[TrainStep, list[TrainState], list[Batches]]:
    """Returns a step, and the first state and the batches of each replica."""
    states, batches = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model, objective = KINDS[kind]()
        auxiliary = objective.initial_state(next(model.parameters()))
        states.append(initial_state(model, optimizer, seed, auxiliary=auxiliary))
        batches.append(batches_of(model, seed))
    settings = {"weight_average_decay": 0.99, "max_gradient_norm": 3.0} | options
    return make_train_step(model, objective, **settings), states, batches


def alone(step: TrainStep, state: TrainState, batches: Batches, num_steps: int) -> list[dict[str, Tensor]]:
    """Returns the metrics of each step; the state is changed in place, its own number of steps apart."""
    history = []
    for _ in range(num_steps):
        state, metrics = step(state, batches.draw(state.step, state.generators["binarisation"]))
        history.append(metrics)
    return history


def assert_same(replica: TrainState, other: TrainState, tolerance: float = TOLERANCE) -> None:
    """Everything that `step` does not count: tensors, moments, counts and random states."""
    compare = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for group in ("parameters", "weight_average", "buffers", "auxiliary", "skipped"):
        first, second = getattr(replica, group), getattr(other, group)
        assert list(first) == list(second)
        for name in first:
            compare(first[name].detach(), second[name].detach(), msg=lambda text, name=name: f"{name}: {text}")
    moments = [state.optimizer.state_dict()["state"] for state in (replica, other)]
    assert moments[0].keys() == moments[1].keys()
    for index, kept in moments[0].items():
        for name, value in kept.items():
            compare(value, moments[1][index][name])
    for name, generator in replica.generators.items():
        assert torch.equal(generator.get_state(), other.generators[name].get_state()), name


def assert_replicas_equal_runs_alone(num_steps: int, *arguments: Any, **options: Any) -> None:
    step, states, batches = setting(*arguments, **options)
    expected = [alone(step, state, own, num_steps) for state, own in zip(states, batches, strict=True)]
    step, others, batches = setting(*arguments, **options)
    first = {name: tensor.detach().clone() for name, tensor in others[1].parameters.items()}
    state = stack_states(others)
    history = alone(make_replicated_step(step), state, ReplicatedBatches(batches), num_steps)
    for replica, (one, metrics) in enumerate(zip(states, expected, strict=True)):
        assert_same(split_states(state)[replica], one)
        for found, wanted in zip(history, metrics, strict=True):
            assert list(found) == list(wanted)
            for name in found:
                torch.testing.assert_close(
                    found[name][replica], wanted[name], rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True
                )
    assert any(not torch.equal(tensor, first[name]) for name, tensor in states[1].parameters.items())
    assert len({metrics[-1]["loss"].item() for metrics in expected}) == len(SEEDS)


@pytest.mark.parametrize("kind", QUICK)
def test_a_replica_among_others_is_the_run_alone(kind: str) -> None:
    assert_replicas_equal_runs_alone(100, kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in QUICK])
def test_every_kind_of_model_prior_flow_and_objective_maps(kind: str) -> None:
    assert_replicas_equal_runs_alone(4, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_for_a_hundred_steps(kind: str) -> None:
    assert_replicas_equal_runs_alone(100, kind)


def assert_compiled_replicas_equal_plain_ones(kind: str, capsys) -> None:
    ends = []
    for compiled in (False, True):
        step, states, batches = setting(kind)
        state = stack_states(states)
        metrics = alone(make_replicated_step(step, compiled), state, ReplicatedBatches(batches), 4)[-1]
        ends.append((split_states(state), metrics))
    assert "torch.compile is not used" not in capsys.readouterr().err
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        assert_same(one, other)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=TOLERANCE, atol=TOLERANCE)


def test_compiled_replicas_equal_plain_ones(capsys) -> None:
    assert_compiled_replicas_equal_plain_ones("standard", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_replicas_is_compiled(kind: str, capsys) -> None:
    assert_compiled_replicas_equal_plain_ones(kind, capsys)


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.Adam, lr=1e-2),
        functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
        torch.optim.Adafactor,  # mixes the elements of a tensor
    ],
)
def test_any_optimizer_steps_as_it_does_alone(optimizer: Callable) -> None:
    assert_replicas_equal_runs_alone(10, "standard", optimizer)


def test_learning_rate_and_limits_are_those_of_each() -> None:
    """A limit that clips some, and one that skips some."""
    schedule = CosineAnnealing(1e-2, 0.0, 20)
    assert_replicas_equal_runs_alone(10, "standard", learning_rate=schedule, max_gradient_norm=0.1)
    step, states, batches = setting("standard")
    norms = torch.stack([row["gradient_norm"] for row in alone(step, states[0], batches[0], 10)])
    assert_replicas_equal_runs_alone(10, "standard", skip_gradient_norm=norms.median().item())


def test_products_of_reduced_precision() -> None:
    """The same step within bfloat16's rounding; products of float64 would not be reduced."""
    torch.set_default_dtype(torch.float32)
    step, states, batches = setting("vamp sylvester", precision="bf16")
    expected = [alone(step, state, own, 3)[-1] for state, own in zip(states, batches, strict=True)]
    step, others, batches = setting("vamp sylvester", precision="bf16")
    found = alone(make_replicated_step(step), stack_states(others), ReplicatedBatches(batches), 3)[-1]
    for replica, metrics in enumerate(expected):
        assert found["loss"][replica].item() == pytest.approx(metrics["loss"].item(), rel=2e-2)


# --- skipped steps ---------------------------------------------------------------------------------------------------


class SometimesNan(Batches):
    """Batches with a value that is not a number at one step."""

    def __init__(self, batches: Batches, step: int) -> None:
        self.batches, self.step = batches, step

    def draw(self, step: int, generator: torch.Generator) -> Tensor:
        batch = self.batches.draw(step, generator)
        return torch.full_like(batch, torch.nan) if step == self.step else batch


@pytest.mark.parametrize("bad", [0, 3], ids=["first", "later"])
@pytest.mark.parametrize(
    "optimizer",
    [FUSED_ADAM, functools.partial(torch.optim.Adam, lr=1e-2), functools.partial(torch.optim.SGD, lr=1e-2)],
    ids=["fused", "adam", "sgd"],
)
def test_a_replica_skips_its_own_steps_alone(optimizer: Callable, bad: int) -> None:
    """Its moments, their count, its average and its multiplier are those of the run alone; the others never notice."""
    kind = "constrained kl"
    step, states, batches = setting(kind, optimizer)
    batches[1] = SometimesNan(batches[1], bad)
    for state, own in zip(states, batches, strict=True):
        alone(step, state, own, 6)
    step, others, batches = setting(kind, optimizer)
    batches[1] = SometimesNan(batches[1], bad)
    state = stack_states(others)
    history = alone(make_replicated_step(step), state, ReplicatedBatches(batches), 6)
    for one, other in zip(split_states(state), states, strict=True):
        assert_same(one, other)
    assert history[-1]["skipped_steps"].tolist() == [0, 1, 0]
    assert history[bad]["skipped_in_a_row"].tolist() == [0, 1, 0]
    assert torch.isfinite(history[bad]["loss"]).tolist() == [True, False, True]


# --- checkpoints, graphs, refusals, means ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vamp sylvester", "constrained kl", "moving average"])
def test_states_survive_a_checkpoint_bit_for_bit(kind: str) -> None:
    def advance(state: ReplicatedState, step: TrainStep, batches: list[Batches], until: int) -> ReplicatedState:
        while state.step < until:
            state, metrics = step(state, ReplicatedBatches(batches).draw(state.step, state.generators["binarisation"]))
            state.recent.append(metrics)
        return state

    plain, states, batches = setting(kind)
    step = make_replicated_step(plain)
    whole = advance(stack_states(states), step, batches, 5)
    _, others, _ = setting(kind)
    half = split_states(advance(stack_states(others), step, batches, 3))
    tensors = [copy.deepcopy(state_to_tensors(one)) for one in half]
    assert [one["step"] for one in tensors] == [3, 3, 3]
    _, fresh, _ = setting(kind)
    restored = stack_states([state_from_tensors(*one) for one in zip(tensors, fresh, strict=True)])
    assert restored.step == 3 and len(restored.recent) == 3
    resumed = advance(restored, step, batches, 5)
    for one, other in zip(split_states(resumed), split_states(whole), strict=True):
        assert_same(one, other, tolerance=0.0)
        assert [sorted(row) for row in one.recent] == [sorted(row) for row in other.recent]
        assert all(torch.equal(a[name], b[name]) for a, b in zip(one.recent, other.recent, strict=True) for name in a)


def test_a_recorded_step_of_replicas_equals_the_plain_one() -> None:
    """With a stand-in for the CUDA graph, which repeats the work on the very same tensors."""
    recorded: list[Any] = []

    def record(work: Callable, generators: Any) -> tuple[Callable, dict[str, Tensor]]:
        recorded.append(list(generators))
        metrics: dict[str, Tensor] = {}

        def replay() -> None:
            for name, value in work().items():
                metrics.setdefault(name, value.clone()).copy_(value)

        return replay, metrics

    plain, states, batches = setting("constrained kl")
    expected = stack_states(states)
    alone(make_replicated_step(plain), expected, ReplicatedBatches(batches), 8)
    _, others, _ = setting("constrained kl")
    state, joint = stack_states(others), ReplicatedBatches(batches)
    captured = CapturedStep(make_replicated_step(plain), joint, record)
    for _ in range(8):
        state, metrics = captured(state, joint.indices(state.step))
    assert len(recorded) == 1 and len(recorded[0]) == 2 * len(SEEDS)
    assert metrics["loss"].shape == (3,) and WARM_UP_STEPS < 8
    for one, other in zip(split_states(state), split_states(expected), strict=True):
        assert_same(one, other, tolerance=0.0)


class LooksAtValues(GRUContext):
    """Leaves the frames as they are if they are small, which several replicas cannot decide together."""

    def forward(self, frames: Tensor) -> Tensor:
        return super().forward(frames if frames.abs().max().item() < 1.0 else frames.tanh())


def test_what_cannot_be_mapped_is_refused_in_one_line() -> None:
    model, objective = cpc(LooksAtValues(6, 8), LinearPredictors(8, 6, num_steps=3)), ContrastiveLoss()
    state = stack_states([initial_state(model, torch.optim.Adam, seed) for seed in SEEDS])
    step = make_replicated_step(make_train_step(model, objective))
    message = (
        r"^Experiment.num_replicas: CPC with ContrastiveLoss cannot be mapped over replicas \(.*item.*\): train one "
    )
    with pytest.raises(ArgumentError, match=message) as error:
        check_can_map(step, state, 3, [make_train_step(model, objective)] * len(SEEDS))
    assert "\n" not in str(error.value)


class Wired(torch.nn.Module):
    """A decoder with weights of its seed that are neither parameters nor a buffer, unless it is said to."""

    latent_dim = 2

    def __init__(self, as_buffer: bool) -> None:
        super().__init__()
        self.out = torch.nn.Linear(5, 12)
        if as_buffer:
            self.register_buffer("wires", torch.randn(2, 5))
        else:
            self.wires = torch.randn(2, 5)

    def forward(self, z: Tensor) -> Bernoulli:
        return Bernoulli(self.out(torch.tanh(z @ self.wires)))


@pytest.mark.parametrize("as_buffer", [True, False])
def test_models_that_differ_in_more_than_their_tensors_are_refused(as_buffer: bool) -> None:
    """All replicas are trained by the code of one."""
    models = [VAE(GaussianEncoder(12, 2, 8), Wired(as_buffer), StandardNormalPrior()) for _ in SEEDS]
    seeded = zip(models, SEEDS, strict=True)
    state = stack_states([initial_state(model, torch.optim.Adam, seed) for model, seed in seeded])
    alone = [make_train_step(model, NegativeELBO()) for model in models]
    refused = pytest.raises(ArgumentError, match="the VAE of replica 1 differs from that of replica 0 in more than its")
    with contextlib.nullcontext() if as_buffer else refused:
        check_can_map(make_replicated_step(alone[0]), state, 4, alone)


def test_the_trial_leaves_the_states_as_they_were() -> None:
    plain, states, _ = setting("moving average")
    _, others, _ = setting("moving average")
    state = stack_states(states)
    check_can_map(make_replicated_step(plain), state, 6, [plain] * len(SEEDS))
    for one, other in zip(split_states(state), others, strict=True):
        assert_same(one, other, tolerance=0.0)


def test_a_step_of_replicas_takes_nothing_else() -> None:
    step, states, batches = setting()
    with pytest.raises(ArgumentError, match="takes a ReplicatedState, got TrainState"):
        make_replicated_step(step)(states[0], [batches[0].draw(0, torch.Generator())])


def test_means_name_the_replica_that_diverged() -> None:
    def row(loss: float, in_a_row: float) -> dict[str, Tensor]:
        one = {"loss": 1.0, "gradient_norm": 2.0, "skipped_steps": 0.0, "skipped_in_a_row": 0.0}
        other = {"loss": loss, "gradient_norm": 2.0, "skipped_steps": in_a_row, "skipped_in_a_row": in_a_row}
        return stack([{name: torch.tensor(value) for name, value in each.items()} for each in (one, other)])

    means = mean_metrics_of_replicas([row(3.0, 0.0), row(torch.nan, 1.0)], step=8, max_skipped_steps=1)
    assert means == {"loss": 2.0, "gradient_norm": 2.0, "skipped_steps": 0.5}
    assert means.each[1] == {"loss": 3.0, "gradient_norm": 2.0, "skipped_steps": 1.0}
    with pytest.raises(DivergedError, match="^replica 1: the loss became nan at step 8") as error:
        mean_metrics_of_replicas([row(3.0, 0.0), row(torch.nan, 1.0)], step=8, max_skipped_steps=0)
    assert (error.value.step, error.value.replica) == (8, 1)
