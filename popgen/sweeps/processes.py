"""Processes, as many at a time as there are places for them."""

import collections
import contextlib
import os
import pathlib
import signal
import subprocess
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

SECONDS_TO_STOP = 30.0  # for a step, and for what is pending to be written


class Job(NamedTuple):
    """A command, and the file that its output is added to."""

    name: str
    command: Sequence[str]
    log: pathlib.Path


def visible_devices() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Example: `places` takes them.
    """
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",")][:count] if named else [str(i) for i in range(count)]


def places(devices: Sequence[str], max_parallel: int | None, num_jobs: int, num_threads: int) -> list[dict[str, str]]:
    """Returns the environment of each place where a process can run.

    Args:
        devices: GPUs; with none the processes run on the CPU.
        max_parallel: processes at a time; None for one on each GPU, or one on the CPU.
        num_jobs: there are no more places than jobs.
        num_threads: threads of the machine that are shared out among the places.

    Example:
        >>> places([], 2, num_jobs=6, num_threads=8)
        [{'OMP_NUM_THREADS': '4'}, {'OMP_NUM_THREADS': '4'}]
        >>> [place["CUDA_VISIBLE_DEVICES"] for place in places(["0", "3"], None, num_jobs=6, num_threads=8)]
        ['0', '3']
    """
    count = min(max_parallel or len(devices) or 1, num_jobs)
    shared = [{"OMP_NUM_THREADS": str(max(1, num_threads // count))} for _ in range(count)]
    for i, place in enumerate(shared if devices else ()):
        place["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
    return shared


def run_all(
    jobs: Sequence[Job],
    places: Sequence[Mapping[str, str]],
    started: Callable[[Job], None],
    ended: Callable[[Job, str | None], None],
) -> None:
    """Runs every job, one in a place at a time, and stops them all if it is interrupted.

    Args:
        jobs: in the order in which they start.
        places: the environment of each, added to this process's own.
        started: called with a job when it starts.
        ended: called with a job when it ends, and what it failed with or None.

    Raises:
        KeyboardInterrupt: on SIGINT, SIGTERM and SIGHUP, when the processes have ended.

    Example:
        >>> import sys
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     commands = {"good": "pass", "bad": "raise ValueError('no data')"}
        ...     log = pathlib.Path(folder) / "log"
        ...     jobs = [Job(name, [sys.executable, "-c", code], log) for name, code in commands.items()]
        ...     run_all(jobs, [{}], lambda job: None, lambda job, failure: print(job.name, failure))
        good None
        bad ValueError: no data
    """
    waiting, free = collections.deque(jobs), list(places)
    running: dict[subprocess.Popen, tuple[Job, Mapping[str, str]]] = {}
    with _signals_interrupt() as interrupts:
        try:
            while (waiting or running) and not interrupts:
                while waiting and free and not interrupts:
                    job, place = waiting.popleft(), free.pop(0)
                    running[_start(job, place)] = job, place
                    started(job)
                time.sleep(0.1)
                for process in [process for process in running if process.poll() is not None]:
                    job, place = running.pop(process)
                    free.append(place)
                    ended(job, _failure(process.returncode, job.log))
        finally:
            _stop(list(running))
        if interrupts:
            raise KeyboardInterrupt


def _start(job: Job, place: Mapping[str, str]) -> subprocess.Popen:
    """Starts a job in a session of its own, so that Ctrl-C reaches it once, by way of `_stop`."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            job.command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **place},  # unbuffered: the error is the last line of the log
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Interrupts processes as Ctrl-C would, and kills those that go on for too long."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + SECONDS_TO_STOP
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:  # also where a second Ctrl-C says that this takes too long
        for process in processes:
            process.kill()
            process.wait()


def _failure(status: int, log: pathlib.Path) -> str | None:
    """Returns what a process failed with in one line, or None if it did not."""
    if status == 0:
        return None
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"exit status {status}"


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[list[int]]:
    """Collects the signals that ask a process to end; from the second on they raise KeyboardInterrupt.

    The first one does not, since it would be lost where it meets code whose exceptions Python ignores. One that is
    ignored, as those of a background process may be, stays without effect here, but by way of a handler:
    a child would inherit that it is ignored, and could not be interrupted.
    """

    interrupts: list[int] = []

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        interrupts.append(number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt

    def ignore(number: int, frame: types.FrameType | None) -> None:
        pass

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        signal.signal(number, ignore if handler is signal.SIG_IGN else interrupt)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
