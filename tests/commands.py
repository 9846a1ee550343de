"""Modules run as `python -m` would, in processes of their own that find torch and popgen imported already.

A short command spends most of its time on imports. Here they are made once, in a server that forks a process for each
command: its working directory, environment, arguments, streams and exit code are those that it would have had.
"""

import atexit
import gc
import json
import os
import pathlib
import runpy
import select
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
IDLE: list["Server"] = []


def run_module(
    module: str,
    arguments: Sequence[str],
    cwd: pathlib.Path = REPOSITORY,
    env: Mapping[str, str] = os.environ,
    timeout: float = 120.0,
) -> subprocess.CompletedProcess[str]:
    """Returns what `python -m module arguments` has done, as `subprocess.run` would."""
    server = IDLE.pop() if IDLE else Server()  # threads of one test may ask at the same time
    done = server.run(module, arguments, cwd, env, timeout)
    IDLE.append(server)
    return done


class Server:
    """A process that forks others, one at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        atexit.register(self.process.kill)

    def run(
        self, module: str, arguments: Sequence[str], cwd: pathlib.Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as folder:
            streams = [pathlib.Path(folder) / name for name in ("stdout", "stderr")]
            request = {
                "module": module,
                "arguments": list(arguments),
                "cwd": str(cwd),
                "environment": dict(env),
                "streams": list(map(str, streams)),
            }
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            forked = int(self.process.stdout.readline())
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                os.kill(forked, 9)
                self.process.stdout.readline()
                raise subprocess.TimeoutExpired([module, *arguments], timeout, *(path.read_bytes() for path in streams))
            code = int(self.process.stdout.readline())
            texts = [path.read_text() for path in streams]
        return subprocess.CompletedProcess([module, *arguments], code, *texts)


def serve() -> None:
    """Answers requests, each in a forked process."""
    for line in sys.stdin:
        forked = os.fork()
        if not forked:
            become(**json.loads(line))
        print(forked, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]), flush=True)


def become(
    module: str, arguments: Sequence[str], cwd: str, environment: Mapping[str, str], streams: Sequence[str]
) -> None:
    """Does what the interpreter does for `python -m module arguments`, except freeing at the end all that it holds."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [cwd, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv[1:] = arguments
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # in place of the folder of this file
    import tensorboard.summary.writer.event_file_writer  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torchvision  # noqa: F401

    import popgen.config
    import popgen.evaluation.evaluator
    import popgen.models.vae
    import popgen.training.loop  # noqa: F401

    gc.freeze()
    serve()
