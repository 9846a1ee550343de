"""What several processes exchange, and how they end when one of them does."""

import math
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.together import results_of, together
from popgen import distributed, rendezvous
from popgen.distributed import ALONE, Processes, check_divided
from popgen.errors import ArgumentError, CheckpointError, ProcessesError, StoppedError
from popgen.messages import packed, unpacked
from popgen.rendezvous import joined, launched_together
from popgen.training.loop import StopTogether


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A process that has several threads is not to be forked."""
    torch.set_num_threads(1)


class Pair(NamedTuple):
    values: Tensor
    labels: dict[str, Tensor]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_parts_make_the_whole(size: int) -> None:
    """Nothing is lost and nothing is seen twice, on any axis and in any collection."""
    batch = Pair(torch.arange(24).view(12, 2), {"digit": torch.arange(12)})
    parts = [Processes(rank, size).part(batch) for rank in range(size)]
    assert torch.equal(torch.cat([part.values for part in parts]), batch.values)
    assert torch.equal(torch.cat([part.labels["digit"] for part in parts]), batch.labels["digit"])
    noise = torch.arange(24).view(2, 12)
    assert torch.equal(torch.cat([Processes(rank, size).part(noise, axis=1) for rank in range(size)], 1), noise)


def test_one_process_alone_starts_nothing() -> None:
    with joined(timeout=1.0) as processes:
        assert processes is ALONE and processes.first
    assert not torch.distributed.is_initialized() and not launched_together()
    means, sums = [torch.ones(2)], [torch.zeros(3)]
    ALONE.all_reduce([*means, *sums])
    assert torch.equal(means[0], torch.ones(2)) and torch.equal(sums[0], torch.zeros(3))
    assert ALONE.broadcast(means) is means and ALONE.all_gather_object(3) == [3] and ALONE.all_reduce_max(2.5) == 2.5
    assert ALONE.part(means) is means


def test_one_process_of_torchrun_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined(timeout=1.0) as processes:
        assert processes is ALONE and not torch.distributed.is_initialized()


def combine(
    processes: Processes, means: list[Tensor], sums: list[Tensor], weight: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    messages = packed(means, sums, weight)
    processes.all_reduce(messages)
    return unpacked(messages, means, sums)


def test_processes_combine_and_tell() -> None:
    """Weighted means and sums of several dtypes and shapes, the same bits everywhere."""
    generator = torch.Generator().manual_seed(0)
    dtypes, shapes = (torch.float32, torch.float64, torch.float32), ((), (3, 2), (5,))
    held = [
        [torch.randn(shape, generator=generator, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        for _ in range(3)
    ]
    weights = [1.0, 4.0, 2.5]

    def work(processes: Processes) -> Any:
        own = held[processes.rank]
        combined = combine(processes, own[:2], own[2:], weights[processes.rank])
        unweighted = combine(processes, own, [])
        told = processes.broadcast({"rank": processes.rank, "values": own[1]})
        return (
            combined,
            unweighted,
            told,
            processes.all_gather_object(processes.rank),
            processes.all_reduce_max(processes.rank / 2),
        )

    results = results_of(work, size=3)
    for (means, sums), (plain_means, no_sums), told, ranks, largest in results:
        for place, mean in enumerate(means):
            expected = sum(w * one[place].double() for w, one in zip(weights, held, strict=True)) / sum(weights)
            torch.testing.assert_close(mean, expected.to(dtypes[place]))
        torch.testing.assert_close(sums[0], held[0][2] + held[1][2] + held[2][2])
        torch.testing.assert_close(plain_means[1], (held[0][1] + held[1][1] + held[2][1]) / 3)
        assert no_sums == [] and told["rank"] == 0 and torch.equal(told["values"], held[0][1])
        assert ranks == [0, 1, 2] and largest == 1.0
    first, *others = ([*means, *sums, *plain] for (means, sums), (plain, _), *_ in results)
    assert all(torch.equal(one, two) for other in others for one, two in zip(first, other, strict=True))


def test_integers_are_summed() -> None:
    def work(processes: Processes) -> Any:
        return combine(processes, [torch.tensor(1.0 + processes.rank)], [torch.tensor([processes.rank, 2])], 3.0)

    for (mean,), (total,) in results_of(work, size=2):
        assert mean == 1.5 and total.tolist() == [1, 4] and total.dtype == torch.int64


def test_parts_are_put_together_with_their_gradients() -> None:
    def work(processes: Processes) -> Any:
        own = torch.full((2, 3), float(processes.rank), requires_grad=True)
        whole = processes.all_gather(own)
        (whole * torch.arange(12.0).view(4, 3) * (1 + processes.rank)).sum().backward()
        return whole.detach(), own.grad, processes.all_gather(torch.tensor([processes.rank]))

    for rank, (whole, gradient, ranks) in enumerate(results_of(work, size=2)):
        assert whole[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0] and ranks.tolist() == [0, 1]
        assert torch.equal(gradient, 3.0 * torch.arange(12.0).view(4, 3)[2 * rank :][:2]), "from both losses"


def test_what_is_not_finite_in_one_process_is_not_finite_in_all() -> None:
    def work(processes: Processes) -> Any:
        return combine(processes, [torch.full((2,), torch.nan if processes.rank else 1.0)], [])[0][0]

    assert all(torch.isnan(result).all() for result in results_of(work, size=2))


# --- one process ends ------------------------------------------------------------------------------------------------


def test_a_process_that_is_killed_takes_the_others_down() -> None:
    """At once, long before the timeout, with one line between them."""

    def work(processes: Processes) -> None:
        processes.all_reduce_max(0.0)
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.all_reduce_max(0.0)

    started = time.perf_counter()
    outcomes = together(work, size=3, timeout=60.0)
    assert time.perf_counter() - started < 20.0
    assert [outcome.status for outcome in outcomes] == [1, -signal.SIGKILL, 1]
    said = "".join(outcome.said for outcome in outcomes)
    assert said.startswith("error: another process of this run has ended, or does not answer in time (")
    assert said.count("\n") == 1 and "the same command goes on from what is saved" in said


def test_a_process_that_hangs_is_not_waited_for_longer_than_the_timeout() -> None:
    def work(processes: Processes) -> None:
        if processes.rank == 1:
            time.sleep(4.0)
            os._exit(9)
        processes.all_reduce_max(0.0)

    started = time.perf_counter()
    outcomes = together(work, size=2, timeout=1.0)
    assert time.perf_counter() - started < 20.0
    assert [outcome.status for outcome in outcomes] == [1, 9]
    assert outcomes[0].said.startswith("error: another process of this run has ended, or does not answer in time (")


def test_the_first_alone_may_take_longer_than_the_timeout() -> None:
    def work(processes: Processes) -> bool:
        for _ in range(2):
            with processes.first_alone():
                if processes.first:
                    time.sleep(2.5)
        return processes.all_reduce_max(1.0 - processes.rank)

    assert results_of(work, size=2, timeout=1.0) == [1.0, 1.0]


@pytest.mark.parametrize("last_words", [True, False])
def test_the_others_learn_that_the_first_has_gone_while_it_was_alone(
    last_words: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "SILENCE_SECONDS", 3.0)

    def work(processes: Processes) -> None:
        with processes.first_alone():
            if processes.first and last_words:
                raise ArgumentError("the loss is bad")
            if processes.first:
                os.kill(os.getpid(), signal.SIGKILL)
        processes.all_reduce_max(0.0)

    started = time.perf_counter()
    first, second = together(work, size=2, timeout=60.0)
    assert time.perf_counter() - started < 20.0 and second.status == 1
    if last_words:
        assert (first.said, second.said) == ("error: the loss is bad\n", "")
    else:
        assert second.said.startswith("error: process 0 of 2 has given no sign of itself for 3 seconds")


def test_a_process_that_dies_while_each_works_alone_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two pieces of work, and not only when all of one's own are done; those that are at work are not."""
    monkeypatch.setattr(distributed, "SILENCE_SECONDS", 3.0)

    def work(processes: Processes) -> None:
        with processes.side_by_side() as check_others:
            for _ in range(60):
                check_others()
                time.sleep(0.5)
                if processes.rank == 1 and time.perf_counter() - started > 5.0:
                    os.kill(os.getpid(), signal.SIGKILL)

    started = time.perf_counter()
    first, second = together(work, size=2, timeout=60.0)
    assert 7.0 < time.perf_counter() - started < 25.0 and (first.status, second.status) == (1, -signal.SIGKILL)
    assert first.said.startswith("error: process 1 of 2 has given no sign of itself for 3 seconds; the same command")


@pytest.mark.parametrize("everywhere", [True, False])
def test_an_error_is_said_once(everywhere: bool) -> None:
    """By whoever has it; those that only see the other one go say nothing."""

    def work(processes: Processes) -> None:
        if everywhere or processes.rank == 1:
            raise CheckpointError("it is damaged")
        processes.all_reduce_max(0.0)

    outcomes = together(work, size=3)
    assert [outcome.status for outcome in outcomes] == [1, 1, 1]
    assert sorted(outcome.said for outcome in outcomes) == ["", "", "error: it is damaged\n"]


def test_different_errors_are_all_said() -> None:
    def work(processes: Processes) -> None:
        raise CheckpointError(f"{processes.rank} is damaged")

    said = sorted(outcome.said for outcome in together(work, size=2))
    assert said == ["error: 0 is damaged\n", "error: 1 is damaged\n"]


def test_all_stop_with_the_status_of_one_that_stops() -> None:
    def work(processes: Processes) -> None:
        stop = StopTogether(lambda: processes.rank == 1, processes)
        if stop():
            raise StoppedError("stopped at step 3")

    outcomes = together(work, size=2)
    assert [outcome.status for outcome in outcomes] == [75, 75]
    assert sorted(outcome.said for outcome in outcomes) == ["", "stopped at step 3\n"]


@pytest.mark.parametrize("asked_at", [3, 150])
def test_processes_ask_each_other_about_twice_a_second(asked_at: int) -> None:
    """A request stops all of them after the same call, soon after it was made, and few calls cost an exchange."""

    def work(processes: Processes) -> tuple[int, int, float]:
        calls, exchanges, asked = 0, 0, math.inf
        largest = Processes.all_reduce_max

        def counted(processes: Processes, number: float) -> float:
            nonlocal exchanges
            exchanges += 1
            return largest(processes, number)

        def is_asked() -> bool:
            return calls >= asked_at and processes.rank == 1

        stop = StopTogether(is_asked, processes)
        with mock.patch.object(Processes, "all_reduce_max", counted):
            while not stop():
                calls += 1
                asked = time.monotonic() if calls == asked_at else asked
                time.sleep(0.01 + 0.01 * processes.rank)
            assert stop(), "it stays so"
        return calls, exchanges, time.monotonic() - asked

    (calls, exchanges, seconds), other = results_of(work, size=2)
    assert other[:2] == (calls, exchanges)
    assert asked_at <= calls < asked_at + 60 and seconds < 2.0
    assert exchanges < 8 + calls / 10


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize(
    "present, said",
    [
        ([0, 1], "error: process 2 of 3 did not come within 2 seconds (--process_timeout)\n"),
        ([0], "error: process 1, 2 of 3 did not come within 2 seconds (--process_timeout)\n"),
        ([1, 2], "error: process 0 of 3 did not answer within 2 seconds (--process_timeout)\n"),
    ],
)
def test_processes_that_never_come_are_named(present: list[int], said: str, by_hand: bool) -> None:
    """By every one that has come, in the same words; whoever has come is not named."""
    started = time.perf_counter()
    outcomes = together(lambda processes: None, size=3, timeout=2.0, present=present, by_hand=by_hand)
    assert time.perf_counter() - started < 20.0
    for outcome in outcomes:  # where the first is to keep the store, it is also said where
        plain = re.sub(r" at 127.0.0.1:\d+|; Connection refused", "", outcome.said)
        assert (outcome.status, plain) == (1, said)
        assert (plain == outcome.said) == (not by_hand or 0 in present)


def test_processes_that_are_started_by_hand_find_each_other() -> None:
    assert (
        results_of(lambda processes: processes.all_gather_object(processes.rank), size=3, by_hand=True)
        == [[0, 1, 2]] * 3
    )


def meet(store: Any, rank: int, size: int, timeout: float) -> str:
    """Returns the name that a process agrees on with others, or what it says where it cannot."""
    try:
        return rendezvous._name_of_start(store, rank, size, timeout, time.monotonic() + timeout)
    except ProcessesError as error:
        return str(error)


def test_one_that_has_waited_for_longer_than_the_first_names_who_is_missing() -> None:
    """Its own time is over before the first has said anything."""
    with ThreadPoolExecutor(2) as threads:
        store = torch.distributed.HashStore()
        second = threads.submit(meet, store, 1, 3, timeout=0.6)
        time.sleep(0.3)
        first = threads.submit(meet, store, 0, 3, timeout=0.6)
        said = "process 2 of 3 did not come within 0.6 seconds (--process_timeout)"
        assert (first.result(), second.result()) == (said, said)


def test_what_was_said_of_an_earlier_start_is_not_heeded() -> None:
    """Process 1 of an earlier start has not come, and what the first wrote of that is still in the store."""
    store = torch.distributed.HashStore()
    assert meet(store, 0, 2, timeout=0.1) == "process 1 of 2 did not come within 0.1 seconds (--process_timeout)"
    assert meet(store, 1, 2, timeout=0.1) == "process 0 of 2 did not answer within 0.1 seconds (--process_timeout)"
    with ThreadPoolExecutor(2) as threads:
        second = threads.submit(meet, store, 1, 2, timeout=10.0)
        time.sleep(0.2)
        first = threads.submit(meet, store, 0, 2, timeout=10.0)
        assert first.result() == second.result() and len(first.result()) == 32


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"MASTER_PORT": ""}, "must be the address and a port of process 0, got '127.0.0.1' and ''"),
        ({"MASTER_PORT": "port"}, "got '127.0.0.1' and 'port'"),
        ({"RANK": "2"}, "RANK must be at least 0 and below WORLD_SIZE, which is 2, got 2"),
        ({"RANK": "one"}, "RANK must be an integer, as torchrun sets it, got 'one'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be an integer, as torchrun sets it, got ''"),
        ({"LOCAL_RANK": "0.5"}, "LOCAL_RANK must be an integer, as torchrun sets it, got '0.5'"),
    ],
)
def test_variables_that_make_no_sense(changes: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not after the time in which others may still come."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (variables | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessesError, match=said), joined(timeout=1_000.0):
        pass


def test_what_an_earlier_start_has_left_in_the_store_does_no_harm() -> None:
    """When torchrun starts processes again, its store still holds the addresses of those that have ended."""

    def work(processes: Processes) -> list[list[int]]:
        found = []
        torch.distributed.destroy_process_group()
        for _ in range(3):
            if processes.rank == 1:
                time.sleep(0.1)  # the first one finds what this one has left
            with joined(timeout=20.0) as again:
                found.append(again.all_gather_object(again.rank))
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        return found  # and leaves what it has just begun

    assert results_of(work, size=2) == [[[0, 1]] * 3] * 2


def test_the_first_goes_ahead() -> None:
    def work(processes: Processes) -> float:
        with processes.first_goes_ahead():
            began = time.monotonic()
            time.sleep(0.2 if processes.first else 0.0)
        return began

    first, *others = results_of(work, size=3)
    assert all(began >= first + 0.2 for began in others)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    gpu = torch.device("cuda")
    assert Processes(3, 4, local_rank=1, local_size=2).device("device", gpu) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    assert Processes(3, 4, 3, 4).device("device", torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ArgumentError, match="4 processes on a machine of 2 GPUs: start torchrun with --nproc_per_node"):
        Processes(0, 4, 0, 4).device("Experiment.device", gpu)
    with pytest.raises(ArgumentError, match="Experiment.device must be 'cuda', of which .* got 'cuda:1'"):
        Processes(0, 2, 0, 2).device("Experiment.device", torch.device("cuda", 1))


def test_a_batch_that_cannot_be_divided() -> None:
    check_divided("batch_size", 100, Processes(0, 4))
    with pytest.raises(ArgumentError, match="batch_size must be a multiple of the 3 processes, got 100"):
        check_divided("batch_size", 100, Processes(0, 3))
    assert issubclass(ProcessesError, Exception)
