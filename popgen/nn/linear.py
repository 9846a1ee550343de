"""The linear layer of VAEs and their flows, which gain by it on some processors (docs/speed.md).

CPC, PixelCNN and WaveNet use `torch.nn.Linear`: for them no gain has been measured.
"""

from jaxtyping import Float
from torch import Tensor, nn

from popgen.products import linear


class Linear(nn.Linear):
    """A `torch.nn.Linear` whose products are formed by the faster library, see `popgen.products`.

    Example:
        >>> import torch
        >>> Linear(784, 300)(torch.zeros(2, 784)).shape
        torch.Size([2, 300])
    """

    def forward(self, x: Float[Tensor, "*batch input"]) -> Float[Tensor, "*batch output"]:
        """Returns x · weightᵀ + bias, shape `(*batch, out_features)`."""
        return linear(x, self.weight, self.bias)
