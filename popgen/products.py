"""The matrix products of linear layers, by the faster of the two libraries that PyTorch carries on a CPU.

PyTorch gives float32 products to MKL, which leaves much of the AVX-512 units of AMD's processors idle; oneDNN does not.
Both sum in float32. Which one is used depends on the processor alone, so that a run repeats itself.
"""

import pathlib

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def linear(
    x: Float[Tensor, "*batch input"],
    weight: Float[Tensor, "output input"],
    bias: Float[Tensor, " output"] | None = None,
) -> Float[Tensor, "*batch output"]:
    """Returns x · weightᵀ + bias, as `torch.nn.functional.linear` does.

    Example:
        >>> linear(torch.ones(3, 2), torch.ones(1, 2), torch.ones(1)).flatten()
        tensor([3., 3., 3.])
    """
    if USES_ONEDNN and _is_for_onednn(x, weight):
        # oneDNN itself copies a first factor that lies the other way round; a compiler that knows of it writes it so
        return _Linear.apply(x.contiguous(), weight, bias)
    return F.linear(x, weight, bias)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.ndim > 1
        and x.numel() > 0
        and x.shape[-1:] == weight.shape[1:]  # else PyTorch names both shapes
        and not torch.is_autocast_enabled("cpu")
    )


def _prefers_onednn() -> bool:
    """Whether the processor is AMD's and has AVX-512, and this PyTorch has what it takes."""
    cpu = pathlib.Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpu.is_file()
        and "AuthenticAMD" in cpu.read_text()
    )


USES_ONEDNN = _prefers_onednn()
ONE_BY_ONE = 2**24  # multiplications from which a product of several is formed by itself


# An operator of its own: the compiler calls it as it is, where it would copy transposed factors for oneDNN.
# Declared bare, since `torch.library.custom_op` would take as long as a small product.
_library = torch.library.Library("popgen", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _form(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


_library.impl("linear", _form, "CPU")


@torch.library.register_fake("popgen::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """oneDNN's product, with its gradients and a rule for torch.vmap."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.popgen.linear.default(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted, rows = ctx.needs_input_grad, gradient.flatten(0, -2)
        return (
            linear(gradient, weight.T) if wanted[0] else None,
            linear(rows.T, x.flatten(0, -2).T) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )

    @staticmethod
    def vmap(info, in_dims: tuple, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        """Returns one product for each pair; where the layer is shared, one product for all.

        oneDNN forms them one after another if they are large; one call of MKL forms many small ones with less ado.
        """
        x_dim, weight_dim, bias_dim = in_dims
        if weight_dim is None and bias_dim is None:
            return linear(x.movedim(x_dim, 0), weight, bias), 0
        x, weight = (leading(tensor, dim, info.batch_size) for tensor, dim in ((x, x_dim), (weight, weight_dim)))
        bias = None if bias is None else leading(bias, bias_dim, info.batch_size)
        if x[0].numel() * weight.shape[1] >= ONE_BY_ONE:
            biases = [None] * len(x) if bias is None else bias.unbind()
            return torch.stack([linear(*one) for one in zip(x.unbind(), weight.unbind(), biases, strict=True)]), 0
        product = torch.matmul(x.reshape(len(x), -1, x.shape[-1]), weight.mT)
        if bias is not None:
            product = product + bias[:, None]
        return product.view(*x.shape[:-1], -1), 0


def leading(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """Returns a tensor with the axis that torch.vmap maps in front; one that all share is repeated without a copy.

    Example:
        >>> leading(torch.zeros(4, 3), 1, 3).shape, leading(torch.zeros(4), None, 3).shape
        (torch.Size([3, 4]), torch.Size([3, 4]))
    """
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
