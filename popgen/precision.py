"""The precision of matrix products.

Networks obey the precision that is set; the values of densities and flows are always formed at full precision.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from popgen.errors import ArgumentError, check_choice

PRECISIONS = ("fp32", "tf32", "bf16")


def check_precision(name: str, precision: str, device: torch.device) -> str:
    """Returns `precision` if a kind of device has such matrix products.

    Raises:
        ArgumentError: if it is unknown, or the kind of device has none.

    Example:
        >>> check_precision("precision", "tf32", torch.device("cpu"))
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: precision 'tf32' needs a CUDA device, got cpu: use 'fp32' or 'bf16'
    """
    check_choice(name, precision, PRECISIONS)
    if precision == "tf32" and device.type != "cuda":
        raise ArgumentError(f"{name} 'tf32' needs a CUDA device, got {device}: use 'fp32' or 'bf16'")
    return precision


@contextlib.contextmanager
def matrix_products(precision: str, device: torch.device) -> Iterator[None]:
    """Sets the precision of the matrix products of networks, convolutions and recurrent layers included.

    "fp32" is full precision; "tf32" rounds the factors of float32 products to 10 bits after the point (CUDA only);
    "bf16" is torch.autocast: factors and results have 7 bits after the point, and sums are float32. Weights, the
    gradients of weights and the optimizer stay as they are, and so do values of densities and flows.

    Args:
        precision: one of `PRECISIONS`.
        device: where the products are formed.

    Raises:
        ArgumentError: if the precision is unknown.

    Example:
        >>> x = torch.full((1, 1), 1.001)
        >>> with matrix_products("bf16", x.device):
        ...     print((x @ x).item())
        1.0
    """
    check_choice("precision", precision, PRECISIONS)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _allow_tf32("high" if precision == "tf32" else "highest", precision == "tf32")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        _allow_tf32(*before)


def _allow_tf32(products: str, layers: bool) -> None:
    """Sets the precision of float32 products, and that of the layers of cuDNN, which has a switch of its own."""
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = layers


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Returns a context in which matrix products have the precision of their factors, whatever surrounds it.

    Example:
        >>> x = torch.full((1, 1), 1.001)
        >>> with matrix_products("bf16", x.device), full_precision(x.device):
        ...     print(round((x @ x).item(), 6))
        1.002001
    """
    if device.type == "meta":
        return contextlib.nullcontext()
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext() if float32_is_full() else matrix_products("fp32", device)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns a tensor at the least precision in which densities are formed.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def float32_is_full() -> bool:
    """Returns whether float32 products have the precision of their factors, as by default.

    Example:
        >>> float32_is_full()
        True
    """
    return torch.get_float32_matmul_precision() == "highest"


# What `torch.compiler.assume_constant_result` does, which imports the compiler: users compile parts of popgen alone.
vars(float32_is_full)["_dynamo_marked_constant"] = True
