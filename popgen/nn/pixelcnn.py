"""The Gated PixelCNN, an autoregressive density of maps of codes (van den Oord et al. 2016).

Conditional Image Generation with PixelCNN Decoders, https://arxiv.org/abs/1606.05328, section 2.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from popgen.distributions.codes import invert_cumulative
from popgen.errors import ArgumentError, check_integer
from popgen.precision import at_least_float32


class GatedPixelCNN(nn.Module):
    """An autoregressive density over maps of discrete codes, such as those of a VQ-VAE.

        p(x) = Π_i p(x_i | x_1, …, x_{i-1}), positions in raster order        (eq. 1 of the paper)

    Two stacks of convolutions describe each position: the vertical one sees the rows above it, on both sides, and the
    horizontal one sees its own row to its left and, at every layer, what the vertical one found (figure 2). Nothing is
    masked: the codes move by one position before the first layer, down for the one stack and to the right for the
    other, and from there on no kernel reaches below its row, nor a horizontal one to the right.

    There is no blind spot: position i depends on all that come before it if the L layers of kernel size k span the map,
    L (k // 2) being at least height - 2 and width - 1. Six layers of size 3 just span maps of 7 × 7.

    Beyond the paper, both stacks start with a learned embedding of the position, and the vertical one is residual too.

    Args:
        num_codes: how many values a position can take.
        map_shape: height and width of the maps.
        hidden_dim: channels of each stack.
        num_layers: number of gated layers L.
        kernel_size: size k of the kernels, odd, before they are cropped to what comes before: (k // 2 + 1) × k in the
            vertical stack, 1 × (k // 2 + 1) in the horizontal one.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> prior = GatedPixelCNN(num_codes=128, map_shape=(7, 7))
        >>> maps = prior.sample(torch.rand(5, 7, 7))
        >>> maps.shape, prior.log_density(maps).shape
        (torch.Size([5, 7, 7]), torch.Size([5]))
    """

    def __init__(
        self,
        num_codes: int,
        map_shape: tuple[int, int],
        hidden_dim: int = 64,
        num_layers: int = 6,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        self.num_codes = check_integer("GatedPixelCNN.num_codes", num_codes, minimum=1)
        self.map_shape = _check_map_shape("GatedPixelCNN.map_shape", map_shape)
        check_integer("GatedPixelCNN.hidden_dim", hidden_dim, minimum=1)
        check_integer("GatedPixelCNN.num_layers", num_layers, minimum=1)
        check_integer("GatedPixelCNN.kernel_size", kernel_size, minimum=3)
        if kernel_size % 2 == 0:
            raise ArgumentError(f"GatedPixelCNN.kernel_size must be odd, got {kernel_size}")
        self.code_embedding = nn.Embedding(num_codes, hidden_dim)
        self.position_embedding = nn.Parameter(torch.randn(*self.map_shape, hidden_dim))
        self.layers = nn.ModuleList(_GatedLayer(hidden_dim, kernel_size) for _ in range(num_layers))
        self.head = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, num_codes)
        )

    def forward(self, indices: Int64[Tensor, "batch height width"]) -> Float[Tensor, "batch height width codes"]:
        """Returns the logits of the code at each position, given the codes before it in raster order.

        They are at least float32, whatever the precision of the products.

        Args:
            indices: the codes, at least 0 and below `num_codes`.

        Raises:
            ArgumentError: if they are not maps of `map_shape`.
        """
        self._check_maps("indices", indices)
        return at_least_float32(self.head(self._features(indices)))

    def log_density(self, indices: Int64[Tensor, "batch height width"]) -> Float[Tensor, " batch"]:
        """Returns log p(x), nats, for each map.

        Args:
            indices: the codes, at least 0 and below `num_codes`.

        Raises:
            ArgumentError: if they are not maps of `map_shape`.
        """
        log_p = self(indices).log_softmax(-1)
        return log_p.gather(-1, indices[..., None]).sum((1, 2, 3))

    @torch.no_grad()
    def sample(self, uniform: Float[Tensor, "batch height width"]) -> Int64[Tensor, "batch height width"]:
        """Returns maps drawn code by code, each by inverting the cumulative distribution given those before it.

        A draw takes one pass through the network for each position, over the rows drawn so far.

        Args:
            uniform: uniform on [0, 1); its ends, to which a value may have been rounded, count as values just within.

        Raises:
            ArgumentError: if they are not maps of `map_shape`.
        """
        self._check_maps("uniform", uniform)
        indices = torch.zeros_like(uniform, dtype=torch.int64)
        height, width = self.map_shape
        for row in range(height):
            for column in range(width):
                features = self._features(indices[:, : row + 1])[:, row, column]
                cumulative = at_least_float32(self.head(features)).softmax(-1).cumsum(-1)
                indices[:, row, column] = invert_cumulative(cumulative, uniform[:, row, column])
        return indices

    def _features(self, indices: Int64[Tensor, "batch rows width"]) -> Float[Tensor, "batch rows width hidden"]:
        """Returns what the horizontal stack knows of each position; the maps may end at any row."""
        codes, position = self.code_embedding(indices), self.position_embedding[: indices.shape[1]]
        above = F.pad(codes, (0, 0, 0, 0, 1, -1)) + position  # each position holds the code above it
        left = F.pad(codes, (0, 0, 1, -1)) + position  # each position holds the code to its left
        # Channels stay innermost in memory, where the convolutions are fastest.
        vertical, horizontal = above.permute(0, 3, 1, 2), left.permute(0, 3, 1, 2)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal)
        return horizontal.permute(0, 2, 3, 1)

    def _check_maps(self, name: str, maps: Tensor) -> None:
        if maps.ndim != 3 or tuple(maps.shape[1:]) != self.map_shape:
            expected = f"(batch, {self.map_shape[0]}, {self.map_shape[1]})"
            raise ArgumentError(f"{name} must have shape {expected}, got {tuple(maps.shape)}")


class _GatedLayer(nn.Module):
    """One layer of both stacks (figure 2 of the paper)."""

    def __init__(self, hidden_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.reach = kernel_size // 2
        self.vertical = nn.Conv2d(hidden_dim, 2 * hidden_dim, (self.reach + 1, kernel_size))
        self.horizontal = nn.Conv2d(hidden_dim, 2 * hidden_dim, (1, self.reach + 1), bias=False)  # the sum has one
        self.vertical_to_horizontal = nn.Conv2d(2 * hidden_dim, 2 * hidden_dim, 1)
        self.output = nn.Conv2d(hidden_dim, hidden_dim, 1)

    def forward(
        self, vertical: Float[Tensor, "batch hidden rows width"], horizontal: Float[Tensor, "batch hidden rows width"]
    ) -> tuple[Float[Tensor, "batch hidden rows width"], Float[Tensor, "batch hidden rows width"]]:
        """Returns both stacks one layer on."""
        reach = self.reach
        seen_above = self.vertical(F.pad(vertical, (reach, reach, reach, 0)))
        seen = self.horizontal(F.pad(horizontal, (reach, 0))) + self.vertical_to_horizontal(seen_above)
        return vertical + _gate(seen_above), horizontal + self.output(_gate(seen))


def _gate(x: Float[Tensor, "batch double rows width"]) -> Float[Tensor, "batch hidden rows width"]:
    """Returns tanh(a) ⊙ sigmoid(b), a and b being the two halves of the channels (eq. 2 of the paper)."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


def _check_map_shape(name: str, map_shape: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(map_shape, tuple | list) or len(map_shape) != 2:
        raise ArgumentError(f"{name} must be a pair (height, width), got {map_shape!r}")
    height, width = map_shape
    return check_integer(f"{name}'s height", height, minimum=1), check_integer(f"{name}'s width", width, minimum=1)
