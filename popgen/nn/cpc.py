"""The parts of contrastive predictive coding (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748).

An encoder turns a sequence into frames, a context summarises the frames so far, and predictors say from the context
what the encodings of the next frames will be. Nothing looks ahead, and nothing passes between sequences.
"""

import abc
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from popgen.errors import ArgumentError, check_integer
from popgen.nn.causal_conv import CausalConv1d
from popgen.nn.negatives import NEGATIVE_KINDS, Negatives, independent_negatives, negative_indices
from popgen.nn.recurrent import gru

__all__ = [
    "NEGATIVE_KINDS",
    "CausalConvContext",
    "Context",
    "FrameEncoder",
    "GRUContext",
    "LinearPredictors",
    "Negatives",
    "Predictors",
    "RowEncoder",
    "StridedConvEncoder",
    "TransformerPredictors",
    "independent_negatives",
    "negative_indices",
]


class FrameEncoder(nn.Module, abc.ABC):
    """A sequence to frames, each of which sees only its own stretch of the sequence.

    Frame i sees the steps from i · hop to i · hop + receptive_field - 1.

    Attributes:
        encoding_dim: size of a frame.
        receptive_field: steps that a frame sees.
        hop: steps between two frames.
        value_shape: of one step of a sequence.
    """

    encoding_dim: int
    receptive_field: int
    hop: int
    value_shape: tuple[int, ...]

    @abc.abstractmethod
    def forward(self, values: Float[Tensor, "batch time ..."]) -> Float[Tensor, "batch frames hidden"]:
        """Returns the frames that fit into the sequences."""

    def num_frames(self, lengths: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """Returns how many frames lie wholly within the first `lengths` steps, and so see no padding."""
        frames = torch.div(lengths - self.receptive_field, self.hop, rounding_mode="floor") + 1
        return frames.clamp_min(0)

    def check_values(self, values: Tensor) -> None:
        """Checks that sequences fit.

        Raises:
            ArgumentError: if a step has another shape, or there is no step.
        """
        if values.ndim < 2 or tuple(values.shape[2:]) != self.value_shape or values.shape[1] == 0:
            expected, given = ", ".join(map(str, ("batch", "time", *self.value_shape))), tuple(values.shape)
            raise ArgumentError(f"values must have shape ({expected}) with a time of at least 1, got {given}")


class StridedConvEncoder(FrameEncoder):
    """Strided convolutions, each followed by a normalisation of every frame and a ReLU (section 3.1 of the paper).

    The convolutions are unpadded, and the normalisation is over the channels of one frame alone: a normalisation over
    time or over the batch, as common as it is, would show a frame the future and the other sequences. They have no
    bias, which the normalisation of a quiet waveform would make louder than the waveform: training is slow then.

    Args:
        hidden_dim: channels of every layer, and size of a frame.
        kernel_sizes: of the layers.
        strides: of the layers; their product is the hop.
        in_channels: 1 takes waveforms, shape `(batch, time)`; more take `(batch, time, in_channels)`.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> encoder = StridedConvEncoder(hidden_dim=64, kernel_sizes=(10, 8, 4, 4), strides=(5, 4, 2, 2))
        >>> encoder(torch.zeros(3, 8_000)).shape, encoder.hop, encoder.receptive_field
        (torch.Size([3, 98, 64]), 80, 225)
        >>> encoder.num_frames(torch.tensor([8_000, 305, 304, 224]))
        tensor([98,  2,  1,  0])
    """

    def __init__(
        self, hidden_dim: int, kernel_sizes: tuple[int, ...], strides: tuple[int, ...], in_channels: int = 1
    ) -> None:
        super().__init__()
        self.encoding_dim = check_integer("StridedConvEncoder.hidden_dim", hidden_dim, minimum=1)
        self.in_channels = check_integer("StridedConvEncoder.in_channels", in_channels, minimum=1)
        if not 0 < len(kernel_sizes) == len(strides):
            given = f"{kernel_sizes!r} and {strides!r}"
            raise ArgumentError(f"StridedConvEncoder.kernel_sizes and strides must be equally many, got {given}")
        self.receptive_field, self.hop = 1, 1
        layers: list[nn.Module] = []
        for kernel_size, stride in zip(kernel_sizes, strides, strict=True):
            check_integer("StridedConvEncoder.kernel_sizes", kernel_size, minimum=1)
            check_integer("StridedConvEncoder.strides", stride, minimum=1)
            self.receptive_field += (kernel_size - 1) * self.hop
            self.hop *= stride
            layers.append(nn.Conv1d(hidden_dim if layers else in_channels, hidden_dim, kernel_size, stride, bias=False))
        self.value_shape = () if in_channels == 1 else (in_channels,)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in layers)

    def forward(self, values: Float[Tensor, "batch time ..."]) -> Float[Tensor, "batch frames hidden"]:
        """Returns the frames.

        Sequences shorter than one frame are padded with zeros to one, which `num_frames` does not count.

        Raises:
            ArgumentError: if the sequences have another shape, or no step.
        """
        self.check_values(values)
        x = values[..., None] if self.in_channels == 1 else values
        x = F.pad(x, (0, 0, 0, max(0, self.receptive_field - x.shape[1])))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x.transpose(1, 2)).transpose(1, 2)))
        return x


class RowEncoder(FrameEncoder):
    """One frame for each row: two dense layers, each followed by a normalisation of the frame and a ReLU.

    Args:
        in_features: size of a row.
        hidden_dim: of both layers, and size of a frame.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> RowEncoder(in_features=28, hidden_dim=64)(torch.zeros(3, 28, 28)).shape
        torch.Size([3, 28, 64])
    """

    def __init__(self, in_features: int, hidden_dim: int) -> None:
        super().__init__()
        check_integer("RowEncoder.in_features", in_features, minimum=1)
        self.encoding_dim = check_integer("RowEncoder.hidden_dim", hidden_dim, minimum=1)
        self.receptive_field, self.hop, self.value_shape = 1, 1, (in_features,)
        sizes = ((in_features, hidden_dim), (hidden_dim, hidden_dim))
        layers = ((nn.Linear(size, out), nn.LayerNorm(out), nn.ReLU()) for size, out in sizes)
        self.layers = nn.Sequential(*(part for layer in layers for part in layer))

    def forward(self, values: Float[Tensor, "batch rows features"]) -> Float[Tensor, "batch rows hidden"]:
        """Returns the frames.

        Raises:
            ArgumentError: if the sequences have another shape, or no row.
        """
        self.check_values(values)
        return self.layers(values)


class Context(nn.Module, abc.ABC):
    """What is known of a sequence after each of its frames.

    Attributes:
        input_dim: size of a frame.
        context_dim: size of a context.
        receptive_field: how many frames a context sees, up to and with its own; None means all of them.
    """

    input_dim: int
    context_dim: int
    receptive_field: int | None

    @abc.abstractmethod
    def forward(self, frames: Float[Tensor, "batch frames input"]) -> Float[Tensor, "batch frames context"]:
        """Returns the context after each frame, which depends on that frame and those before it."""


class GRUContext(Context):
    """The states of a GRU (section 3.1 of the paper); its weights are named and shaped as those of `torch.nn.GRU`.

    Args:
        input_dim: size of a frame.
        context_dim: size of the state.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> GRUContext(input_dim=64, context_dim=32)(torch.zeros(3, 100, 64)).shape
        torch.Size([3, 100, 32])
    """

    def __init__(self, input_dim: int, context_dim: int) -> None:
        super().__init__()
        self.input_dim = check_integer("GRUContext.input_dim", input_dim, minimum=1)
        self.context_dim = check_integer("GRUContext.context_dim", context_dim, minimum=1)
        self.receptive_field = None
        bound = 1.0 / math.sqrt(context_dim)
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * context_dim, input_dim).uniform_(-bound, bound))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * context_dim, context_dim).uniform_(-bound, bound))
        self.bias_ih_l0 = nn.Parameter(torch.empty(3 * context_dim).uniform_(-bound, bound))
        self.bias_hh_l0 = nn.Parameter(torch.empty(3 * context_dim).uniform_(-bound, bound))

    def forward(self, frames: Float[Tensor, "batch frames input"]) -> Float[Tensor, "batch frames context"]:
        """Returns the state after each frame, at the precision of the weights."""
        # The function, not torch.nn.GRU: the module keeps a second list of its weights, which torch.compile refuses.
        weights: list[Tensor] = [self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0]
        with torch.autocast(frames.device.type, enabled=False):  # the recurrence adds its rounding up
            return gru(frames.to(self.weight_ih_l0.dtype), weights)


class CausalConvContext(Context):
    """Residual blocks of dilated causal convolutions: x + W · ReLU(norm(causal convolution of x)).

    The dilations are 1, g, g², ... with growth g, so that L layers of kernel size k see 1 + (k - 1)(g^L - 1)/(g - 1)
    frames. Normalisations are over the channels of one frame.

    Args:
        input_dim: size of a frame.
        context_dim: size of a context.
        num_layers: L.
        kernel_size: k.
        dilation_growth: g; 1 keeps the dilation at 1.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> context = CausalConvContext(input_dim=64, context_dim=32, num_layers=4, kernel_size=3)
        >>> context(torch.zeros(3, 100, 64)).shape, context.receptive_field
        (torch.Size([3, 100, 32]), 31)
    """

    def __init__(
        self, input_dim: int, context_dim: int, num_layers: int = 4, kernel_size: int = 3, dilation_growth: int = 2
    ) -> None:
        super().__init__()
        self.input_dim = check_integer("CausalConvContext.input_dim", input_dim, minimum=1)
        self.context_dim = check_integer("CausalConvContext.context_dim", context_dim, minimum=1)
        check_integer("CausalConvContext.num_layers", num_layers, minimum=1)
        check_integer("CausalConvContext.kernel_size", kernel_size, minimum=1)
        check_integer("CausalConvContext.dilation_growth", dilation_growth, minimum=1)
        self.first = nn.Linear(input_dim, context_dim)
        self.convolutions = nn.ModuleList(
            CausalConv1d(context_dim, context_dim, kernel_size, dilation_growth**i) for i in range(num_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(context_dim) for _ in range(num_layers))
        self.outputs = nn.ModuleList(nn.Linear(context_dim, context_dim) for _ in range(num_layers))
        self.receptive_field = 1 + (kernel_size - 1) * sum(dilation_growth**i for i in range(num_layers))

    def forward(self, frames: Float[Tensor, "batch frames input"]) -> Float[Tensor, "batch frames context"]:
        """Returns the context after each frame."""
        x = self.first(frames)
        for convolution, norm, output in zip(self.convolutions, self.norms, self.outputs, strict=True):
            x = x + output(F.relu(norm(convolution(x.transpose(1, 2)).transpose(1, 2))))
        return x


class Predictors(nn.Module, abc.ABC):
    """Predictions of the encodings 1 to K frames ahead; log f_k is their scalar product with an encoding (eq. 3).

    Attributes:
        context_dim: size of a context.
        encoding_dim: size of an encoding.
        num_steps: K.
    """

    context_dim: int
    encoding_dim: int
    num_steps: int

    @abc.abstractmethod
    def forward(self, contexts: Float[Tensor, "batch frames context"]) -> Float[Tensor, "batch steps frames encoding"]:
        """Returns the predictions made after each frame."""


class LinearPredictors(Predictors):
    """W_k c_t for k = 1, ..., K, so that scores are log-bilinear, z' W_k c (eq. 3 of the paper).

    Args:
        context_dim: size of a context.
        encoding_dim: size of an encoding.
        num_steps: K.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> LinearPredictors(context_dim=32, encoding_dim=64, num_steps=12)(torch.zeros(3, 100, 32)).shape
        torch.Size([3, 12, 100, 64])
    """

    def __init__(self, context_dim: int, encoding_dim: int, num_steps: int) -> None:
        super().__init__()
        self.context_dim = check_integer("LinearPredictors.context_dim", context_dim, minimum=1)
        self.encoding_dim = check_integer("LinearPredictors.encoding_dim", encoding_dim, minimum=1)
        self.num_steps = check_integer("LinearPredictors.num_steps", num_steps, minimum=1)
        self.layer = nn.Linear(context_dim, num_steps * encoding_dim, bias=False)

    def forward(self, contexts: Float[Tensor, "batch frames context"]) -> Float[Tensor, "batch steps frames encoding"]:
        """Returns W_k c_t."""
        return self.layer(contexts).unflatten(-1, (self.num_steps, self.encoding_dim)).transpose(1, 2)


class TransformerPredictors(Predictors):
    """A causal transformer block and a linear map for each step, after Rivière et al. 2020, section 3.2.

    (Unsupervised pretraining transfers well across languages, https://arxiv.org/abs/2002.02848.) The attention is
    biased towards recent frames by slopes that differ among the heads (Press et al. 2022,
    https://arxiv.org/abs/2108.12409), which serves sequences of any length.

    Args:
        context_dim: size of a context.
        encoding_dim: size of an encoding.
        num_steps: K.
        num_heads: of the attention; they divide the context.
        hidden_dim: between the dense layers; four times the context by default.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> TransformerPredictors(context_dim=32, encoding_dim=64, num_steps=12)(torch.zeros(3, 100, 32)).shape
        torch.Size([3, 12, 100, 64])
    """

    def __init__(
        self, context_dim: int, encoding_dim: int, num_steps: int, num_heads: int = 4, hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        self.context_dim = check_integer("TransformerPredictors.context_dim", context_dim, minimum=1)
        self.encoding_dim = check_integer("TransformerPredictors.encoding_dim", encoding_dim, minimum=1)
        self.num_steps = check_integer("TransformerPredictors.num_steps", num_steps, minimum=1)
        check_integer("TransformerPredictors.num_heads", num_heads, minimum=1)
        if context_dim % num_heads:
            raise ArgumentError(f"TransformerPredictors.num_heads must divide context_dim, got {num_heads}")
        hidden_dim = 4 * context_dim if hidden_dim is None else hidden_dim
        check_integer("TransformerPredictors.hidden_dim", hidden_dim, minimum=1)
        self.blocks = nn.ModuleList(_CausalBlock(context_dim, num_heads, hidden_dim) for _ in range(num_steps))
        self.outputs = nn.ModuleList(nn.Linear(context_dim, encoding_dim, bias=False) for _ in range(num_steps))

    def forward(self, contexts: Float[Tensor, "batch frames context"]) -> Float[Tensor, "batch steps frames encoding"]:
        """Returns the predictions, each from the contexts up to its own."""
        pairs = zip(self.blocks, self.outputs, strict=True)
        return torch.stack([output(block(contexts)) for block, output in pairs], dim=1)


class _CausalBlock(nn.Module):
    """A transformer block: attention to the present and the past, then dense layers, each normalised and residual."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.dense_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.projection, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.dense = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))

    def forward(self, x: Float[Tensor, "batch frames dim"]) -> Float[Tensor, "batch frames dim"]:
        """Returns what the block makes of the frames."""
        heads = self.projection(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._bias(x.shape[1], x.device).to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, bias)
        x = x + self.output(attended.transpose(1, 2).flatten(-2))
        return x + self.dense(self.dense_norm(x))

    def _bias(self, frames: int, device: torch.device) -> Float[Tensor, "heads frames frames"]:
        """Returns what is added to the attention: less the older a frame is, minus infinity if it is to come."""
        places = torch.arange(frames, device=device)
        age = places[:, None] - places
        slopes = torch.exp2(-8.0 * (torch.arange(self.num_heads, device=device) + 1) / self.num_heads)
        return (-slopes[:, None, None] * age).masked_fill(age < 0, -math.inf)
