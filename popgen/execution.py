"""How the arithmetic is carried out: the precision of matrix products, and compilation.

Networks obey the precision that is set; the values of densities and flows are always formed at full precision.
"""

import contextlib
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import popgen
from popgen.errors import ArgumentError, check_choice, reason_of

Recorded = tuple[Callable[[], object], Any]

PRECISIONS = ("fp32", "tf32", "bf16")
# Relative difference that a compiled function's values and gradients may show, at full and at reduced precision.
COMPILED_TOLERANCE, REDUCED_TOLERANCE = 1e-4, 5e-2
# What rounding may add to a single number, relative to the largest beside it: a KL near 0 is a difference.
ROUNDING = 1e-6


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
    """Sets the precision of the matrix products of networks.

    "fp32" is full precision; "tf32" rounds the factors of float32 products to 10 bits after the point (CUDA only);
    "bf16" is torch.autocast: factors and results have 7 bits after the point, and sums are float32. Weights, the
    gradients of weights and the optimizer stay as they are, and so do values of densities and flows.

    Args:
        precision: one of `PRECISIONS`.
        device: where the products are formed.

    Example:
        >>> x = torch.full((1, 1), 1.001)
        >>> with matrix_products("bf16", x.device):
        ...     print((x @ x).item())
        1.0
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Returns a context in which matrix products have the precision of their factors, whatever surrounds it.

    Example:
        >>> x = torch.full((1, 1), 1.001)
        >>> with matrix_products("bf16", x.device), full_precision(x.device):
        ...     print(round((x @ x).item(), 6))
        1.002001
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext() if _float32_is_full() else matrix_products("fp32", device)


def _float32_is_full() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


def compile_or_fall_back(
    function: Callable[..., Any], checked_with: Callable[[tuple], tuple] = lambda arguments: arguments
) -> Callable[..., Any]:
    """Returns `function` compiled by torch.compile, or as it is where that fails.

    The first call compares the two: every tensor that they return, and the gradients of the first one. Where there is
    no compiler, the function cannot be compiled, or the two disagree, one line on standard error says so, and the plain
    function is used from then on.

    Args:
        function: pure, and free of random numbers.
        checked_with: maps the arguments of the first call to those that the comparison uses, of the same shapes.

    Example:
        >>> fast = compile_or_fall_back(torch.square)  # compiled at the first call
    """
    return _Compiled(function, checked_with)


class _Compiled:
    def __init__(self, function: Callable[..., Any], checked_with: Callable[[tuple], tuple]) -> None:
        torch.compiler.assume_constant_result(_float32_is_full)  # here, since it imports the compiler
        self.plain, self.checked_with, self.checked = function, checked_with, False
        self.chosen = torch.compile(function, dynamic=False)

    def __call__(self, *arguments: Any) -> Any:
        if not self.checked:
            self.checked = True
            reason = self._reason_against(self.checked_with(arguments))
            if reason is not None:
                print(f"torch.compile is not used: {reason}", file=sys.stderr, flush=True)
                self.chosen = self.plain
        return self.chosen(*arguments)

    def _reason_against(self, arguments: tuple) -> str | None:
        """Returns why the compiled function cannot be used, or None."""
        if not _float32_is_full():
            return "it cannot keep densities exact under precision 'tf32', whose switch holds for the whole function"
        expected = _values_and_gradients(self.plain, arguments)
        try:
            with warnings.catch_warnings():  # the compiler's own deprecations
                warnings.simplefilter("ignore")
                found = _values_and_gradients(self.chosen, arguments)
        except Exception as error:  # the plain function has just done the same: whatever it is comes from the compiler
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        full = not torch.is_autocast_enabled(found[0].device.type)
        tolerance = COMPILED_TOLERANCE if full else REDUCED_TOLERANCE
        numbers = [abs(other.item()) for other in expected if other.dim() == 0]
        largest = max(filter(math.isfinite, numbers), default=0.0)
        for one, other in zip(found, expected, strict=True):
            size = torch.linalg.vector_norm(other.double()).clamp_min(1e-12).item()
            difference = torch.linalg.vector_norm(one.double() - other.double()).item()
            allowed = tolerance * size + (ROUNDING * largest if other.dim() == 0 else 0.0)
            if not difference <= allowed and bool(torch.isfinite(other).all()):
                return f"its result differs from that of the plain code by {difference / size:.1e} of its size"
        return None


def _values_and_gradients(function: Callable[..., Any], arguments: tuple) -> list[Tensor]:
    """Returns the tensors that a function returns, and the gradients of the sum of the first one."""
    values = [value for value in tree_leaves(function(*arguments)) if isinstance(value, Tensor)]
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.requires_grad]
    gradients: tuple[Tensor | None, ...] = ()
    if leaves and values[0].requires_grad:
        gradients = torch.autograd.grad(values[0].sum(), leaves, allow_unused=True)
    return [*(value.detach() for value in values), *(gradient for gradient in gradients if gradient is not None)]


def can_be_read(tensor: Tensor) -> bool:
    """Returns whether a look at the values of a tensor waits for nothing and breaks nothing.

    On a GPU it would wait; what is being compiled has no values yet, and under torch.vmap several stand in one.

    Example:
        >>> can_be_read(torch.zeros(3)), torch.vmap(lambda x: x + can_be_read(x))(torch.zeros(3))
        (True, tensor([0., 0., 0.]))
    """
    return not (tensor.is_cuda or torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(tensor))


def hardware(device: torch.device) -> str:
    """Returns what a device is, in words.

    Example:
        >>> "cores" in hardware(torch.device("cpu"))
        True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def surroundings(device: torch.device) -> dict[str, str]:
    """Returns what a result on a device depends on beside the code that made it: hardware, and versions.

    Example:
        >>> list(surroundings(torch.device("cpu")))
        ['device', 'hardware', 'popgen_version', 'torch_version', 'python_version']
    """
    return {
        "device": str(device),
        "hardware": hardware(device),
        "popgen_version": popgen.__version__,
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
    }


def record_cuda_graph(work: Callable[[], Any], generators: Iterable[torch.Generator] = ()) -> Recorded:
    """Returns a function that repeats the work on the device, and what the work returned: its tensors hold the results.

    Args:
        work: reads and writes the same tensors every time, and never waits for the device.
        generators: all that it draws from.

    Raises:
        Exception: of whatever kind, if the work cannot be recorded.

    Example: `record_or_fall_back` calls it.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        results = work()
    return graph.replay, results


def record_or_fall_back(work: Callable[[], object]) -> Callable[[], object]:
    """Returns what replays the work from a CUDA graph, or the work itself where it cannot be recorded.

    Example: `WaveNet` records a step of its generation.
    """
    try:
        return record_cuda_graph(work)[0]
    except Exception as error:  # whatever it is, the plain work has been done before
        reason = reason_of(error)
        print(f"the CUDA graph of a step is not used: {reason}", file=sys.stderr, flush=True)
        return work
