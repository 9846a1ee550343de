"""Compilation by torch.compile, checked against the plain code and falling back to it."""

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from popgen.precision import float32_is_full, matrix_products
from popgen.tensors import is_launch_bound

# Relative difference that a compiled function's values and gradients may show, at full and at reduced precision.
COMPILED_TOLERANCE, REDUCED_TOLERANCE = 1e-4, 5e-2
# What rounding may add to a loss or a metric, relative to the largest beside it: a KL near 0 is a difference.
ROUNDING = 1e-6


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
        if not (float32_is_full() or isinstance(self.chosen, _Traced)):
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
        full = float32_is_full() and not torch.is_autocast_enabled(found[0].device.type)
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
        key = kinds, torch.is_autocast_enabled(device), float32_is_full()
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

        rules = rules_for_tracing(is_launch_bound(tensors[0]), float32_is_full())
        graph = make_fx(of_tensors, rules, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        for node in reversed(graph.graph.nodes):  # what an optimizer tells a profiler
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "profiler":
                graph.graph.erase_node(node)
        graph.recompile()
        return torch.compile(graph, dynamic=False), found[-1]


def rules_for_tracing(launches_are_dear: bool, full_by_default: bool) -> dict[Any, Callable[..., Any]]:
    """Returns what a trace records in place of some operators.

    Args:
        launches_are_dear: many small products, each of a row or a column, are then recorded as sums of products, which
            a compiler fuses with what comes before and after; a library's product is a launch of its own.
        full_by_default: whether float32 products are exact. Where the switch of the whole function lowers them, those
            that are formed in `full_precision` are recorded as an operator that sets the switch back.

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
        return full_product(a, b) if float32_is_full() and a.dtype == torch.float32 else NotImplemented

    def full_with_bias(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Any:
        product = full(a, b)
        return product if product is NotImplemented else beta * bias + alpha * product

    def of_many(a: Tensor, b: Tensor) -> Any:
        product = thin(a, b) if launches_are_dear else NotImplemented
        return full(a, b) if product is NotImplemented and not full_by_default else product

    rules: dict[Any, Callable[..., Any]] = {}
    if launches_are_dear or not full_by_default:
        rules[aten.bmm.default] = of_many
    if not full_by_default:
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


def _tensors_in(value: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
