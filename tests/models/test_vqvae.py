"""The VQ-VAE: its terms by brute force, its bound by enumeration of all maps, how it starts, trains, and refuses."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popgen.errors import ArgumentError, DataError
from popgen.models import vqvae as vqvae_module
from popgen.models.vqvae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder, ResidualBlock, VQVAEWithPrior
from popgen.nn.pixelcnn import GatedPixelCNN
from popgen.nn.vqvae import GradientQuantiser, MovingAverageQuantiser, Quantiser, ResidualQuantiser
from popgen.training.objectives import NegativeELBO, VQVAELoss
from popgen.training.state import TrainState, initial_state, model_with_weights
from popgen.training.step import make_train_step

DIM = 3
QUANTISERS = {
    "gradient": lambda num_codes: GradientQuantiser(num_codes, DIM),
    "moving average": lambda num_codes: MovingAverageQuantiser(num_codes, DIM, decay=0.9),
    "residual": lambda num_codes: ResidualQuantiser(2, num_codes, DIM, decay=0.9),
}
every_quantiser = pytest.mark.parametrize("quantiser", QUANTISERS)


def make_vqvae(
    quantiser: str = "moving average",
    num_codes: int = 5,
    image_shape: tuple[int, int] = (8, 12),
    initialisation: str = "kmeans",
) -> VQVAE:
    """Returns a small VQ-VAE in float64 that uses several codes."""
    parts = (
        ConvolutionalEncoder(DIM, image_shape, hidden_dim=16, num_blocks=1),
        QUANTISERS[quantiser](num_codes),
        ConvolutionalDecoder(DIM, image_shape, hidden_dim=16, num_blocks=1),
    )
    with torch.no_grad():
        for module in (parts[0], parts[2]):
            for parameter in module.parameters():
                parameter.mul_(2.0)
        vectors = parts[0](torch.randint(2, (50, image_shape[0] * image_shape[1])).float()).flatten(0, -2)
        for codes in codebooks(parts[1]):
            codes.copy_(vectors[torch.randperm(len(vectors))[:num_codes]])
            vectors = vectors - vectors.mean(0)
    return VQVAE(*parts, initialisation).double()


def make_images(batch: int = 6, size: int = 96, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns binary images."""
    return torch.randint(2, (batch, size)).to(dtype)


def with_prior(vqvae: VQVAE, scale: float = 3.0) -> VQVAEWithPrior:
    """Returns the VQ-VAE with a prior in float64 that is far from uniform."""
    prior = GatedPixelCNN(vqvae.quantiser.num_codes, vqvae.map_shape, hidden_dim=4, num_layers=1)
    with torch.no_grad():
        prior.head[-1].weight.mul_(scale)
    return VQVAEWithPrior(vqvae, prior.double())


def codebooks(quantiser: Quantiser) -> list[Tensor]:
    """Returns the codes of each codebook."""
    stages = quantiser.stages if isinstance(quantiser, ResidualQuantiser) else [quantiser]
    return [stage.codes for stage in stages]


def quantise(quantiser: Quantiser, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Returns by brute force the sums of the nearest codes, and their indices, codebooks on the last axis."""
    total, indices = torch.zeros_like(vectors), []
    for codes in codebooks(quantiser):
        distances = ((vectors - total)[..., None, :] - codes).square().sum(-1)
        indices.append(distances.argmin(-1))
        total = total + codes[indices[-1]]
    return total, torch.stack(indices, dim=-1)


def log_bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """Returns log p(x), nats, by torch.distributions."""
    return torch.distributions.Bernoulli(logits=logits).log_prob(x).sum(-1)


# --- encoder and decoder ---------------------------------------------------------------------------------------------


def test_residual_block_by_hand() -> None:
    block, x = ResidualBlock(4, 2).double(), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    wide = F.conv2d(F.relu(x), block.wide.weight, block.wide.bias, padding=1)
    expected = x + torch.einsum("oi,bihw->bohw", block.narrow.weight[:, :, 0, 0], F.relu(wide))
    torch.testing.assert_close(block(x), expected + block.narrow.bias[:, None, None])


@pytest.mark.parametrize("row, column", [(0, 0), (1, 2), (3, 4)])
def test_a_position_of_the_map_sees_the_pixels_around_its_own_place(row: int, column: int) -> None:
    """Two kernels of 4 with stride 2 and padding 1 span ten pixels, from 4 r - 3 to 4 r + 6."""
    encoder = ConvolutionalEncoder(DIM, (16, 20), hidden_dim=16, num_blocks=0).double()
    x = make_images(8, 320).requires_grad_()
    vectors = encoder(x)
    assert vectors.shape == (8, 4, 5, DIM)
    (gradient,) = torch.autograd.grad(vectors[:, row, column].sum(), x)
    seen = gradient.view(8, 16, 20).ne(0).any(0).nonzero()
    expected = [range(max(0, 4 * i - 3), min(4 * i + 7, size)) for i, size in ((row, 16), (column, 20))]
    assert {tuple(place) for place in seen.tolist()} == set(itertools.product(*expected))


@pytest.mark.parametrize("row, column", [(0, 0), (1, 2), (3, 4)])
def test_a_code_reaches_the_pixels_around_its_own_place(row: int, column: int) -> None:
    """A kernel of 3 and two transposed ones of 4 with stride 2 reach from 4 r - 7 to 4 r + 10."""
    decoder = ConvolutionalDecoder(DIM, (16, 20), hidden_dim=16, num_blocks=0).double()
    z = torch.randn(8, 4, 5, DIM, dtype=torch.float64)
    moved = z.clone()
    moved[:, row, column] += 1.0
    assert decoder(z).logits.shape == (8, decoder.output_dim) == (8, 320)
    reached = (decoder(moved).logits - decoder(z).logits).view(8, 16, 20).ne(0).any(0).nonzero()
    expected = [range(max(0, 4 * i - 7), min(4 * i + 11, size)) for i, size in ((row, 16), (column, 20))]
    assert {tuple(place) for place in reached.tolist()} == set(itertools.product(*expected))


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_blocks_are_counted(num_blocks: int) -> None:
    for part in (ConvolutionalEncoder(DIM, num_blocks=num_blocks), ConvolutionalDecoder(DIM, num_blocks=num_blocks)):
        assert sum(isinstance(module, ResidualBlock) for module in part.modules()) == num_blocks


# --- the terms -------------------------------------------------------------------------------------------------------


@every_quantiser
def test_terms_by_brute_force(quantiser: str) -> None:
    model, x = make_vqvae(quantiser), make_images()
    vectors = model.encoder(x)
    codes, indices = quantise(model.quantiser, vectors)
    terms = model(x)
    assert indices.unique().numel() > 2, "a map of one code shows little"
    assert torch.equal(terms.indices, indices if quantiser == "residual" else indices[..., 0])
    torch.testing.assert_close(terms.log_p_x_given_z[0], log_bernoulli(model.decoder(codes).logits, x))
    chosen = 2 * 3 * (2 if quantiser == "residual" else 1)  # codes for an image
    torch.testing.assert_close(terms.log_p_z, torch.full((1, 6), -chosen * math.log(5), dtype=torch.float64))
    for nought in (terms.log_q_z_given_x, terms.log_det):
        assert torch.equal(nought, torch.zeros(1, 6, dtype=torch.float64))
    distance = (vectors - codes).square().sum((1, 2, 3))
    torch.testing.assert_close(terms.commitment_loss, distance)
    torch.testing.assert_close(terms.codebook_loss, distance if quantiser == "gradient" else torch.zeros_like(distance))
    assert terms.observed == {}, "nothing moves unless noise for it is given"


@every_quantiser
def test_each_loss_moves_what_it_should(quantiser: str) -> None:
    """The likelihood reaches the encoder as if the codes were its vectors; the codebook has a loss of its own."""
    model, x = make_vqvae(quantiser), make_images()
    terms, vectors = model(x), model.encoder(x)
    encoder, decoder, codebook = (list(part.parameters()) for part in (model.encoder, model.decoder, model.quantiser))
    assert len(codebook) == (quantiser == "gradient")

    def gradients(loss: Tensor) -> list[list[Tensor]]:
        parameters = [*encoder, *decoder, *codebook]
        found = torch.autograd.grad(loss.sum(), parameters, retain_graph=True, materialize_grads=True)
        ends = len(encoder), len(encoder) + len(decoder)
        return [list(found[: ends[0]]), list(found[ends[0] : ends[1]]), list(found[ends[1] :])]

    def nought(tensors: list[Tensor]) -> bool:
        return not any(tensor.any() for tensor in tensors)

    codes = quantise(model.quantiser, vectors)[0].detach().requires_grad_()
    (at_codes,) = torch.autograd.grad(log_bernoulli(model.decoder(codes).logits, x).sum(), codes)
    expected = torch.autograd.grad(vectors, encoder, at_codes, retain_graph=True)
    found = gradients(terms.log_p_x_given_z)
    torch.testing.assert_close(found[0], list(expected))
    assert not nought(found[1]) and nought(found[2])

    expected = torch.autograd.grad(vectors, encoder, 2 * (vectors - codes).detach())
    found = gradients(terms.commitment_loss)
    torch.testing.assert_close(found[0], list(expected))
    assert nought(found[1]) and nought(found[2])

    if quantiser == "gradient":
        found = gradients(terms.codebook_loss)
        pulls = torch.zeros_like(codebook[0]).index_add_(
            0, terms.indices.flatten(), 2 * (codes - vectors).detach().flatten(0, -2)
        )
        assert nought(found[0]) and nought(found[1])
        torch.testing.assert_close(found[2][0], pulls)
    else:
        assert not terms.codebook_loss.requires_grad


@every_quantiser
def test_decoding_what_was_encoded_is_the_models_own_likelihood(quantiser: str) -> None:
    model, x = make_vqvae(quantiser), make_images()
    terms = model(x)
    assert torch.equal(model.encode(x), terms.indices)
    found = model.decode(model.encode(x)).log_density(x)
    torch.testing.assert_close(found, terms.log_p_x_given_z[0], rtol=1e-13, atol=0)


@every_quantiser
def test_the_codebooks_next_state_is_asked_for_by_noise(quantiser: str) -> None:
    model, x = make_vqvae(quantiser), make_images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    uniform = torch.rand(model.quantiser.num_codebooks, 5, dtype=torch.float64)
    terms = model(x, None, uniform)
    buffers = dict(model.quantiser.named_buffers())
    expected, num_revived = model.quantiser.transition(model.encoder(x), terms.indices, uniform)
    found, num_found = model.quantiser.advance(buffers, terms.observed)
    assert set(found) == set(buffers)
    for name, value in expected.items():
        assert torch.equal(found[name], value) and not value.requires_grad
    assert num_found == num_revived
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@every_quantiser
def test_a_batch_of_one_and_an_empty_one(quantiser: str) -> None:
    model, x = make_vqvae(quantiser), make_images()
    uniform = torch.rand(model.quantiser.num_codebooks, 5, dtype=torch.float64)
    whole, one, none = model(x), model(x[2:3], None, uniform), model(x[:0], None, uniform)
    for name in ("log_p_x_given_z", "log_p_z", "log_q_z_given_x", "log_det"):
        torch.testing.assert_close(getattr(one, name), getattr(whole, name)[:, 2:3])
        assert getattr(none, name).shape == (1, 0)
    for name in ("commitment_loss", "codebook_loss", "indices"):
        torch.testing.assert_close(getattr(one, name), getattr(whole, name)[2:3])
        assert getattr(none, name).shape == (0, *getattr(whole, name).shape[1:])
    buffers = dict(model.quantiser.named_buffers())
    changes, _ = model.quantiser.advance(buffers, none.observed)
    assert all(torch.equal(value, buffers[name]) for name, value in changes.items()), "nothing was seen"
    assert model.decode(none.indices).mean.shape == (0, 96)


@every_quantiser
def test_float32_and_float64_agree(quantiser: str) -> None:
    model, x = make_vqvae(quantiser), make_images()
    uniform = torch.rand(model.quantiser.num_codebooks, 5, dtype=torch.float64)
    double = model(x, None, uniform)
    single = model.float()(x.float(), None, uniform.float())
    assert torch.equal(single.indices, double.indices)
    for terms, dtype in ((single, torch.float32), (double, torch.float64)):
        assert {value.dtype for value in (*terms[:6], *terms.observed.values())} == {dtype}
    for one, other in zip(single[:6], double[:6], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    for name, value in single.observed.items():
        torch.testing.assert_close(value.double(), double.observed[name], rtol=1e-4, atol=1e-4)


# --- the bound -------------------------------------------------------------------------------------------------------


def log_joint(model: VQVAE | VQVAEWithPrior, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log p(x|z) + log p(z) of every image and every map of codes there is, and the maps."""
    vqvae = model.autoencoder if isinstance(model, VQVAEWithPrior) else model
    height, width = vqvae.map_shape
    values = itertools.product(range(vqvae.quantiser.num_codes), repeat=height * width)
    maps = torch.tensor(list(values)).view(-1, height, width)
    logits = vqvae.decoder(codebooks(vqvae.quantiser)[0][maps]).logits
    if isinstance(model, VQVAEWithPrior):
        log_p_z = model.prior(maps).log_softmax(-1).gather(-1, maps[..., None]).sum((1, 2, 3))
    else:
        log_p_z = torch.full((len(maps),), -math.log(len(maps)), dtype=torch.float64)
    assert log_p_z.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    return log_bernoulli(logits, x[:, None]) + log_p_z, maps


@pytest.mark.parametrize("prior", ["uniform", "learned"])
@pytest.mark.parametrize("num_codes, image_shape", [(2, (4, 4)), (3, (4, 8)), (2, (8, 4)), (2, (8, 8))])
def test_the_bound_is_one_term_of_the_likelihood(prior: str, num_codes: int, image_shape: tuple[int, int]) -> None:
    """The likelihood is Σ_z p(x|z) p(z) over all maps; the bound is the term of the map that the encoder chooses."""
    vqvae = make_vqvae("moving average", num_codes, image_shape)
    model = with_prior(vqvae) if prior == "learned" else vqvae
    x = make_images(40, image_shape[0] * image_shape[1])
    joint, maps = log_joint(model, x)
    terms = model(x, torch.empty(1, 40, 0, dtype=torch.float64))
    bound = (terms.log_p_x_given_z + terms.log_p_z - terms.log_q_z_given_x)[0]
    chosen = quantise(vqvae.quantiser, vqvae.encoder(x))[1][..., 0]
    places = (chosen[:, None] == maps).flatten(2).all(2)
    assert torch.equal(places.sum(1), torch.ones(40, dtype=torch.int64)) and places.any(0).sum() > 1
    torch.testing.assert_close(bound, joint[places], rtol=0, atol=1e-10)
    log_p_x = joint.logsumexp(1)
    assert (bound < log_p_x).all() and (log_p_x - bound).max() > 0.1


@pytest.mark.parametrize("prior", ["uniform", "learned"])
def test_the_bound_is_that_of_a_normalised_density(prior: str) -> None:
    """Over all 65,536 images, Σ p(x) = 1 and so Σ exp(bound) ≤ 1; without log p(z) it would exceed 1."""
    vqvae = make_vqvae("moving average", 3, (4, 4))
    model = with_prior(vqvae) if prior == "learned" else vqvae
    x = (torch.arange(2**16)[:, None] >> torch.arange(16) & 1).double()
    with torch.no_grad():
        terms = model(x, torch.empty(1, len(x), 0, dtype=torch.float64))
        assert log_joint(model, x)[0].exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    assert (terms.log_p_x_given_z + terms.log_p_z).exp().sum() < 1.0 < terms.log_p_x_given_z.exp().sum()


# --- with a prior ----------------------------------------------------------------------------------------------------


def test_terms_with_a_prior() -> None:
    vqvae, x = make_vqvae(), make_images()
    before = vqvae(x)
    model = with_prior(vqvae)
    terms = model(x, torch.empty(1, 6, 0, dtype=torch.float64))
    assert torch.equal(terms.log_p_x_given_z, before.log_p_x_given_z)
    log_p = model.prior(before.indices).log_softmax(-1)
    by_hand = torch.stack([sum(log_p[i, r, c, k] for (r, c), k in numbered(m)) for i, m in enumerate(before.indices)])
    torch.testing.assert_close(terms.log_p_z[0], by_hand)
    assert torch.equal(terms.log_q_z_given_x, torch.zeros(1, 6)) and torch.equal(terms.log_det, torch.zeros(1, 6))
    assert (model.input_dim, model.noise_dim, model.decoder) == (96, 0, vqvae.decoder)


def numbered(indices: Tensor) -> list[tuple[tuple[int, int], int]]:
    """Returns the positions of a map and their codes."""
    return [((r, c), int(indices[r, c])) for r, c in itertools.product(*map(range, indices.shape))]


@pytest.mark.parametrize("quantiser", ["gradient", "moving average"])
def test_the_autoencoder_is_frozen_and_the_prior_alone_has_gradients(quantiser: str) -> None:
    model = with_prior(make_vqvae(quantiser))
    assert not any(parameter.requires_grad for parameter in model.autoencoder.parameters())
    assert all(parameter.requires_grad for parameter in model.prior.parameters())
    terms = model(make_images())
    assert not terms.log_p_x_given_z.requires_grad
    for name, parameter in model.prior.named_parameters():
        (gradient,) = torch.autograd.grad(terms.log_p_z.sum(), parameter, retain_graph=True)
        assert gradient.any(), name


def advance(state: TrainState, model: nn.Module, objective: Any, images: Tensor, num_steps: int) -> list[dict]:
    """Takes steps on all images and returns the metrics of each; the state's tensors hold the last weights."""
    step, history = make_train_step(model, objective, weight_average_decay=0.9), []
    for _ in range(num_steps):
        state, metrics = step(state, images)
        history.append({name: value.item() for name, value in metrics.items()})
    return history


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


@pytest.mark.parametrize("quantiser", ["gradient", "moving average"])
def test_the_bound_alone_trains_the_prior(quantiser: str) -> None:
    """The KL falls to below the entropy that codes drawn position by position would have; nothing else changes."""
    model = with_prior(make_vqvae(quantiser))
    bars = torch.arange(12) % 4 < 2
    images = torch.cat([bars.expand(8, 12).reshape(1, 96), ~bars.expand(8, 12).reshape(1, 96)]).double().repeat(8, 1)
    assert not torch.equal(*model.autoencoder.encode(images[:2]))
    state = initial_state(model, adam, seed=0)
    assert all(name.startswith("prior.") for name in state.parameters)
    frozen = {name: tensor.clone() for name, tensor in state.buffers.items()}
    history = advance(state, model, NegativeELBO(), images, 150)
    assert history[0]["kl"] > 4.0 and history[-1]["kl"] == pytest.approx(math.log(2.0), abs=0.1)
    assert len({metrics["reconstruction"] for metrics in history}) == 1
    assert set(frozen) == {f"autoencoder.{name}" for name in model.autoencoder.state_dict()}
    assert all(torch.equal(frozen[name], tensor) for name, tensor in state.buffers.items())
    trained = model_with_weights(model, state.parameters, state.buffers)
    uniform = torch.rand(200, *model.autoencoder.map_shape, dtype=torch.float64)
    drawn = trained.prior.sample(uniform)
    assert torch.equal(trained.sample(uniform), trained.autoencoder.decode(drawn).mean)
    right = [(drawn == indices).flatten(1).all(1).double().mean() for indices in trained.autoencoder.encode(images[:2])]
    assert sum(right) > 0.8 and min(right) > 0.3, "what it draws is what it was shown"


# --- training the autoencoder ----------------------------------------------------------------------------------------


@every_quantiser
def test_encoder_codebook_and_decoder_move_and_the_loss_falls(quantiser: str) -> None:
    model, images = make_vqvae(quantiser), make_images(8)
    state = initial_state(model, adam, seed=0)
    first = {name: tensor.detach().clone() for name, tensor in (state.parameters | state.buffers).items()}
    history = advance(state, model, VQVAELoss(), images, 60)
    for name, tensor in (state.parameters | state.buffers).items():
        assert not torch.equal(tensor, first[name]), f"{name} did not move"
    codes = [name for name in (state.parameters if quantiser == "gradient" else state.buffers) if "codes" in name]
    assert len(codes) == len(codebooks(model.quantiser))
    assert history[-1]["loss"] < history[0]["loss"] - 5.0
    assert history[-1]["reconstruction"] > history[0]["reconstruction"] + 5.0
    assert all(torch.isfinite(tensor).all() for tensor in (state.parameters | state.buffers).values())


def test_dead_codes_are_revived_in_training() -> None:
    model, images = make_vqvae(num_codes=8), make_images(8)
    with torch.no_grad():
        model.quantiser.codes[3:] = 1_000.0
    state = initial_state(model, adam, seed=0)
    history = advance(state, model, VQVAELoss(), images, 3)
    assert history[0]["codes_revived"] >= 5.0
    assert state.buffers["quantiser.codes"].abs().max() < 100.0


# --- the first codes -------------------------------------------------------------------------------------------------


def three_kinds(counts: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Returns three different 4 × 4 images, and as many of each as asked for, shuffled."""
    kinds = torch.zeros(3, 16, dtype=torch.float64)
    kinds[1, :8], kinds[2, ::2] = 1.0, 1.0
    images = kinds.repeat_interleave(torch.tensor(counts), dim=0)
    return kinds, images[torch.randperm(len(images))]


@pytest.mark.parametrize("counts, batches", [((30, 20, 10), 1), ((60, 90, 100), 3), ((800, 700, 500), 20)])
def test_the_first_codes_are_the_centres_of_what_the_encoder_makes_of_the_data(counts: tuple, batches: int) -> None:
    """Of three images there are three vectors; the counts are those of one batch of at most 100 images."""
    model = make_vqvae(num_codes=3, image_shape=(4, 4))
    kinds, images = three_kinds(counts)
    vectors = model.encoder(kinds).detach().view(3, DIM)
    model.initialise_from_data(images, torch.Generator().manual_seed(1))
    order = torch.cdist(vectors, model.quantiser.codes).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(model.quantiser.codes[order], vectors)
    torch.testing.assert_close(model.quantiser.counts[order], torch.tensor(counts).double() / batches)
    torch.testing.assert_close(model.quantiser.sums[order], model.quantiser.counts[order, None] * vectors)
    assert torch.equal(model.quantiser.weights, torch.ones(3, dtype=torch.float64))


def test_the_first_codes_see_a_bounded_number_of_random_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vqvae_module, "INITIAL_IMAGES", 40)
    monkeypatch.setattr(vqvae_module, "INITIAL_BATCHES", 4)
    model = make_vqvae(num_codes=3, image_shape=(4, 4))
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.initialise_from_data(three_kinds((300, 300, 300))[1].sort(0).values, torch.Generator().manual_seed(1))
    assert [len(part) for part in seen] == [10] * 4
    assert model.quantiser.counts.sum().item() == pytest.approx(10.0)
    assert torch.cat(seen).unique(dim=0).shape[0] == 3, "and not the first ones"


@every_quantiser
def test_the_start_is_a_function_of_data_and_generator(quantiser: str) -> None:
    images = make_images(50)
    codes = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = make_vqvae(quantiser)
        before = torch.get_rng_state()
        model.initialise_from_data(images, torch.Generator().manual_seed(seed))
        assert torch.equal(before, torch.get_rng_state())
        codes.append(torch.cat([book.detach() for book in codebooks(model.quantiser)]))
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


@every_quantiser
def test_the_start_brings_the_codes_near_the_vectors(quantiser: str) -> None:
    """Not even the residual's second codebook is left where it was; "random" leaves all as they were built."""
    images = make_images(50)
    model = make_vqvae(quantiser)
    for codes in codebooks(model.quantiser):
        codes.data.add_(10.0)
    vectors = model.encoder(images)
    variance = (vectors - vectors.mean((0, 1, 2))).square().sum((1, 2, 3)).mean().item()
    model.initialise_from_data(images, torch.Generator())
    after = model(images).commitment_loss.mean().item()
    assert after < 0.5 * variance
    if quantiser == "residual":
        coarse = model.quantiser.look_up(model.encode(images)[..., :1])
        assert (vectors - coarse).square().sum((1, 2, 3)).mean() > 1.5 * after
    model = make_vqvae(quantiser, initialisation="random")
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.initialise_from_data(images, torch.Generator())
    assert all(torch.equal(first[name], tensor) for name, tensor in model.state_dict().items())


def test_the_first_codes_are_of_what_the_encoder_is_trained_on() -> None:
    """Levels are binarised, and a fifth of all pixels of this grey are ones; values are used as they are."""
    model = make_vqvae()
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.initialise_from_data(torch.full((200, 96), 51, dtype=torch.uint8), torch.Generator())
    pixels = torch.cat(seen)
    assert pixels.dtype == torch.float64 and set(pixels.unique().tolist()) == {0.0, 1.0}
    assert pixels.mean().item() == pytest.approx(0.2, abs=5 * (0.16 / pixels.numel()) ** 0.5)
    seen.clear()
    values = 2.0 * torch.rand(200, 96, dtype=torch.float64) - 1.0
    model.initialise_from_data(values, torch.Generator())
    torch.testing.assert_close(torch.cat(seen).sort(0).values, values.sort(0).values, rtol=0.0, atol=0.0)


def test_more_codes_than_vectors_are_refused() -> None:
    model = make_vqvae(num_codes=13)
    model.initialise_from_data(make_images(3), torch.Generator())
    with pytest.raises(
        ArgumentError, match="num_codes must be at most the 12 vectors that 2 training images give, got 13: .*'random'"
    ):
        model.initialise_from_data(make_images(2), torch.Generator())


# --- errors ----------------------------------------------------------------------------------------------------------


def parts(**changes: Any) -> dict[str, Any]:
    """Returns the parts of a VQ-VAE with some of them changed."""
    encoder, decoder = (part(DIM, (8, 8), 4, 0) for part in (ConvolutionalEncoder, ConvolutionalDecoder))
    return {"encoder": encoder, "quantiser": MovingAverageQuantiser(4, DIM), "decoder": decoder} | changes


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoder": None}, "VQVAE.encoder must be a torch.nn.Module, got None"),
        ({"decoder": ConvolutionalDecoder}, "VQVAE.decoder must be a torch.nn.Module, got <class"),
        ({"quantiser": nn.Linear(3, 3)}, "VQVAE.quantiser must be a popgen.nn.vqvae.Quantiser, got Linear"),
        ({"quantiser": None}, "VQVAE.quantiser must be a popgen.nn.vqvae.Quantiser, got None"),
        ({"encoder": ConvolutionalEncoder(5, (8, 8))}, "encoder.code_dim is 5, but quantiser.code_dim is 3"),
        ({"decoder": ConvolutionalDecoder(2, (8, 8))}, "decoder.code_dim is 2, but quantiser.code_dim is 3"),
        ({"decoder": ConvolutionalDecoder(3, (8, 12))}, "encoder.input_dim is 64, but decoder.output_dim is 96"),
        ({"quantiser": GradientQuantiser(4, 7)}, "encoder.code_dim is 3, but quantiser.code_dim is 7"),
        ({"initialisation": "k-means"}, "VQVAE.initialisation must be one of kmeans, random, got 'k-means'"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        VQVAE(**parts(**changes))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("part", [ConvolutionalEncoder, ConvolutionalDecoder])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_shape": (8, 10)}, r"image_shape must be a height and a width, multiples of 4, got \(8, 10\)"),
        ({"image_shape": (0, 8)}, "image_shape must be a height and a width"),
        ({"image_shape": 8}, "image_shape must be a height and a width, multiples of 4, got 8"),
        ({"image_shape": (8.0, 8)}, "image_shape must be a height and a width"),
        ({"code_dim": 0}, "code_dim must be an integer of at least 1, got 0"),
        ({"hidden_dim": 1}, "hidden_dim must be an integer of at least 2, got 1"),
        ({"num_blocks": -1}, "num_blocks must be an integer of at least 0, got -1"),
    ],
)
def test_arguments(part: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"{part.__name__}.{message}"):
        part(**{"code_dim": DIM, **arguments})


@pytest.mark.usefixtures("as_a_user")
def test_a_prior_that_does_not_fit() -> None:
    vqvae = VQVAE(**parts())
    for num_codes, map_shape, message in (
        (5, (2, 2), "prior.num_codes is 5, but autoencoder's num_codes is 4"),
        (4, (2, 3), r"prior.map_shape is \(2, 3\), but autoencoder's map_shape is \(2, 2\)"),
    ):
        with pytest.raises(ArgumentError, match=f"VQVAEWithPrior: {message}"):
            VQVAEWithPrior(vqvae, GatedPixelCNN(num_codes, map_shape, 4, 1))
    with pytest.raises(ArgumentError, match="VQVAEWithPrior.prior must have log_density and sample, got Linear"):
        VQVAEWithPrior(vqvae, nn.Linear(3, 3))
    with pytest.raises(ArgumentError, match="VQVAEWithPrior.autoencoder must be a VQVAE, got Linear"):
        VQVAEWithPrior(nn.Linear(3, 3), GatedPixelCNN(4, (2, 2), 4, 1))
    residual = VQVAE(**parts(quantiser=ResidualQuantiser(3, 4, DIM)))
    with pytest.raises(ArgumentError, match="autoencoder must have one codebook.*its quantiser has 3"):
        VQVAEWithPrior(residual, GatedPixelCNN(4, (2, 2), 4, 1))


@pytest.mark.parametrize("prior", [False, True])
def test_images_that_do_not_fit(prior: bool) -> None:
    vqvae = VQVAE(**parts())
    model = VQVAEWithPrior(vqvae, GatedPixelCNN(4, (2, 2), 4, 1)) if prior else vqvae
    model.check_examples(torch.rand(5, 64))
    model.check_examples(torch.full((5, 64), 255, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"\(5, 60\), but the encoder takes \(count, 64\)"):
        model.check_examples(torch.rand(5, 60))
    with pytest.raises(DataError, match=r"values from 0 to 2.*\[0, 1\]"):
        model.check_examples(torch.tensor([0.0, 2.0]).repeat(5, 32))


def test_encoder_and_decoder_by_hand() -> None:
    """Convolutions with a ReLU between any two of them, and a last one with none after it."""
    encoder = ConvolutionalEncoder(3, (8, 12), hidden_dim=4, num_blocks=0).double()
    decoder = ConvolutionalDecoder(3, (8, 12), hidden_dim=4, num_blocks=0).double()
    x = torch.randn(2, 96, dtype=torch.float64)
    a, b, c = (layer for layer in encoder.layers if isinstance(layer, nn.Conv2d))
    vectors = c(F.relu(b(F.relu(a(x.view(2, 1, 8, 12))))))
    torch.testing.assert_close(encoder(x), vectors.permute(0, 2, 3, 1))
    a, b, c = (layer for layer in decoder.layers if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d))
    logits = c(F.relu(b(F.relu(a(vectors)))))
    torch.testing.assert_close(decoder(encoder(x)).logits, logits.view(2, 96))
