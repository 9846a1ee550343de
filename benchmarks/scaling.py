"""Steps of several processes on this machine, and of many devices on paper: python -m benchmarks.scaling.

Each process has one thread.

- scaling: strong scaling shares one batch out, weak scaling gives each process a batch; beside each time stands that
  of the same processes when they exchange nothing, which is as far as the machine goes.
- overlap: a plain loop of the same models, batches and optimizer. Its gradients are exchanged in one message after the
  backward pass, or by torch's DistributedDataParallel, in buckets while the backward pass goes on.
- paper: arithmetic. What a step takes on one device was measured, and its message has the size of the parameters;
  network and memory are assumed. Nothing is measured here, and of several devices nothing has been.
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
from torch import Tensor, nn

from benchmarks.measure import markdown_table
from benchmarks.together import results_of
from popgen.datasets.images import TrainBatches
from popgen.distributed import ALONE, Processes
from popgen.messages import packed, unpacked
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.priors import StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior
from popgen.training.objectives import NegativeELBO
from popgen.training.state import initial_state
from popgen.training.step import make_train_step

IMAGE_SIZE, NUM_IMAGES, ROUNDS = 784, 4_000, 5
DRAWN_BYTES = 18  # a pixel, that its draw reads and writes: level, random bits, and the pixel itself
PASSES = 6  # over the message in memory: to pack it, weigh it and divide it, each read and written
MODELS: dict[str, Callable[[], VAE]] = {
    "vae": lambda: VAE(GaussianEncoder(784, 40), BernoulliDecoder(40, 784), StandardNormalPrior()),
    "vamp": lambda: VAE(GaussianEncoder(784, 40), BernoulliDecoder(40, 784), VampPrior(784, 500)),
    "vamp_hsnf": lambda: VAE(
        GaussianEncoder(784, 40), BernoulliDecoder(40, 784), VampPrior(784, 500), HouseholderSylvesterFlow(40, 300)
    ),
}


TABLES = ("scaling", "overlap", "paper")
MS_ON_A_DEVICE = {"vae": 0.210, "vamp": 0.320, "vamp_hsnf": 0.608}  # a step of 100 images on an H200: docs/speed.md


class Network(NamedTuple):
    """What connects devices, by assumption.

    Attributes:
        bandwidth: bytes a second, each way, of a device.
        latency: seconds of a message.
    """

    bandwidth: float
    latency: float

    def all_reduce(self, size: int, num_bytes: float) -> float:
        """Returns the seconds in which devices sum a message, by the better of two ways that NCCL has.

        A ring takes 2 (n - 1) steps of an n-th of the message each. A pair of trees takes 2 log2(n) steps, and each
        device sends the message twice.
        """
        ring = 2 * (size - 1) * (num_bytes / size / self.bandwidth + self.latency)
        trees = 2 * math.ceil(math.log2(size)) * self.latency + 2 * num_bytes / self.bandwidth
        return min(ring, trees)


def median_seconds(work: Callable[[], Any], seconds: float, processes: Processes) -> float:
    """Returns the median seconds of some work that all processes do equally often, for as long as `seconds`."""
    for _ in range(3):
        work()
    processes.all_gather_object(None)
    times, end, going = [], time.perf_counter() + seconds, True
    while going:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
        going = len(times) % 10 > 0 or processes.all_reduce_max(end - time.perf_counter()) > 0
    return statistics.median(times)


def make_batches(batch_size: int) -> TrainBatches:
    """Returns batches of grey levels that are binarised anew."""
    return TrainBatches(torch.randint(0, 256, (NUM_IMAGES, IMAGE_SIZE), dtype=torch.uint8), batch_size, seed=0)


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
    batches = make_batches(own_size)
    step = make_train_step(model, objective, processes=processes if exchange else ALONE)
    messages = packed(list(state.parameters.values()), [], weight=0.0)

    def draw() -> torch.Tensor:
        batch = batches.draw(state.step, state.generators["binarisation"])
        objective.draw_noise(model, batch, state.generators["posterior noise"])
        return batch

    def take() -> None:
        nonlocal state
        state, _ = step(state, batches.draw(state.step, state.generators["binarisation"]))

    timed = functools.partial(median_seconds, seconds=seconds, processes=processes)
    return {
        "step": timed(take),
        "draw": timed(draw),
        "exchange": timed(lambda: processes.all_reduce(messages)) if exchange else 0.0,
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


class Loss(nn.Module):
    """The loss of a model, as DistributedDataParallel wraps it."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor, noise: Tensor) -> Tensor:
        """Returns the mean loss of a part of a batch."""
        return NegativeELBO()(self.model, batch, noise, {"beta": torch.ones(())}, {})[0]


def seconds_of_exchanges(
    name: str, batch_size: int, bucket_mb: list[float], seconds: float, processes: Processes
) -> dict[str, float]:
    """Returns the median seconds of a step of a plain loop, by how gradients are exchanged; the ways take turns.

    Args:
        name: of the model.
        batch_size: of all processes together.
        bucket_mb: sizes of DistributedDataParallel's buckets beside its default.
        seconds: how long to measure each.
        processes: of which this is one.
    """

    def contender(wrap: Callable[[Loss], nn.Module], exchange: Callable[[list[Tensor]], None]) -> Callable[[], None]:
        torch.manual_seed(0)
        loss = Loss(MODELS[name]())
        wrapped, parameters = wrap(loss), list(loss.parameters())
        optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
        batches, generator = make_batches(batch_size), torch.Generator().manual_seed(0)

        def step() -> None:
            batch = batches.draw(0, generator)
            noise = NegativeELBO().draw_noise(loss.model, batch, generator)
            optimizer.zero_grad()
            wrapped(processes.part(batch), processes.part(noise, axis=1)).backward()
            exchange(parameters)
            optimizer.step()

        return step

    def one_message(parameters: list[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        messages = packed(gradients, [], weight=1.0)
        processes.all_reduce(messages)
        for parameter, mean in zip(parameters, unpacked(messages, gradients, [])[0], strict=True):
            parameter.grad = mean

    def in_buckets(bucket_cap_mb: float | None) -> Callable[[Loss], nn.Module]:
        return functools.partial(
            nn.parallel.DistributedDataParallel,
            bucket_cap_mb=bucket_cap_mb,
            gradient_as_bucket_view=True,
        )

    ways = {
        "none": contender(lambda loss: loss, lambda parameters: None),
        "one message": contender(lambda loss: loss, one_message),
        "DDP": contender(in_buckets(None), lambda parameters: None),
        **{f"DDP, {mb:g} MB": contender(in_buckets(mb), lambda parameters: None) for mb in bucket_mb},
    }
    rounds = [
        {way: median_seconds(step, seconds / ROUNDS, processes) for way, step in ways.items()} for _ in range(ROUNDS)
    ]
    return {way: statistics.median(times[way] for times in rounds) for way in ways}


def exchanges(name: str, sizes: list[int], batch_size: int, bucket_mb: list[float], seconds: float) -> list[list[str]]:
    """Returns the rows of a model: what a step takes under each way to exchange gradients."""
    rows = []
    for size in sizes:
        work = functools.partial(seconds_of_exchanges, name, batch_size, bucket_mb, seconds)
        results = results_of(work, size)
        cells = [1e3 * statistics.median(result[way] for result in results) for way in results[0]]
        rows.append([name, str(size), str(batch_size), *(f"{cell:.3g}" for cell in cells)])
    return rows


def on_paper(
    name: str,
    seconds: float,
    num_bytes: int,
    batch_size: int,
    sizes: list[int],
    node: Network,
    net: Network,
    memory: float,
) -> list[list[str]]:
    """Returns rows of weak scaling that nobody has measured; up to eight devices are a node.

    Every device draws the whole batch, which is what does not scale, and the message has the size of the parameters.

    Args:
        name: of the model.
        seconds: of a step of one device alone, the draw of its batch included.
        num_bytes: of the parameters.
        batch_size: of one device.
        sizes: numbers of devices.
        node: what connects the devices of a node.
        net: what connects nodes.
        memory: bytes a second of a device's memory.
    """
    rows = []
    for size in sizes:
        draw = DRAWN_BYTES * IMAGE_SIZE * batch_size * (size - 1) / memory
        own = min(size, 8)  # devices of a node, of which each sends its share of the message to other nodes
        exchange = node.all_reduce(own, num_bytes) + net.all_reduce(math.ceil(size / 8), num_bytes / own)
        exchange += PASSES * num_bytes / memory if size > 1 else 0.0
        step = seconds + draw + exchange
        cells = [1e3 * cell for cell in (seconds, draw, exchange, step)]
        rows.append([name, f"{num_bytes / 1e6:.1f}", str(size), f"{size * batch_size:,}"])
        rows[-1] += [f"{cell:.3f}" for cell in cells] + [f"{size * batch_size / step:,.0f}", f"{seconds / step:.0%}"]
    return rows


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=TABLES, default=TABLES)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", nargs="*", type=int, help="numbers of processes; default 1, 2, 4, … up to the cores")
    parser.add_argument("--batch_size", type=int, default=128, help="of one process, and of all in strong scaling")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--bucket_mb", nargs="*", type=float, default=[1.0], help="of buckets, beside DDP's default")
    parser.add_argument("--devices", nargs="*", type=int, default=[1, 8, 64, 512], help="on paper")
    parser.add_argument("--device_batch", type=int, default=100, help="images of a device's step")
    parser.add_argument(
        "--device_ms", nargs="*", type=float, help="of a step of each model on one device; default an H200's"
    )
    parser.add_argument("--memory_bandwidth", type=float, default=3e12, help="bytes a second of a device's memory")
    parser.add_argument("--node_bandwidth", type=float, default=200e9, help="bytes a second within a node")
    parser.add_argument("--node_latency", type=float, default=5e-6, help="seconds within a node")
    parser.add_argument("--network_bandwidth", type=float, default=25e9, help="of a device, between nodes")
    parser.add_argument("--network_latency", type=float, default=20e-6, help="seconds between nodes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports what every child would import
    cores, names = len(os.sched_getaffinity(0)), arguments.models
    sizes = arguments.sizes or [2**power for power in range(int(math.log2(cores)) + 1)]
    if any(arguments.batch_size % size for size in sizes):
        parser.error(f"--batch_size must be a multiple of every number of processes, got {arguments.batch_size}")
    device_ms = arguments.device_ms or [MS_ON_A_DEVICE[name] for name in names]
    if len(device_ms) != len(names):
        parser.error(f"--device_ms must be {len(names)} numbers, one for each of {', '.join(names)}")
    if "scaling" in arguments.only:
        print(f"{cores} cores; one thread a process; ms a step\n", flush=True)
        headings = ["model", "scaling", "processes", "batch", "step", "of it draw", "exchange alone"]
        rows = [row for name in names for row in measured(name, sizes, arguments.batch_size, arguments.seconds)]
        print(markdown_table([*headings, "step, no exchange", "efficiency", "of the machine"], rows), flush=True)
    if "overlap" in arguments.only:
        print(f"\n{cores} cores; one thread a process; ms a step of a plain loop, by its exchange\n", flush=True)
        buckets = [f"DDP, buckets of {mb:g} MB" for mb in arguments.bucket_mb]
        headings = ["model", "processes", "batch", "no exchange", "one message afterwards", "DDP", *buckets]
        batch_size, seconds = arguments.batch_size, arguments.seconds
        several = [size for size in sizes if size > 1]
        rows = [row for name in names for row in exchanges(name, several, batch_size, arguments.bucket_mb, seconds)]
        print(markdown_table(headings, rows), flush=True)
    if "paper" in arguments.only:
        node = Network(arguments.node_bandwidth, arguments.node_latency)
        net = Network(arguments.network_bandwidth, arguments.network_latency)
        print(f"\nOn paper, not measured: {node} in a node of eight, {net} of each device between nodes; ms a step\n")
        rows = []
        for name, ms in zip(names, device_ms, strict=True):
            num_bytes = sum(parameter.nbytes for parameter in MODELS[name]().parameters())
            sizes_of_paper = arguments.device_batch, arguments.devices
            rows += on_paper(name, ms / 1e3, num_bytes, *sizes_of_paper, node, net, arguments.memory_bandwidth)
        headings = ["model", "MB", "devices", "batch", "alone", "more to draw", "exchange", "step"]
        print(markdown_table([*headings, "images a second", "efficiency"], rows))


if __name__ == "__main__":
    main()
