"""Kills training runs again and again and compares how they end: python -m benchmarks.kills.

Every run is continued until it ends by itself, and is then compared with one that nothing disturbed: checkpoints bit
for bit, curves and pictures as TensorBoard reads them, and files. Processes die at random moments (SIGKILL), at a
random point of a write (just before or after a file is synchronised, linked or renamed; what was half written is then
cut at a random place), or are asked to stop (SIGTERM). They are forked from this one, which has imported everything, so
that most of their short lives is training.
"""

import argparse
import collections
import functools
import logging
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from benchmarks.measure import markdown_table
from launch.command import STOPPED, guarded, stop_requests
from popgen.datasets.images import ImageData, prepare_images
from popgen.evaluation.vqvae import VQVAEEvaluator
from popgen.experiment import Configuration, Experiment, run
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.models.vqvae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.priors import StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior
from popgen.nn.vqvae import MovingAverageQuantiser
from popgen.optim.geco import GECO
from popgen.optim.schedules import SigmoidAnnealing
from popgen.training.checkpoints import load
from popgen.training.objectives import ConstrainedELBO, NegativeELBO, VQVAELoss
from popgen.training.run_directory import RunDirectory

KINDS = ("vae", "geco", "vqvae")
WAYS = ("moment", "write", "stop")
WRITING = ("fsync", "link", "replace")  # of the module os: all that a write does


class Bars:
    """Grey 8 × 8 images, each quarter with a light bar along one of its sides."""

    def load(self) -> ImageData:
        """Makes them."""
        quarters = torch.full((4, 4, 4), 20, dtype=torch.uint8)
        quarters[0, 0], quarters[1, -1], quarters[2, :, 0], quarters[3, :, -1] = 230, 230, 230, 230
        chosen = quarters[torch.randint(4, (90, 2, 2), generator=torch.Generator().manual_seed(0))]
        images = chosen.permute(0, 1, 3, 2, 4).reshape(90, 64)
        return prepare_images(images[:60], images[60:], (8, 8), "dynamic", 0)


def make_experiment(kind: str, **changes: Any) -> Experiment:
    """Returns a small experiment: a VAE with its weight average, one under GECO, or a VQ-VAE with revived codes."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "dataset": Bars(),
        "optimizer": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
        "num_steps": 80,
        "batch_size": 20,
        "eval_every": 4,
        "log_every": 3,
        "checkpoint_every": 10,
    }
    encoder, decoder = GaussianEncoder(64, 3, 8), BernoulliDecoder(3, 64, 8)
    if kind == "geco":
        geco = GECO(rate=0.01, decay=0.8, warm_up_steps=2)
        settings |= {"model": VAE(encoder, decoder, StandardNormalPrior())}
        settings |= {"objective": ConstrainedELBO(geco, "reconstruction", -20.0)}
    elif kind == "vqvae":
        parts = (part(3, (8, 8), 16, 1) for part in (ConvolutionalEncoder, ConvolutionalDecoder))
        encode, decode = parts
        settings |= {"model": VQVAE(encode, MovingAverageQuantiser(8, 3, decay=0.9), decode), "objective": VQVAELoss()}
        settings |= {"evaluator": VQVAEEvaluator()}
    else:
        flow = HouseholderSylvesterFlow(3, 8, num_flows=1, num_reflections=2)
        settings |= {"model": VAE(encoder, decoder, VampPrior(64, 4, "data"), flow)}
        settings |= {"objective": NegativeELBO(SigmoidAnnealing(rate=0.1))}
    return Experiment(**(settings | changes))


def train_in(path: pathlib.Path, kind: str, **changes: Any) -> None:
    """Trains an experiment in a directory, or goes on with it."""
    directory = RunDirectory(path)
    with directory.locked(), stop_requests() as stop:
        run(make_experiment(kind, **changes), directory, Configuration("given", "operative", {}), stop)


def forked(work: Callable[[], None], stderr: int | None = None) -> int:
    """Returns the process that does some work as a command does it; its exit status is 2 after an unexpected error.

    Args:
        work: what it does.
        stderr: the file descriptor that its standard error goes to.
    """
    process = os.fork()
    if process:
        return process
    status, own = 2, sys.stderr
    try:
        with open(os.devnull if stderr is None else stderr, "w", buffering=1) as sys.stderr:
            os.dup2(sys.stderr.fileno(), 2)
            guarded(work)
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc(file=own)
        own.flush()
    finally:
        os._exit(status)


def dies_in_a_write(work: Callable[[], None], calls: int, after: bool) -> None:
    """Does some work and dies just before or after one of its calls that write."""
    left = calls

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if not left and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments)
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in WRITING:
        setattr(os, name, counted(getattr(os, name)))
    work()


def disturbed(work: Callable[[], None], way: str, seconds: float, choice: random.Random) -> int:
    """Returns how a process ended that was to die in a way: its exit status, or minus the signal that killed it."""
    if way == "write":
        process = forked(functools.partial(dies_in_a_write, work, choice.randint(1, 40), choice.random() < 0.5))
    else:
        process = forked(work)
        time.sleep(choice.uniform(0.0, seconds))
        os.kill(process, signal.SIGTERM if way == "stop" else signal.SIGKILL)
    return ended(process)


def ended(process: int) -> int:
    """Returns how a process ended, once it has: its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def cut_what_was_half_written(path: pathlib.Path, choice: random.Random) -> int:
    """Leaves of each unfinished file a random part, as a death in the middle of its writing does; returns how many."""
    unfinished = [file for file in path.glob("**/.writing-*") if file.stat().st_nlink == 1]
    for file in unfinished:
        os.truncate(file, choice.randint(0, file.stat().st_size))
    return len(unfinished)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dictionaries and lists, by path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in flat(item, f"{name}/{key}").items()}
    return {name: value}


def shown(path: pathlib.Path) -> dict[str, list[tuple[int, Any]]]:
    """Returns every curve and picture that TensorBoard shows of a run, but for the speed."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    pictures = {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in tags["images"]}
    return {name: points for name, points in (curves | pictures).items() if not name.endswith("steps_per_second")}


def difference(reference: pathlib.Path, other: pathlib.Path) -> str | None:
    """Returns the first thing in which two finished runs differ, or None; evaluations say how long they took."""
    names = [
        {str(file.relative_to(path)) for file in path.rglob("*") if "tfevents" not in file.name}
        for path in (reference, other)
    ]
    if names[0] != names[1]:
        return f"files: {', '.join(sorted(names[0] ^ names[1]))}"
    for name in sorted(names[0]):
        one, two = reference / name, other / name
        if name.endswith(".ckpt"):
            leaves = flat(load(one)), flat(load(two))
            if name.endswith("previous.ckpt"):  # whole, and of the step before which the run last stopped
                continue
            if leaves[0].keys() != leaves[1].keys():
                return f"{name}: {', '.join(sorted(leaves[0].keys() ^ leaves[1].keys()))}"
            for key, value in leaves[0].items():
                same = torch.equal(value, leaves[1][key]) if isinstance(value, Tensor) else value == leaves[1][key]
                if not same:
                    return f"{name}: {key}"
        elif one.is_file() and not name.startswith("evaluation") and one.read_bytes() != two.read_bytes():
            return name
    curves = shown(reference), shown(other)
    for name in sorted(curves[0].keys() | curves[1].keys()):
        if curves[0].get(name) != curves[1].get(name):
            return f"curve or picture {name}"
    return None


def torment(kind: str, kills: int, folder: pathlib.Path, choice: random.Random) -> collections.Counter[str]:
    """Disturbs runs of a kind at least so many times, and returns how often what happened.

    Raises:
        AssertionError: if a run fails, or ends in another way than one that nothing disturbed.
    """
    reference, path = folder / f"{kind}-reference", folder / kind
    started = time.perf_counter()
    status = ended(forked(lambda: train_in(reference, kind)))
    assert status == 0, "the run that nothing disturbs fails"
    seconds = time.perf_counter() - started
    happened: collections.Counter[str] = collections.Counter()
    while True:
        way = choice.choice(WAYS) if sum(happened[each] for each in WAYS) < kills else "none"
        work = functools.partial(train_in, path, kind)
        status = ended(forked(work)) if way == "none" else disturbed(work, way, 0.7 * seconds, choice)
        if status in (-signal.SIGKILL, -signal.SIGTERM, STOPPED):
            happened[way] += 1
            happened["cut"] += cut_what_was_half_written(path, choice)
            continue
        assert status == 0, f"a continued {kind} run fails with status {status}"
        found = difference(reference, path)
        assert found is None, f"a {kind} run disturbed {dict(happened)} ends differently: {found}"
        happened["finished"] += 1
        if way == "none":
            return happened
        shutil.rmtree(path)


def main() -> None:
    """Prints how often which run was disturbed how, once every one has ended as it should."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="of each kind of run, at least; default 50")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it says what it hides of killed processes
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports what every child would import
    rows = []
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            happened = torment(kind, arguments.kills, pathlib.Path(folder), random.Random(arguments.seed))
        rows.append([kind, *(str(happened[name]) for name in (*WAYS, "cut", "finished"))])
        print(f"{kind}: {dict(happened)}", file=sys.stderr, flush=True)
    headings = ["run", "killed at a moment", "killed in a write", "asked to stop", "half-written files", "same ends"]
    print(markdown_table(headings, rows))


if __name__ == "__main__":
    main()
