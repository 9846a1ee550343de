"""How the arithmetic is carried out: the precision of matrix products, and compilation.

Networks obey the precision that is set; the values of densities and flows are always formed at full precision.
"""

import contextlib
import functools
import math
import os
import pathlib
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import popgen
from popgen.errors import ArgumentError, check_choice, reason_of

Recorded = tuple[Callable[[], object], Any]

PRECISIONS = ("fp32", "tf32", "bf16")
# Relative difference that a compiled function's values and gradients may show, at full and at reduced precision.
COMPILED_TOLERANCE, REDUCED_TOLERANCE = 1e-4, 5e-2
# What rounding may add to a loss or a metric, relative to the largest beside it: a KL near 0 is a difference.
ROUNDING = 1e-6
GIT_SECONDS = 10.0  # that git is given to name a commit


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
    return contextlib.nullcontext() if _float32_is_full() else matrix_products("fp32", device)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns a tensor at the least precision in which densities are formed.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _float32_is_full() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


def compile_or_fall_back(
    function: Callable[..., Any],
    checked_with: Callable[[tuple], tuple] = lambda arguments: arguments,
    traced: bool = False,
    in_place: bool = False,
) -> Callable[..., Any]:
    """Returns `function` compiled by torch.compile, or as it is where that fails.

    The first call compares the two, every tensor that they return. Where there is no compiler, the function cannot be
    compiled, or the two disagree, one line on standard error says so, and the plain function is used from then on.

    Args:
        function: pure, and free of random numbers.
        checked_with: maps the arguments of the first call to those that the comparison uses, of the same shapes.
        traced: whether the compiler is given the operations that the function carries out, in one piece, those of the
            gradients that it forms included. Its results then have no gradients of their own. Anything in it that looks
            at the values of a tensor cannot be traced.
        in_place: whether it changes its arguments; the comparison is then made on copies of them, and of them too.

    Example:
        >>> fast = compile_or_fall_back(torch.square)  # compiled at the first call
    """
    compiled = _Traced(function) if traced else torch.compile(function, dynamic=False)
    return _Compiled(function, checked_with, compiled, in_place)


class _Compiled:
    def __init__(
        self,
        function: Callable[..., Any],
        checked_with: Callable[[tuple], tuple],
        compiled: Callable[..., Any],
        in_place: bool,
    ) -> None:
        self.plain, self.checked_with, self.chosen, self.checked = function, checked_with, compiled, False
        self.in_place = in_place

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
        if not (_float32_is_full() or isinstance(self.chosen, _Traced)):
            return "it cannot keep densities exact under precision 'tf32', whose switch holds for the whole function"

        def tensors_after(function: Callable[..., Any]) -> list[Tensor]:
            if not self.in_place:
                return _tensors_in(function(*arguments))
            copies = tree_map_only(Tensor, torch.clone, arguments)
            return _tensors_in((function(*copies), copies))

        expected = tensors_after(self.plain)
        try:
            with warnings.catch_warnings():  # the compiler's own deprecations
                warnings.simplefilter("ignore")
                found = tensors_after(self.chosen)
        except Exception as error:  # the plain function has just done the same: whatever it is comes from the compiler
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        full = _float32_is_full() and not torch.is_autocast_enabled(found[0].device.type)
        tolerance = COMPILED_TOLERANCE if full else REDUCED_TOLERANCE
        metrics = [other.double() for other in expected if other.shape == expected[0].shape]  # the loss comes first
        largest = torch.nan_to_num(torch.stack(metrics), nan=0.0, posinf=0.0, neginf=0.0).abs().max().item()
        for one, other in zip(found, expected, strict=True):
            size = torch.linalg.vector_norm(other.double()).clamp_min(1e-12).item()
            difference = torch.linalg.vector_norm(one.double() - other.double()).item()
            rounding = ROUNDING * largest * math.sqrt(other.numel()) if other.shape == expected[0].shape else 0.0
            allowed = tolerance * size + rounding
            if not difference <= allowed and bool(torch.isfinite(other).all()):
                return f"its result differs from that of the plain code by {difference / size:.1e} of its size"
        return None


class _Traced:
    """A function whose operations are traced, then compiled, once for each set of shapes of its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.compiled: dict[Any, tuple[Callable[..., Any], TreeSpec]] = {}

    def __call__(self, *arguments: Any) -> Any:
        leaves, structure = tree_flatten(arguments)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        device = tensors[0].device.type
        kinds = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = kinds, torch.is_autocast_enabled(device), _float32_is_full()
        if key not in self.compiled:
            self.compiled[key] = self._compile(leaves, tensors, structure)
        compiled, results = self.compiled[key]
        with torch.no_grad(), torch.autocast(device, enabled=False):  # the trace holds every conversion
            return tree_unflatten(compiled(*tensors), results)

    def _compile(
        self, leaves: list[Any], tensors: list[Tensor], structure: TreeSpec
    ) -> tuple[Callable[..., Any], TreeSpec]:
        from torch.fx.experimental.proxy_tensor import make_fx  # here, since it imports the compiler

        found: list[TreeSpec] = []

        def of_tensors(*tensors: Tensor) -> tuple:
            given = iter(tensors)
            arguments = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            results, result_structure = tree_flatten(self.function(*tree_unflatten(arguments, structure)))
            found.append(result_structure)
            return tuple(result.detach() if isinstance(result, Tensor) else result for result in results)

        rules = rules_for_tracing(launches_cost(tensors[0]), _float32_is_full())
        graph = make_fx(of_tensors, rules, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        for node in reversed(graph.graph.nodes):  # what an optimizer tells a profiler
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "profiler":
                graph.graph.erase_node(node)
        graph.recompile()
        return torch.compile(graph, dynamic=False), found[-1]


def rules_for_tracing(launches_are_dear: bool, float32_is_full: bool) -> dict[Any, Callable[..., Any]]:
    """Returns what a trace records in place of some operators.

    Args:
        launches_are_dear: many small products, each of a row or a column, are then recorded as sums of products, which
            a compiler fuses with what comes before and after; a library's product is a launch of its own.
        float32_is_full: where it is not, the switch of the whole function lowers the precision of float32 products.
            Those that are formed in `full_precision` are then recorded as an operator that sets the switch back.

    Example:
        >>> rules_for_tracing(False, True)
        {}
    """
    aten = torch.ops.aten  # a rule that returns NotImplemented leaves its operator as it is
    full_product = torch.ops.popgen.full_product.default

    def thin(a: Tensor, b: Tensor) -> Any:
        if 1 in (a.shape[1], a.shape[2], b.shape[2]) and a.dtype.itemsize >= 4:
            return (a[:, :, :, None] * b[:, None]).sum(2)
        return NotImplemented

    def full(a: Tensor, b: Tensor) -> Any:
        return full_product(a, b) if _float32_is_full() and a.dtype == torch.float32 else NotImplemented

    def full_with_bias(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Any:
        product = full(a, b)
        return product if product is NotImplemented else beta * bias + alpha * product

    def of_many(a: Tensor, b: Tensor) -> Any:
        product = thin(a, b) if launches_are_dear else NotImplemented
        return full(a, b) if product is NotImplemented and not float32_is_full else product

    rules: dict[Any, Callable[..., Any]] = {}
    if launches_are_dear or not float32_is_full:
        rules[aten.bmm.default] = of_many
    if not float32_is_full:
        rules |= {aten.mm.default: full, aten.addmm.default: full_with_bias}
    return rules


_library = torch.library.Library("popgen", "FRAGMENT")
_library.define("full_product(Tensor a, Tensor b) -> Tensor")


def _full_product(a: Tensor, b: Tensor) -> Tensor:
    with matrix_products("fp32", a.device):
        return torch.matmul(a, b)


_library.impl("full_product", _full_product, "CompositeExplicitAutograd")


@torch.library.register_fake("popgen::full_product")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


# What `torch.compiler.assume_constant_result` does, which imports the compiler: users compile parts of popgen alone.
vars(_float32_is_full)["_dynamo_marked_constant"] = True


def _tensors_in(value: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


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


def launches_cost(tensor: Tensor) -> bool:
    """Returns whether small operations on a tensor cost their launch, as on a GPU, and not what they compute.

    Example:
        >>> launches_cost(torch.zeros(3))
        False
    """
    return tensor.is_cuda


def hardware(device: torch.device) -> str:
    """Returns what a device is, in words.

    Example:
        >>> "cores" in hardware(torch.device("cpu"))
        True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def commit(package: pathlib.Path = pathlib.Path(popgen.__file__).parent) -> str | None:
    """Returns the commit that code runs from, with "-dirty" behind it where tracked files differ from it.

    It is found at the first call and stays, as the code does that has been imported.

    Args:
        package: the folder of the code.

    Returns:
        None where git does not know the code, as where pip has installed it.

    Example:
        >>> commit(pathlib.Path("/nowhere")) is None
        True
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # whoever works there is not to be disturbed
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # installed code may lie in somebody else's checkout
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def surroundings(device: torch.device) -> dict[str, str | None]:
    """Returns what a result on a device depends on beside its settings: hardware, versions and the commit.

    Example:
        >>> list(surroundings(torch.device("cpu")))
        ['device', 'hardware', 'popgen_version', 'commit', 'torch_version', 'python_version']
    """
    return {
        "device": str(device),
        "hardware": hardware(device),
        "popgen_version": popgen.__version__,
        "commit": commit(),
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
