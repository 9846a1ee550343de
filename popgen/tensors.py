"""What may be asked of a tensor, and what is cheap on its device."""

import torch
from torch import Tensor


def can_be_read(tensor: Tensor) -> bool:
    """Returns whether a look at the values of a tensor waits for nothing and breaks nothing.

    On a GPU it would wait; what is being compiled or traced has no values, and under torch.vmap several stand in one.

    Example:
        >>> can_be_read(torch.zeros(3)), torch.vmap(lambda x: x + can_be_read(x))(torch.zeros(3))
        (True, tensor([0., 0., 0.]))
    """
    if tensor.is_cuda or tensor.is_meta or torch.compiler.is_compiling() or hasattr(tensor, "fake_mode"):
        return False
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):  # torch.func.grad wraps what torch.vmap maps
        tensor = functorch.get_unwrapped(tensor)
    return not functorch.is_batchedtensor(tensor)


def is_launch_bound(tensor: Tensor) -> bool:
    """Returns whether small operations on a tensor cost their launch, as on a GPU, and not what they compute.

    Example:
        >>> is_launch_bound(torch.zeros(3))
        False
    """
    return tensor.is_cuda
