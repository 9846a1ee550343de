"""The recorded step against the plain one: with a stand-in for the graph on a CPU, with the graph itself on a GPU."""

import functools
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from popgen.datasets.data import Batches
from popgen.datasets.images import TrainBatches
from popgen.datasets.sequences import Sequences, WindowBatches
from popgen.distributions.codes import CategoricalOutput
from popgen.errors import TrainingError
from popgen.models.cpc import CPC
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.models.vqvae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder
from popgen.models.wavenet import WaveNet
from popgen.nn.cpc import GRUContext, LinearPredictors, StridedConvEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.vamp_prior import VampPrior
from popgen.nn.vqvae import GradientQuantiser, MovingAverageQuantiser, ResidualQuantiser
from popgen.optim.geco import GECO
from popgen.optim.schedules import CosineAnnealing, SigmoidAnnealing
from popgen.training import captured_step
from popgen.training.captured_step import CapturedStep, record_step
from popgen.training.objectives import ConstrainedELBO, LossOutput, NegativeELBO, VQVAELoss
from popgen.training.sequence_objectives import ContrastiveLoss, NegativeLogLikelihood
from popgen.training.state import TrainState, initial_state
from popgen.training.step import make_train_step

NUM_STEPS = 9
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class StandIn:
    """Records as a graph does: work is gone through once and changes nothing; a replay repeats it on the same tensors.

    Processes exchange nothing within it.

    Args:
        states: of all that the work may change.
    """

    def __init__(self, *states: TrainState) -> None:
        self.states, self.recorded, self.replayed, self.generators = states, 0, 0, []

    def __call__(self, work, generators):
        self.recorded += 1
        self.generators += generators
        changing = [tensor for state in self.states for tensor in tensors_in(state)]
        own = [generator for state in self.states for generator in state.generators.values()]
        before = [tensor.detach().clone() for tensor in changing], [generator.get_state() for generator in own]
        leaves, structure = tree_flatten(without_exchange(work))
        with torch.no_grad():
            for tensor, value in zip(changing, before[0], strict=True):
                tensor.copy_(value)
        for generator, value in zip(own, before[1], strict=True):
            generator.set_state(value)
        results = [torch.full_like(leaf, -1) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

        def replay() -> None:
            self.replayed += 1
            for result, leaf in zip(results, tree_leaves(without_exchange(work)), strict=True):
                if isinstance(leaf, torch.Tensor):
                    result.copy_(leaf)

        return replay, tree_unflatten(results, structure)


def tensors_in(state: TrainState) -> list[torch.Tensor]:
    """Returns all tensors that a step changes."""
    kept = [dict(kept) for kept in state.optimizer.state.values()]
    changing = state.parameters, state.buffers, state.auxiliary, state.weight_average, state.skipped, kept
    return [leaf for leaf in tree_leaves(changing) if isinstance(leaf, torch.Tensor)]


def without_exchange(work):
    """Does some work in which processes must exchange nothing."""
    with mock.patch.multiple(torch.distributed, all_reduce=mock.DEFAULT, all_gather=mock.DEFAULT) as exchanges:
        result = work()
    assert not any(exchange.called for exchange in exchanges.values()), "an exchange is recorded"
    return result


def make_vae() -> VAE:
    return VAE(
        GaussianEncoder(16, 4, 12), BernoulliDecoder(4, 16, 12), VampPrior(16, 5), HouseholderSylvesterFlow(4, 12, 2, 3)
    )


def make_vqvae(quantiser) -> VQVAE:
    encoder, decoder = (part(3, (4, 4), 4, 1) for part in (ConvolutionalEncoder, ConvolutionalDecoder))
    return VQVAE(encoder, quantiser, decoder)


class SometimesNan(NegativeELBO):
    """Has a loss that is not a number in two steps, one of them while warming up."""

    def settings(self, step: int) -> dict[str, float]:
        return {**super().settings(step), "scale": torch.nan if step in (1, 6) else 1.0}

    def __call__(self, forward, batch, noise, settings, state):
        loss, metrics, changes = super().__call__(forward, batch, noise, settings, state)
        return LossOutput(loss * settings["scale"], metrics, changes)


KINDS = {
    "skipping": lambda: (make_vae(), SometimesNan()),
    "annealed": lambda: (make_vae(), NegativeELBO(SigmoidAnnealing(rate=0.3))),
    "reconstruction": lambda: (make_vae(), ConstrainedELBO(GECO(rate=0.1, warm_up_steps=5), "reconstruction", -5.0)),
    "kl": lambda: (make_vae(), ConstrainedELBO(GECO(rate=0.1), "kl", 1.0)),
    "moving average": lambda: (make_vqvae(MovingAverageQuantiser(4, 3, decay=0.8)), VQVAELoss()),
    "residual": lambda: (make_vqvae(ResidualQuantiser(2, 4, 3, decay=0.8)), VQVAELoss()),
    "gradient": lambda: (make_vqvae(GradientQuantiser(4, 3)), VQVAELoss()),
    "contrastive": lambda: (make_cpc("batch"), ContrastiveLoss()),
    "contrastive by speaker": lambda: (make_cpc("speaker"), ContrastiveLoss()),
    "likelihood": lambda: (
        WaveNet(CategoricalOutput(), 6, 8, num_layers=3, dilation_cycle=3, classes={"speaker": 2}),
        NegativeLogLikelihood(),
    ),
}


def make_cpc(negatives: str) -> CPC:
    encoder, context = StridedConvEncoder(6, kernel_sizes=(4, 2), strides=(2, 1)), GRUContext(6, 8)
    label = "speaker" if negatives == "speaker" else None
    return CPC(encoder, context, LinearPredictors(8, 6, num_steps=3), negatives, num_negatives=7, label=label)


def make_batches(model, device: str) -> Batches:
    """Returns batches of grey images, or of windows of waveforms at random speeds."""
    generator = torch.Generator().manual_seed(1)
    if not isinstance(model, CPC | WaveNet):
        levels = torch.randint(0, 256, (20, 16), generator=generator, dtype=torch.uint8)
        return TrainBatches(levels.to(device), 6, seed=0)
    lengths = torch.randint(20, 60, (20,), generator=generator)
    values = torch.rand(int(lengths.sum()), generator=generator) - 0.5
    sequences = Sequences(values, lengths, {"speaker": torch.arange(20) % 2}).to(device)
    return WindowBatches(sequences, 30, 6, seed=0, max_speed=1.3)


def setting(kind: str = "annealed", device: str = "cpu", **options):
    torch.manual_seed(0)
    model, objective = KINDS[kind]()
    model.to(device)
    learning_rate = CosineAnnealing(1e-2, 0.0, NUM_STEPS + 1) if kind == "annealed" else None
    step = make_train_step(
        model, objective, weight_average_decay=0.99, max_gradient_norm=1.0, learning_rate=learning_rate, **options
    )
    adam = functools.partial(torch.optim.Adam, lr=1e-2, fused=True)
    auxiliary = objective.initial_state(next(model.parameters()))
    state = initial_state(model, adam, seed=0, auxiliary=auxiliary)
    return step, make_batches(model, device), state


def run(step, draw_batch, state: TrainState) -> tuple[TrainState, list[dict]]:
    history = []
    for _ in range(NUM_STEPS):
        state, metrics = step(state, draw_batch(state))
        history.append(metrics)
    return state, history


def assert_same(one: tuple[TrainState, list[dict]], other: tuple[TrainState, list[dict]], tolerance: float) -> None:
    compare = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert one[0].step == other[0].step == NUM_STEPS
    for group in ("parameters", "weight_average", "buffers", "auxiliary", "skipped"):
        first, second = (getattr(state, group) for state, _ in (one, other))
        assert list(first) == list(second)
        for name in first:
            compare(first[name], second[name])
    for name, generator in one[0].generators.items():
        assert torch.equal(generator.get_state(), other[0].generators[name].get_state()), name
    for metrics, others in zip(one[1], other[1], strict=True):
        assert list(metrics) == list(others)
        for name in metrics:
            compare(metrics[name], others[name])


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_equal_plain_ones_bit_for_bit(kind: str):
    """Batches, noise, annealing, clipping, averages, GECO, the codebook and every metric, kept after later steps."""
    step, batches, state = setting(kind)
    first = {name: tensor.clone() for name, tensor in (state.buffers | state.auxiliary).items()}
    plain = run(step, lambda state: batches.draw(state.step, state.generators["binarisation"]), state)
    step, batches, state = setting(kind)
    record = StandIn(state)
    captured = run(CapturedStep(step, batches, record), lambda state: batches.indices(state.step), state)
    assert_same(captured, plain, tolerance=0.0)
    assert captured[0].skipped["total"] == (2 if kind == "skipping" else 0)
    assert (record.recorded, record.replayed) == (1, NUM_STEPS - captured_step.WARM_UP_STEPS)
    assert record.generators == list(captured[0].generators.values())
    changing = {"annealed": "beta", "kl": "multiplier", "reconstruction": "constraint_average"}
    assert len({metrics[changing.get(kind, "loss")].item() for metrics in captured[1]}) == NUM_STEPS
    for name, tensor in (captured[0].buffers | captured[0].auxiliary).items():
        assert not torch.equal(tensor, first[name]), f"{name} did not move"


def test_another_state_is_recorded_anew():
    step, batches, state = setting()
    _, _, other = setting()
    record = StandIn(state, other)
    captured = CapturedStep(step, batches, record)
    first = run(captured, lambda state: batches.indices(state.step), state)
    second = run(captured, lambda state: batches.indices(state.step), other)
    assert record.recorded == 2
    assert_same(first, second, tolerance=0.0)


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_equals_plain_steps(kind: str):
    step, batches, state = setting(kind, device="cuda")
    plain = run(step, lambda state: batches.draw(state.step, state.generators["binarisation"]), state)
    step, batches, state = setting(kind, device="cuda")
    captured = run(CapturedStep(step, batches), lambda state: batches.indices(state.step), state)
    assert_same(captured, plain, tolerance=1e-6)


@on_gpu
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("tf32", 5e-2)])
def test_a_compiled_cuda_graph_equals_plain_steps(precision: str, tolerance: float, capsys: pytest.CaptureFixture):
    """Loss and gradients in one graph, products of rows as sums, flows by matrices, the update in one piece."""
    step, batches, state = setting(device="cuda")
    plain = run(step, lambda state: batches.draw(state.step, state.generators["binarisation"]), state)
    step, batches, state = setting(device="cuda", compiled=True, precision=precision)
    captured = run(CapturedStep(step, batches), lambda state: batches.indices(state.step), state)
    assert "not used" not in capsys.readouterr().err
    assert_same(captured, plain, tolerance)


@on_gpu
def test_work_that_waits_for_the_device_is_refused():
    value = torch.zeros(1, device="cuda")
    with pytest.raises(TrainingError, match="set Experiment.cuda_graph = False"):
        record_step(lambda: {"loss": torch.tensor(value.item(), device="cuda")}, [])
