"""Steps that several processes share out against those of one: the same states to rounding, whatever the objective."""

import functools
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.together import results_of
from popgen.datasets.images import TrainBatches
from popgen.datasets.sequences import Sequences, WindowBatches
from popgen.distributed import ALONE, Processes
from popgen.distributions.codes import CategoricalOutput
from popgen.errors import ArgumentError
from popgen.models.cpc import CPC
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.models.vqvae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder
from popgen.models.wavenet import WaveNet
from popgen.nn.cpc import NEGATIVE_KINDS, GRUContext, LinearPredictors, StridedConvEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.priors import StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior
from popgen.nn.vqvae import MovingAverageQuantiser, ResidualQuantiser
from popgen.optim.geco import GECO
from popgen.optim.schedules import SigmoidAnnealing
from popgen.training.captured_step import WARM_UP_STEPS, CapturedStep
from popgen.training.importance_objectives import DoublyReparameterisedIWAE, StickingTheLanding
from popgen.training.objectives import ConstrainedELBO, LossOutput, NegativeELBO, Objective, VQVAELoss
from popgen.training.sequence_objectives import ContrastiveLoss, NegativeLogLikelihood
from popgen.training.state import TrainState, initial_state, state_to_tensors
from popgen.training.step import make_train_step
from tests.training.test_captured_step import StandIn

NUM_STEPS, BATCH_SIZE = 100, 12


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A process that has several threads is not to be forked."""
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports what every child would import


def make_vae(whole: bool = True) -> VAE:
    prior, flow = (VampPrior(16, 5), HouseholderSylvesterFlow(3, 8, 2, 2)) if whole else (StandardNormalPrior(), None)
    return VAE(GaussianEncoder(16, 3, 8), BernoulliDecoder(3, 16, 8), prior, flow)


def make_vqvae(quantiser: Any) -> VQVAE:
    """Returns a model whose maps are 2 × 2: the outer weights of a convolution of 1 × 1 have no gradient but rounding,
    which Adam makes a whole step of.
    """
    encoder, decoder = (part(3, (8, 8), 4, 1) for part in (ConvolutionalEncoder, ConvolutionalDecoder))
    return VQVAE(encoder, quantiser, decoder)


def geco(constraint: str, target: float) -> ConstrainedELBO:
    return ConstrainedELBO(GECO(rate=0.05, decay=0.8, warm_up_steps=3), constraint, target)


def wavenet() -> WaveNet:
    return WaveNet(CategoricalOutput(), 4, 4, num_layers=3, dilation_cycle=3)


def contrastive(negatives: str) -> tuple[CPC, ContrastiveLoss]:
    encoder = StridedConvEncoder(6, kernel_sizes=(3, 2), strides=(2, 1))
    label = "speaker" if negatives == "speaker" else None
    model = CPC(encoder, GRUContext(6, 4), LinearPredictors(4, 6, num_steps=3), negatives, num_negatives=5, label=label)
    return model, ContrastiveLoss()


KINDS: dict[str, Callable[[], tuple[Any, Objective]]] = {
    "vae": lambda: (make_vae(whole=False), NegativeELBO(SigmoidAnnealing(rate=0.1), num_samples=2)),
    "vamp and flow": lambda: (make_vae(), NegativeELBO()),
    "path derivative": lambda: (make_vae(), StickingTheLanding()),
    "doubly reparameterised": lambda: (make_vae(), DoublyReparameterisedIWAE(num_samples=3)),
    "geco, reconstruction": lambda: (make_vae(), geco("reconstruction", -8.0)),
    "geco, kl": lambda: (make_vae(), geco("kl", 1.0)),
    "vqvae": lambda: (make_vqvae(MovingAverageQuantiser(40, 3, decay=0.8, least_usage=0.2)), VQVAELoss()),
    "residual vqvae": lambda: (make_vqvae(ResidualQuantiser(2, 5, 3, decay=0.9)), VQVAELoss()),
    "wavenet": lambda: (wavenet(), NegativeLogLikelihood()),
    **{f"cpc, {kind}": functools.partial(contrastive, kind) for kind in NEGATIVE_KINDS},
}


def make_batches(model: Any) -> TrainBatches | WindowBatches:
    """Returns batches in float64; sequences of unequal lengths, so that parts of a batch have unequal weights."""
    generator = torch.Generator().manual_seed(3)
    if isinstance(model, WaveNet | CPC):
        lengths = torch.randint(3, 30, (31,), generator=generator)
        values = 0.5 * torch.rand(int(lengths.sum()), generator=generator, dtype=torch.float64)
        speakers = {"speaker": torch.randint(0, 4, (31,), generator=generator)}
        return WindowBatches(Sequences(values, lengths, speakers), window=20, batch_size=BATCH_SIZE, seed=0)
    size = model.input_dim
    images = (torch.rand(67, size, generator=generator, dtype=torch.float64) < torch.linspace(0.1, 0.9, size)).double()
    return TrainBatches(images, BATCH_SIZE, seed=0)


def trained(
    kind: Callable[[], tuple[Any, Objective]],
    processes: Processes,
    num_steps: int = NUM_STEPS,
    recorded: bool = False,
    **settings: Any,
) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """Returns the state after some steps, plain or recorded, as a checkpoint has it, and the metrics of every step."""
    torch.manual_seed(0)
    model, objective = kind()
    model = model.double()
    auxiliary = objective.initial_state(next(model.parameters()))
    optimizer = functools.partial(torch.optim.Adam, lr=0.01, fused=True)
    state: TrainState = initial_state(model, optimizer, seed=0, auxiliary=auxiliary)
    step = make_train_step(model, objective, weight_average_decay=0.9, processes=processes, **settings)
    batches, record, history = make_batches(model), StandIn(state), []
    captured = CapturedStep(step, batches, record)
    for _ in range(num_steps):
        if recorded:
            state, metrics = captured(state, batches.indices(state.step))
        else:
            state, metrics = step(state, batches.draw(state.step, state.generators["binarisation"]))
        history.append(metrics)
    pieces = (1 if processes.size == 1 else 2) if recorded else 0
    assert (record.recorded, record.replayed) == (pieces, pieces * (num_steps - WARM_UP_STEPS))
    return state_to_tensors(state), history


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dictionaries and lists, by path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in flat(item, f"{name}/{key}").items()}
    return {name: value}


def assert_agree(found: Any, expected: Any, tolerance: float) -> None:
    """Compares every tensor and number of two states, bit for bit where the tolerance is nought."""
    one, other = flat(found), flat(expected)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(
                value,
                other[name],
                rtol=0,
                atol=tolerance,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        else:
            assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name


SOME = ("vae", "vamp and flow", "doubly reparameterised", "geco, reconstruction", "vqvae", "wavenet", "cpc, batch")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_two_processes_take_the_steps_of_one(name: str) -> None:
    """After 100 steps all of the state and every metric are equal to 1e-9, and the same bits in both processes."""
    first, second = results_of(lambda processes: trained(KINDS[name], processes), size=2)
    assert_agree(first, second, tolerance=0.0)
    expected = trained(KINDS[name], ALONE)
    assert_agree(first, expected, tolerance=1e-9)
    metrics = expected[1]
    assert abs(metrics[-1]["loss"] - metrics[0]["loss"]) > 0.1, "something is learned"
    if name == "vqvae":
        assert sum(row["codes_revived"] for row in metrics) > 20
    if "geco" in name:
        assert len({row["multiplier"].item() for row in metrics}) > 90


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [3, 4])
def test_more_processes_take_the_steps_of_one(name: str, size: int) -> None:
    first, *others = results_of(lambda processes: trained(KINDS[name], processes), size=size)
    for other in others:
        assert_agree(other, first, tolerance=0.0)
    assert_agree(first, trained(KINDS[name], ALONE), tolerance=1e-9)


@pytest.mark.parametrize("name", ["vae", "vamp and flow", "geco, reconstruction", "geco, kl", "vqvae", "wavenet"])
def test_recorded_steps_of_two_processes_are_those_of_one(name: str) -> None:
    """Recorded in two pieces, the same bits as plain steps of two, and those of one to 1e-9."""
    take = functools.partial(trained, KINDS[name], num_steps=40)
    first, second = results_of(functools.partial(take, recorded=True), size=2)
    assert_agree(first, second, tolerance=0.0)
    assert_agree(first, results_of(take, size=2)[0], tolerance=0.0)
    assert_agree(first, take(ALONE), tolerance=1e-9)
    if name == "vqvae":
        assert sum(row["codes_revived"] for row in first[1]) > 5


def test_an_exchange_in_the_midst_of_a_loss_cannot_be_recorded() -> None:
    """The stand-in sees it, and the step says so beforehand."""

    def work(processes: Processes) -> None:
        with pytest.raises(AssertionError, match="an exchange is recorded"):
            trained(KINDS["cpc, batch"], processes, num_steps=5, recorded=True)

    results_of(work, size=2)
    for name, size, expected in (("cpc, batch", 2, True), ("cpc, batch", 1, False), ("wavenet", 2, False)):
        model, objective = KINDS[name]()
        assert make_train_step(model, objective, processes=Processes(0, size)).exchanges_in_loss == expected


@pytest.mark.parametrize("recorded", [False, True])
def test_clipping_is_of_the_gradient_of_the_whole_batch(recorded: bool) -> None:
    take = functools.partial(trained, KINDS["vae"], num_steps=20, max_gradient_norm=0.5)
    found = results_of(functools.partial(take, recorded=recorded), size=2)[0]
    assert_agree(found, take(ALONE), tolerance=1e-9)
    assert all(row["gradient_norm"] > 0.5 for row in found[1])


class NanAtOne(NegativeELBO):
    """Has a loss that is not a number where the first pixel of the last image of a batch is one."""

    def __call__(self, forward, batch, noise, settings, state):
        loss, metrics, observed = super().__call__(forward, batch, noise, settings, state)
        return LossOutput(torch.where(batch[-1, 0] == 1, torch.nan, loss), metrics, observed)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_that_one_process_cannot_take_is_skipped_by_all(recorded: bool) -> None:
    """The loss is not a number in the second process, whose part has the last image."""
    take = functools.partial(trained, lambda: (make_vae(), NanAtOne()), num_steps=40)
    first, second = results_of(functools.partial(take, recorded=recorded), size=2)
    assert_agree(first, second, tolerance=0.0)
    skipped = [int(row["skipped_steps"]) for row in first[1]]
    assert 2 <= skipped[-1] <= 38
    assert all(bool(torch.isfinite(tensor).all()) for tensor in first[0]["parameters"].values())
    by_one = take(ALONE)
    assert [int(row["skipped_steps"]) for row in by_one[1]][-1] > 0
    assert_agree(first[0]["generators"], by_one[0]["generators"], tolerance=0.0)


COMPILED = """
import functools, sys, torch
from benchmarks.together import together
from popgen.distributed import ALONE
from tests.training.test_shared_steps import KINDS, assert_agree, trained

torch.set_num_threads(1)
for name in ("vamp and flow", "vqvae"):
    take = functools.partial(trained, KINDS[name], num_steps=20)
    first, second = together(functools.partial(take, compiled=True), size=2, timeout=300.0)
    assert (first.status, second.status) == (0, 0) and "not used" not in first.said + second.said, first.said
    assert_agree(first.result, second.result, tolerance=0.0)
    assert_agree(first.result, take(ALONE), tolerance=1e-9)

take = functools.partial(trained, KINDS["cpc, batch"], num_steps=20)
shared = together(functools.partial(take, compiled=True), size=2, timeout=300.0)
line = "what several processes exchange in the midst of a loss cannot be compiled"
assert all(one.status == 0 and line in one.said for one in shared), shared[0].said
assert_agree(shared[0].result, take(ALONE), tolerance=1e-9)
"""


@pytest.mark.slow
def test_a_compiled_loss_is_shared_as_a_plain_one() -> None:
    """In a process of its own, without the hook that checks shapes; one that must exchange something stays plain."""
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# --- objectives that cannot be shared --------------------------------------------------------------------------------


class OwnNoise(Objective):
    """Draws noise, and does not say whose it is."""

    def draw_noise(self, model, batch, generator):
        return torch.randn(1, len(batch), model.noise_dim, generator=generator)

    def __call__(self, forward, batch, noise, settings, state):
        return NegativeELBO()(forward, batch, noise, {"beta": 1.0}, state)


class OwnMean(NegativeELBO):
    """Keeps a mean by the third thing it returns, which would be a sum."""

    def initial_state(self, reference: Tensor) -> dict[str, Tensor]:
        return {"mean": torch.zeros_like(reference[..., 0].flatten()[0])}

    def __call__(self, forward, batch, noise, settings, state):
        loss, metrics, _ = super().__call__(forward, batch, noise, settings, state)
        return LossOutput(loss, metrics, {"mean": batch.mean()})


def test_an_objective_must_say_which_part_of_its_noise_is_whose() -> None:
    with pytest.raises(ArgumentError, match=r"OwnNoise cannot be shared by 2 processes: .* \(part_of_noise\)"):
        trained(lambda: (make_vae(), OwnNoise()), Processes(0, 2))


def test_an_objective_must_make_its_own_state_of_sums() -> None:
    with pytest.raises(ArgumentError, match="OwnMean cannot be shared by 2 processes: it must define transition"):
        trained(lambda: (make_vae(), OwnMean()), Processes(0, 2))
    assert math.isfinite(trained(lambda: (make_vae(), OwnMean()), ALONE, num_steps=2)[0]["auxiliary"]["mean"])
