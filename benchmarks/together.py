"""Work by several processes at once, forked from this one; for benchmarks and tests of what runs under torchrun."""

import functools
import os
import pathlib
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.kills import ended, forked
from popgen.distributed import Processes, joined

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


def together(work: Work, size: int, timeout: float = 60.0, present: int | None = None) -> list[Outcome]:
    """Returns how `size` processes end that each do some work, with the variables that torchrun sets.

    Args:
        work: is given the processes; what it returns must be fit for torch.save.
        size: how many processes there are to be.
        timeout: seconds that they wait for each other.
        present: how many there are; default all.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder) / str(rank) for rank in range(size if present is None else present)]
        port = free_port()
        started = [  # while this process has one thread
            forked(functools.partial(_work_as, work, rank, size, port, timeout, path), path.with_suffix(".log"))
            for rank, path in enumerate(paths)
        ]
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # as torchrun's
        statuses = [ended(process) for process in started]
        del store
        return [
            Outcome(
                status,
                path.with_suffix(".log").read_text(),
                torch.load(path, weights_only=False) if path.is_file() else None,
            )
            for status, path in zip(statuses, paths, strict=True)
        ]


def results_of(work: Work, size: int, timeout: float = 60.0) -> list[Any]:
    """Returns what each of several processes returns.

    Raises:
        AssertionError: if one fails.
    """
    outcomes = together(work, size, timeout)
    failed = [f"process {rank}: {outcome.said}" for rank, outcome in enumerate(outcomes) if outcome.status]
    assert not failed, "\n".join(failed)
    return [outcome.result for outcome in outcomes]


def free_port() -> int:
    """Returns a port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _work_as(work: Work, rank: int, size: int, port: int, timeout: float, path: pathlib.Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # whatever pytest made of it
    with joined(timeout) as processes:
        torch.save(work(processes), path)
