"""Processes of a sweep: how many at a time, with what environment, and how they end."""

import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from popgen.sweeps.processes import Job, places, run_all, visible_devices

# Says when it started and ended, in a file of its own.
TIMED = """
import pathlib, sys, time
start = time.time()
time.sleep(0.4)
pathlib.Path(sys.argv[1]).write_text(f"{start} {time.time()}")
"""
# Trains until it is interrupted, and then tidies up as training does.
PATIENT = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1])
try:
    path.write_text("started")
    time.sleep(60)
except KeyboardInterrupt:
    path.write_text("tidied up")
    sys.exit(130)
"""


def job(tmp_path: pathlib.Path, name: str, code: str) -> Job:
    return Job(name, [sys.executable, "-c", code, str(tmp_path / name)], tmp_path / f"{name}.log")


@pytest.mark.parametrize("num_places", [1, 2, 3])
def test_as_many_run_at_a_time_as_there_are_places(tmp_path: pathlib.Path, num_places: int) -> None:
    jobs = [job(tmp_path, f"job{i}", TIMED) for i in range(4)]
    order: list[str] = []
    run_all(jobs, [{}] * num_places, lambda job: order.append(job.name), lambda job, failure: None)
    times = [[float(text) for text in (tmp_path / name).read_text().split()] for name in order]
    at_once = [sum(start <= moment < end for start, end in times) for moment, _ in times]
    assert order == ["job0", "job1", "job2", "job3"]
    assert max(at_once) <= num_places and (num_places > 1 or max(at_once) == 1)


def test_each_place_has_its_environment_and_one_job_at_a_time(tmp_path: pathlib.Path) -> None:
    code = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [job(tmp_path, f"job{i}", code) for i in range(2)]
    run_all(jobs, places(["GPU-a", "GPU-b"], None, 2, 4), lambda job: None, lambda job, failure: None)
    assert [(tmp_path / job.name).read_text() for job in jobs] == ["GPU-a", "GPU-b"]


def test_a_failure_is_the_last_line_and_stops_nothing(tmp_path: pathlib.Path) -> None:
    codes = {
        "error": "import sys; print('chatter'); print('error: no data in x', file=sys.stderr); sys.exit(1)",
        "traceback": "print('chatter'); {}['key']",
        "silent": "import sys; sys.exit(3)",
        "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "good": "print('all is well')",
    }
    found: dict[str, str | None] = {}
    jobs = [job(tmp_path, name, code) for name, code in codes.items()]
    run_all(jobs, [{}], lambda job: None, lambda job, failure: found.update({job.name: failure}))
    assert found == {
        "error": "no data in x",
        "traceback": "KeyError: 'key'",
        "silent": "exit status 3",
        "killed": "ended by SIGKILL",
        "good": None,
    }
    assert (tmp_path / "good.log").read_text() == "all is well\n"


@pytest.fixture
def interrupts_are(request: pytest.FixtureRequest):
    """What the tests themselves were started with does not matter, such as nohup, which lets SIGHUP be ignored.

    SIGINT meets the handler that the test names, and SIGHUP the system's.
    """
    handlers = {signal.SIGINT: request.param, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


IN_BACKGROUND = [signal.SIG_IGN]  # what a shell does to the commands that a script starts in the background
IN_FOREGROUND = [signal.default_int_handler]  # what a terminal does


@pytest.mark.usefixtures("interrupts_are")
@pytest.mark.parametrize("interrupts_are", IN_BACKGROUND, indirect=True)
def test_a_process_in_the_background_can_interrupt_its_own(tmp_path: pathlib.Path) -> None:
    check_that_a_signal_interrupts_every_process(tmp_path, signal.SIGTERM)


@pytest.mark.usefixtures("interrupts_are")
@pytest.mark.parametrize("interrupts_are", IN_FOREGROUND, indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_every_process_and_starts_no_other(tmp_path: pathlib.Path, number: int) -> None:
    check_that_a_signal_interrupts_every_process(tmp_path, number)


def check_that_a_signal_interrupts_every_process(tmp_path: pathlib.Path, number: int) -> None:
    jobs = [job(tmp_path, f"job{i}", PATIENT) for i in range(3)]

    def interrupt_when_both_run() -> None:
        while not all((tmp_path / f"job{i}").is_file() for i in range(2)):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt_when_both_run).start()
    with pytest.raises(KeyboardInterrupt):
        run_all(jobs, [{}, {}], lambda job: None, lambda job, failure: None)
    assert [(tmp_path / f"job{i}").read_text() for i in range(2)] == ["tidied up"] * 2
    assert not (tmp_path / "job2").exists()
    assert signal.getsignal(number) is before


def test_places_are_shared_out() -> None:
    assert places([], None, num_jobs=5, num_threads=8) == [{"OMP_NUM_THREADS": "8"}]
    assert places([], 8, num_jobs=3, num_threads=2) == [{"OMP_NUM_THREADS": "1"}] * 3
    two_each = places(["0", "1"], 4, num_jobs=9, num_threads=8)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in two_each] == ["0", "1", "0", "1"]
    assert len(places(["0", "1", "2"], 2, num_jobs=9, num_threads=8)) == 2


def test_devices_keep_the_names_that_the_environment_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5ab1")
    assert visible_devices() == ["3", "GPU-5ab1"]
