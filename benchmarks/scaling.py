"""Steps of several processes on this machine, and of many devices on paper: python -m benchmarks.scaling.

Each process has one thread. Strong scaling shares one batch out, weak scaling gives each process a batch; beside each
time stands that of the same processes when they exchange nothing, which is as far as the machine goes. The second
table is arithmetic: the step of one process and the draw of its batch as measured, divided by an assumed speed of a
device, and an assumed network for the message. Nothing in it was measured on a GPU or a network.
"""

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.measure import markdown_table
from benchmarks.together import results_of
from popgen.datasets.images import TrainBatches
from popgen.distributed import ALONE, Processes
from popgen.messages import packed
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.priors import StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior
from popgen.training.objectives import NegativeELBO
from popgen.training.state import initial_state
from popgen.training.step import make_train_step

IMAGE_SIZE, NUM_IMAGES = 784, 4_000
MODELS: dict[str, Callable[[], VAE]] = {
    "vae": lambda: VAE(GaussianEncoder(784, 40), BernoulliDecoder(40, 784), StandardNormalPrior()),
    "vamp_hsnf": lambda: VAE(
        GaussianEncoder(784, 40), BernoulliDecoder(40, 784), VampPrior(784, 500), HouseholderSylvesterFlow(40, 300)
    ),
}


class Network(NamedTuple):
    """What connects devices, by assumption.

    Attributes:
        bandwidth: bytes a second, each way, of a device.
        latency: seconds of a message.
    """

    bandwidth: float
    latency: float

    def all_reduce(self, size: int, num_bytes: float) -> float:
        """Returns the seconds in which a ring of devices sums a message: 2 (n - 1) steps of an n-th of it each."""
        return 2 * (size - 1) * (num_bytes / size / self.bandwidth + self.latency)


def seconds_of_steps(name: str, batch_size: int, exchange: bool, seconds: float, processes: Processes) -> dict:
    """Returns the median seconds of a step, of the draw of its batch and noise, and of the exchange alone.

    Args:
        name: of the model.
        batch_size: of all processes together.
        exchange: whether they train one model, or each its own with its part of the batch.
        seconds: how long to measure.
        processes: of which this is one.
    """
    torch.manual_seed(0)
    model, objective = MODELS[name](), NegativeELBO()
    state = initial_state(model, functools.partial(torch.optim.Adam, lr=1e-3, fused=True), seed=0)
    own_size = batch_size if exchange else batch_size // processes.size
    levels = torch.randint(0, 256, (NUM_IMAGES, IMAGE_SIZE), dtype=torch.uint8)
    batches = TrainBatches(levels, own_size, seed=0)
    step = make_train_step(model, objective, processes=processes if exchange else ALONE)
    messages = packed(list(state.parameters.values()), [], weight=0.0)

    def draw() -> torch.Tensor:
        batch = batches.draw(state.step, state.generators["binarisation"])
        objective.draw_noise(model, batch, state.generators["posterior noise"])
        return batch

    def take() -> None:
        nonlocal state
        state, _ = step(state, batches.draw(state.step, state.generators["binarisation"]))

    def timed(work: Callable[[], Any]) -> float:
        for _ in range(3):
            work()
        processes.gather(None)
        times, end, going = [], time.perf_counter() + seconds, True
        while going:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
            going = len(times) % 10 > 0 or processes.largest(end - time.perf_counter()) > 0
        return statistics.median(times)

    return {
        "step": timed(take),
        "draw": timed(draw),
        "exchange": timed(lambda: processes.add_up(messages)) if exchange else 0.0,
        "bytes": 4 * sum(p.numel() for p in state.parameters.values()),
    }


def measured(name: str, sizes: list[int], batch_size: int, seconds: float) -> list[list[str]]:
    """Returns the rows of strong and weak scaling of a model."""
    rows = []
    for kind in ("strong", "weak"):
        alone = 0.0
        for size in sizes:
            total = batch_size * (size if kind == "weak" else 1)
            together, apart = (
                {
                    key: statistics.median(result[key] for result in results)
                    for results in [
                        results_of(functools.partial(seconds_of_steps, name, total, exchange, seconds), size)
                    ]
                    for key in results[0]
                }
                for exchange in (True, False)
            )
            alone = alone or together["step"]
            efficiency = alone / together["step"] / (1 if kind == "weak" else size)
            limit = alone / apart["step"] / (1 if kind == "weak" else size)
            cells = [1e3 * together[key] for key in ("step", "draw", "exchange")] + [1e3 * apart["step"]]
            rows.append(
                [name, kind, str(size), str(total), *(f"{cell:.3g}" for cell in cells)]
                + [f"{efficiency:.0%}", f"{limit:.0%}"]
            )
    return rows


def on_paper(
    name: str,
    one: dict[str, float],
    batch_size: int,
    sizes: list[int],
    speeds: list[float],
    node: Network,
    net: Network,
) -> list[list[str]]:
    """Returns rows of weak scaling that nobody has measured; up to eight devices are a node.

    Every device draws the whole batch, which is what does not scale.
    """
    rows = []
    for speed in speeds:
        own = (one["step"] - one["draw"]) / speed
        for size in sizes:
            draw = one["draw"] * size / speed
            exchange = node.all_reduce(min(size, 8), one["bytes"])
            if size > 8:
                exchange += net.all_reduce(math.ceil(size / 8), one["bytes"])
            step = own + draw + exchange
            cells = [1e3 * cell for cell in (step, own, draw, exchange)]
            efficiency = (own + one["draw"] / speed) / step
            rows.append([name, f"{speed:g}", str(size), str(size * batch_size)] + [f"{cell:.3g}" for cell in cells])
            rows[-1] += [f"{size * batch_size / step:,.0f}", f"{efficiency:.0%}"]
    return rows


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", nargs="*", type=int, help="numbers of processes; default 1, 2, 4, … up to the cores")
    parser.add_argument("--batch_size", type=int, default=128, help="of one process, and of all in strong scaling")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--devices", nargs="*", type=int, default=[1, 8, 64, 512], help="on paper")
    parser.add_argument(
        "--speeds", nargs="*", type=float, default=[1, 100], help="of a device, in cores of this machine"
    )
    parser.add_argument("--node_bandwidth", type=float, default=200e9, help="bytes a second within a node")
    parser.add_argument("--node_latency", type=float, default=5e-6, help="seconds within a node")
    parser.add_argument("--network_bandwidth", type=float, default=25e9, help="bytes a second between nodes")
    parser.add_argument("--network_latency", type=float, default=20e-6, help="seconds between nodes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports what every child would import
    cores = len(os.sched_getaffinity(0))
    sizes = arguments.sizes or [2**power for power in range(int(math.log2(cores)) + 1)]
    if any(arguments.batch_size % size for size in sizes):
        parser.error(f"--batch_size must be a multiple of every number of processes, got {arguments.batch_size}")
    print(f"{cores} cores; one thread a process; ms a step\n", flush=True)
    headings = ["model", "scaling", "processes", "batch", "step", "of it draw", "exchange alone", "step, no exchange"]
    rows = [row for name in arguments.models for row in measured(name, sizes, arguments.batch_size, arguments.seconds)]
    print(markdown_table([*headings, "efficiency", "of the machine"], rows), flush=True)
    node = Network(arguments.node_bandwidth, arguments.node_latency)
    net = Network(arguments.network_bandwidth, arguments.network_latency)
    print(f"\nOn paper, not measured: {node} in a node of eight, {net} between nodes; ms a step\n")
    rows = []
    for name in arguments.models:
        one = seconds_of_steps(name, arguments.batch_size, True, arguments.seconds, ALONE)
        rows += on_paper(name, one, arguments.batch_size, arguments.devices, arguments.speeds, node, net)
    headings = ["model", "speed", "devices", "batch", "step", "own work", "draw", "exchange", "examples a second"]
    print(markdown_table([*headings, "efficiency"], rows))


if __name__ == "__main__":
    main()
