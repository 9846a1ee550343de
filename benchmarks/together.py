"""Work by several processes at once, forked from this one; for benchmarks and tests of what runs under torchrun."""

import functools
import os
import pathlib
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.kills import ended, forked
from popgen.distributed import Processes
from popgen.rendezvous import joined

Work = Callable[[Processes], Any]


class Outcome(NamedTuple):
    """How one of several processes ended.

    Attributes:
        status: its exit status, or minus the signal that killed it.
        said: on standard error.
        result: what its work returned; None if it failed.
    """

    status: int
    said: str
    result: Any


def together(
    work: Work, size: int, timeout: float = 60.0, present: Sequence[int] | None = None, by_hand: bool = False
) -> list[Outcome]:
    """Returns how `size` processes end that each do some work, with the variables that torchrun sets.

    Args:
        work: is given the processes; what it returns must be fit for torch.save.
        size: how many processes there are to be.
        timeout: seconds that they wait for each other.
        present: the ranks that there are; default all.
        by_hand: whether the first process keeps what torchrun would, as where nobody starts torchrun.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {rank: pathlib.Path(folder) / str(rank) for rank in (range(size) if present is None else present)}
        port, store = free_port(), None
        started = [  # while this process has one thread
            forked(
                functools.partial(_work_as, work, rank, size, port, timeout, path, by_hand), path.with_suffix(".log")
            )
            for rank, path in paths.items()
        ]
        if not by_hand:
            store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        statuses = [ended(process) for process in started]
        del store
        return [
            Outcome(
                status,
                path.with_suffix(".log").read_text(),
                torch.load(path, weights_only=False) if path.is_file() else None,
            )
            for status, path in zip(statuses, paths.values(), strict=True)
        ]


def results_of(work: Work, size: int, timeout: float = 60.0, by_hand: bool = False) -> list[Any]:
    """Returns what each of several processes returns.

    Raises:
        AssertionError: if one fails.
    """
    outcomes = together(work, size, timeout, by_hand=by_hand)
    failed = [f"process {rank}: {outcome.said}" for rank, outcome in enumerate(outcomes) if outcome.status]
    assert not failed, "\n".join(failed)
    return [outcome.result for outcome in outcomes]


def free_port() -> int:
    """Returns a port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _work_as(work: Work, rank: int, size: int, port: int, timeout: float, path: pathlib.Path, by_hand: bool) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(not by_hand),
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # whatever pytest made of it
    with joined(timeout) as processes:
        torch.save(work(processes), path)
