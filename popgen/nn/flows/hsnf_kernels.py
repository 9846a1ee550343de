"""Householder Sylvester flows on a GPU, where launches cost: one kernel for the way there, and one for the way back.

A program carries one point through all transformations, with the parameters of its example as the network gives them:
it reflects a vector by one reflector after another, and forms no matrix. `popgen.nn.flows.hsnf` says what is computed.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from popgen.products import leading

NUM_WARPS = 2  # of a program: four run out of registers in some compilers


def move(
    points: Float[Tensor, "samples batch latent"],
    parameters: Float[Tensor, "batch flows size"],
    num_reflections: int,
    max_diagonal: float,
) -> tuple[Float[Tensor, "samples batch latent"], Float[Tensor, "samples batch"]]:
    """Returns the points that all transformations give, and the logarithm of the determinant.

    Args:
        points: float32, on a GPU.
        parameters: of each example and transformation the square, the reflectors, the diagonal of R̃ and the bias.
        num_reflections: H.
        max_diagonal: what tanh of a diagonal is multiplied by.

    Example: `HouseholderSylvesterBijection` calls it.
    """
    moved, log_det, _ = _Move.apply(points, parameters, num_reflections, max_diagonal)
    return moved, log_det


class _Move(torch.autograd.Function):
    """The two kernels."""

    generate_vmap_rule = True  # from those of the operators

    @staticmethod
    def forward(points: Tensor, parameters: Tensor, num_reflections: int, max_diagonal: float) -> tuple[Tensor, ...]:
        return torch.ops.popgen.sylvester_move.default(points, parameters, num_reflections, max_diagonal)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, parameters, *ctx.settings = inputs
        _, _, path = output
        ctx.mark_non_differentiable(path)
        ctx.save_for_backward(parameters, path)

    @staticmethod
    @once_differentiable
    def backward(ctx, moved: Tensor, log_det: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        parameters, path = ctx.saved_tensors
        given = moved, log_det, parameters, path
        of_points, of_parameters = torch.ops.popgen.sylvester_move_backward.default(*given, *ctx.settings)
        return of_points, of_parameters.sum(0), None, None


_library = torch.library.Library("popgen", "FRAGMENT")
_settings = "int num_reflections, float max_diagonal"
_library.define(f"sylvester_move(Tensor points, Tensor parameters, {_settings}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"sylvester_move_backward(Tensor moved, Tensor log_det, Tensor parameters, Tensor path, {_settings}) "
    "-> (Tensor, Tensor)"
)


def _move(
    points: Tensor, parameters: Tensor, num_reflections: int, max_diagonal: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the moved points, the log-determinants, and each point before a transformation with its move there."""
    points, parameters = points.contiguous(), parameters.contiguous()
    moved, log_det, path = _outcome_of_move(points, parameters, num_reflections, max_diagonal)
    if moved.numel():
        with torch.cuda.device_of(points):
            _move_kernel[(log_det.numel(),)](
                points, parameters, moved, log_det, path, *_sizes(path, num_reflections, max_diagonal),
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return moved, log_det, path


def _outcome_of_move(points: Tensor, parameters: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    path = points.new_empty(parameters.shape[1], 2, *points.shape)
    return points.new_empty(points.shape), points.new_empty(points.shape[:2]), path


def _move_backward(
    moved: Tensor, log_det: Tensor, parameters: Tensor, path: Tensor, num_reflections: int, max_diagonal: float
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the points, and those of the parameters for each sample by itself."""
    moved, log_det, parameters, path = (one.contiguous() for one in (moved, log_det, parameters, path))
    of_points, of_parameters = _outcome_of_move_backward(moved, log_det, parameters)
    if moved.numel():
        with torch.cuda.device_of(moved):
            _move_backward_kernel[(log_det.numel(),)](
                moved, log_det, parameters, path, of_points, of_parameters,
                *_sizes(path, num_reflections, max_diagonal), num_warps=NUM_WARPS,
            )  # fmt: skip
    return of_points, of_parameters


def _outcome_of_move_backward(moved: Tensor, log_det: Tensor, parameters: Tensor, *_) -> tuple[Tensor, Tensor]:
    return moved.new_empty(moved.shape), parameters.new_empty(len(moved), *parameters.shape)


def _sizes(path: Tensor, num_reflections: int, max_diagonal: float) -> tuple:
    flows, _, samples, batch, latent = path.shape
    blocks = triton.next_power_of_2(latent), triton.next_power_of_2(num_reflections)
    return samples * batch, batch, flows, latent, num_reflections, max_diagonal, *blocks


_library.impl("sylvester_move", _move, "CompositeExplicitAutograd")
_library.impl("sylvester_move_backward", _move_backward, "CompositeExplicitAutograd")
torch.library.register_fake("popgen::sylvester_move", _outcome_of_move)
torch.library.register_fake("popgen::sylvester_move_backward", _outcome_of_move_backward)


def _as_one_batch(operator: Callable[..., tuple[Tensor, ...]], axes: tuple[int, ...], of_results: tuple[int, ...]):
    """Returns the rule of an operator for torch.vmap: the examples of all copies are one batch.

    Args:
        operator: takes tensors, then settings.
        axes: of each tensor, the one of the examples.
        of_results: the same of its results.
    """

    def rule(info, in_dims: tuple, *arguments: Any) -> tuple[tuple, tuple]:
        each = zip(arguments, in_dims, axes, strict=False)  # settings stand behind the tensors
        whole = [leading(one, dim, info.batch_size).movedim(0, axis).flatten(axis, axis + 1) for one, dim, axis in each]
        results = operator(*whole, *arguments[len(axes) :])
        cut = [one.unflatten(axis, (info.batch_size, -1)) for one, axis in zip(results, of_results, strict=True)]
        return tuple(cut), of_results

    return rule


torch.library.register_vmap("popgen::sylvester_move", _as_one_batch(torch.ops.popgen.sylvester_move, (1, 0), (1, 1, 3)))
torch.library.register_vmap(
    "popgen::sylvester_move_backward",
    _as_one_batch(torch.ops.popgen.sylvester_move_backward, (1, 1, 0, 3), (1, 1)),
)


@triton.jit
@no_type_check
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
@no_type_check
def _row(matrix, rows, index):
    """Returns one row of a matrix; `rows` numbers them."""
    return tl.sum(tl.where(rows[:, None] == index, matrix, 0.0), axis=0)


@triton.jit
@no_type_check
def _reflect(x, unit):
    """Returns x - 2 (x · v) v."""
    return x - 2.0 * tl.sum(x * unit) * unit


@triton.jit
@no_type_check
def _transformation(
    base, latent, reflections, max_diagonal, latent_block: tl.constexpr, reflection_block: tl.constexpr
):
    """Returns R and R̃ᵀ beside their diagonals, the reflectors and their lengths, both diagonals and the bias."""
    i, h = tl.arange(0, latent_block), tl.arange(0, reflection_block)
    here = i < latent
    row, column = i[:, None], i[None, :]
    square = tl.load(base + row * latent + column, mask=here[:, None] & here[None, :], other=0.0)
    upper, lower = tl.where(row < column, square, 0.0), tl.where(row > column, square, 0.0)
    r = max_diagonal * _tanh(tl.load(base + i * (latent + 1), mask=here, other=0.0))
    base += latent * latent
    known = (h < reflections)[:, None] & here[None, :]
    reflectors = tl.load(base + h[:, None] * latent + i[None, :], mask=known, other=0.0)
    lengths = tl.maximum(tl.sqrt(tl.sum(reflectors * reflectors, axis=1)), 1e-12)
    base += reflections * latent
    r_tilde = max_diagonal * _tanh(tl.load(base + i, mask=here, other=0.0))
    bias = tl.load(base + latent + i, mask=here, other=0.0)
    return upper, lower, reflectors / lengths[:, None], lengths, r, r_tilde, bias


@triton.jit
@no_type_check
def _hidden(z, lower, units, r_tilde, bias, rows, reflections):
    """Returns Qᵀ z and tanh(R̃ Qᵀ z + b)."""
    rotated = z
    for index in range(reflections):
        rotated = _reflect(rotated, _row(units, rows, index))
    return rotated, _tanh(tl.sum(lower * rotated[:, None], axis=0) + r_tilde * rotated + bias)


@triton.jit
@no_type_check
def _move_kernel(
    points, parameters, moved, log_det, path, programs, batch, flows, latent, reflections, max_diagonal,
    latent_block: tl.constexpr, reflection_block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    size = latent * (latent + reflections + 2)
    i, h = tl.arange(0, latent_block), tl.arange(0, reflection_block)
    here = i < latent
    z = tl.load(points + program * latent + i, mask=here, other=0.0)
    total = 0.0
    for k in range(flows):
        base = parameters + ((program % batch) * flows + k) * size
        upper, lower, units, _, r, r_tilde, bias = _transformation(
            base, latent, reflections, max_diagonal, latent_block, reflection_block
        )
        _, hidden = _hidden(z, lower, units, r_tilde, bias, h, reflections)
        total += tl.sum(tl.log(1.0 + (1.0 - hidden * hidden) * r * r_tilde))
        step = tl.sum(upper * hidden[None, :], axis=1) + r * hidden  # becomes Q R tanh(·)
        for index in range(reflections):
            step = _reflect(step, _row(units, h, reflections - 1 - index))
        tl.store(path + ((2 * k) * programs + program) * latent + i, z, mask=here)
        tl.store(path + ((2 * k + 1) * programs + program) * latent + i, step, mask=here)
        z += step
    tl.store(moved + program * latent + i, z, mask=here)
    tl.store(log_det + program, total)


@triton.jit
@no_type_check
def _unreflect(x, gradient, of_units, units, rows, index):
    """Goes back over a reflection: returns what was reflected, its gradient, and those of all reflectors so far."""
    unit = _row(units, rows, index)
    before, along = _reflect(x, unit), tl.sum(gradient * unit)
    of_unit = -2.0 * (tl.sum(before * unit) * gradient + along * before)
    of_units += tl.where(rows[:, None] == index, of_unit[None, :], 0.0)
    return before, gradient - 2.0 * along * unit, of_units


@triton.jit
@no_type_check
def _move_backward_kernel(
    moved, log_det, parameters, path, of_points, of_parameters, programs, batch, flows, latent, reflections,
    max_diagonal, latent_block: tl.constexpr, reflection_block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    size = latent * (latent + reflections + 2)
    i, h = tl.arange(0, latent_block), tl.arange(0, reflection_block)
    here = i < latent
    row, column = i[:, None], i[None, :]
    of_z = tl.load(moved + program * latent + i, mask=here, other=0.0)
    of_log_det = tl.load(log_det + program)
    for back in range(flows):
        k = flows - 1 - back
        base = parameters + ((program % batch) * flows + k) * size
        upper, lower, units, lengths, r, r_tilde, bias = _transformation(
            base, latent, reflections, max_diagonal, latent_block, reflection_block
        )
        z = tl.load(path + ((2 * k) * programs + program) * latent + i, mask=here, other=0.0)
        rotated, hidden = _hidden(z, lower, units, r_tilde, bias, h, reflections)
        slope = 1.0 - hidden * hidden
        of_slope = of_log_det / (1.0 + slope * r * r_tilde)  # beside a factor r r̃

        step = tl.load(path + ((2 * k + 1) * programs + program) * latent + i, mask=here, other=0.0)
        of_step, of_units = of_z, tl.zeros([reflection_block, latent_block], dtype=tl.float32)
        for index in range(reflections):
            step, of_step, of_units = _unreflect(step, of_step, of_units, units, h, index)
        of_hidden = tl.sum(upper * of_step[:, None], axis=0) + r * of_step - 2.0 * hidden * r * r_tilde * of_slope
        of_inner = of_hidden * slope
        of_rotated = tl.sum(lower * of_inner[None, :], axis=1) + r_tilde * of_inner
        of_r = of_step * hidden + of_slope * slope * r_tilde
        of_r_tilde = of_inner * rotated + of_slope * slope * r
        of_diagonal = of_r * (max_diagonal - r * r / max_diagonal)
        of_square = tl.where(row < column, of_step[:, None] * hidden[None, :], rotated[:, None] * of_inner[None, :])
        of_square = tl.where(row == column, of_diagonal[:, None], of_square)
        for index in range(reflections):
            rotated, of_rotated, of_units = _unreflect(rotated, of_rotated, of_units, units, h, reflections - 1 - index)
        of_z += of_rotated

        given = of_parameters + (program * flows + k) * size
        tl.store(given + row * latent + column, of_square, mask=here[:, None] & here[None, :])
        given += latent * latent
        of_units -= units * tl.sum(units * of_units, axis=1)[:, None]
        known = (h < reflections)[:, None] & here[None, :]
        tl.store(given + h[:, None] * latent + i[None, :], of_units / lengths[:, None], mask=known)
        given += reflections * latent
        tl.store(given + i, of_r_tilde * (max_diagonal - r_tilde * r_tilde / max_diagonal), mask=here)
        tl.store(given + latent + i, of_inner, mask=here)
    tl.store(of_points + program * latent + i, of_z, mask=here)
