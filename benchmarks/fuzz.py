"""Feeds what parses files with inputs of a coverage-guided fuzzer, until one raises what is not the project's error.

    pip install -e '.[fuzz]'
    python -m benchmarks.fuzz --target=checkpoint --seconds=600     # or idx, amat, wav, gin, table

It begins with files that the project writes itself. An input that raises another exception, takes more than
`--memory` MB or `--timeout` seconds ends the search with a trace, and lies in `--out` as `crash-*`, `oom-*` or
`timeout-*`; `python -m benchmarks.fuzz --target=... --replay=FILE` runs it again.
"""

import argparse
import contextlib
import io
import pathlib
import sys
import tempfile
import warnings

try:
    import atheris
except ImportError:
    sys.exit("benchmarks.fuzz needs atheris: pip install -e '.[fuzz]'")
import torch.utils.tensorboard  # noqa: F401  (before the others: instrumenting all of torch takes a minute)
from torch._weights_only_unpickler import Unpickler

with atheris.instrument_imports(include=["popgen", "gin"]):
    from benchmarks.parsers import TARGETS
    from popgen.errors import PopgenError


def main() -> None:
    """Searches for an input, or replays one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=sorted(TARGETS), required=True)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--memory", type=int, default=2_500, help="MB that the process may come to")
    parser.add_argument("--timeout", type=int, default=30, help="seconds that one input may take")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("fuzz"))
    parser.add_argument("--replay", type=pathlib.Path, help="an input to run again, with its trace")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    Unpickler.load = atheris.instrument_func(Unpickler.load)
    folder = tempfile.mkdtemp(prefix="popgen-fuzz-")
    target = TARGETS[arguments.target](pathlib.Path(folder))

    def parse(data: bytes) -> None:
        with contextlib.suppress(PopgenError), contextlib.redirect_stderr(io.StringIO()):
            target.parse(data)

    if arguments.replay:
        target.parse(arguments.replay.read_bytes())
        return
    corpus = arguments.out / arguments.target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = pathlib.Path(folder) / "words"
    words.write_text("".join(f'"{word}"\n' for word in target.words()))
    options: dict[str, object] = {
        "max_total_time": arguments.seconds,
        "max_len": target.max_length,
        "rss_limit_mb": arguments.memory,
        "timeout": arguments.timeout,
        "print_final_stats": 1,
        "artifact_prefix": f"{arguments.out}/{arguments.target}-",
    }
    if target.words():
        options["dict"] = words
    atheris.Setup([sys.argv[0], str(corpus), *(f"-{name}={value}" for name, value in options.items())], parse)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
