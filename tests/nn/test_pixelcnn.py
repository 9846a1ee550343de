"""The Gated PixelCNN: the order of its dependence, its total probability, and draws against enumerated maps."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popgen.errors import ArgumentError
from popgen.nn.pixelcnn import GatedPixelCNN

LARGEST_BELOW_ONE = {torch.float32: 1.0 - 2.0**-24, torch.float64: 1.0 - 2.0**-53}


def make_model(
    num_codes: int = 4, map_shape: tuple[int, int] = (4, 5), scale: float = 2.0, **arguments: int
) -> GatedPixelCNN:
    """Returns a model in float64 whose weights are scaled up, so that its densities are far from uniform."""
    model = GatedPixelCNN(num_codes, map_shape, **{"hidden_dim": 6, "num_layers": 4, **arguments}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def make_maps(model: GatedPixelCNN, batch: int = 3) -> Tensor:
    """Returns maps of random codes."""
    return torch.randint(model.num_codes, (batch, *model.map_shape))


def all_maps(model: GatedPixelCNN) -> Tensor:
    """Returns every map that there is."""
    height, width = model.map_shape
    codes = list(itertools.product(range(model.num_codes), repeat=height * width))
    return torch.tensor(codes).view(-1, height, width)


def changes(model: GatedPixelCNN) -> Tensor:
    """Returns by how much the logits at one position (second axis) move when another's code (first axis) changes."""
    indices = make_maps(model, batch=1)
    positions = indices.numel()
    changed = indices.flatten().repeat(positions, 1)
    changed.diagonal().add_(1).remainder_(model.num_codes)
    with torch.no_grad():
        difference = model(changed.view(-1, *model.map_shape)) - model(indices)
    return difference.abs().amax(-1).view(positions, positions)


SHAPES = [(4, 5), (5, 4), (1, 6), (6, 1), (1, 1)]


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("map_shape", SHAPES)
def test_logits_ignore_the_present_and_the_future(map_shape: tuple[int, int], kernel_size: int) -> None:
    """The logits at a position stay as they are, to rounding, whatever code at or after it changes."""
    moved = changes(make_model(map_shape=map_shape, kernel_size=kernel_size))
    assert moved.tril().max() < 1e-12


@pytest.mark.parametrize("kernel_size, num_layers", [(3, 4), (5, 2)])
@pytest.mark.parametrize("map_shape", SHAPES)
def test_logits_depend_on_all_of_the_past(map_shape: tuple[int, int], kernel_size: int, num_layers: int) -> None:
    """No blind spot: every position sees every earlier one as soon as the layers span the map."""
    moved = changes(make_model(map_shape=map_shape, kernel_size=kernel_size, num_layers=num_layers, hidden_dim=16))
    past = torch.ones_like(moved).triu(1).bool()
    assert (moved[past] > 1e-12).all()


def test_six_layers_span_seven_rows_and_columns_and_five_do_not() -> None:
    """As the documentation says: L (k // 2) must reach width - 1."""
    spans = [changes(make_model(2, (7, 7), num_layers=n, hidden_dim=16)).triu(1) > 1e-12 for n in (5, 6)]
    past = torch.ones(49, 49).triu(1).bool()
    assert not torch.equal(spans[0], past)
    assert torch.equal(spans[1], past)


@pytest.mark.parametrize(
    "num_codes, map_shape", [(3, (2, 2)), (2, (2, 3)), (2, (3, 2)), (3, (1, 4)), (3, (4, 1)), (1, (2, 2))]
)
def test_probabilities_of_all_maps_sum_to_one(num_codes: int, map_shape: tuple[int, int]) -> None:
    """The density is normalised, and the weights of these tests keep it far from uniform."""
    model = make_model(num_codes, map_shape)
    probabilities = model.log_density(all_maps(model)).exp()
    assert len(probabilities) == num_codes ** math.prod(map_shape)
    torch.testing.assert_close(probabilities.sum().item(), 1.0)
    assert num_codes == 1 or probabilities.max() > 3.0 * probabilities.mean()


def test_log_density_is_the_sum_of_the_conditionals() -> None:
    """Position by position, against a categorical distribution of torch.distributions, in nats."""
    model = make_model()
    indices = make_maps(model)
    conditionals = torch.distributions.Categorical(logits=model(indices))
    torch.testing.assert_close(model.log_density(indices), conditionals.log_prob(indices).sum((1, 2)))


def test_positions_differ() -> None:
    """One code everywhere and no neighbours beyond reach: only the position embedding tells the places apart."""
    model = make_model(num_codes=2, map_shape=(8, 8), num_layers=1)
    logits = model(torch.zeros(1, 8, 8, dtype=torch.int64))[0]
    inner = logits[3:6, 3:6].flatten(0, 1)
    assert (torch.pdist(inner) > 1e-3).all()


def test_layers_compute_what_the_figure_draws() -> None:
    """Figure 2 of the paper, one position and one neighbour after another, for one layer of kernel size 3."""
    model = make_model(num_layers=1, map_shape=(3, 4), scale=1.0)
    layer, (height, width) = model.layers[0], model.map_shape
    indices = make_maps(model, batch=1)
    codes, position = model.code_embedding(indices)[0], model.position_embedding

    def at(row: int, column: int, source: str) -> Tensor:
        """Returns what a stack starts with at a position: the code above or to the left, and where it is."""
        if not (0 <= row < height and 0 <= column < width):
            return torch.zeros(6, dtype=torch.float64)
        row_of_code, column_of_code = (row - 1, column) if source == "above" else (row, column - 1)
        code = codes[row_of_code, column_of_code] if min(row_of_code, column_of_code) >= 0 else 0.0
        return code + position[row, column]

    expected = torch.zeros(height, width, model.num_codes, dtype=torch.float64)
    for row, column in itertools.product(range(height), range(width)):
        vertical = layer.vertical.bias
        for i, j in itertools.product((-1, 0), (-1, 0, 1)):
            vertical = vertical + layer.vertical.weight[:, :, i + 1, j + 1] @ at(row + i, column + j, "above")
        horizontal = layer.vertical_to_horizontal.weight[:, :, 0, 0] @ vertical + layer.vertical_to_horizontal.bias
        for j in (-1, 0):
            horizontal = horizontal + layer.horizontal.weight[:, :, 0, j + 1] @ at(row, column + j, "left")
        gated = torch.tanh(horizontal[:6]) * torch.sigmoid(horizontal[6:])
        out = at(row, column, "left") + layer.output.weight[:, :, 0, 0] @ gated + layer.output.bias
        expected[row, column] = model.head(out)
    torch.testing.assert_close(model(indices)[0], expected)


def test_both_stacks_of_a_layer_add_to_what_they_are_given() -> None:
    """Without a kernel a gate is nought, and both pass on what came: deep stacks are trained through these sums."""
    layer = make_model(num_layers=1, map_shape=(3, 4)).layers[0]
    for parameter in layer.parameters():
        parameter.data.zero_()
    vertical, horizontal = torch.randn(2, 5, 6, 3, 4, dtype=torch.float64)
    above, left = layer(vertical, horizontal)
    assert torch.equal(above, vertical) and torch.equal(left, horizontal)


@pytest.mark.parametrize("num_codes, map_shape", [(3, (2, 2)), (2, (2, 3)), (2, (3, 2))])
def test_samples_have_the_enumerated_probabilities(num_codes: int, map_shape: tuple[int, int]) -> None:
    """Counts of 4000 draws against exp(log p) of every map: chi-square within five standard deviations."""
    model = make_model(num_codes, map_shape)
    maps = all_maps(model)
    expected = 4_000 * model.log_density(maps).exp().detach()
    draws = model.sample(torch.rand(4_000, *map_shape))
    place = num_codes ** torch.arange(math.prod(map_shape)).flip(0)
    counts = torch.bincount((draws.flatten(1) * place).sum(1), minlength=len(maps)).double()
    common = expected > 5.0  # the rest form one class
    pooled = [torch.cat([values[common], values[~common].sum()[None]]) for values in (counts, expected)]
    chi_square = ((pooled[0] - pooled[1]).square() / pooled[1].clamp_min(1.0)).sum()
    freedom = int(common.sum())
    assert freedom > 8
    assert chi_square < freedom + 5.0 * math.sqrt(2.0 * freedom)


def test_sampling_inverts_the_cumulative_distribution() -> None:
    """On a map of one position a grid of uniform values gives each code its share of the grid, in order."""
    model = make_model(num_codes=5, map_shape=(1, 1))
    probabilities = model(torch.zeros(1, 1, 1, dtype=torch.int64))[0, 0, 0].softmax(-1).tolist()
    uniform = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    expected = [next(k for k in range(5) if u < sum(probabilities[: k + 1])) for u in uniform.tolist()]
    assert len(set(expected)) >= 3
    assert model.sample(uniform.view(-1, 1, 1)).flatten().tolist() == expected


def with_logits(logits: list[float]) -> GatedPixelCNN:
    """Returns a model in float32 whose logits are the same at all positions."""
    model = GatedPixelCNN(len(logits), (2, 2), hidden_dim=2, num_layers=1)
    last = model.head[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(logits))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_uniform_values_give_the_outermost_possible_codes(dtype: torch.dtype) -> None:
    """A cumulative sum that ends above or below 1, codes without probability at either end, and 1 itself do no harm."""
    ends = torch.tensor([0.0, LARGEST_BELOW_ONE[dtype], 1.0], dtype=dtype).view(3, 1, 1).expand(3, 2, 2)
    for num_codes in (1, 3, 10, 49, 128, 1000):
        drawn = with_logits(torch.linspace(-1.0, 1.0, num_codes).tolist()).sample(ends)
        assert (drawn[0] == 0).all()
        assert (drawn[1:] == num_codes - 1).all()
        padded = with_logits([-200.0] * 3 + [0.1 * (k % 7) for k in range(num_codes)] + [-200.0] * 3).sample(ends)
        assert (padded[0] == 3).all()
        assert (padded[1:] == num_codes + 2).all()
        unlikely = with_logits([-60.0] + [0.1 * (k % 7) for k in range(num_codes)]).sample(ends)
        assert (unlikely[0] == 1).all(), "0 stands for all that were rounded to it"


def test_sampling_depends_on_its_noise_alone() -> None:
    """The same noise gives the same maps, one map does not affect another; nothing random and no gradient is used."""
    model, uniform, graphs = make_model(), torch.rand(6, 4, 5), []
    state = torch.get_rng_state()
    with model.head.register_forward_hook(lambda module, inputs, output: graphs.append(output.requires_grad)):
        maps = model.sample(uniform)
    assert graphs == [False] * 20
    assert torch.equal(torch.get_rng_state(), state)
    assert maps.dtype == torch.int64
    assert torch.equal(model.sample(uniform.flip(0)), maps.flip(0))
    assert torch.equal(model.sample(uniform[:1]), maps[:1])


def test_every_parameter_gets_a_gradient() -> None:
    """Finite, and from some map not zero."""
    model = make_model(scale=1.0)
    model.log_density(make_maps(model, batch=20)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0.0).any(), name


def test_training_finds_a_deterministic_rule() -> None:
    """Maps whose codes follow from the first one have log 4 nats to learn, and a few steps nearly get there."""
    torch.manual_seed(0)
    model = GatedPixelCNN(4, (3, 3), hidden_dim=16, num_layers=2)
    maps = (torch.arange(4)[:, None, None] + torch.arange(9).view(3, 3)) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = -model.log_density(maps).mean()
        loss.backward()
        optimizer.step()
    assert math.log(4.0) - 1e-4 < loss.item() < math.log(4.0) + 0.1
    draws = model.sample(torch.rand(50, 3, 3))
    follows = (draws == maps[draws[:, 0, 0]]).flatten(1).all(1)
    assert follows.sum() >= 40


def test_state_dict_round_trip() -> None:
    """A model that loads another's state has its density."""
    model, loaded = make_model(), make_model()
    indices = make_maps(model)
    assert not torch.equal(loaded.log_density(indices), model.log_density(indices))
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded.log_density(indices), model.log_density(indices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_has_the_type_of_the_parameters(dtype: torch.dtype) -> None:
    """In float32 it is that of float64, rounded; one map at a time it is that of the batch; no map, no density."""
    model = make_model(scale=1.0)
    indices = make_maps(model)
    exact = model.log_density(indices)
    model.to(dtype)
    found = model.log_density(indices)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([model.log_density(one[None]) for one in indices]), found)
    nothing = model.log_density(indices[:0])
    assert nothing.shape == (0,)
    nothing.sum().backward()
    assert model.sample(torch.rand(0, 4, 5)).shape == (0, 4, 5)


def test_density_is_formed_in_float32_under_autocast() -> None:
    """The products are rounded to bfloat16, the normalisation is not; sampling works as well."""
    model = make_model(num_codes=50, map_shape=(3, 3), scale=1.0).float()
    indices = make_maps(model, batch=8)
    exact = model.log_density(indices)
    with torch.autocast("cpu", torch.bfloat16):
        logits, rounded, maps = model(indices), model.log_density(indices), model.sample(torch.rand(8, 3, 3))
    assert logits.dtype == rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)
    torch.testing.assert_close(logits.log_softmax(-1).exp().sum(-1), torch.ones(8, 3, 3))
    assert maps.min() >= 0 and maps.max() < 50


def test_functional_call_uses_the_parameters_it_is_given() -> None:
    """The pure training step calls models so."""

    class Density(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prior = make_model()

        def forward(self, indices: Tensor) -> Tensor:
            return self.prior.log_density(indices)

    model, other = Density(), Density()
    indices = make_maps(model.prior)
    called = torch.func.functional_call(model, dict(other.named_parameters()), (indices,))
    torch.testing.assert_close(called, other(indices))


def test_one_graph_is_compiled(as_a_user) -> None:
    """torch.compile finds nothing that it cannot trace, and gives the same density."""
    model = make_model()
    indices = make_maps(model)
    compiled = torch.compile(model.log_density, dynamic=False, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(indices), model.log_density(indices))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_codes": 0}, "GatedPixelCNN.num_codes must be an integer of at least 1, got 0"),
        ({"hidden_dim": 0}, "GatedPixelCNN.hidden_dim must be an integer of at least 1, got 0"),
        ({"num_layers": 0}, "GatedPixelCNN.num_layers must be an integer of at least 1, got 0"),
        ({"kernel_size": 1}, "GatedPixelCNN.kernel_size must be an integer of at least 3, got 1"),
        ({"kernel_size": 4}, "GatedPixelCNN.kernel_size must be odd, got 4"),
        ({"map_shape": (0, 7)}, "GatedPixelCNN.map_shape's height must be an integer of at least 1, got 0"),
        ({"map_shape": (7, 2.5)}, "GatedPixelCNN.map_shape's width must be an integer of at least 1, got 2.5"),
        ({"map_shape": (7,)}, r"GatedPixelCNN.map_shape must be a pair \(height, width\), got \(7,\)"),
        ({"map_shape": 7}, r"GatedPixelCNN.map_shape must be a pair \(height, width\), got 7"),
    ],
)
def test_bad_arguments_are_named(as_a_user, arguments: dict, message: str) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ArgumentError, match=message):
        GatedPixelCNN(**{"num_codes": 4, "map_shape": (7, 7), **arguments})


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 4, 6), (3, 1, 5), (4, 5), (2, 3, 4, 5)])
def test_maps_of_another_shape_are_refused(as_a_user, shape: tuple[int, ...]) -> None:
    """The message says what shape the maps must have, and which they had."""
    model = make_model()
    for name, call in (("indices", model.forward), ("indices", model.log_density), ("uniform", model.sample)):
        with pytest.raises(ArgumentError, match=rf"^{name} must have shape \(batch, 4, 5\), got ") as error:
            call(torch.zeros(shape, dtype=torch.int64 if name == "indices" else torch.float32))
        assert str(error.value).endswith(str(shape))


def test_the_head_is_two_dense_layers_behind_gates_of_their_own() -> None:
    model = GatedPixelCNN(4, (3, 4), hidden_dim=6, num_layers=1).double()
    indices = torch.randint(4, (2, 3, 4))
    first, second = (layer for layer in model.head if isinstance(layer, nn.Linear))
    hidden = first(F.silu(model._features(indices)))
    torch.testing.assert_close(model(indices), second(F.silu(hidden)))
