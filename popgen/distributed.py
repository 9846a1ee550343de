"""The processes that work on one run together, as torchrun starts them; one process alone needs none of this.

What they exchange goes through gloo, and what lies on GPUs through NCCL. Nothing here is imported by models or losses:
a training step is given its `Processes`, cuts its batch and its noise, and combines what it has found.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from popgen.errors import ArgumentError, ProcessesError, reason_of

T = TypeVar("T")
POLLING_SECONDS = 0.02
SIGN_SECONDS, SILENCE_SECONDS = 1.0, 30.0  # between the signs of a process at work, and after which it counts as gone
GOES_ON = "the same command goes on from what is saved"


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this one is.

    Every method but `part` is to be called by all of them, in the same order. The first one alone writes and prints.

    Args:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: of this process on its machine.
        local_size: how many there are on its machine.

    Example:
        >>> batch = torch.arange(6)
        >>> [Processes(rank, size=3).part(batch).tolist() for rank in range(3)]
        [[0, 1], [2, 3], [4, 5]]
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def part(self, batch: T, axis: int = 0) -> T:
        """Returns this process's part of a batch: of every tensor in it, the slices that are its own along an axis."""

        def cut(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor):
                return tensor
            length = tensor.shape[axis] // self.size
            return tensor.narrow(axis, self.rank * length, length)

        return batch if self.size == 1 else tree_map(cut, batch)

    def all_reduce(self, messages: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over the processes, the same bits in all of them; one alone changes nothing.

        Args:
            messages: the same shapes in every process; see `popgen.messages`.

        Raises:
            ProcessesError: if a process has ended.
        """
        if self.size > 1:
            for message in messages:
                with _answered():
                    torch.distributed.all_reduce(message)

    def all_gather(self, part: Tensor) -> Tensor:
        """Returns the parts of all processes side by side along the first axis.

        What the losses of all processes give it of a gradient comes back to the process whose part it is, summed.

        Args:
            part: of the same shape in every process.

        Raises:
            ProcessesError: if a process has ended, also in the backward pass.
        """
        return part if self.size == 1 else _Whole.apply(part, self)

    def all_reduce_max(self, number: float) -> float:
        """Returns the largest of their numbers.

        Raises:
            ProcessesError: if a process has ended.
        """
        if self.size == 1:
            return number
        held = torch.tensor(number, dtype=torch.float64)
        with _answered():
            torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
        return held.item()

    def broadcast(self, value: T) -> T:
        """Returns what the first process has, tensors, numbers and collections of them; the others may give None.

        Raises:
            ProcessesError: if a process has ended.
        """
        if self.size == 1:
            return value
        held = [value if self.first else None]
        with _answered():
            torch.distributed.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]  # type: ignore[return-value]

    def all_gather_object(self, value: T) -> list[T]:
        """Returns what every process has, in their order.

        Raises:
            ProcessesError: if a process has ended.
        """
        if self.size == 1:
            return [value]
        held: list[Any] = [None] * self.size
        with _answered():
            torch.distributed.all_gather_object(held, value)
        return held

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Compares what they have been asked for, by name.

        Raises:
            ArgumentError: in all of them, with what differs, if that is not the same.
            ProcessesError: if a process has ended.
        """
        first, *others = self.all_gather_object(dict(settings))
        for rank, other in enumerate(others, 1):
            names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
            if names:
                listed = "; ".join(f"{name}: {first.get(name)} -> {other.get(name)}" for name in names)
                raise ArgumentError(f"process {rank} was asked for something else than process 0 ({listed})")

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Lets the first process of each machine finish some work before others begin it: it may leave files."""
        if self.local_rank:
            self.all_gather_object(None)
        yield
        if not self.local_rank:
            self.all_gather_object(None)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Lets the first process do something that may take longer than they wait for each other; the others wait.

        They know from a sign that it gives every second that it is still there.

        Raises:
            ProcessesError: in the others, if the sign has not come for `SILENCE_SECONDS`.
        """
        if self.size == 1:
            yield
            return
        store = torch.distributed.distributed_c10d._get_default_store()
        with _answered():
            done = f"popgen/alone/{store.add(f'popgen/alone/of {self.rank}', 1)}"
        if not self.first:
            yield
            with _answered():
                _wait(store, done, self.size)
            return
        try:
            with _signs_of(self.rank, store):
                yield
        finally:
            with contextlib.suppress(RuntimeError):  # whoever kept the store is gone: the next exchange says so
                store.set(done, "")

    @contextlib.contextmanager
    def side_by_side(self) -> Iterator[Callable[[], None]]:
        """Lets each process do work of its own, and yields a check that the others are still there, for between pieces.

        Raises:
            ProcessesError: by that check, if one of them has given no sign of itself for `SILENCE_SECONDS`.
        """
        if self.size == 1:
            yield lambda: None
            return
        store = torch.distributed.distributed_c10d._get_default_store()
        watched = [_Watched(rank, self.size, store) for rank in range(self.size) if rank != self.rank]

        def check() -> None:
            with _answered():
                for other in watched:
                    other.check()

        with _signs_of(self.rank, store):
            yield check

    def device(self, name: str, device: torch.device) -> torch.device:
        """Returns the device of this process where the experiment says `device`: of GPUs, each has its own.

        Args:
            name: of the argument, for the error.
            device: of the experiment.

        Raises:
            ArgumentError: if a machine has more processes than GPUs, or the device is a single one of them.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise ArgumentError(
                f"{name} must be 'cuda', of which each of the {self.size} processes takes its own, got {str(device)!r}"
            )
        if self.local_size > torch.cuda.device_count():
            raise ArgumentError(
                f"there are {self.local_size} processes on a machine of {torch.cuda.device_count()} GPUs: start "
                f"torchrun with --nproc_per_node={torch.cuda.device_count()}, or set {name} = 'cpu'"
            )
        own = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(own)
        return own


@contextlib.contextmanager
def _signs_of(rank: int, store: Any) -> Iterator[None]:
    """Gives a sign of a process every second, from a thread of its own."""
    ended = threading.Event()

    def give() -> None:
        with contextlib.suppress(RuntimeError):  # whoever kept the store is gone: the next exchange says so
            while not ended.wait(SIGN_SECONDS):
                store.add(f"popgen/signs/{rank}", 1)

    signs = threading.Thread(target=give, daemon=True)
    signs.start()
    try:
        yield
    finally:
        ended.set()
        signs.join()


class _Watched:
    """A process whose signs another one watches for."""

    def __init__(self, rank: int, size: int, store: Any) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.signs, self.deadline = -1, 0.0

    def check(self) -> None:
        """Raises ProcessesError if it has given none for `SILENCE_SECONDS` since there were last more."""
        given = self.store.add(f"popgen/signs/{self.rank}", 0)
        if given != self.signs:
            self.signs, self.deadline = given, time.monotonic() + SILENCE_SECONDS
        if time.monotonic() > self.deadline:
            said = f"process {self.rank} of {self.size} has given no sign of itself for {SILENCE_SECONDS:g} seconds"
            raise ProcessesError(f"{said}; {GOES_ON}")


def _wait(store: Any, done: str, size: int) -> None:
    """Waits until something is done, as long as the first process gives signs.

    Raises:
        ProcessesError: if it does not.
    """
    first = _Watched(0, size, store)
    while not store.check([done]):
        first.check()
        time.sleep(POLLING_SECONDS)


class _Whole(torch.autograd.Function):
    """All parts of a tensor; backward is the sum of what every process found for one's own part."""

    @staticmethod
    def forward(ctx, part: Tensor, processes: Processes) -> Tensor:
        if hasattr(part, "fake_mode"):  # traced, without values to send
            raise NotImplementedError("what several processes exchange in the midst of a loss cannot be compiled")
        ctx.processes = processes
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(processes.size)]
        with _answered():
            torch.distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        with _answered():
            torch.distributed.all_reduce(total)
        return ctx.processes.part(total), None


ALONE = Processes()


def check_divided(name: str, count: int, processes: Processes) -> None:
    """Raises ArgumentError if the processes cannot have equal parts of so many examples.

    Example:
        >>> check_divided("Experiment.batch_size", 100, Processes(rank=0, size=3))
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: Experiment.batch_size must be a multiple of the 3 processes, got 100
    """
    if count % processes.size:
        raise ArgumentError(f"{name} must be a multiple of the {processes.size} processes, got {count}")


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """Raises ProcessesError where the others do not answer."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessesError(
            f"another process of this run has ended, or does not answer in time (--process_timeout; "
            f"{reason_of(error)}); {GOES_ON}"
        ) from error
