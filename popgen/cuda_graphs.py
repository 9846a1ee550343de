"""Work that is recorded once as a CUDA graph, and replayed."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from popgen.errors import reason_of

Recorded = tuple[Callable[[], object], Any]


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
