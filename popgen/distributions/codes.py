"""Two densities over the 256 codes of a waveform, of any leading shape and without an event axis.

Both give log-probabilities of the same codes, so their nats and bits compare. Whatever the type of the network that
made their parameters, they are formed in float32 at least.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from popgen.distributions.mu_law import NUM_CODES
from popgen.errors import ArgumentError, check_integer
from popgen.precision import at_least_float32

WIDTH = 2.0 / NUM_CODES  # of the interval of a code in [-1, 1]
LOWEST_LOG_SCALE = -7.0  # a logistic of this scale has up to 97 % of its mass on one code
NARROW = 1e-12  # widths, in units of the scale, for which the gradient of the formula may overflow


@dataclasses.dataclass(frozen=True)
class CategoricalCodes:
    """A probability for each code, p(c) = softmax(logits)_c (van den Oord et al. 2016, section 2.2).

    https://arxiv.org/abs/1609.03499

    Attributes:
        logits: shape `(*batch, 256)`.

    Example:
        >>> density = CategoricalCodes(torch.zeros(2, 100, 256))
        >>> codes = density.sample(torch.rand(2, 100))
        >>> density.log_density(codes).shape  # -log 256 each
        torch.Size([2, 100])
    """

    logits: Float[Tensor, "*batch codes"]

    def log_density(self, codes: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Returns log p(c), nats, of each code.

        Args:
            codes: from 0 to 255.

        Raises:
            ArgumentError: if the shape is not that of the logits without their last axis.
        """
        _check_shape(codes, self.logits)
        return at_least_float32(self.logits).log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)

    def sample(self, uniform: Float[Tensor, "*batch"]) -> Int64[Tensor, "*batch"]:
        """Returns a code for each, by inverting the cumulative distribution.

        Args:
            uniform: uniform on [0, 1), whose ends count as values just within: 0 stands for all that were rounded
                to it, and would give the farthest code of a tail.
        """
        return invert_cumulative(at_least_float32(self.logits).softmax(-1).cumsum(-1), uniform)


@dataclasses.dataclass(frozen=True)
class DiscretisedLogisticMixture:
    """The mass that a mixture of logistic distributions has on the interval of each code.

        p(c) = Σ_k softmax(logits)_k [σ((right_c - mean_k) / scale_k) - σ((left_c - mean_k) / scale_k)]

    The codes divide [-1, 1] into 256 equal intervals, the outermost of which reach to infinity (Salimans et al. 2017,
    PixelCNN++, https://arxiv.org/abs/1701.05517, eq. 1 and 2). With b = a + width / scale each mass is formed by

        log[σ(b) - σ(a)] = log σ(b) + log σ(-a) + log(1 - exp(a - b))

    which loses nothing however far out the interval lies.

    Attributes:
        logits: of the components, shape `(*batch, components)`.
        means: where [-1, 1] is the range of the codes; the same shape.
        log_scales: the same shape; a value below -7 counts as -7.

    Example:
        >>> density = DiscretisedLogisticMixture(*torch.zeros(3, 2, 100, 10))
        >>> codes = density.sample(torch.rand(2, 100))
        >>> density.log_density(codes).shape
        torch.Size([2, 100])
    """

    logits: Float[Tensor, "*batch components"]
    means: Float[Tensor, "*batch components"]
    log_scales: Float[Tensor, "*batch components"]

    def log_density(self, codes: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Returns log p(c), nats, of each code.

        Args:
            codes: from 0 to 255.

        Raises:
            ArgumentError: if the shape is not that of the logits without their last axis.
        """
        _check_shape(codes, self.logits)
        logits, means, log_scales = self._parameters()
        left = WIDTH * codes[..., None].to(means.dtype) - 1.0
        precision = torch.exp(-log_scales)
        a = (left - means) * precision
        b = a + WIDTH * precision
        first, last = codes[..., None] == 0, codes[..., None] == NUM_CODES - 1
        log_masses = (
            F.logsigmoid(b).masked_fill(last, 0.0)
            + F.logsigmoid(-a).masked_fill(first, 0.0)
            + _log_one_minus_exp(math.log(WIDTH) - log_scales).masked_fill(first | last, 0.0)
        )
        return torch.logsumexp(logits.log_softmax(-1) + log_masses, dim=-1)

    def sample(self, uniform: Float[Tensor, "*batch"]) -> Int64[Tensor, "*batch"]:
        """Returns a code for each, by inverting the cumulative distribution of the whole mixture.

        Args:
            uniform: uniform on [0, 1), whose ends count as values just within: 0 stands for all that were rounded
                to it, and would give the farthest code of a tail.
        """
        logits, means, log_scales = (parameter[..., None, :] for parameter in self._parameters())
        rights = WIDTH * torch.arange(1, NUM_CODES + 1, dtype=means.dtype, device=means.device) - 1.0
        rights[-1] = math.inf
        below = torch.sigmoid((rights[:, None] - means) * torch.exp(-log_scales))
        below = torch.where(rights[:, None].isinf(), 1.0, below)  # infinity times a scale that is rounded to none
        return invert_cumulative((logits.softmax(-1) * below).sum(-1), uniform)

    def _parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        logits, means, log_scales = map(at_least_float32, (self.logits, self.means, self.log_scales))
        return logits, means, log_scales.clamp_min(LOWEST_LOG_SCALE)


def _check_shape(codes: Tensor, logits: Tensor) -> None:
    if codes.shape != logits.shape[:-1]:
        raise ArgumentError(
            f"codes must have the shape of the logits without their last axis, got {tuple(codes.shape)} for "
            f"{tuple(logits.shape)}"
        )


CodeDensity = CategoricalCodes | DiscretisedLogisticMixture


@dataclasses.dataclass(frozen=True)
class CategoricalOutput:
    """A logit for each of the 256 codes (section 2.2 of the paper).

    Example:
        >>> CategoricalOutput().density(torch.zeros(2, 100, 256)).log_density(torch.zeros(2, 100).long()).shape
        torch.Size([2, 100])
    """

    num_parameters = NUM_CODES

    def initial_bias(self) -> Float[Tensor, " parameters"]:
        """Returns zeros: all codes are equally likely."""
        return torch.zeros(NUM_CODES)

    def density(self, parameters: Float[Tensor, "*batch parameters"]) -> CategoricalCodes:
        """Returns the density of a code."""
        return CategoricalCodes(parameters)


@dataclasses.dataclass(frozen=True)
class LogisticMixtureOutput:
    """The logits, means and log-scales of a discretised mixture of logistic distributions.

    The output of Parallel WaveNet (van den Oord et al. 2017, https://arxiv.org/abs/1711.10433, section 2.1), over the
    same 256 codes as the categorical one.

    Args:
        num_components: of the mixture.

    Raises:
        ArgumentError: if it is not an integer of at least 1.

    Example:
        >>> LogisticMixtureOutput(num_components=10).density(torch.zeros(2, 100, 30)).means.shape
        torch.Size([2, 100, 10])
    """

    num_components: int = 10

    def __post_init__(self) -> None:
        check_integer("LogisticMixtureOutput.num_components", self.num_components, minimum=1)

    @property
    def num_parameters(self) -> int:
        """Three for each component."""
        return 3 * self.num_components

    def initial_bias(self) -> Float[Tensor, " parameters"]:
        """Returns equal components spread evenly over [-1, 1], whose scale is a quarter of their distance."""
        k = self.num_components
        means = (2.0 * torch.arange(k) + 1.0) / k - 1.0
        return torch.cat([torch.zeros(k), means, torch.full((k,), 0.5 / k).log()])

    def density(self, parameters: Float[Tensor, "*batch parameters"]) -> DiscretisedLogisticMixture:
        """Returns the density of a code."""
        return DiscretisedLogisticMixture(*parameters.chunk(3, dim=-1))


def _log_one_minus_exp(log_width: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns log(1 - exp(-w)) for w = exp(log_width), with a gradient however small w is."""
    width = torch.exp(log_width)
    narrow = width < NARROW
    series = log_width - width / 2.0
    formula = torch.log(-torch.expm1(-width.masked_fill(narrow, NARROW)))
    return torch.where(narrow, series, formula)


def invert_cumulative(
    cumulative: Float[Tensor, "*batch codes"], uniform: Float[Tensor, "*batch"]
) -> Int64[Tensor, "*batch"]:
    """Returns the code at which each cumulative distribution passes a uniform number.

    Args:
        cumulative: sums of probabilities, the last of them 1 but for rounding.
        uniform: uniform on [0, 1), whose ends count as values just within: 0 stands for all that were rounded to it,
            and would give a code of no probability.

    Example:
        >>> invert_cumulative(torch.tensor([[0.25, 1.0], [0.0, 1.0]]), torch.tensor([0.5, 0.0]))
        tensor([1, 1])
    """
    spacing = torch.finfo(uniform.dtype).eps / 2.0  # of the values that a generator draws
    passed = cumulative <= uniform[..., None].clamp_min(spacing / 2.0)
    # Rounding may end the sum below 1: the last code is the one that completes it.
    return (passed & (cumulative < cumulative[..., -1:])).sum(-1)
