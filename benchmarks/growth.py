"""Shows how time, memory and arithmetic grow with every size of the model, of a batch and of an evaluation.

    python -m benchmarks.growth                # every table
    python -m benchmarks.growth "batch size"   # one of them

Each row is a fresh process: the median time of some calls, the memory that the work adds to the process at its highest
(weights and data included), the parameters, and the floating-point operations of all matrix products. The last columns
are relative to the table's first row. A step also passes over all parameters, to clip, update and average them: where
time grows no faster than the operations or the parameters do, nothing but the formula makes it grow.
"""

import argparse
import functools
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import in_fresh_process, markdown_table, prepared, synchronise
from benchmarks.speed import STEPS, loaded, project_evaluation, project_training

MIXTURE = ("VAE.prior = @popgen.nn.priors.GaussianMixturePrior()", "GaussianMixturePrior.latent_dim = 40")
# What grows: the config, its bindings and the values. A table without bindings is of evaluations.
TABLES = {
    "batch size": ("vamp_hsnf", ("Experiment.batch_size = {}",), (50, 100, 200, 400, 800)),
    "latent dimension L": ("vamp_hsnf", ("LATENT_DIM = {}",), (20, 40, 80, 160)),
    "flows K": ("vamp_hsnf", ("HouseholderSylvesterFlow.num_flows = {}",), (1, 2, 4, 8, 16)),
    "reflections H": ("vamp_hsnf", ("HouseholderSylvesterFlow.num_reflections = {}",), (1, 4, 8, 16, 32)),
    "pseudo-inputs": ("vamp", ("VampPrior.num_components = {}",), (250, 500, 1_000, 2_000)),
    "mixture components": ("vae", (*MIXTURE, "GaussianMixturePrior.num_components = {}"), (100, 1_000, 10_000)),
    "importance samples": ("vamp_hsnf", (), (500, 1_000, 5_000, 20_000, 80_000)),
}
IMAGES = 8  # of an evaluation
CALLS = 5


def measured(config: str, device: str, changes: tuple[str, ...], num_samples: int | None) -> list[float]:
    """Returns the seconds of a step, or of an image where `num_samples` is given, and MiB, parameters and FLOPs.

    To be called in a fresh process. The FLOPs are those of the matrix products.
    """
    if num_samples is None:
        units, prepare = STEPS, functools.partial(project_training, config, device, False, *changes)
    else:
        units, prepare = IMAGES, functools.partial(project_evaluation, config, device, False, num_samples, IMAGES)
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
    parameters = sum(p.numel() for p in loaded(config, device, False, *changes)[2].parameters())
    return [statistics.median(times), memory, parameters, counter.get_total_flops() / units]


def rows(config: str, device: str, changes: tuple[str, ...], values: tuple[int, ...]) -> list[list[str]]:
    """Returns the rows of one table."""
    lines, first = [], None
    for value in values:
        bound = tuple(change.format(value) for change in changes)
        found = in_fresh_process(measured, config, device, bound, None if changes else value)
        first = first or found
        seconds, memory, parameters, flops = found
        cells = [f"{value:,}", f"{1e3 * seconds:.1f}", f"{memory:.0f}", f"{parameters / 1e6:.2f}", f"{flops / 1e9:.2f}"]
        lines.append([*cells, *(f"{found[i] / first[i]:.2f}" for i in (0, 2, 3))])
    return lines


def main() -> None:
    """Prints the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"some of: {', '.join(TABLES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.tables if name not in TABLES]
    if unknown:
        parser.error(f"no table {unknown[0]!r}: choose from {', '.join(TABLES)}")
    for name in arguments.tables or TABLES:
        config, changes, values = TABLES[name]
        unit = f"ms a step of {config}" if changes else f"ms an image of {config}"
        headings = [name, unit, "MiB", "million parameters", "GFLOP", "time ×", "parameters ×", "GFLOP ×"]
        print(markdown_table(headings, rows(config, arguments.device, changes, values)), "\n", flush=True)


if __name__ == "__main__":
    main()
