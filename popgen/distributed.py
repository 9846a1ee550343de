"""The processes that work on one run together, as torchrun starts them; one process alone needs none of this.

What they exchange goes through gloo, and what lies on GPUs through NCCL. Nothing here is imported by models or losses:
a training step is given its `Processes`, cuts its batch and its noise, and combines what it has found.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from popgen.errors import ArgumentError, PopgenError, ProcessesError, reason_of

T = TypeVar("T")
POLLING_SECONDS = 0.02
SIGN_SECONDS, SILENCE_SECONDS = 1.0, 30.0  # between the signs of a process at work, and after which it counts as gone
CLOSING_SECONDS = 2.0  # that a process waits for another to say what has happened, before it says that it is gone


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

    def combine(
        self, means: Sequence[Tensor], sums: Sequence[Tensor], weight: Tensor | float = 1.0
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Returns the weighted means of some tensors over the processes, and the sums of others.

        There is one message for each dtype, and every process is given the same bits.

        Args:
            means: the same shapes in every process, of floating point.
            sums: the same shapes in every process.
            weight: of this process in the means.

        Raises:
            ProcessesError: if a process has ended.
        """
        if self.size == 1:
            return means, sums
        results = [*means, *sums]
        for dtype in dict.fromkeys(tensor.dtype for tensor in results):
            places = [place for place, tensor in enumerate(results) if tensor.dtype == dtype]
            tensors = [results[place].detach().reshape(-1) for place in places]
            own = torch.as_tensor(weight, dtype=dtype, device=tensors[0].device).reshape(1)
            flat = torch.cat([own, *tensors])
            averaged = flat[1 : 1 + sum(results[place].numel() for place in places if place < len(means))]
            averaged.mul_(own)
            with _answered():
                torch.distributed.all_reduce(flat)
            if dtype.is_floating_point:  # integers are only summed
                averaged.div_(flat[0])
            parts = flat[1:].split([tensor.numel() for tensor in tensors])
            for place, part in zip(places, parts, strict=True):
                results[place] = part.view(results[place].shape)
        return results[: len(means)], results[len(means) :]

    def whole(self, part: Tensor) -> Tensor:
        """Returns the parts of all processes side by side along the first axis.

        What the losses of all processes give it of a gradient comes back to the process whose part it is, summed.

        Args:
            part: of the same shape in every process.

        Raises:
            ProcessesError: if a process has ended, also in the backward pass.
        """
        return part if self.size == 1 else _Whole.apply(part, self)

    def any(self, flag: bool) -> bool:
        """Returns whether any of them says so.

        Raises:
            ProcessesError: if a process has ended.
        """
        if self.size == 1:
            return flag
        said = torch.tensor([int(flag)], dtype=torch.int32)
        with _answered():
            torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        return bool(said)

    def from_first(self, value: T) -> T:
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

    def gather(self, value: T) -> list[T]:
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

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Lets the first process of each machine finish some work before others begin it: it may leave files."""
        if self.local_rank:
            self.gather(None)
        yield
        if not self.local_rank:
            self.gather(None)

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
        ended = threading.Event()
        signs = threading.Thread(target=_give_signs, args=(store, ended), daemon=True)
        signs.start()
        try:
            yield
        finally:
            ended.set()
            signs.join()
            with contextlib.suppress(RuntimeError):  # whoever kept the store is gone: the next exchange says so
                store.set(done, "")

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


def _give_signs(store: Any, ended: threading.Event) -> None:
    with contextlib.suppress(RuntimeError):  # as where it ends
        while not ended.wait(SIGN_SECONDS):
            store.add("popgen/signs", 1)


def _wait(store: Any, done: str, size: int) -> None:
    """Waits until something is done, as long as the first process gives signs.

    Raises:
        ProcessesError: if it does not.
    """
    signs, deadline = -1, 0.0
    while not store.check([done]):
        given = store.add("popgen/signs", 0)
        if given != signs:
            signs, deadline = given, time.monotonic() + SILENCE_SECONDS
        if time.monotonic() > deadline:
            raise ProcessesError(
                f"process 0 of {size} has given no sign of itself for {SILENCE_SECONDS:g} seconds; the same command "
                "goes on from the latest checkpoint"
            )
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


def launched_together() -> bool:
    """Returns whether torchrun, or whoever sets its variables, has started this process as one of several.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, RANK="0", WORLD_SIZE="2"):
        ...     launched_together()
        True
    """
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextlib.contextmanager
def joined(timeout: float) -> Iterator[Processes]:
    """Joins the other processes of this run, if there are any, and leaves them in the end.

    An error that ends all of them is marked as said in all but one.

    Args:
        timeout: seconds that a process waits for the others, at first and whenever they exchange something.

    Raises:
        ProcessesError: if they do not come together in that time.

    Example:
        >>> with joined(timeout=60.0) as processes:
        ...     processes
        Processes(rank=0, size=1, local_rank=0, local_size=1)
    """
    if not launched_together():
        yield ALONE
        return
    limit = datetime.timedelta(seconds=timeout)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        whole_store, _, _ = next(torch.distributed.rendezvous("env://", timeout=limit))
        whole_store.set_timeout(limit)
        store = torch.distributed.PrefixStore(_name_of_start(whole_store, rank, size, timeout), whole_store)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(f"process {rank} of {size} did not find the others ({reason_of(error)})") from error
    local_rank, local_size = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    try:
        yield Processes(rank, size, local_rank, local_size)
    except PopgenError as error:
        error.said = not _first_to_say(store, error)
        raise
    torch.distributed.destroy_process_group()


def _name_of_start(store: Any, rank: int, size: int, timeout: float) -> str:
    """Returns a name that the processes of this start have agreed on, and none of an earlier one has had.

    When torchrun starts processes again, its store still holds the addresses of those that have ended. The first
    process proposes a name, the others answer it with names of their own, and it goes by what it was answered.

    Raises:
        ProcessesError: if not all come.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    answers = [f"popgen/{own}/{other}" for other in range(1, size)]
    if rank == 0:
        store.set("popgen/start", own)
    while time.monotonic() < deadline:
        if rank == 0:
            if store.check(answers):
                store.set(f"popgen/{own}/agreed", b",".join(map(store.get, answers)))
                return own
        elif store.check(["popgen/start"]):
            proposed = store.get("popgen/start").decode()
            store.set(f"popgen/{proposed}/{rank}", own)
            agreed = f"popgen/{proposed}/agreed"
            if store.check([agreed]) and own in store.get(agreed).decode():
                return proposed
        time.sleep(POLLING_SECONDS)
    missing = [place for place, answer in enumerate(answers, 1) if not store.check([answer])] if rank == 0 else [0]
    raise ProcessesError(
        f"process {', '.join(map(str, missing))} of {size} did not come within {timeout:g} seconds (--process_timeout)"
    )


def _first_to_say(store: Any, error: PopgenError) -> bool:
    """Returns whether no other process has said the same; that one is gone, whether none has said anything at all."""
    digest = hashlib.sha256(str(error).encode()).hexdigest()
    try:
        if not isinstance(error, ProcessesError):
            store.add("popgen/said", 1)
            return store.add(f"popgen/said/{digest}", 1) == 1
        deadline = time.monotonic() + CLOSING_SECONDS
        while time.monotonic() < deadline:  # whoever has ended first may be about to say why
            if store.add("popgen/said", 0):
                return False
            time.sleep(POLLING_SECONDS)
        return store.add("popgen/said", 1) == 1
    except RuntimeError:  # whoever kept the store is gone too
        return True


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """Raises ProcessesError where the others do not answer."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessesError(
            f"another process of this run has ended, or does not answer ({reason_of(error)}); the same command goes on "
            "from the latest checkpoint"
        ) from error
