"""Shows what the precision of matrix products does to the bound of a trained model, image by image.

    python -m benchmarks.precision experiments/vamp_hsnf --num_images 1000

The best checkpoint is evaluated at every precision that the device has, with the same noise. What training at a lower
precision does to the final bound is a matter of two runs: `--gin_bindings='Experiment.precision = "bf16"'`.
"""

import argparse
import pathlib
import time

import torch

from benchmarks.measure import markdown_table, synchronise
from popgen import config
from popgen.errors import ArgumentError
from popgen.evaluation.likelihood import estimate_log_likelihood
from popgen.evaluation.statistics import standard_error
from popgen.precision import PRECISIONS, check_precision
from popgen.prepared import prepare
from popgen.training.run_directory import RunDirectory


def available(device: torch.device) -> list[str]:
    """Returns the precisions that a device has."""
    found = []
    for precision in PRECISIONS:
        try:
            found.append(check_precision("precision", precision, device))
        except ArgumentError:
            continue
    return found


def main() -> None:
    """Prints the bound at each precision and how far single images move."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=pathlib.Path)
    parser.add_argument("--num_images", type=int, default=1_000)
    parser.add_argument("--num_samples", type=int, default=5_000)
    arguments = parser.parse_args()
    directory = RunDirectory(arguments.run_dir)
    experiment = config.load([str(directory.config_path)], []).experiment
    device = experiment.torch_device()
    trained = prepare(experiment, device).with_checkpoint(directory.load_checkpoint("best"))
    images, rows, exact = trained.data.test[: arguments.num_images], [], None
    for precision in available(device):
        synchronise(device)
        start = time.perf_counter()
        log_p_x = estimate_log_likelihood(trained.model, images, arguments.num_samples, precision=precision).double()
        synchronise(device)
        seconds = (time.perf_counter() - start) / len(images)
        exact = log_p_x if exact is None else exact
        moved = log_p_x - exact
        cells = [precision, f"{log_p_x.mean():.4f}", f"{moved.mean():+.1e} ± {standard_error(moved):.0e}"]
        rows.append([*cells, f"{moved.abs().max():.1e}", f"{seconds:.4f}"])
    headings = ["products", "log p(x), nats", "mean change", "largest change of an image", "s an image"]
    print(markdown_table(headings, rows))


if __name__ == "__main__":
    main()
