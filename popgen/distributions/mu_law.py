"""The μ-law, by which eight bits carry the loudness of speech (ITU-T G.711, with μ = 255).

It compands: f(x) = sign(x) log(1 + μ|x|) / log(1 + μ) maps [-1, 1] to itself, and 256 codes lie evenly on that.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from popgen.precision import at_least_float32

NUM_CODES = 256
MU = NUM_CODES - 1


def mu_law_encode(waveform: Float[Tensor, "*sample"]) -> Int64[Tensor, "*sample"]:
    """Returns the code, from 0 to 255, nearest to each value of a waveform after companding.

    The inverse of `mu_law_decode`, and the same codes as those of torchaudio. WaveNet reads and writes them
    (van den Oord et al. 2016, https://arxiv.org/abs/1609.03499, section 2.2).

    Args:
        waveform: values in [-1, 1]; those beyond count as the nearest end.

    Example:
        >>> mu_law_encode(torch.tensor([-1.0, -0.01, 0.0, 0.01, 1.0]))
        tensor([  0,  98, 128, 157, 255])
    """
    x = at_least_float32(waveform).clamp(-1.0, 1.0)
    companded = torch.sign(x) * torch.log1p(MU * x.abs()) / math.log1p(MU)
    return ((companded + 1.0) / 2.0 * MU + 0.5).to(torch.int64)  # never negative: it rounds to the nearest


def mu_law_decode(codes: Int64[Tensor, "*sample"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*sample"]:
    """Returns the value in [-1, 1] that each code stands for; `mu_law_encode` gives the code back.

    Args:
        codes: from 0 to 255.
        dtype: of the result.

    Example:
        >>> mu_law_decode(torch.tensor([0, 255]))
        tensor([-1.,  1.])
    """
    companded = 2.0 * codes.to(torch.promote_types(dtype, torch.float32)) / MU - 1.0
    magnitude = torch.expm1(companded.abs() * math.log1p(MU)) / MU
    return (torch.sign(companded) * magnitude).to(dtype)
