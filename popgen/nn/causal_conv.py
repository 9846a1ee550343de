"""A causal convolution, and the memory that lets it go a step at a time.

Fast Wavenet Generation Algorithm (Le Paine et al. 2016), https://arxiv.org/abs/1611.09482.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from popgen.errors import ArgumentError, check_integer


class PastInputs(NamedTuple):
    """What one or several causal convolutions of the same kernel size have yet to see of their past inputs.

    Each convolution has a ring of (kernel_size - 1) · dilation slots, and the rings lie one after another. A step reads
    `kernel_size - 1` slots of each, overwrites the oldest, and moves on by one: its time and memory do not depend on
    the dilation, on how many steps there have been, or on how long the sequence will be. Where the rings stand is a
    tensor too, so that a compiled step needs no second compilation and a recorded one can be replayed.

    The state is donated: `write` overwrites it in place.

    Attributes:
        values: past inputs, zero before the first; shape `(slots, batch, channels)`.
        slots: which of them the next step reads, oldest first; shape `(convolutions, kernel_size - 1)`.
        successors: the slot after each one in its ring, shape `(slots,)`.

    Example: `no_past_inputs` makes one, `CausalConv1d` uses it.
    """

    values: Float[Tensor, "slots batch channels"]
    slots: Int64[Tensor, "convolutions taps"]
    successors: Int64[Tensor, " slots"]

    def read(self) -> Float[Tensor, "convolutions taps batch channels"]:
        """Returns a copy of the past inputs that the next step of each convolution sees, oldest first."""
        return self.values.index_select(0, self.slots.flatten()).unflatten(0, self.slots.shape)

    def write(self, x: Float[Tensor, "convolutions batch channels"]) -> None:
        """Takes the inputs of this step in, in place of the oldest, and moves on to the next step."""
        if self.slots.shape[1] > 0:
            self.values.index_copy_(0, self.slots[:, 0], x.to(self.values.dtype))
            self.slots.copy_(self.successors[self.slots])


def no_past_inputs(
    kernel_size: int,
    dilations: Sequence[int],
    channels: int,
    batch_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PastInputs:
    """Returns the past inputs before the first step: zeros.

    Args:
        kernel_size: of all convolutions; one of size 1 needs no past inputs.
        dilations: of each convolution.
        channels: of the inputs of each convolution.
        batch_size: how many sequences go on side by side.
        device: of the state.
        dtype: of the inputs.

    Raises:
        ArgumentError: if `batch_size` is not a non-negative integer.

    Example:
        >>> state = no_past_inputs(kernel_size=2, dilations=(1, 2, 4), channels=64, batch_size=3)
        >>> state.values.shape, state.read().shape
        (torch.Size([7, 3, 64]), torch.Size([3, 1, 3, 64]))
    """
    check_integer("batch_size", batch_size, minimum=0)
    taps = kernel_size - 1
    slots: list[list[int]] = []
    successors: list[int] = []
    for dilation in dilations:
        first, length = len(successors), taps * dilation
        slots.append([first + tap * dilation for tap in range(taps)])
        successors += [first + (slot + 1) % length for slot in range(length)]
    return PastInputs(
        values=torch.zeros(len(successors), batch_size, channels, device=device, dtype=dtype),
        slots=torch.tensor(slots, device=device, dtype=torch.int64).view(len(dilations), taps),
        successors=torch.tensor(successors, device=device, dtype=torch.int64),
    )


class CausalConv1d(nn.Conv1d):
    """A convolution over time that sees the present and the past: y_t = b + Σ_j W_j x_{t - (K - 1 - j) · dilation}.

    Whole sequences go through `forward`, single steps through `step`, with the same result. The module holds weights
    alone, named and shaped as those of `torch.nn.Conv1d`; what a step remembers is passed in and returned.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: number of taps K.
        dilation: steps between two taps.
        groups: the channels fall into so many groups, none of which sees another.
        bias: whether b is learned; zero otherwise.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> convolution = CausalConv1d(3, 5, kernel_size=2, dilation=4)
        >>> x = torch.randn(2, 3, 100)
        >>> y = convolution(x)
        >>> state, steps = convolution.initial_state(batch_size=2), []
        >>> for x_t in x.unbind(-1):
        ...     y_t, state = convolution.step(x_t, state)
        ...     steps.append(y_t)
        >>> torch.allclose(torch.stack(steps, -1), y, atol=1e-5)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        check_integer("CausalConv1d.groups", groups, minimum=1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_integer(f"CausalConv1d.{name}", channels, minimum=1)
            if channels % groups:
                raise ArgumentError(f"CausalConv1d.{name} must be a multiple of groups = {groups}, got {channels}")
        check_integer("CausalConv1d.kernel_size", kernel_size, minimum=1)
        check_integer("CausalConv1d.dilation", dilation, minimum=1)
        super().__init__(in_channels, out_channels, kernel_size, dilation=dilation, groups=groups, bias=bias)

    @property
    def reach(self) -> int:
        """How many steps before the present the convolution sees."""
        return (self.kernel_size[0] - 1) * self.dilation[0]

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch out time"]:
        """Returns y for whole sequences, which zeros precede.

        Raises:
            ArgumentError: if x is not of shape `(batch, in_channels, time)` with a time of at least 1.
        """
        if x.ndim != 3 or x.shape[1] != self.in_channels or x.shape[2] == 0:
            raise ArgumentError(
                f"x must have shape (batch, {self.in_channels}, time) with a time of at least 1, got {tuple(x.shape)}"
            )
        return super().forward(F.pad(x, (self.reach, 0)))

    def initial_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PastInputs:
        """Returns the state before the first step.

        Args:
            batch_size: how many sequences go on side by side.
            device: that of the weights unless given.
            dtype: that of the weights unless given.

        Raises:
            ArgumentError: if `batch_size` is not a non-negative integer.
        """
        device, dtype = device or self.weight.device, dtype or self.weight.dtype
        return no_past_inputs(self.kernel_size[0], self.dilation, self.in_channels, batch_size, device, dtype)

    @torch.no_grad()
    def step(
        self, x: Float[Tensor, "batch channels"], state: PastInputs
    ) -> tuple[Float[Tensor, "batch out"], PastInputs]:
        """Returns y at the next step, and the state after it, without a gradient.

        Args:
            x: the input of this step.
            state: from `initial_state` or the step before. It is donated: its tensors are overwritten in place.

        Raises:
            ArgumentError: if the shape of x does not fit the layer and the state.
        """
        expected = (state.values.shape[1], self.in_channels)
        if tuple(x.shape) != expected:
            raise ArgumentError(f"x must have shape (batch, channels) = {expected}, got {tuple(x.shape)}")
        taps = torch.cat([state.read()[0], x[None]])
        y = F.conv1d(taps.permute(1, 2, 0), self.weight, self.bias, groups=self.groups)
        state.write(x[None])
        return y.squeeze(-1), state
