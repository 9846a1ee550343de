"""Quantisers as modules: their gradients, their transitions against the codebook functions, and what they learn."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from popgen.errors import ArgumentError
from popgen.losses import codebook_loss, commitment_loss
from popgen.nn.vqvae import (
    Codebook,
    CodeUsage,
    GradientQuantiser,
    MovingAverageQuantiser,
    Quantiser,
    ResidualQuantiser,
    jitter,
    nearest_codes,
    revive_dead_codes,
    straight_through,
    update_codebook,
)

NUM_CODES, CODE_DIM, NUM_BOOKS = 12, 3, 3
QUANTISERS = {
    "gradient": lambda: GradientQuantiser(NUM_CODES, CODE_DIM),
    "moving average": lambda: MovingAverageQuantiser(NUM_CODES, CODE_DIM),
    "residual": lambda: ResidualQuantiser(NUM_BOOKS, NUM_CODES, CODE_DIM),
}
every_quantiser = pytest.mark.parametrize("name", QUANTISERS)
single_codebook = pytest.mark.parametrize("name", ["gradient", "moving average"])


def make_uniform(quantiser: Quantiser) -> Tensor:
    """Returns the noise of a transition."""
    return torch.rand(quantiser.num_codebooks, quantiser.num_codes)


def train(quantiser: Quantiser, num_steps: int = 3, count: int = 200) -> Quantiser:
    """Returns the quantiser after some transitions in a loop of one's own."""
    for _ in range(num_steps):
        vectors = torch.randn(count, quantiser.code_dim)
        changes, _ = quantiser.transition(vectors, quantiser(vectors).indices, make_uniform(quantiser))
        quantiser.load(changes)
    return quantiser


def clone_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(module: nn.Module, state: dict[str, Tensor]) -> bool:
    found = module.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


# --- straight through ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_straight_through_is_the_codes_with_the_gradient_of_the_identity(dtype: torch.dtype) -> None:
    """The value to the last bit, even beside vectors that are far larger; nothing reaches the codes."""
    vectors = (1e6 * torch.randn(5, 4, dtype=dtype)).requires_grad_()
    codes = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    values = straight_through(vectors, codes)
    assert torch.equal(values, codes)
    weights = torch.randn(5, 4, dtype=dtype)
    (weights * values).sum().backward()
    assert torch.equal(vectors.grad, weights)
    assert codes.grad is None


# --- laws of every quantiser -----------------------------------------------------------------------------------------


@every_quantiser
@pytest.mark.parametrize("shape", [(), (1,), (2, 0, 3), (4, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_quantised_fits_together(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Values are the codes in the precision of the vectors, and the codes are what the indices stand for."""
    quantiser = QUANTISERS[name]()
    quantised = quantiser(torch.randn(*shape, CODE_DIM).to(dtype))
    assert quantised.indices.shape == (shape if name != "residual" else (*shape, NUM_BOOKS))
    assert quantised.values.shape == quantised.codes.shape == (*shape, CODE_DIM)
    assert quantised.values.dtype == dtype and quantised.codes.dtype == torch.float32
    assert torch.equal(quantised.values, quantised.codes.to(dtype))
    torch.testing.assert_close(quantiser.look_up(quantised.indices), quantised.codes)


@single_codebook
def test_quantised_are_the_nearest_codes(name: str) -> None:
    """Against brute force, and look-up takes indices of any shape."""
    quantiser, vectors = QUANTISERS[name]().double(), torch.randn(4, 5, CODE_DIM, dtype=torch.float64)
    codes = quantiser.codes.detach()
    expected = (vectors[..., None, :] - codes).square().sum(-1).argmin(-1)
    quantised = quantiser(vectors)
    assert torch.equal(quantised.indices, expected)
    assert torch.equal(quantised.codes, codes[expected])
    assert torch.equal(quantiser.look_up(torch.tensor(2)), codes[2])
    assert quantiser.look_up(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, CODE_DIM)


@every_quantiser
def test_values_carry_the_gradient_past_the_codebook(name: str) -> None:
    """What a decoder is given: the identity for the encoder, and nothing for the codes."""
    quantiser, vectors = QUANTISERS[name](), torch.randn(4, 5, CODE_DIM, requires_grad=True)
    weights = torch.randn(4, 5, CODE_DIM)
    (weights * quantiser(vectors).values).sum().backward()
    assert torch.equal(vectors.grad, weights)
    assert all(parameter.grad is None for parameter in quantiser.parameters())


@every_quantiser
def test_commitment_reaches_the_encoder_alone(name: str) -> None:
    """2 (z - e), as if the codes were constants: those of the codebook, and of what earlier codebooks left."""
    quantiser, vectors = QUANTISERS[name](), torch.randn(4, 5, CODE_DIM, requires_grad=True)
    quantised = quantiser(vectors)
    commitment_loss(vectors, quantised.codes).sum().backward()
    torch.testing.assert_close(vectors.grad, 2.0 * (vectors - quantised.codes).detach())
    assert all(parameter.grad is None for parameter in quantiser.parameters())


def test_codes_of_a_gradient_quantiser_have_its_gradient() -> None:
    """Each code is pulled to the vectors that chose it, 2 Σ (e - z), and to no others; the encoder gets nothing."""
    quantiser, vectors = GradientQuantiser(NUM_CODES, CODE_DIM), torch.randn(4, 5, CODE_DIM, requires_grad=True)
    quantised = quantiser(vectors)
    codebook_loss(vectors, quantised.codes).sum().backward()
    expected = torch.zeros(NUM_CODES, CODE_DIM)
    for vector, index in zip(vectors.detach().flatten(0, 1), quantised.indices.flatten().tolist(), strict=True):
        expected[index] += 2.0 * (quantiser.codes[index].detach() - vector)
    torch.testing.assert_close(quantiser.codes.grad, expected)
    assert vectors.grad is None


@pytest.mark.parametrize("name", ["moving average", "residual"])
def test_codes_of_moving_averages_have_no_gradient(name: str) -> None:
    """They are buffers: an optimizer never sees them, and no graph goes through the codes."""
    quantiser = QUANTISERS[name]()
    assert list(quantiser.parameters()) == []
    assert not quantiser(torch.randn(4, CODE_DIM, requires_grad=True)).codes.requires_grad


@pytest.mark.usefixtures("as_a_user")
@every_quantiser
def test_vectors_of_another_size_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"vectors must have 3 values on their last axis.*got shape \(2, 5, 4\)"):
        QUANTISERS[name]()(torch.zeros(2, 5, 4))


@pytest.mark.usefixtures("as_a_user")
@every_quantiser
def test_noise_of_another_shape_is_refused(name: str) -> None:
    """By the transition of what learns from the vectors, and by initialisation."""
    quantiser = QUANTISERS[name]()
    vectors = torch.randn(20, CODE_DIM)
    indices, books = quantiser(vectors).indices, quantiser.num_codebooks
    for shape in ((NUM_CODES,), (), (books + 1, NUM_CODES), (books, NUM_CODES - 1), (1, books, NUM_CODES)):
        expected = f"uniform must have shape (num_codebooks, num_codes) = {(books, NUM_CODES)}, got {shape}"
        if name != "gradient":
            with pytest.raises(ArgumentError, match=re.escape(expected)):
                quantiser.transition(vectors, indices, torch.rand(shape))
        with pytest.raises(ArgumentError, match=re.escape(expected)):
            quantiser.initialise(vectors, torch.rand(shape), 1)


# --- state -----------------------------------------------------------------------------------------------------------


def test_where_each_quantiser_keeps_its_codebook() -> None:
    """The gradient's is a parameter; the averages are buffers, one set for each stage."""
    names = {"codes", "counts", "sums", "weights"}
    by_gradient, by_average, residual = (QUANTISERS[name]() for name in QUANTISERS)
    assert dict(by_gradient.named_buffers()) == {} and [n for n, _ in by_gradient.named_parameters()] == ["codes"]
    assert dict(by_average.named_buffers()).keys() == names
    assert dict(residual.named_buffers()).keys() == {f"stages.{i}.{n}" for i in range(NUM_BOOKS) for n in names}
    assert [quantiser.num_codebooks for quantiser in (by_gradient, by_average, residual)] == [1, 1, NUM_BOOKS]
    assert {(quantiser.num_codes, quantiser.code_dim) for quantiser in (by_gradient, by_average, residual)} == {
        (NUM_CODES, CODE_DIM)
    }
    assert all(torch.equal(getattr(by_average.codebook, name), getattr(by_average, name)) for name in names)


@every_quantiser
def test_saved_and_loaded_quantisers_go_on_alike(name: str) -> None:
    """The state dictionary holds all that the future depends on."""
    quantiser, loaded = train(QUANTISERS[name]()), QUANTISERS[name]()
    vectors, uniform = torch.randn(200, CODE_DIM), make_uniform(quantiser)
    assert not torch.equal(loaded(vectors).indices, quantiser(vectors).indices)
    loaded.load_state_dict(quantiser.state_dict())
    results = []
    for one in (quantiser, loaded):
        changes, num_revived = one.transition(vectors, one(vectors).indices, uniform)
        one.load(changes)
        results.append((one(vectors), num_revived))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert same_state(loaded, quantiser.state_dict())


@every_quantiser
def test_transition_leaves_the_module_as_it_is(name: str) -> None:
    """It returns every buffer under its own name; the codes move when they are loaded, after the step has used them."""
    quantiser = train(QUANTISERS[name]())
    before, storage = clone_state(quantiser), {n: b.data_ptr() for n, b in quantiser.named_buffers()}
    vectors = 3.0 + torch.randn(200, CODE_DIM)
    quantised = quantiser(vectors)
    changes, num_revived = quantiser.transition(vectors, quantised.indices, make_uniform(quantiser))
    assert same_state(quantiser, before)
    assert torch.equal(quantiser(vectors).codes, quantised.codes)
    assert changes.keys() == storage.keys() and num_revived.shape == ()
    assert not {value.data_ptr() for value in changes.values()} & set(storage.values())
    quantiser.load(changes)
    assert same_state(quantiser, {**before, **changes})
    assert {n: b.data_ptr() for n, b in quantiser.named_buffers()} == storage
    assert torch.equal(quantiser(vectors).codes, quantised.codes) == (name == "gradient")


@every_quantiser
def test_nothing_is_decided_by_the_global_random_state(name: str) -> None:
    """A quantiser draws its codes when it is built; afterwards all noise is given to it."""
    quantiser = QUANTISERS[name]()
    vectors, uniform = torch.randn(200, CODE_DIM), make_uniform(quantiser)
    state = torch.get_rng_state()
    quantiser.initialise(vectors, uniform, 1)
    quantiser.transition(vectors, quantiser(vectors).indices, uniform)
    assert torch.equal(torch.get_rng_state(), state)


def test_transition_is_the_update_and_then_the_revival() -> None:
    """With the constants that the quantiser was built with."""
    quantiser = train(MovingAverageQuantiser(NUM_CODES, CODE_DIM, decay=0.7, smoothing=0.1, least_usage=0.96))
    vectors, uniform = torch.randn(4, 50, CODE_DIM), make_uniform(quantiser)
    indices = quantiser(vectors).indices
    updated = update_codebook(quantiser.codebook, vectors, indices, decay=0.7, smoothing=0.1)
    expected, expected_num = revive_dead_codes(updated, vectors, uniform[0], least_usage=0.96)
    changes, num_revived = quantiser.transition(vectors, indices, uniform)
    assert 0 < num_revived < NUM_CODES and num_revived == expected_num
    assert all(torch.equal(changes[name], value) for name, value in expected._asdict().items())


class InStep(nn.Module):
    """Quantises and forms the next state in one forward, as a model in a pure training step does."""

    def __init__(self, quantiser: Quantiser) -> None:
        super().__init__()
        self.quantiser = quantiser

    def forward(self, vectors: Tensor, uniform: Tensor) -> tuple[Any, dict[str, Tensor], Tensor]:
        quantised = self.quantiser(vectors)
        return quantised, *self.quantiser.transition(vectors, quantised.indices, uniform)


@every_quantiser
def test_pure_step_with_a_state_from_outside(name: str) -> None:
    """The module's own codes are neither read nor written, and gradients go to the codes that were given."""
    other, module = InStep(train(QUANTISERS[name]())), InStep(QUANTISERS[name]())
    vectors, uniform = torch.randn(50, CODE_DIM), make_uniform(other.quantiser)
    before, given = clone_state(module), clone_state(other)
    parameters = {n: given[n].requires_grad_() for n, _ in other.named_parameters()}
    found = functional_call(module, {**given, **parameters}, (vectors, uniform))
    torch.testing.assert_close(found, other(vectors, uniform), rtol=0, atol=0)
    assert same_state(module, before) and not torch.equal(found[0].indices, module(vectors, uniform)[0].indices)
    if parameters:
        codebook_loss(vectors, found[0].codes).sum().backward()
        assert all((parameter.grad != 0.0).any() for parameter in parameters.values())
        assert all(parameter.grad is None for parameter in module.parameters())


# --- initialisation --------------------------------------------------------------------------------------------------


@single_codebook
def test_initialisation_takes_the_clusters_of_the_data(name: str) -> None:
    """Twelve clusters of five vectors, given twice as two batches: each code is the mean of one."""
    quantiser = QUANTISERS[name]()
    centres = 100.0 * torch.randn(NUM_CODES, 1, CODE_DIM)
    clusters = centres + 0.1 * torch.randn(NUM_CODES, 5, CODE_DIM)
    quantiser.initialise(clusters.flatten(0, 1).repeat(2, 1), make_uniform(quantiser), num_updates=2)
    means = clusters.mean(1)
    order = nearest_codes(means, quantiser.codes.detach())
    torch.testing.assert_close(quantiser.codes.detach()[order], means)
    assert len(order.unique()) == NUM_CODES
    if name == "moving average":
        torch.testing.assert_close(quantiser.counts, torch.full((NUM_CODES,), 5.0))
        torch.testing.assert_close(quantiser.sums, 5.0 * quantiser.codes)
        assert quantiser.weights.tolist() == [1.0] * NUM_CODES
    else:
        assert quantiser.codes.requires_grad and quantiser.codes.is_leaf


@every_quantiser
def test_codebook_larger_than_the_data_is_refused(name: str) -> None:
    quantiser = QUANTISERS[name]()
    with pytest.raises(ArgumentError, match="num_codes must be at most the 11 vectors that there are, got 12"):
        quantiser.initialise(torch.randn(11, CODE_DIM), make_uniform(quantiser), 1)


# --- learning --------------------------------------------------------------------------------------------------------


def grid_of_gaussians(count: int) -> Tensor:
    """Returns draws from sixteen narrow Gaussians on a grid."""
    labels = torch.randint(0, 16, (count,))
    return 4.0 * torch.stack([labels % 4, labels // 4], dim=-1) + 0.2 * torch.randn(count, 2)


@pytest.mark.parametrize("least_usage, all_used", [(0.03, True), (0.0, False)])
def test_revival_brings_a_badly_placed_codebook_to_use(least_usage: float, all_used: bool) -> None:
    """All codes begin far off on one side: one of them takes all vectors, and without revival the others never any."""
    quantiser = MovingAverageQuantiser(num_codes=16, code_dim=2, decay=0.9, least_usage=least_usage)
    quantiser.load({"codes": 100.0 + torch.randn(16, 2)})
    usage, revived = CodeUsage.of(torch.zeros(0, dtype=torch.int64), num_codes=16), 0
    for step in range(150):
        vectors = grid_of_gaussians(256)
        indices = quantiser(vectors).indices
        changes, num_revived = quantiser.transition(vectors, indices, make_uniform(quantiser))
        quantiser.load(changes)
        revived += int(num_revived)
        if step >= 140:
            usage = usage + CodeUsage.of(indices, num_codes=16)
    error = (vectors - quantiser(vectors).codes).square().sum(-1).mean().item()
    if all_used:
        assert usage.num_used == 16 and usage.perplexity > 8.0
        assert revived >= 15 and error < 4.0
    else:
        assert usage.num_used < 4 and revived == 0 and error > 10.0


def test_gradient_descent_moves_codes_to_the_means() -> None:
    """The minimum of the codebook loss is where moving averages go at once."""
    labels = torch.arange(16).repeat(10)
    centres = 4.0 * torch.stack([labels % 4, labels // 4], dim=-1)
    vectors = centres + 0.2 * torch.randn(160, 2)
    quantiser = GradientQuantiser(num_codes=16, code_dim=2)
    with torch.no_grad():
        quantiser.codes.copy_(centres[:16] + 0.5)
    optimizer = torch.optim.SGD(quantiser.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        codebook_loss(vectors, quantiser(vectors).codes).sum().backward()
        optimizer.step()
    means = torch.stack([vectors[labels == k].mean(0) for k in range(16)])
    torch.testing.assert_close(quantiser.codes.detach(), means, rtol=1e-5, atol=1e-5)


def test_transition_leaves_a_gradient_codebook_to_the_optimizer() -> None:
    """A transition has nothing to change, however its codes are used."""
    quantiser, vectors = GradientQuantiser(NUM_CODES, CODE_DIM), torch.randn(20, CODE_DIM)
    changes, num_revived = quantiser.transition(vectors, quantiser(vectors).indices, make_uniform(quantiser))
    assert changes == {} and num_revived.item() == 0 and num_revived.shape == ()
    before = clone_state(quantiser)
    quantiser.load(changes)
    assert same_state(quantiser, before)


# --- residual quantisation -------------------------------------------------------------------------------------------


def test_residual_stages_quantise_in_turn() -> None:
    """Each the nearest code, by brute force, to what the sum of those before it leaves."""
    quantiser, vectors = ResidualQuantiser(4, 20, CODE_DIM).double(), torch.randn(5, 6, CODE_DIM, dtype=torch.float64)
    quantised, rest = quantiser(vectors), vectors.clone()
    for i in range(4):
        codes = quantiser.state_dict()[f"stages.{i}.codes"]
        nearest = (rest[..., None, :] - codes).square().sum(-1).argmin(-1)
        assert torch.equal(quantised.indices[..., i], nearest)
        rest = rest - codes[nearest]
    torch.testing.assert_close(quantised.codes, vectors - rest)


def test_residuals_of_reduced_precision_are_not_rounded_again() -> None:
    """Codes are float32: vectors in bfloat16 leave residuals that bfloat16 does not hold."""
    quantiser, vectors = ResidualQuantiser(4, 20, CODE_DIM), torch.randn(200, CODE_DIM)
    quantiser.initialise(vectors, make_uniform(quantiser))
    vectors = vectors.bfloat16()
    assert torch.equal(quantiser(vectors).indices, quantiser(vectors.float()).indices)
    uniform, indices = make_uniform(quantiser), quantiser(vectors).indices
    changes, _ = quantiser.transition(vectors, indices, uniform)
    expected, _ = quantiser.transition(vectors.float(), indices, uniform)
    assert all(torch.equal(changes[name], expected[name]) for name in expected)


def test_first_stages_alone_give_a_coarser_sum() -> None:
    """Once they are at the clusters of data, each stage brings the sums nearer to it."""
    quantiser, vectors = ResidualQuantiser(5, 8, CODE_DIM), torch.randn(500, CODE_DIM)
    quantiser.initialise(vectors, make_uniform(quantiser), num_updates=1)
    quantised = quantiser(vectors)
    sums = torch.zeros_like(vectors)
    errors = [vectors.square().sum(1).mean().item()]
    for i in range(5):
        sums = sums + quantiser.state_dict()[f"stages.{i}.codes"][quantised.indices[:, i]]
        coarse = quantiser.look_up(quantised.indices[:, : i + 1])
        torch.testing.assert_close(coarse, sums)
        errors.append((vectors - coarse).square().sum(1).mean().item())
    assert all(after < 0.8 * before for before, after in zip(errors, errors[1:], strict=False))
    torch.testing.assert_close(quantised.codes, sums)


def test_residual_transition_is_one_of_each_stage() -> None:
    """On what the codes before it left, with noise of its own and with the constants that it was built with."""
    constants = {"decay": 0.7, "smoothing": 0.1, "least_usage": 0.96}
    quantiser = train(ResidualQuantiser(NUM_BOOKS, NUM_CODES, CODE_DIM, **constants))
    vectors, uniform = torch.randn(4, 50, CODE_DIM), make_uniform(quantiser)
    quantised = quantiser(vectors)
    changes, num_revived = quantiser.transition(vectors, quantised.indices, uniform)
    state, rest, total = quantiser.state_dict(), vectors, 0
    for i in range(NUM_BOOKS):
        codebook = Codebook(*(state[f"stages.{i}.{name}"] for name in Codebook._fields))
        indices = quantised.indices[..., i]
        updated = update_codebook(codebook, rest, indices, decay=0.7, smoothing=0.1)
        expected, revived = revive_dead_codes(updated, rest, uniform[i], least_usage=0.96)
        for name, value in expected._asdict().items():
            torch.testing.assert_close(changes[f"stages.{i}.{name}"], value)
        rest, total = rest - codebook.codes[indices], total + int(revived)
    assert num_revived.item() == total > 0


def test_residual_initialisation_is_one_of_each_stage() -> None:
    """On what the stages before it leave, with noise of its own."""
    quantiser, vectors = QUANTISERS["residual"](), torch.randn(300, CODE_DIM)
    uniform = make_uniform(quantiser)
    rest = given = vectors.clone()
    quantiser.initialise(given, uniform, num_updates=3)
    for i in range(NUM_BOOKS):
        stage = MovingAverageQuantiser(NUM_CODES, CODE_DIM)
        stage.initialise(rest, uniform[i : i + 1], num_updates=3)
        for name, value in stage.state_dict().items():
            torch.testing.assert_close(quantiser.state_dict()[f"stages.{i}.{name}"], value)
        rest = rest - stage(rest).codes
    assert torch.equal(given, vectors)


def test_residual_quantiser_of_one_codebook_is_the_plain_one() -> None:
    """But for the axis of codebooks."""
    plain, residual = MovingAverageQuantiser(NUM_CODES, CODE_DIM), ResidualQuantiser(1, NUM_CODES, CODE_DIM)
    residual.load({f"stages.0.{name}": value for name, value in plain.state_dict().items()})
    vectors, uniform = torch.randn(50, CODE_DIM), make_uniform(plain)
    expected, found = plain(vectors), residual(vectors)
    assert torch.equal(found.indices[:, 0], expected.indices) and torch.equal(found.codes, expected.codes)
    changes, _ = residual.transition(vectors, found.indices, uniform)
    for name, value in plain.transition(vectors, expected.indices, uniform)[0].items():
        assert torch.equal(changes[f"stages.0.{name}"], value)


@pytest.mark.parametrize("books", [0, NUM_BOOKS + 1])
def test_indices_of_too_many_or_no_codebooks_are_refused(books: int) -> None:
    """Those beyond the last stage would silently be dropped."""
    with pytest.raises(ArgumentError) as error:
        QUANTISERS["residual"]().look_up(torch.zeros(2, 5, books, dtype=torch.int64))
    assert str(error.value) == f"indices must have 1 to 3 codebooks on their last axis, got shape (2, 5, {books})"


# --- jitter ----------------------------------------------------------------------------------------------------------


def moves(values: Tensor, jittered: Tensor) -> Tensor:
    """Returns how far each code came from, where the values count up in time."""
    return (jittered - values).squeeze(-1).long()


def make_sequence(batch: int, time: int) -> Tensor:
    """Returns sequences that count up in time, apart from each other."""
    return (torch.arange(time) + 10 * time * torch.arange(batch)[:, None]).double()[..., None]


def test_jitter_of_no_probability_is_the_identity() -> None:
    """Even for noise of exactly zero."""
    values = torch.randn(3, 7, 4)
    uniform = torch.rand(3, 7)
    uniform[0] = 0.0
    assert torch.equal(jitter(values, uniform, probability=0.0), values)


def test_jitter_of_certainty_moves_every_code() -> None:
    """To a neighbour of the same sequence; what lies beyond an end is the end itself."""
    values = make_sequence(batch=3, time=200)
    found = moves(values, jitter(values, torch.rand(3, 200), probability=1.0))
    assert set(found[:, 1:-1].flatten().tolist()) == {-1, 1}
    assert set(found[:, 0].tolist()) <= {0, 1} and set(found[:, -1].tolist()) <= {-1, 0}


@pytest.mark.parametrize("probability", [0.12, 0.5])
def test_jitter_goes_left_and_right_equally_often(probability: float) -> None:
    """On a grid of noise both have exactly half of the probability, and what is drawn independently goes both ways."""
    values, uniform = make_sequence(1, 1000), ((torch.arange(1000) + 0.5) / 1000)[torch.randperm(1000)][None]
    found = moves(values, jitter(values, uniform, probability))[0, 1:-1]
    inner = uniform[0, 1:-1]
    assert (found == -1).sum() == (inner < probability / 2).sum()
    assert (found == 1).sum() == ((inner >= probability / 2) & (inner < probability)).sum()
    assert ((inner < probability) == (found != 0)).all()
    assert (found == -1).double().mean().item() == pytest.approx(probability / 2, abs=0.003)


def test_jitter_replaces_an_eighth_by_default() -> None:
    """0.12 of the codes, as the paper recommends; each as a whole, with all its dimensions."""
    values = make_sequence(20, 500).expand(-1, -1, 3) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    jittered = jitter(values, torch.rand(20, 500))
    moved = jittered - values
    assert torch.equal(moved[..., 1], 2.0 * moved[..., 0]) and torch.equal(moved[..., 2], 3.0 * moved[..., 0])
    assert (moved[..., 0] != 0.0).double().mean().item() == pytest.approx(0.12, abs=0.015)


@pytest.mark.parametrize("shape", [(3, 1, 4), (0, 5, 4), (3, 0, 4)])
def test_jitter_of_short_and_empty_sequences(shape: tuple[int, ...]) -> None:
    """A code without neighbours stays."""
    values = torch.randn(shape)
    assert torch.equal(jitter(values, torch.rand(shape[:2]), probability=1.0), values)


def test_gradient_of_jitter_goes_where_the_code_came_from() -> None:
    """A code that was copied gets the gradient of each copy, one that was replaced none."""
    values = torch.randn(1, 4, 2, requires_grad=True)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])[None, :, None]
    uniform = torch.tensor([[0.9, 0.05, 0.9, 0.01]])  # the second from its left, the last from its left
    (weights * jitter(values, uniform)).sum().backward()
    assert values.grad[0, :, 0].tolist() == [11.0, 0.0, 1100.0, 0.0]


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("values, uniform", [((3, 7), (3, 7)), ((3, 7, 4), (3, 6)), ((3, 7, 4), (3, 7, 1))])
def test_shapes_of_jitter_must_fit(values: tuple[int, ...], uniform: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError) as error:
        jitter(torch.zeros(values), torch.zeros(uniform))
    assert str(error.value) == (
        f"values must have shape (batch, time, dim) and uniform (batch, time), got {values} and {uniform}"
    )


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_probability_of_jitter_must_be_one(probability: float) -> None:
    with pytest.raises(ArgumentError, match=rf"^probability must be at least 0 and at most 1, got {probability}$"):
        jitter(torch.zeros(1, 2, 3), torch.zeros(1, 2), probability)


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "quantiser, arguments, message",
    [
        (GradientQuantiser, {"num_codes": 0}, "num_codes must be an integer of at least 1, got 0"),
        (GradientQuantiser, {"code_dim": 2.0}, "code_dim must be an integer of at least 1, got 2.0"),
        (MovingAverageQuantiser, {"num_codes": -3}, "num_codes must be an integer of at least 1, got -3"),
        (MovingAverageQuantiser, {"code_dim": 0}, "code_dim must be an integer of at least 1, got 0"),
        (MovingAverageQuantiser, {"decay": -0.1}, "decay must be at least 0 and below 1, got -0.1"),
        (MovingAverageQuantiser, {"decay": 1.0}, "decay must be at least 0 and below 1, got 1.0"),
        (MovingAverageQuantiser, {"smoothing": -1e-5}, "smoothing must be at least 0, got -1e-05"),
        (MovingAverageQuantiser, {"least_usage": -1.0}, "least_usage must be at least 0 and at most 1, got -1.0"),
        (MovingAverageQuantiser, {"least_usage": None}, "least_usage must be a finite number, got None"),
        (ResidualQuantiser, {"num_codebooks": 0}, "num_codebooks must be an integer of at least 1, got 0"),
        (ResidualQuantiser, {"num_codes": 0}, "num_codes must be an integer of at least 1, got 0"),
        (ResidualQuantiser, {"code_dim": 0}, "code_dim must be an integer of at least 1, got 0"),
        (ResidualQuantiser, {"decay": 1.5}, "decay must be at least 0 and below 1, got 1.5"),
    ],
)
def test_bad_arguments_are_named(quantiser: type[Quantiser], arguments: dict[str, Any], message: str) -> None:
    """The message names the argument and its value, when the quantiser is built."""
    sizes = {"num_codes": 4, "code_dim": 2, **({"num_codebooks": 2} if quantiser is ResidualQuantiser else {})}
    with pytest.raises(ArgumentError) as error:
        quantiser(**{**sizes, **arguments})
    assert str(error.value).endswith(f"Quantiser.{message}")


def test_copies_share_nothing() -> None:
    """A copy of a quantiser, as a weight average keeps one, does not follow it."""
    quantiser = QUANTISERS["residual"]()
    before = copy.deepcopy(quantiser)
    train(quantiser)
    assert not same_state(quantiser, before.state_dict())
