"""WaveNet: what it sees, its formula, its total probability, and generation against recomputing."""

import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from popgen import compilation
from popgen.cuda_graphs import record_or_fall_back
from popgen.distributions.codes import CategoricalOutput, CodeDensity, DiscretisedLogisticMixture, LogisticMixtureOutput
from popgen.errors import ArgumentError
from popgen.models import wavenet_generation
from popgen.models.wavenet import SHARED_BATCH, START, WaveNet

CLASSES = {"speaker": 3, "digit.of": 4}  # a name that no module could have
LABELS = {"digit.of": torch.tensor([3, 0, 1]), "speaker": torch.tensor([0, 2, 2])}


def make_model(output=None, conditioned: bool = False, scale: float = 2.0, **arguments) -> WaveNet:
    """Returns a model in float64 whose weights are scaled up, so that its densities are far from uniform."""
    sizes = {"hidden_dim": 5, "skip_dim": 7, "num_layers": 5, "dilation_cycle": 3, **arguments}
    conditions = {"classes": CLASSES, "local_dim": 2} if conditioned else {}
    model = WaveNet(output or CategoricalOutput(), **{**conditions, **sizes}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def make_inputs(model: WaveNet, time: int = 40, batch: int = 3) -> tuple[Tensor, dict | None, Tensor | None]:
    """Returns codes, and labels and local features where the model is conditioned."""
    codes = torch.randint(256, (batch, time))
    if not model.classes:
        return codes, None, None
    labels = {name: torch.randint(count, (batch,)) for name, count in model.classes.items()}
    return codes, labels, torch.randn(batch, model.local_dim, time).to(model.embedding.weight.dtype)


def parameters_of(density: CodeDensity) -> Tensor:
    """Returns what the network gave, the parameters of a density side by side."""
    return torch.cat(list(vars(density).values()), -1)


def stepped(model: WaveNet, codes: Tensor, labels: dict | None, local: Tensor | None) -> Tensor:
    """Returns the parameters of the density of each code, a step at a time."""
    state, weights = model.initial_state(len(codes)), model.step_weights(labels)
    previous, found = torch.full((len(codes),), START), []
    for t in range(codes.shape[1]):
        density, state = model.step(previous, state, local=None if local is None else local[..., t], weights=weights)
        found.append(parameters_of(density))
        previous = codes[:, t]
    return torch.stack(found, 1)


def recomputed(model: WaveNet, uniform: Tensor, labels: dict | None, local: Tensor | None, primer: Tensor) -> Tensor:
    """Returns codes drawn by a whole forward pass for each."""
    codes = primer
    for t, now in enumerate(uniform.T, primer.shape[1]):
        features = None if local is None else local[..., : t + 1]
        density = model(torch.cat([codes, torch.zeros(len(codes), 1).long()], 1), labels, features)
        last = type(density)(*(value[:, -1] for value in vars(density).values()))
        codes = torch.cat([codes, last.sample(now)[:, None]], 1)
    return codes[:, primer.shape[1] :]


NO_PRIMER = torch.zeros(3, 0, dtype=torch.int64)


# --- the density -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers, cycle, kernel_size", [(1, 1, 2), (4, 2, 2), (3, 3, 3), (2, 5, 4)])
def test_a_density_sees_its_receptive_field_and_nothing_else(num_layers: int, cycle: int, kernel_size: int) -> None:
    """The codes before it back to the receptive field: neither itself, nor the future, nor what is farther back."""
    sizes = {"hidden_dim": 8, "skip_dim": 40}  # so many that somewhere every change gets through
    model = make_model(num_layers=num_layers, dilation_cycle=cycle, kernel_size=kernel_size, **sizes)
    field = 1 + (kernel_size - 1) * sum(2 ** (n % cycle) for n in range(num_layers))
    assert model.receptive_field == field
    time = field + 4
    codes = make_inputs(model, time, batch=1)[0]
    changed = codes.repeat(time, 1)
    changed.diagonal().add_(100).remainder_(256)  # each row differs from the codes at one place
    with torch.no_grad():
        moved = (model(changed).logits - model(codes).logits).abs().amax(-1) > 1e-13
    place, seen_by = torch.arange(time)[:, None], torch.arange(time)
    assert torch.equal(moved, (place < seen_by) & (place >= seen_by - field))


def test_layers_compute_what_the_figure_draws() -> None:
    """Figure 4 of the paper, one position and one layer after another, with both kinds of conditioning."""
    model = make_model(conditioned=True, scale=1.0)
    codes, labels, local = make_inputs(model, time=12, batch=1)
    previous = [START, *codes[0, :-1].tolist()]
    x = [model.embedding.weight[code] for code in previous]
    skips = [torch.zeros(7, dtype=torch.float64)] * 12
    assert model.classes == {"digit.of": 4, "speaker": 3}, "rows follow the names in their sorted order"
    rows = model.label_embedding.weight[[labels["digit.of"].item(), 4 + labels["speaker"].item()]].sum(0).view(5, 10)
    for n, layer in enumerate(model.layers):
        dilation, below = 2 ** (n % 3), x
        x = list(below)
        for t in range(12):
            both = layer.conv.weight[:, :, 1] @ below[t] + layer.conv.bias + rows[n]
            if t >= dilation:
                both = both + layer.conv.weight[:, :, 0] @ below[t - dilation]
            both = both + layer.local.weight[:, :, 0] @ local[0, :, t]
            z = torch.tanh(both[:5]) * torch.sigmoid(both[5:])
            skips[t] = skips[t] + layer.skip.weight[:, :, 0] @ z
            if n < 4:
                x[t] = below[t] + layer.residual.weight[:, :, 0] @ z
    hidden = torch.relu(torch.stack(skips) + model.layers[-1].skip.bias)
    expected = model.head[3](torch.relu(model.head[1](hidden)))
    torch.testing.assert_close(model(codes, labels, local).logits[0], expected)


@pytest.mark.parametrize("output", [CategoricalOutput(), LogisticMixtureOutput(3)], ids=["categorical", "mixture"])
def test_probabilities_of_all_sequences_sum_to_one(output) -> None:
    """All 256² pairs of codes, and they are far from equally likely."""
    model = make_model(output, num_layers=2, scale=3.0)
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    with torch.no_grad():
        log_density = model.log_density(pairs)
    assert log_density.shape == (65536, 2)
    assert log_density.sum(1).logsumexp(0).abs() < 1e-9
    assert log_density[:, 1].view(256, 256).std(0).max() > 0.05, "the second depends on the first"
    assert log_density.sum(1).max() > 1.0 - 2.0 * math.log(256)


def test_log_density_is_that_of_torch_for_each_code() -> None:
    model = make_model(conditioned=True)
    codes, labels, local = make_inputs(model)
    conditionals = torch.distributions.Categorical(logits=model(codes, labels, local).logits)
    torch.testing.assert_close(model.log_density(codes, labels, local), conditionals.log_prob(codes))


def test_both_outputs_compare_at_the_start() -> None:
    """Before training, no output knows more than that there are 256 codes: nearly log 256 nats each."""
    codes = torch.randint(256, (2, 100))
    for output in (CategoricalOutput(), LogisticMixtureOutput()):
        nats = -WaveNet(output, 16, 16, 4, 2).log_density(codes).mean().item()
        assert math.log(256) - 0.2 < nats < math.log(256) + 0.5


def test_conditions_reach_every_position_and_only_their_own() -> None:
    """A label moves all densities of its own sequence; a local feature those from its place on that see it."""
    model = make_model(conditioned=True, hidden_dim=8, skip_dim=40)
    codes, labels, local = make_inputs(model, time=20)
    exact = model(codes, labels, local).logits
    for name, count in CLASSES.items():
        other = {**labels, name: labels[name].clone()}
        other[name][1] = (other[name][1] + 1) % count
        moved = (model(codes, other, local).logits - exact).abs().amax(-1) > 1e-13
        assert moved[1].all() and not moved[0].any() and not moved[2].any()
    local = local.clone()
    local[1, 0, 7] += 1.0
    moved = (model(codes, labels, local).logits - exact).abs().amax(-1) > 1e-13
    end = 7 + model.receptive_field - 1  # it enters after the first convolution, of dilation 1
    assert moved[1].tolist() == [7 <= t < end for t in range(20)] and not moved[[0, 2]].any()


def test_every_parameter_gets_a_gradient() -> None:
    """Finite, and from some sequence not zero; with one layer alone, too."""
    for num_layers in (5, 1):
        model = make_model(LogisticMixtureOutput(3), conditioned=True, num_layers=num_layers, hidden_dim=6)
        inputs = [make_inputs(model, time=60, batch=30) for _ in range(2)]
        sum(model.log_density(*each).sum() for each in inputs).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert (parameter.grad != 0.0).any(), name


@pytest.mark.parametrize("output", [CategoricalOutput(), LogisticMixtureOutput(3)], ids=["categorical", "mixture"])
def test_training_finds_a_deterministic_rule(output) -> None:
    """Sequences that go down or up by 10, as a label says, from one of eight starts: only the start is unknown."""
    model = WaveNet(output, 24, 24, num_layers=3, dilation_cycle=3, classes={"direction": 2})
    starts, directions = (each.flatten() for each in torch.meshgrid(torch.arange(8), torch.arange(2), indexing="ij"))
    codes = 100 + 8 * starts[:, None] + 10 * (2 * directions[:, None] - 1) * torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -model.log_density(codes, {"direction": directions}).sum(1).mean()
        loss.backward()
        optimizer.step()
    drawn = model.generate(torch.rand(16, 4), {"direction": directions}, primer=codes[:, :4])
    if isinstance(output, CategoricalOutput):
        assert math.log(8.0) - 1e-3 < loss.item() < math.log(8.0) + 0.3
        assert (drawn == codes[:, 4:]).float().mean() > 0.9
    else:  # from 45 nats; it spreads the start over what lies between, and is slow to become narrow
        assert loss.item() < 25.0
        assert ((drawn[:, 0] - codes[:, 4]).abs() <= 10).float().mean() > 0.7


# --- steps and generation --------------------------------------------------------------------------------------------

SIZES = [
    {},
    {"conditioned": True},
    {"kernel_size": 3, "dilation_cycle": 2},
    {"kernel_size": 3, "conditioned": True, "num_layers": 1},
    {"output": LogisticMixtureOutput(3), "num_layers": 4, "dilation_cycle": 4},
]


@pytest.mark.parametrize("arguments", SIZES, ids=str)
def test_steps_equal_the_whole(arguments: dict) -> None:
    """To the last digits of each type, and long after the rings have come round."""
    model = make_model(**arguments)
    time = 3 * model.receptive_field
    codes, labels, local = make_inputs(model, time)
    with torch.no_grad():
        exact = parameters_of(model(codes, labels, local))
        torch.testing.assert_close(stepped(model, codes, labels, local), exact, rtol=1e-12, atol=1e-12)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            model.to(dtype)
            features = None if local is None else local.to(dtype)
            whole, steps = parameters_of(model(codes, labels, features)), stepped(model, codes, labels, features)
            for one, other in ((whole, exact), (steps, exact), (steps, whole)):
                assert (one.double() - other.double()).norm() < tolerance * other.double().norm()


@pytest.mark.parametrize("primer_time", [0, 1, 9])
@pytest.mark.parametrize("arguments", SIZES, ids=str)
def test_generation_equals_recomputing(arguments: dict, primer_time: int) -> None:
    """The same noise gives the same codes as a forward pass over all that came before, for each of them."""
    model = make_model(**arguments)
    _, labels, local = make_inputs(model, 30 + primer_time)
    uniform, primer = torch.rand(3, 30, dtype=torch.float64), torch.randint(256, (3, primer_time))
    codes = model.generate(uniform, labels, local, primer if primer_time else None)
    assert codes.shape == (3, 30) and codes.dtype == torch.int64 and len(codes.unique()) > 20
    assert torch.equal(codes, recomputed(model, uniform, labels, local, primer))


def test_generation_depends_on_its_noise_alone() -> None:
    """One sequence does not affect another; nothing random and no gradient is used; a draw can be continued."""
    model, uniform = make_model(), torch.rand(6, 25)
    state = torch.get_rng_state()
    codes = model.generate(uniform)
    assert torch.equal(torch.get_rng_state(), state) and not codes.requires_grad
    assert torch.equal(model.generate(uniform.flip(0)), codes.flip(0))
    assert torch.equal(model.generate(uniform[:1]), codes[:1])
    assert torch.equal(model.generate(uniform[:, 20:], primer=codes[:, :20]), codes[:, 20:])
    assert model.generate(uniform[:0]).shape == (0, 25) and model.generate(uniform[:, :0]).shape == (6, 0)


def test_first_codes_have_the_probabilities_that_the_density_gives() -> None:
    """A grid of uniform values gives each code its share of the grid."""
    model = make_model()
    grid = ((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)[:, None]
    share = torch.bincount(model.generate(grid)[:, 0], minlength=256) / 20_000
    expected = model(torch.zeros(1, 1, dtype=torch.int64)).logits[0, 0].softmax(-1)
    torch.testing.assert_close(share.double(), expected, rtol=0, atol=1.01 / 20_000)


def test_weights_that_are_loaded_later_count() -> None:
    """Neither a state nor the module remembers weights: only `StepWeights` do, and they are a copy of their own."""
    model, other = make_model(conditioned=True), make_model(conditioned=True)
    _, labels, local = make_inputs(model)
    state, old = model.initial_state(3), model.step_weights(labels)
    model.generate(torch.rand(3, 40), labels, local)
    previous = torch.full((3,), START)
    before = parameters_of(model.step(previous, model.initial_state(3), labels, local[..., 0])[0])
    model.load_state_dict(other.state_dict())
    expected = parameters_of(other.step(previous, other.initial_state(3), labels, local[..., 0])[0])
    assert torch.equal(parameters_of(model.step(previous, state, labels, local[..., 0])[0]), expected)
    kept = parameters_of(model.step(previous, model.initial_state(3), local=local[..., 0], weights=old)[0])
    assert torch.equal(kept, before) and not torch.equal(kept, expected)
    uniform = torch.rand(3, 40)
    assert torch.equal(model.generate(uniform, labels, local), other.generate(uniform, labels, local))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_step_keeps_its_state_in_place() -> None:
    """Constant memory: one slot for each layer is overwritten in each step, and no tensor moves or grows."""
    model = make_model(num_layers=4, dilation_cycle=4)
    state = model.initial_state(2)
    assert len(state.values) == 1 + 2 + 4 + 8
    addresses = [tensor.data_ptr() for tensor in state]
    for _ in range(40):
        before = state.values.clone()
        density, state = model.step(torch.randint(256, (2,)), state)
        assert ((state.values != before).flatten(1).any(1)).sum() == 4
        assert [tensor.data_ptr() for tensor in state] == addresses
        assert not density.logits.requires_grad


@pytest.mark.parametrize("output", [CategoricalOutput(), LogisticMixtureOutput(3)], ids=["categorical", "mixture"])
def test_densities_are_float32_at_least(output) -> None:
    """Whether the weights or the products alone are bfloat16."""
    model = make_model(output, conditioned=True, scale=1.0).float()
    codes, labels, local = make_inputs(model)
    exact = model.log_density(codes, labels, local)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, drawn = model.log_density(codes, labels, local), model.generate(torch.rand(3, 40), labels, local)
    assert rounded.dtype == torch.float32 and drawn.unique().numel() > 20
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)
    model.bfloat16()
    rounded = model.log_density(codes, labels, local)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)
    assert model.generate(torch.rand(3, 40), labels, local).unique().numel() > 20


@pytest.mark.parametrize("batch", [2, SHARED_BATCH])
def test_generation_leaves_the_threads_as_they_were(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small step goes in one thread, a large one in as many as there are; after an error too."""
    model, seen, before = make_model(), [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patch:
            plain = wavenet_generation._draw
            patch.setattr(wavenet_generation, "_draw", lambda *a: seen.append(torch.get_num_threads()) or plain(*a))
            model.generate(torch.rand(batch, 3))
            patch.setattr(wavenet_generation, "_draw", None)
            with pytest.raises(TypeError):
                model.generate(torch.rand(batch, 3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1 if batch == 2 else 2] * 3


def test_functional_call_uses_the_parameters_it_is_given() -> None:
    """The pure training step calls models so."""

    class Density(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def forward(self, codes: Tensor) -> Tensor:
            return self.model.log_density(codes)

    model, other = Density(), Density()
    codes = make_inputs(model.model)[0]
    called = torch.func.functional_call(model, dict(other.named_parameters()), (codes,))
    torch.testing.assert_close(called, other(codes))


def test_gradients_of_single_batches_are_mapped() -> None:
    """torch.func.grad within torch.vmap, over the codes, as one batch after another."""
    model = make_model(LogisticMixtureOutput(3))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    codes = torch.randint(256, (4, 2, 10))

    def loss(weights: dict[str, Tensor], codes: Tensor) -> Tensor:
        return -torch.func.functional_call(model, weights, (codes,)).log_density(codes).mean()

    mapped = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, codes)
    for n, batch in enumerate(codes):
        for name, gradient in torch.func.grad(loss)(weights, batch).items():
            torch.testing.assert_close(mapped[name][n], gradient)


# --- compilation -----------------------------------------------------------------------------------------------------


# In a process of its own, where nothing checks shapes at runtime and so nothing stands between compiler and code.
COMPILED_RUN = """
import torch, torch._dynamo.utils as utils
from popgen import compilation
from popgen.models.wavenet import CategoricalOutput, LogisticMixtureOutput, WaveNet
torch.manual_seed(0)
codes, local = torch.randint(256, (3, 50)), torch.randn(3, 4, 50, dtype=torch.float64)

def graphs(output, kernel_size):
    utils.counters.clear()
    for _ in range(2):
        model = WaveNet(output, 8, 8, 2, 2, kernel_size, classes={"digit": 10}, local_dim=4).double()
        labels, uniform = {"digit": torch.randint(10, (3,))}, torch.rand(3, 40, dtype=torch.float64)
        plain, compiled = (model.generate(uniform, labels, local, codes[:, :10], flag) for flag in (False, True))
        assert torch.equal(plain, compiled)
    return utils.counters["stats"]["unique_graphs"], len(utils.counters["graph_break"])

print(graphs(CategoricalOutput(), 2))
real, arguments = torch.compile, {"backend": "eager", "fullgraph": True, "dynamic": False}
compilation.torch.compile = lambda function, **_: real(function, **arguments)  # which takes less time
print(graphs(LogisticMixtureOutput(3), 3))
torch.compile = real
for output in (CategoricalOutput(), LogisticMixtureOutput(3)):
    model, labels = WaveNet(output, 8, 8, 2, 2, classes={"digit": 10}, local_dim=4).double(), {"digit": torch.arange(3)}
    compiled = torch.compile(model.log_density, **arguments)
    torch.testing.assert_close(compiled(codes, labels, local), model.log_density(codes, labels, local))
"""


def test_compiled_code_equals_plain_code() -> None:
    """One compilation serves all steps of one generation and of the next, whatever the weights, labels and noise; the
    compiler finds nothing that it cannot trace, in the density neither.
    """
    done = subprocess.run([sys.executable, "-c", COMPILED_RUN], capture_output=True, text=True)
    assert done.returncode == 0 and "torch.compile is not used" not in done.stderr, done.stderr
    assert done.stdout == "(1, 0)\n(1, 0)\n"


@pytest.mark.parametrize("which", [0, 1, 2], ids=["codes", "parameters", "inputs"])
def test_a_wrong_compilation_is_never_used(which: int, as_a_user, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The compared step has a past, so that a mistake in what it adds is found; one line says so."""

    def spoiled(function, **_):
        def wrong(previous, uniform, state, *rest):
            found = list(function(previous, uniform, state, *rest))
            found[which] = found[which] + (state.values.abs().sum() > 0).to(found[which].dtype)
            return tuple(found)

        return wrong

    monkeypatch.setattr(compilation.torch, "compile", spoiled)
    model, uniform = make_model(), torch.rand(2, 20)
    codes = model.generate(uniform, compiled=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torch.compile is not used: its result differs")
    assert torch.equal(codes, model.generate(uniform))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_work_that_cannot_be_recorded_goes_on_plainly(capsys) -> None:
    """One line says so."""
    calls: list[int] = []
    work = record_or_fall_back(lambda: calls.append(1))
    work()
    assert calls[-1:] == [1]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the CUDA graph of a step is not used: ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_replayed_graph_generates_the_same_codes(compiled: bool, as_a_user, capsys) -> None:
    """On a GPU, in float64, as on the CPU; a primer goes through the same graph."""
    model = make_model(conditioned=True)
    codes, labels, local = make_inputs(model, 50)
    uniform = torch.rand(3, 40, dtype=torch.float64)
    expected = model.generate(uniform, labels, local, codes[:, :10])
    labels = {name: values.cuda() for name, values in labels.items()}
    found = model.cuda().generate(uniform.cuda(), labels, local.cuda(), codes[:, :10].cuda(), compiled)
    assert torch.equal(found.cpu(), expected) and capsys.readouterr().err == ""


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"output": None}, "WaveNet.output must be a CategoricalOutput or LogisticMixtureOutput, got None"),
        ({"output": CategoricalOutput}, "WaveNet.output must be a CategoricalOutput or LogisticMixtureOutput, got <cl"),
        ({"hidden_dim": 0}, "WaveNet.hidden_dim must be an integer of at least 1, got 0"),
        ({"skip_dim": 0}, "WaveNet.skip_dim must be an integer of at least 1, got 0"),
        ({"num_layers": 0}, "WaveNet.num_layers must be an integer of at least 1, got 0"),
        ({"dilation_cycle": 0}, "WaveNet.dilation_cycle must be an integer of at least 1, got 0"),
        ({"kernel_size": 1}, "WaveNet.kernel_size must be an integer of at least 2, got 1"),
        ({"local_dim": -1}, "WaveNet.local_dim must be an integer of at least 0, got -1"),
        ({"classes": {"digit": 0}}, r"WaveNet.classes\['digit'\] must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(as_a_user, arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        WaveNet(**{"output": CategoricalOutput(), "hidden_dim": 4, "num_layers": 2, **arguments})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": None}, r"labels must have the names \['digit.of', 'speaker'\], got \[\]"),
        ({"labels": {"speaker": LABELS["speaker"]}}, r"labels must have the names .*, got \['speaker'\]"),
        ({"labels": {"word": LABELS["speaker"]}}, r"labels must have the names .*, got \['word'\]"),
        (
            {"labels": {**LABELS, "speaker": torch.zeros(2).long()}},
            r"labels\['\S+'\] must have shape \([23],\), got \(",
        ),
        (
            {"labels": {**LABELS, "speaker": torch.tensor([0, 3, 1])}},
            r"labels\['speaker'\] must be .* at most 2, got 3",
        ),
        ({"labels": {**LABELS, "speaker": torch.tensor([0, -1, 1])}}, r"labels\['speaker'\] must be .*0 .*, got -1"),
        ({"local": None}, r"local must have shape \(3, 2, 20\), got None"),
        ({"local": torch.zeros(3, 2, 19)}, r"local must have shape \(3, 2, 20\), got \(3, 2, 19\)"),
    ],
)
def test_conditions_that_do_not_fit_are_named(as_a_user, changes: dict, message: str) -> None:
    """In one line, by the density and by generation."""
    model = make_model(conditioned=True).float()
    arguments = {"labels": LABELS, "local": torch.zeros(3, 2, 20), **changes}
    for call in (
        lambda: model(torch.zeros(3, 20).long(), **arguments),
        lambda: model.generate(torch.rand(3, 20), **arguments),
    ):
        with pytest.raises(ArgumentError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_conditions_of_a_model_without_any_are_refused(as_a_user) -> None:
    model = make_model()
    with_others = model(torch.zeros(2, 3).long(), {"digit": torch.tensor([1, 2])})
    torch.testing.assert_close(with_others.logits, model(torch.zeros(2, 3).long()).logits)
    with pytest.raises(ArgumentError, match=r"local must be None, got \(2, 1, 3\)"):
        model(torch.zeros(2, 3).long(), None, torch.zeros(2, 1, 3))
    for shape in ((2, 0), (3,), (2, 3, 1), ()):
        expected = "(batch, time) with a time of at least 1"
        with pytest.raises(ArgumentError, match=re.escape(f"codes must have shape {expected}, got {shape}")):
            model(torch.zeros(shape).long())
    for shape in ((3,), (2, 3, 1), ()):
        with pytest.raises(ArgumentError, match=re.escape(f"uniform must have shape (batch, time), got {shape}")):
            model.generate(torch.rand(shape))
    for shape in ((1, 4), (2,), (2, 4, 1), ()):
        with pytest.raises(ArgumentError, match=re.escape(f"primer must have shape (2, time), got {shape}")):
            model.generate(torch.rand(2, 3), primer=torch.zeros(shape).long())


def test_features_of_a_step_are_not_forgotten(as_a_user) -> None:
    """Weights that were taken before do not excuse from them."""
    model = make_model(conditioned=True)
    weights, previous = model.step_weights(LABELS), torch.full((3,), START)
    for local, found in ((None, "None"), (torch.zeros(3, 3).double(), r"\(3, 3\)")):
        with pytest.raises(ArgumentError, match=rf"local must have shape \(3, 2\), got {found}"):
            model.step(previous, model.initial_state(3), local=local, weights=weights)


@pytest.mark.parametrize("code", [-1, 256, START + 1])
def test_codes_out_of_range_are_named(code: int) -> None:
    """At the last place, too, which only the density of the code itself would look at; START is no code."""
    model, codes = make_model(), torch.zeros(2, 5).long()
    codes[1, 4] = code
    for call in (
        lambda: model(codes),
        lambda: model.log_density(codes),
        lambda: model.check_values(codes),
        lambda: model.generate(torch.rand(2, 5), primer=codes),
    ):
        with pytest.raises(ArgumentError, match=f"codes must be at least 0 and at most 255, got {code}"):
            call()
    model.check_values(codes[:1], {"another": torch.tensor([900])})


def test_sizes_of_the_parts_agree() -> None:
    """Every size can be chosen on its own."""
    for hidden, skip, kernel_size in itertools.product((1, 4), (1, 6), (2, 3)):
        model = WaveNet(LogisticMixtureOutput(2), hidden, skip, num_layers=3, dilation_cycle=2, kernel_size=kernel_size)
        density = model(torch.zeros(2, 1).long())
        assert isinstance(density, DiscretisedLogisticMixture) and density.means.shape == (2, 1, 2)
        assert model.generate(torch.rand(1, 4)).shape == (1, 4)


def test_the_order_of_label_names_means_nothing() -> None:
    """Weights mean the same where a mapping comes back in another order, as from a configuration that was saved."""
    classes = {"speaker": 3, "digit": 2}
    one = WaveNet(CategoricalOutput(), 8, 8, num_layers=3, dilation_cycle=3, classes=classes)
    other = WaveNet(CategoricalOutput(), 8, 8, num_layers=3, dilation_cycle=3, classes=dict(reversed(classes.items())))
    other.load_state_dict(one.state_dict())
    codes = torch.randint(256, (4, 30))
    labels = {"speaker": torch.tensor([0, 1, 2, 2]), "digit": torch.tensor([0, 1, 0, 1])}
    densities = [model(codes, labels).log_density(codes) for model in (one, other)]
    assert torch.equal(*densities)
    swapped = {**labels, "digit": 1 - labels["digit"]}
    assert not torch.equal(one(codes, swapped).log_density(codes), densities[0])


@pytest.mark.usefixtures("as_a_user")
def test_labels_of_no_class_are_not_looked_at() -> None:
    model = WaveNet(CategoricalOutput(), 8, 8, num_layers=3, dilation_cycle=3, classes={"digit": 3})
    uniform, digits = torch.rand(2, 5), torch.tensor([2, 0])
    expected = model.generate(uniform, {"digit": digits})
    for other in (torch.zeros(7, dtype=torch.int64), torch.tensor(1)):
        assert torch.equal(model.generate(uniform, {"another": other, "digit": digits}), expected)
