"""What the benchmarks share: interleaved timing, the matrix products of a piece of work, and peak memory."""

import gc
import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import popgen.products  # noqa: F401 (registers popgen::linear)
from popgen.cuda_graphs import record_cuda_graph

PRODUCTS = {  # the operator, and which of its tensors are the factors
    torch.ops.aten.mm.default: slice(0, 2),
    torch.ops.aten.addmm.default: slice(1, 3),
    torch.ops.popgen.linear.default: slice(0, 2),
}

Work = Callable[[], object]


def synchronise(device: torch.device) -> None:
    """Waits for a GPU; a CPU is always done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    contenders: Mapping[str, tuple[Work, int]], rounds: int, device: torch.device, seconds: float = 0.4
) -> dict[str, list[float]]:
    """Returns the seconds that each contender took for one unit of work in each round.

    The contenders take turns, so that whatever else the machine does falls on all of them alike; compare them round by
    round. Each turn repeats its work until it has lasted about `seconds`.

    Args:
        contenders: name to what is timed, and how many units one call does.
        rounds: turns of each.
        device: where the work is done.
        seconds: least duration of a turn.
    """
    repeats = {}
    for name, (work, _) in contenders.items():
        work()  # kernels are chosen and code is compiled now
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (work, units) in contenders.items():
            work()  # the caches are this contender's again
            synchronise(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                work()
            synchronise(device)
            times[name].append((time.perf_counter() - start) / repeats[name] / units)
    return times


def ratio(one: list[float], other: list[float]) -> float:
    """Returns the median over rounds of the ratio of two contenders."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def bare_products(work: Work, device: torch.device, by_torch: bool = False) -> tuple[Work, float]:
    """Returns work that does nothing but the dense matrix products of some other work, in float32, and their FLOPs.

    Every aten::mm, aten::addmm and popgen::linear is recorded with the shapes and strides of its factors and repeated
    by the same library on random matrices, those of one shape on the same one. Products of small matrices, one for each
    image, are not among them.

    Args:
        work: is done once.
        device: where it is done.
        by_torch: whether PyTorch's ordinary products are taken in place of popgen::linear.
    """
    matrices: dict[tuple, torch.Tensor] = {}
    calls: list[tuple[Callable, list[torch.Tensor]]] = []
    flops = 0.0

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal flops
            if function in PRODUCTS:
                repeated = []
                for place, f in enumerate(args):
                    key = None if f is None else (place, *f.shape, *f.stride())
                    if key is not None and key not in matrices:
                        extent = 1 + sum((size - 1) * step for size, step in zip(f.shape, f.stride(), strict=True))
                        matrices[key] = torch.randn(extent, device=device).as_strided(f.shape, f.stride())
                    repeated.append(None if key is None else matrices[key])
                ours = function is torch.ops.popgen.linear.default
                calls.append((torch.nn.functional.linear if ours and by_torch else function, repeated))
                left, right = args[PRODUCTS[function]]
                flops += 2.0 * left.numel() * right.numel() / left.shape[-1]
            return function(*args, **(kwargs or {}))

    with Record():
        work()

    def repeat() -> None:
        for product, factors in calls:
            product(*factors)

    if device.type != "cuda":
        return repeat, flops
    repeat()
    return record_cuda_graph(repeat)[0], flops


def in_fresh_process(function: Callable, *arguments: object):
    """Returns what a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def prepared(prepare: Callable[[], Work]) -> tuple[Work, Callable[[], float]]:
    """Returns prepared work, and a function that tells the MiB it has added to this process at its highest since.

    Weights and data that the preparation leaves behind are counted, what it needed for itself is not. On a GPU the
    figure is that of PyTorch's allocator, on a CPU the process's (Linux only).
    """
    before = _resident("VmRSS")
    work = prepare()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return work, lambda: torch.cuda.max_memory_allocated() / 2**20
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the highest mark is set back to the present
    return work, lambda: _resident("VmHWM") - before


def peak_memory(prepare: Callable[[], Work]) -> float:
    """Returns the MiB of some work that is done twice; to be called in a fresh process."""
    work, peak = prepared(prepare)
    for _ in range(2):
        work()
    return peak()


def _resident(field: str) -> float:
    """Returns the MiB that the kernel reports for this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 2**10


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table; every row has a cell under each heading.

    Raises:
        ValueError: if one has not.
    """
    if any(len(cells) != len(headings) for cells in rows):
        raise ValueError(f"rows must have {len(headings)} cells, one under each heading of {headings}")
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
