"""The objectives that change more than parameters: GECO's constraint, and the codebook of a VQ-VAE."""

import copy
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import popgen
from popgen import config
from popgen.datasets.images import ImageData
from popgen.errors import ArgumentError, PopgenError
from popgen.experiment import run
from popgen.models.image_model import LogDensities
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.models.vqvae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder, VQVAETerms
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.priors import StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior
from popgen.nn.vqvae import GradientQuantiser, MovingAverageQuantiser, Quantiser, ResidualQuantiser
from popgen.optim.geco import GECO
from popgen.training import checkpoints
from popgen.training.objectives import ConstrainedELBO, NegativeELBO, Objective, VQVAELoss
from popgen.training.run_directory import RunDirectory
from popgen.training.state import TrainState, initial_state, state_from_tensors, state_to_tensors
from popgen.training.step import make_train_step

# Two samples of two images. Means: log p(x|z) -10, log p(z) -4, log q(z|x) -1, log det 0.5; so the KL is 3.
TERMS = LogDensities(
    log_p_x_given_z=torch.tensor([[-4.0, -8.0], [-12.0, -16.0]]),
    log_p_z=torch.tensor([[-1.0, -3.0], [-5.0, -7.0]]),
    log_q_z_given_x=torch.tensor([[-4.0, 2.0], [-2.0, 0.0]]),
    log_det=torch.tensor([[0.0, 0.5], [0.5, 1.0]]),
)
PARTS = {"elbo": -13.0, "reconstruction": -10.0, "kl": 3.0, "log_q_z_given_x": -1.0, "log_p_z": -4.0, "log_det": 0.5}
GECO_STATE = {
    "multiplier": torch.tensor(2.0),
    "constraint_average": torch.tensor(4.0),
    "num_updates": torch.tensor(3),
}
every_constraint = pytest.mark.parametrize("constraint", ["reconstruction", "kl"])


def make_vae(flow: bool = False) -> VAE:
    torch.manual_seed(0)
    parts = (VampPrior(16, 5), HouseholderSylvesterFlow(4, 12, 2, 3)) if flow else (StandardNormalPrior(), None)
    return VAE(GaussianEncoder(16, 4, 12), BernoulliDecoder(4, 16, 12), *parts)


def make_vqvae(quantiser: Quantiser) -> VQVAE:
    parts = (part(quantiser.code_dim, (8, 8), 4, 1) for part in (ConvolutionalEncoder, ConvolutionalDecoder))
    encoder, decoder = parts
    return VQVAE(encoder, quantiser, decoder)


def bars(count: int = 24) -> Tensor:
    """Returns 4 × 4 images of rows and columns, one of 8 kinds each."""
    kinds = torch.stack([torch.eye(4)[i // 2].view((4, 1) if i % 2 else (1, 4)).expand(4, 4) for i in range(8)])
    return kinds.flatten(1).repeat(count // 8, 1)


def start(model: nn.Module, objective: Objective, learning_rate: float = 1e-2) -> TrainState:
    auxiliary = objective.initial_state(next(model.parameters()))
    optimizer = functools.partial(torch.optim.Adam, lr=learning_rate)
    return initial_state(model, optimizer, seed=0, auxiliary=auxiliary)


def advance(
    state: TrainState, model: nn.Module, objective: Objective, num_steps: int, images: Tensor
) -> tuple[TrainState, list[dict[str, Tensor]]]:
    """Returns the state after more steps on all images, and the metrics of each as the loop gathers them."""
    step, history = make_train_step(model, objective), []
    for _ in range(num_steps):
        state, metrics = step(state, images)
        history.append(metrics)
    return state, history


# --- the constrained bound by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "constraint, target, violation, average, loss",
    [("reconstruction", -7.0, 3.0, 3.5, 3.0 + 2.0 * 3.5), ("kl", 1.0, 2.0, 3.0, 10.0 + 2.0 * 3.0)],
)
def test_loss_metrics_and_state_by_hand(
    constraint: str, target: float, violation: float, average: float, loss: float
) -> None:
    """λ = 2, the average was 4, and half of it is forgotten; λ grows by exp(0.1 · average)."""
    objective = ConstrainedELBO(GECO(rate=0.1, decay=0.5), constraint, target, num_samples=2)
    found, metrics, observed = objective(
        lambda batch, noise: TERMS, torch.zeros(2, 4), torch.zeros(2, 2, 3), {}, dict(GECO_STATE)
    )
    changes, metrics = objective.transition(None, GECO_STATE, metrics, observed)
    assert found.shape == () and found.item() == pytest.approx(loss)
    expected = {"loss": loss, **PARTS, "constraint": violation, "constraint_average": average, "multiplier": 2.0}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    assert set(changes) == set(GECO_STATE)
    assert changes["multiplier"].item() == pytest.approx(2.0 * math.exp(0.1 * average))
    assert changes["constraint_average"].item() == pytest.approx(average) and changes["num_updates"] == 4


@every_constraint
@pytest.mark.parametrize("flow", [False, True])
def test_gradients_are_those_of_one_term_and_the_multiplier_times_the_other(constraint: str, flow: bool) -> None:
    """The average, 4, and the target are constants: neither has a part in the gradient."""
    vae, x = make_vae(flow).double(), bars().double()
    objective = ConstrainedELBO(GECO(rate=0.1), constraint, target=1.5, num_samples=3)
    noise = objective.draw_noise(vae, x, torch.Generator())
    assert noise.shape == (3, 24, 4) and noise.dtype == torch.float64
    state = {name: value.double() for name, value in GECO_STATE.items()}
    loss, metrics, observed = objective(vae, x, noise, {}, state)
    changes, metrics = objective.transition(vae, state, metrics, observed)
    terms, parameters = vae(x, noise), list(vae.parameters())
    reconstruction = terms.log_p_x_given_z.mean()
    kl = (terms.log_q_z_given_x - terms.log_p_z).mean()
    gradients = [
        torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
        for term in (loss, -reconstruction, kl)
    ]
    factors = (2.0, 1.0) if constraint == "reconstruction" else (1.0, 2.0)
    for found, of_reconstruction, of_kl in zip(*gradients, strict=True):
        torch.testing.assert_close(found, factors[0] * of_reconstruction + factors[1] * of_kl, rtol=1e-10, atol=1e-12)
    assert not any(value.requires_grad for value in (*metrics.values(), *changes.values()))


def test_the_first_state_is_on_the_device_and_in_the_dtype_of_the_model() -> None:
    state = ConstrainedELBO(GECO(rate=0.1, initial_multiplier=3.0), "kl", 1.0).initial_state(torch.zeros(2).double())
    assert {name: value.item() for name, value in state.items()} == {
        "multiplier": 3.0,
        "constraint_average": 0.0,
        "num_updates": 0,
    }
    assert state["multiplier"].dtype == state["constraint_average"].dtype == torch.float64
    assert NegativeELBO().initial_state(torch.zeros(2)) == VQVAELoss().initial_state(torch.zeros(2)) == {}


# --- the constrained bound in steps ----------------------------------------------------------------------------------


@every_constraint
@pytest.mark.parametrize("violated", [True, False])
def test_the_multiplier_rises_while_the_constraint_is_violated_and_falls_while_it_is_met(
    constraint: str, violated: bool
) -> None:
    """What is logged of each step is what the update rule makes of the constraints, in plain numbers."""
    target = {"reconstruction": -1.0 if violated else -90.0, "kl": 0.5 if violated else 90.0}[constraint]
    vae, geco = make_vae(), GECO(rate=0.02, decay=0.8)
    with torch.no_grad():
        list(vae.encoder.parameters())[-1].add_(2.0)  # a posterior that is not the prior
    objective = ConstrainedELBO(geco, constraint, target)
    state, history = advance(start(vae, objective), vae, objective, 6, bars())
    multiplier, average = 1.0, None
    for metrics in history:
        now = metrics["constraint"].item()
        part = metrics["kl"].item() if constraint == "kl" else -metrics["reconstruction"].item()
        assert now == pytest.approx(part - target if constraint == "kl" else part + target, abs=1e-4)
        assert (now > 0) == violated
        average = now if average is None else 0.8 * average + 0.2 * now
        assert metrics["multiplier"].item() == pytest.approx(multiplier, rel=1e-5), "the one that the step used"
        assert metrics["constraint_average"].item() == pytest.approx(average, rel=1e-4)
        minimised = -metrics["reconstruction"].item() if constraint == "kl" else metrics["kl"].item()
        assert metrics["loss"].item() == pytest.approx(minimised + multiplier * average, rel=1e-4)
        multiplier *= math.exp(0.02 * average)
    assert (multiplier > 1.0) == violated
    assert state.auxiliary["multiplier"].item() == pytest.approx(multiplier, rel=1e-5)
    assert state.auxiliary["num_updates"] == 6


@every_constraint
def test_a_resumed_run_continues_bit_for_bit(constraint: str, tmp_path: pathlib.Path) -> None:
    """With a VampPrior and a Sylvester flow, whose every parameter moves."""
    vae = make_vae(flow=True)
    objective = ConstrainedELBO(GECO(rate=0.05, decay=0.7, warm_up_steps=1), constraint, target=0.5)
    whole, expected = advance(start(vae, objective), vae, objective, 6, bars())
    half, _ = advance(start(vae, objective), vae, objective, 3, bars())
    checkpoints.save(tmp_path / "half.ckpt", state_to_tensors(half))
    other = copy.deepcopy(vae)
    for parameter in other.parameters():
        nn.init.constant_(parameter, 7.0)
    template = start(other, dataclasses.replace(objective, geco=GECO(rate=0.05, initial_multiplier=9.0)))
    restored = state_from_tensors(checkpoints.load(tmp_path / "half.ckpt"), template)
    assert restored.auxiliary["num_updates"] == 3 and restored.auxiliary["multiplier"] != 1.0
    resumed, found = advance(restored, vae, objective, 3, bars())
    for group in ("parameters", "auxiliary", "weight_average"):
        for name, tensor in getattr(whole, group).items():
            assert torch.equal(tensor, getattr(resumed, group)[name]), name
    for one, two in zip(expected[3:], found, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for name, parameter in vae.named_parameters():
        assert not torch.equal(whole.parameters[name], parameter), f"{name} did not move"


class Parabolas(nn.Module):
    """Has log p(x|z) = -(θ - 3)² and KL = θ², so that every constraint has its answer in closed form."""

    noise_dim = 0

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, x: Tensor, noise: Tensor) -> LogDensities:
        ones = torch.ones(1, len(x), dtype=torch.float64)
        return LogDensities(-((self.theta - 3.0) ** 2) * ones, -(self.theta**2) * ones, 0.0 * ones, 0.0 * ones)


@pytest.mark.parametrize("constraint, target, theta", [("reconstruction", -1.0, 2.0), ("kl", 1.0, 1.0)])
def test_a_problem_in_closed_form(constraint: str, target: float, theta: float) -> None:
    """The least θ² with (θ - 3)² ≤ 1 is at θ = 2, the least (θ - 3)² with θ² ≤ 1 at θ = 1; λ is 2 at both."""
    model = Parabolas()
    objective = ConstrainedELBO(GECO(rate=0.1, decay=0.5), constraint, target)
    sgd = functools.partial(torch.optim.SGD, lr=0.05)
    state = initial_state(model, sgd, 0, auxiliary=objective.initial_state(model.theta))
    state, history = advance(state, model, objective, 400, torch.zeros(2, 1, dtype=torch.float64))
    assert state.parameters["theta"].item() == pytest.approx(theta, abs=1e-3)
    assert state.auxiliary["multiplier"].item() == pytest.approx(2.0, abs=1e-2)
    assert history[-1]["constraint"].item() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("constraint, target, rate", [("reconstruction", -3.0, 0.01), ("kl", 1.0, 0.03)])
def test_a_vae_reaches_its_target(constraint: str, target: float, rate: float) -> None:
    """After so few steps the plain bound is still where it began, at a KL of 0 and a reconstruction of -9 nats."""
    vae, objective = make_vae(), ConstrainedELBO(GECO(rate, decay=0.9), constraint, target)
    history = advance(start(vae, objective, learning_rate=2e-2), vae, objective, 500, bars())[1]
    last = torch.stack([metrics[constraint] for metrics in history[-100:]])
    assert last.mean().item() == pytest.approx(target, abs=0.15)


# --- the loss of a VQ-VAE by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize("commitment", [0.0, 0.25, 2.0])
def test_loss_of_a_vqvae_by_hand(commitment: float) -> None:
    """10 nats, a codebook loss of 5, and the weight times a commitment loss of 3."""
    observed = {"seen": torch.ones(2, 4)}
    terms = VQVAETerms(
        log_p_x_given_z=torch.tensor([[-4.0, -16.0]]),
        log_p_z=torch.tensor([[-3.0, -5.0]]),
        log_q_z_given_x=torch.zeros(1, 2),
        log_det=torch.zeros(1, 2),
        commitment_loss=torch.tensor([2.0, 4.0]),
        codebook_loss=torch.tensor([1.0, 9.0]),
        indices=torch.zeros(2, 1, 1, dtype=torch.int64),
        observed=observed,
    )
    seen: list[Any] = []
    noise = torch.rand(1, 2)
    loss, metrics, found = VQVAELoss(commitment)(
        lambda *inputs: seen.extend(inputs) or terms, torch.zeros(2, 4), noise, {}, {}
    )
    assert loss.item() == pytest.approx(15.0 + 3.0 * commitment) and found is observed
    expected = {"loss": 15.0 + 3.0 * commitment, "elbo": -14.0, "reconstruction": -10.0, "kl": 4.0}
    expected |= {"log_q_z_given_x": 0.0, "log_p_z": -4.0, "log_det": 0.0}
    expected |= {"commitment_loss": 3.0, "codebook_loss": 5.0}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    assert len({value.dtype for value in metrics.values()}) == 1, "the loop stacks them"
    assert seen[2] is noise


def test_noise_of_a_vqvae_is_uniform_and_the_generators_alone() -> None:
    model, batch = make_vqvae(ResidualQuantiser(20, 500, 2)), torch.zeros(3, 64, dtype=torch.float64)
    before = torch.get_rng_state()
    first, same, other = (VQVAELoss().draw_noise(model, batch, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert first.shape == (20, 500) and first.dtype == torch.float64
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.min() >= 0.0 and first.max() < 1.0 and first.mean().item() == pytest.approx(0.5, abs=0.02)
    assert first.var().item() == pytest.approx(1 / 12, abs=0.01)


@pytest.mark.parametrize(
    "quantiser", [lambda: MovingAverageQuantiser(5, 3, decay=0.8), lambda: ResidualQuantiser(2, 5, 3, decay=0.8)]
)
def test_a_step_keeps_the_codebook_that_its_own_vectors_make(quantiser: Any) -> None:
    """The vectors are those from before the optimizer's step, and the noise is that of the step's own stream."""
    model, images = make_vqvae(quantiser()), torch.rand(6, 64).round()
    state = start(model, VQVAELoss())
    generator = torch.Generator()
    generator.set_state(state.generators["posterior noise"].get_state())
    step = make_train_step(model, VQVAELoss())
    plain = copy.deepcopy(model)
    for _ in range(3):
        uniform = torch.rand(model.quantiser.num_codebooks, 5, generator=generator)
        plain.load_state_dict({**state.parameters, **state.buffers})
        vectors = plain.encoder(images)
        expected, num_revived = plain.quantiser.transition(vectors, plain.quantiser(vectors).indices, uniform)
        before = dict(plain.quantiser.named_buffers())
        assert all(not torch.equal(value, before[name]) for name, value in expected.items() if "codes" in name)
        state, metrics = step(state, images)
        for name, value in expected.items():
            torch.testing.assert_close(state.buffers[f"quantiser.{name}"], value, rtol=1e-6, atol=1e-6)
        assert metrics["codes_revived"] == num_revived


@pytest.mark.parametrize("quantiser", ["gradient", "moving average", "residual"])
def test_a_resumed_vqvae_continues_bit_for_bit(quantiser: str, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    kinds = {"gradient": GradientQuantiser, "moving average": MovingAverageQuantiser}
    model = make_vqvae(ResidualQuantiser(2, 5, 3) if quantiser == "residual" else kinds[quantiser](5, 3))
    images = torch.rand(6, 64).round()
    whole, _ = advance(start(model, VQVAELoss()), model, VQVAELoss(), 6, images)
    half, _ = advance(start(model, VQVAELoss()), model, VQVAELoss(), 3, images)
    checkpoints.save(tmp_path / "half.ckpt", state_to_tensors(half))
    other = copy.deepcopy(model)
    for tensor in itertools.chain(other.parameters(), other.buffers()):
        nn.init.constant_(tensor, 7.0)
    restored = state_from_tensors(checkpoints.load(tmp_path / "half.ckpt"), start(other, VQVAELoss()))
    resumed, _ = advance(restored, model, VQVAELoss(), 3, images)
    for group in ("parameters", "buffers", "weight_average"):
        assert getattr(whole, group) or group == "buffers"
        for name, tensor in getattr(whole, group).items():
            assert torch.equal(tensor, getattr(resumed, group)[name]), name


# --- compiled --------------------------------------------------------------------------------------------------------

# Run in a process of its own, where nothing checks shapes at runtime and so nothing stands between the compiler and the
# code.
COMPILED = """
import torch
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.models.vqvae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder
from popgen.nn.priors import StandardNormalPrior
from popgen.nn.vqvae import GradientQuantiser, MovingAverageQuantiser
from popgen.optim.geco import GECO
from popgen.training.objectives import ConstrainedELBO, VQVAELoss
from popgen.training.state import initial_state
from popgen.training.step import make_train_step

torch.manual_seed(0)
images = torch.rand(6, 64).round()
objective = {objective}
model = {model}
results = []
for compiled in (False, True):
    auxiliary = objective.initial_state(images)
    state = initial_state(model, lambda p: torch.optim.SGD(p, lr=1e-3), seed=0, auxiliary=auxiliary)
    step = make_train_step(model, objective, compiled=compiled)
    history = []
    for _ in range(5):
        state, metrics = step(state, images)
        history.append(torch.stack(list(metrics.values())))
    results.append({{**state.parameters, **state.buffers, **state.auxiliary, "history": torch.stack(history)}})
first = {{**dict(model.named_parameters()), **dict(model.named_buffers())}}
assert all(not torch.equal(results[1][name], value) for name, value in first.items())
for name in results[0]:
    torch.testing.assert_close(*(result[name] for result in results), rtol=1e-4, atol=1e-4, msg=name)
print("the same")
"""
VAE_TEXT = "VAE(GaussianEncoder(64, 2, 8), BernoulliDecoder(2, 64, 8), StandardNormalPrior())"
VQVAE_TEXT = "VQVAE(ConvolutionalEncoder(3, (8, 8), 4, 0), {}, ConvolutionalDecoder(3, (8, 8), 4, 0))"
ALL_COMPILED = {
    "reconstruction": ("ConstrainedELBO(GECO(rate=0.01), 'reconstruction', -30.0)", VAE_TEXT),
    "moving average": ("VQVAELoss()", VQVAE_TEXT.format("MovingAverageQuantiser(4, 3, decay=0.8)")),
    "gradient": ("VQVAELoss()", VQVAE_TEXT.format("GradientQuantiser(4, 3)")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_COMPILED)
def test_compiled_steps_equal_plain_ones(name: str) -> None:
    objective, model = ALL_COMPILED[name]
    done = subprocess.run(
        [sys.executable, "-c", COMPILED.format(objective=objective, model=model)],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(popgen.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout == "the same\n", done.stderr
    assert "torch.compile is not used" not in done.stderr


# --- by configuration, and errors ------------------------------------------------------------------------------------

BINDINGS = [
    "Experiment.objective = @popgen.training.objectives.ConstrainedELBO()",
    "ConstrainedELBO.geco = @popgen.optim.geco.GECO()",
    "ConstrainedELBO.constraint = 'kl'",
    "ConstrainedELBO.target = 20.0",
    "GECO.rate = 1e-3",
]


@dataclasses.dataclass(frozen=True)
class Noise:
    """Random binary images of MNIST's size."""

    def load(self) -> ImageData:
        images = torch.rand(500, 784).round()
        return ImageData(images, images[:20], (28, 28), "none")


@pytest.mark.usefixtures("as_a_user")
def test_the_headline_model_under_a_constraint_by_config_alone(tmp_path: pathlib.Path) -> None:
    loaded = config.load(["configs/vamp_hsnf.gin"], BINDINGS)
    assert loaded.orphans == ["NegativeELBO.beta", "SigmoidAnnealing.rate"]
    experiment = dataclasses.replace(loaded.experiment, dataset=Noise(), num_steps=2, batch_size=20, log_every=1)
    directory = RunDirectory(tmp_path)
    with directory.locked():
        state = run(experiment, directory, loaded.configuration)
    assert state.step == 2 and state.auxiliary["num_updates"] == 2
    assert state.auxiliary["multiplier"].item() != 1.0 and math.isfinite(state.best_loss)
    saved = directory.load_checkpoint("latest")["auxiliary"]
    assert all(torch.equal(saved[name], value) for name, value in state.auxiliary.items())


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"constraint": "elbo"}, "ConstrainedELBO.constraint must be one of reconstruction, kl, got 'elbo'"),
        ({"geco": 0.1}, "ConstrainedELBO.geco must be a GECO, such as @popgen.optim.geco.GECO(), got 0.1"),
        (
            {"geco": GECO},
            "ConstrainedELBO.geco must be a GECO, such as @popgen.optim.geco.GECO(), got "
            "<class 'popgen.optim.geco.GECO'>",
        ),
        ({"target": "low"}, "ConstrainedELBO.target must be a finite number, got 'low'"),
        ({"target": math.nan}, "ConstrainedELBO.target must be a finite number, got nan"),
        ({"target": -72.0}, "ConstrainedELBO.target (the largest KL) must be at least 0, got -72.0"),
        ({"num_samples": 0}, "ConstrainedELBO.num_samples must be an integer of at least 1, got 0"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        ConstrainedELBO(**{"geco": GECO(rate=0.1), "constraint": "kl", "target": 1.0, **arguments})
    assert str(caught.value) == message


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "binding, wanted",
    [
        ("ConstrainedELBO.constraint = 'elbo'", "ConstrainedELBO.constraint must be one of reconstruction, kl"),
        ("ConstrainedELBO.geco = @popgen.optim.geco.GECO", "ConstrainedELBO.geco must be a GECO"),
        ("ConstrainedELBO.geco = None", "ConstrainedELBO.geco must be a GECO"),
        ("GECO.rate = -1.0", "GECO.rate must be above 0"),
        ("GECO.pace = 1.0", "'pace'"),
    ],
)
def test_a_mistake_in_a_binding_is_one_line(binding: str, wanted: str) -> None:
    with pytest.raises(PopgenError) as caught:
        config.load(["configs/vae.gin"], [*BINDINGS, binding])
    assert wanted in str(caught.value) and "\n" not in str(caught.value)
