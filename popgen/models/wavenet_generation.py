"""How a WaveNet draws codes: one step of constant cost for each, whose past inputs are kept and not formed again.

Fast Wavenet Generation Algorithm (Le Paine et al. 2016), https://arxiv.org/abs/1611.09482.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from popgen.compilation import compile_or_fall_back
from popgen.cuda_graphs import record_or_fall_back
from popgen.distributions.codes import CategoricalOutput, LogisticMixtureOutput
from popgen.distributions.mu_law import NUM_CODES
from popgen.nn.causal_conv import PastInputs

START = NUM_CODES  # what stands before the first code
WARM_UP_STEPS = 3  # before a CUDA graph is recorded: libraries are loaded, kernels chosen
SHARED_BATCH = 64  # sequences from which on a step has enough work for several threads of a CPU

Output = CategoricalOutput | LogisticMixtureOutput


class StepWeights(NamedTuple):
    """A model's weights as a step reads them: those of all layers in one tensor, and the labels added to the biases.

    They are a copy: once the model's weights have changed, take them anew.

    Example: `WaveNet.step_weights` takes them.
    """

    embedding: Float[Tensor, "symbols hidden"]
    past: Float[Tensor, "layers past double"]
    present: Float[Tensor, "layers hidden double"]
    bias: Float[Tensor, "layers #batch double"]
    local: Float[Tensor, "local layers_double"] | None
    residual: Float[Tensor, "residuals hidden hidden"]
    skip: Float[Tensor, "layers_hidden skip"]
    skip_bias: Float[Tensor, " skip"]
    head: tuple[Tensor, ...]


def take_step(
    previous: Int64[Tensor, " batch"],
    state: PastInputs,
    weights: StepWeights,
    local: Float[Tensor, "batch local"] | None,
) -> tuple[Float[Tensor, "batch parameters"], Float[Tensor, "layers batch hidden"]]:
    """Returns the parameters of the next density, and the inputs of all layers, which the state does not hold yet.

    What the past adds is known for all layers before the first one is entered: it is one product.

    Args:
        previous: the code before, `START` before the first.
        state: what the layers have seen.
        weights: of the model.
        local: features of this position, if the model has any.

    Example: `WaveNet` takes one in `step`.
    """
    bias = weights.bias
    if weights.local is not None:
        bias = bias + (cast(Tensor, local).to(bias.dtype) @ weights.local).unflatten(1, (len(bias), -1)).transpose(0, 1)
    known = torch.baddbmm(bias, state.read().transpose(1, 2).flatten(2), weights.past)
    x, residuals = F.embedding(previous, weights.embedding), weights.residual.unbind()
    inputs, gated = [], []
    for n, (from_past, present) in enumerate(zip(known.unbind(), weights.present.unbind(), strict=True)):
        inputs.append(x)
        filtered, gate = torch.addmm(from_past, x, present).chunk(2, dim=1)
        gated.append(torch.tanh(filtered) * torch.sigmoid(gate))
        if n < len(residuals):
            x = torch.addmm(x, gated[n], residuals[n])
    skips = torch.addmm(weights.skip_bias, torch.cat(gated, 1), weights.skip)
    hidden = F.linear(F.relu(skips), *weights.head[:2])
    return F.linear(F.relu(hidden), *weights.head[2:]), torch.stack(inputs)


@torch.no_grad()
def draw_codes(
    uniform: Float[Tensor, "batch time"],
    output: Output,
    state: PastInputs,
    weights: StepWeights,
    local: Float[Tensor, "batch local all_time"] | None,
    primer: Int64[Tensor, "batch primer_time"] | None,
    compiled: bool,
) -> Int64[Tensor, "batch time"]:
    """Returns codes drawn one after another; see `WaveNet.generate`, which checks what it is given.

    Args:
        uniform: noise on [0, 1), a value for each code.
        output: makes a density of the parameters of a step.
        state: before the first step. It is donated: its tensors are overwritten in place.
        weights: of the model.
        local: features of each position, those of the primer first.
        primer: codes that come before those to be drawn.
        compiled: whether a step is compiled by torch.compile.

    Example: `WaveNet` draws them in `generate`.
    """
    batch, time = uniform.shape
    given = 0 if primer is None else primer.shape[1]
    codes = torch.empty(batch, given + time, dtype=torch.int64, device=uniform.device)
    if primer is not None:
        codes[:, :given] = primer
    # A step reads its inputs from tensors that stay where they are, so that it can be recorded.
    previous, uniform_now = torch.full((batch,), START, device=uniform.device), uniform.new_zeros(batch)
    local_now = None if local is None else weights.embedding.new_zeros(local.shape[:2])
    with _threads(1 if batch < SHARED_BATCH else torch.get_num_threads()):
        draw = _compiled_draw(previous, uniform_now, state, weights, local_now, output) if compiled else _draw

        def advance() -> None:
            codes, _, inputs = draw(previous, uniform_now, state, weights, local_now, output)
            state.write(inputs)
            previous.copy_(codes)

        work: Callable[[], object] = advance
        for t in range(given + time):
            if t >= given:
                uniform_now.copy_(uniform[:, t - given])
            if local is not None:
                cast(Tensor, local_now).copy_(local[:, :, t])
            if uniform.is_cuda and t == WARM_UP_STEPS:
                work = record_or_fall_back(advance)
            work()
            if t < given:
                previous.copy_(codes[:, t])
            else:
                codes[:, t] = previous
    return codes[:, given:]


def _draw(
    previous: Tensor, uniform: Tensor, state: PastInputs, weights: StepWeights, local: Tensor | None, output: Output
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the next code, and what `take_step` returns."""
    parameters, inputs = take_step(previous, state, weights, local)
    return output.density(parameters).sample(uniform), parameters, inputs


def _compiled_draw(previous: Tensor, uniform: Tensor, state: PastInputs, *rest: Any) -> Callable[..., Any]:
    """Returns `_draw` compiled for arguments of these shapes, and compared with the plain one, or the plain one."""
    draw, settings = compile_or_fall_back(_draw), contextlib.nullcontext()
    if not uniform.is_cuda:
        from torch._inductor import config

        settings = config.patch(cpp_wrapper=True)  # the products of so small a step cost less than Python's calls
    past = torch.arange(state.values.numel(), device=uniform.device).sin().view_as(state.values).to(state.values.dtype)
    with settings:
        # No noise: a draw from the middle could turn on the last digit of a sum.
        draw(previous, torch.zeros_like(uniform), state._replace(values=past), *rest)
    return draw


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sets the number of threads of a CPU.

    To share a small step gains nothing, and where other programs are busy the threads wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
