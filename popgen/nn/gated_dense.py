"""The gated dense layer of the VampPrior paper."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from popgen.errors import check_integer
from popgen.nn.linear import Linear


class GatedDense(nn.Module):
    """A linear layer whose output is gated by a second one, (W x + b) ⊙ sigmoid(V x + c).

    Both are one matrix product followed by a gated linear unit (Dauphin et al. 2017,
    https://arxiv.org/abs/1612.08083, eq. 1; used by Tomczak and Welling 2018, https://arxiv.org/abs/1705.07120).

    Args:
        input_dim: size of the last axis of the input.
        output_dim: size of the last axis of the output.

    Example:
        >>> import torch
        >>> GatedDense(784, 300)(torch.zeros(2, 784)).shape
        torch.Size([2, 300])
    """

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        check_integer("GatedDense.input_dim", input_dim, minimum=1)
        check_integer("GatedDense.output_dim", output_dim, minimum=1)
        self.linear = Linear(input_dim, 2 * output_dim)

    def forward(self, x: Float[Tensor, "*batch input"]) -> Float[Tensor, "*batch output"]:
        """Returns the gated activations, shape `(*batch, output_dim)`."""
        return F.glu(self.linear(x), dim=-1)
