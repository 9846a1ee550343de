"""Commands that the tests fork from a process that waits are what `python -m` would have started."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.commands import run_module

PROGRAM = """
import atexit, os, sys, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.2), print("in a thread"))).start()
print(sys.argv[1:], os.path.basename(sys.argv[0]), os.getcwd(), os.environ["OWN"], "HOME" in os.environ)
print(__name__, sys.stdin.read() == "", file=sys.stderr)
exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    "ending", ["pass", "sys.exit(75)", "sys.exit('a reason')", "os._exit(3)", "1 / 0", "os.kill(os.getpid(), 9)"]
)
def test_streams_codes_and_surroundings_are_those_of_a_process_of_its_own(ending: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    arguments, environment = [ending, "--flag=a b"], {"OWN": "1", "PYTHONPATH": "", "PATH": os.environ["PATH"]}
    done = run_module("program", arguments, tmp_path, environment)
    command = [sys.executable, "-m", "program", *arguments]
    alone = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (alone.returncode, alone.stdout)
    last = slice(-1 if "/" in ending else None, None)  # tracebacks differ above
    assert done.stderr.splitlines()[last] == alone.stderr.splitlines()[last]


def test_a_command_that_does_not_end_is_killed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "program.py").write_text("import time\nprint('began', flush=True)\ntime.sleep(60)\n")
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_module("program", [], tmp_path, {}, timeout=1.0)
    assert caught.value.stdout == b"began\n"
