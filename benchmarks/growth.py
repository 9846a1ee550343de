"""Shows how time, memory and arithmetic grow with every size of the model, of a batch and of an evaluation.

    python -m benchmarks.growth                # every table
    python -m benchmarks.growth "batch size"   # one of them

Each row is a fresh process: the median time of some calls, the memory that the work adds to the process at its highest,
weights and data included, and the floating-point operations of all matrix products. The last two columns are relative
to the table's first row: where time grows no faster than the operations, nothing but the formula makes it grow.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Work, in_fresh_process, prepared, synchronise, table
from benchmarks.speed import STEPS, project_evaluation, project_training

MIXTURE = ("VAE.prior = @popgen.nn.priors.GaussianMixturePrior()", "GaussianMixturePrior.latent_dim = 40")
# What grows: the config, its bindings and the values.
TRAINING = {
    "batch size": ("vamp_hsnf", ("Experiment.batch_size = {}",), (50, 100, 200, 400, 800)),
    "latent dimension L": ("vamp_hsnf", ("LATENT_DIM = {}",), (20, 40, 80, 160)),
    "flows K": ("vamp_hsnf", ("HouseholderSylvesterFlow.num_flows = {}",), (1, 2, 4, 8, 16)),
    "reflections H": ("vamp_hsnf", ("HouseholderSylvesterFlow.num_reflections = {}",), (1, 4, 8, 16, 32)),
    "pseudo-inputs": ("vamp", ("VampPrior.num_components = {}",), (250, 500, 1_000, 2_000)),
    "mixture components": ("vae", (*MIXTURE, "GaussianMixturePrior.num_components = {}"), (100, 1_000, 10_000)),
}
IMPORTANCE_SAMPLES = (500, 1_000, 5_000, 20_000, 80_000)
CALLS = 6


def training(config: str, device: str, changes: tuple[str, ...]) -> Work:
    """Returns what takes `STEPS` steps of a changed config."""
    return project_training(config, device, False, *changes)


def measured(prepare: Callable[[], Work], units: int, device: str) -> tuple[float, float, float]:
    """Returns the seconds of a unit of work, its MiB and the FLOPs of its matrix products; for a fresh process."""
    (work, peak), times = prepared(prepare), []
    for _ in range(CALLS):
        synchronise(torch.device(device))
        start = time.perf_counter()
        work()
        synchronise(torch.device(device))
        times.append((time.perf_counter() - start) / units)
    memory = peak()
    with FlopCounterMode(display=False) as counter:
        work()
    return statistics.median(times), memory, counter.get_total_flops() / units


def rows_of(values: tuple[int, ...], works: list[Callable[[], Work]], units: int, device: str) -> list[list[str]]:
    """Returns the rows of one table."""
    rows, first = [], None
    for value, work in zip(values, works, strict=True):
        seconds, memory, flops = in_fresh_process(measured, work, units, device)
        first = first or (seconds, flops)
        row = [f"{value:,}", f"{1e3 * seconds:.1f}", f"{memory:.0f}", f"{flops / 1e9:.2f}"]
        rows.append([*row, f"{seconds / first[0]:.2f}", f"{flops / first[1]:.2f}"])
    return rows


def main() -> None:
    """Prints the tables that were asked for."""
    names = (*TRAINING, "importance samples")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[[], *names], default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for name in arguments.tables or names:
        if name in TRAINING:
            config, changes, values = TRAINING[name]
            prepare = [
                functools.partial(training, config, arguments.device, tuple(c.format(value) for c in changes))
                for value in values
            ]
            unit, rows = f"ms a step of {config}", rows_of(values, prepare, STEPS, arguments.device)
        else:
            values = IMPORTANCE_SAMPLES
            prepare = [
                functools.partial(project_evaluation, "vamp_hsnf", arguments.device, False, value, 4)
                for value in values
            ]
            unit, rows = "ms an image of vamp_hsnf", rows_of(values, prepare, 4, arguments.device)
        print(table([name, unit, "MiB", "GFLOP", "time / first", "GFLOP / first"], rows), "\n", flush=True)


if __name__ == "__main__":
    main()
