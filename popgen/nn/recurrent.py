"""A recurrent network as a function, which torch.vmap can map."""

import torch
from jaxtyping import Float
from torch import Tensor

from popgen.products import leading


def gru(frames: Float[Tensor, "batch frames input"], weights: list[Tensor]) -> Float[Tensor, "batch frames hidden"]:
    """Returns the states of a GRU of one layer after each frame, from a state of zero.

    Args:
        frames: its inputs.
        weights: those of `torch.nn.GRU`, in its order: of the input, of the state, and the bias of either.

    Example:
        >>> module = torch.nn.GRU(4, 3, batch_first=True)
        >>> frames = torch.randn(2, 5, 4)
        >>> torch.equal(gru(frames, list(module.parameters())), module(frames)[0])
        True
    """
    if any(map(torch._C._functorch.is_batchedtensor, (frames, *weights))):
        return _OneAfterAnother.apply(frames, *weights)
    state = frames.new_zeros(1, len(frames), weights[1].shape[1])
    # In training mode, without which cuDNN forms no gradients; there is no dropout that it would switch on.
    biases, layers, dropout, train, bidirectional, batch_first = True, 1, 0.0, True, False, True
    return torch.gru(frames, state, weights, biases, layers, dropout, train, bidirectional, batch_first)[0]


class _OneAfterAnother(torch.autograd.Function):
    """Recurrent networks mapped by torch.vmap, for which torch.gru has no rule; gradients are those of each."""

    @staticmethod
    def forward(frames: Tensor, *weights: Tensor) -> Tensor:
        return gru(frames, list(weights))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def vmap(info, in_dims: tuple, *inputs: Tensor) -> tuple[Tensor, int]:
        columns = [leading(*one, info.batch_size).unbind() for one in zip(inputs, in_dims, strict=True)]
        return torch.stack([gru(frames, weights) for frames, *weights in zip(*columns, strict=True)]), 0
