"""How the processes of a run find each other, as torchrun starts them, and which of them says why they end."""

import contextlib
import datetime
import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import torch

from popgen.distributed import ALONE, POLLING_SECONDS, Processes
from popgen.errors import PopgenError, ProcessesError, Terminated, reason_of

CLOSING_SECONDS = 2.0  # that a process waits for another to say what has happened, before it says that it is gone


def launched_together() -> bool:
    """Returns whether torchrun, or whoever sets its variables, has started this process as one of several.

    Raises:
        ProcessesError: if WORLD_SIZE is no integer.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, RANK="0", WORLD_SIZE="2"):
        ...     launched_together()
        True
    """
    return "RANK" in os.environ and _set_by_torchrun("WORLD_SIZE", 1) > 1


def started_again() -> bool:
    """Returns whether torchrun starts these processes a second time, or more often, after one of them has died.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT="1"):
        ...     started_again()
        True
    """
    return _set_by_torchrun("TORCHELASTIC_RESTART_COUNT", 0) > 0


def _set_by_torchrun(name: str, otherwise: int) -> int:
    """Returns an integer of the environment.

    Raises:
        ProcessesError: if something else is there.
    """
    text = os.environ.get(name, str(otherwise))
    try:
        return int(text)
    except ValueError as error:
        raise ProcessesError(f"{name} must be an integer, as torchrun sets it, got {text!r}") from error


@contextlib.contextmanager
def joined(timeout: float) -> Iterator[Processes]:
    """Joins the other processes of this run, if there are any, and leaves them in the end.

    An error that ends all of them is marked as said in all but one; of those that miss others, each says whom.

    Args:
        timeout: seconds that a process waits for the others, at first and whenever they exchange something.

    Raises:
        ProcessesError: if they do not come together in that time, or the variables that torchrun sets make no sense.

    Example:
        >>> with joined(timeout=60.0) as processes:
        ...     processes
        Processes(rank=0, size=1, local_rank=0, local_size=1)
    """
    if not launched_together():
        yield ALONE
        return
    limit, deadline = datetime.timedelta(seconds=timeout), time.monotonic() + timeout
    rank, size = _set_by_torchrun("RANK", 0), _set_by_torchrun("WORLD_SIZE", 1)
    local_rank, local_size = _set_by_torchrun("LOCAL_RANK", 0), _set_by_torchrun("LOCAL_WORLD_SIZE", 1)
    if not 0 <= rank < size:
        raise ProcessesError(f"RANK must be at least 0 and below WORLD_SIZE, which is {size}, got {rank}")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    whole_store = _store(rank, size, timeout, deadline)
    try:
        store = torch.distributed.PrefixStore(_name_of_start(whole_store, rank, size, timeout, deadline), whole_store)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(f"process {rank} of {size} did not find the others ({reason_of(error)})") from error
    try:
        yield Processes(rank, size, local_rank, local_size)
    except (PopgenError, Terminated) as error:
        error.said = not _first_to_say(store, error)
        raise
    torch.distributed.destroy_process_group()


def _store(rank: int, size: int, timeout: float, deadline: float) -> torch.distributed.TCPStore:
    """Returns the store in which the processes find each other: torchrun's, or one that the first of them keeps.

    Raises:
        ProcessesError: if there is none.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise ProcessesError(
            f"MASTER_ADDR and MASTER_PORT must be the address and a port of process 0, got {address!r} and {port!r}"
        )
    keeps_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not keeps_it:  # a store that is not there yet would be reported by torch, at length
        try:
            socket.create_connection((address, port), timeout).close()
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ProcessesError(
                    f"process 0 of {size} did not answer at {address}:{port} within {timeout:g} seconds "
                    f"(--process_timeout; {error.strerror})"
                ) from error
        time.sleep(POLLING_SECONDS)
    limit = datetime.timedelta(seconds=timeout)
    try:
        return torch.distributed.TCPStore(
            address, int(port), is_master=keeps_it, timeout=limit, wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, ValueError) as error:
        said = f"process {rank} of {size} cannot meet the others at {address}:{port}"
        raise ProcessesError(f"{said} ({reason_of(error)})") from error


def _name_of_start(store: Any, rank: int, size: int, timeout: float, deadline: float) -> str:
    """Returns a name that the processes of this start have agreed on, and none of an earlier one has had.

    When torchrun starts processes again, its store still holds the addresses of those that have ended. The first
    process proposes a name, and all answer it with names of their own. Once all have, or its time is over, the first
    lists the answers; who finds its own among them knows who else is there.

    Raises:
        ProcessesError: if not all come.
    """

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    own = uuid.uuid4().hex
    if rank == 0:
        store.set("popgen/start", own)
    while True:
        late, start = time.monotonic() >= deadline, own if rank == 0 else read("popgen/start")
        answers = [f"popgen/{start}/{other}" for other in range(size)]
        if start:
            store.set(answers[rank], own)
        if rank == 0 and (late or store.check(answers)):
            store.set(f"popgen/{start}/listed", ",".join(map(read, answers)))
        listed = read(f"popgen/{start}/listed").split(",")
        if own in listed:
            break
        if late:  # the first has come later than this one, or not at all
            listed = list(map(read, answers)) if start and listed == [""] else []
            break
        time.sleep(POLLING_SECONDS)
    if own in listed and all(listed):
        return start
    missing, within = [place for place, name in enumerate(listed) if not name], f"within {timeout:g} seconds"
    if not missing:
        raise ProcessesError(f"process 0 of {size} did not answer {within} (--process_timeout)")
    readers = store.add(f"popgen/{start}/readers", 1)
    while rank == 0 and readers < size - len(missing) and time.monotonic() < deadline + CLOSING_SECONDS:
        time.sleep(POLLING_SECONDS)  # the others read in the store that ends with this process
        readers = store.add(f"popgen/{start}/readers", 0)
    raise ProcessesError(f"process {', '.join(map(str, missing))} of {size} did not come {within} (--process_timeout)")


def _first_to_say(store: Any, error: PopgenError | Terminated) -> bool:
    """Returns whether no other process has said the same; that one is gone, whether none has said anything at all."""
    digest = hashlib.sha256(str(error).encode()).hexdigest()
    try:
        if not isinstance(error, ProcessesError):
            store.add("popgen/said", 1)
            return store.add(f"popgen/said/{digest}", 1) == 1
        deadline = time.monotonic() + CLOSING_SECONDS
        with contextlib.suppress(Terminated):  # asked to end too, say by torchrun, it waits no longer
            while time.monotonic() < deadline:  # whoever has ended first may be about to say why
                if store.add("popgen/said", 0):
                    return False
                time.sleep(POLLING_SECONDS)
        return store.add("popgen/said", 1) == 1
    except RuntimeError:  # whoever kept the store is gone too
        return True
