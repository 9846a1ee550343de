"""Times the nearest-code look-up against its matrix product and argmin alone, in turns, in one run.

    python -m benchmarks.quantise                                   # 1e6 vectors of 64 against 1,024 codes
    python -m benchmarks.quantise --num_vectors 100_000 --num_codes 128

The yardstick forms the same products chunk by chunk into one buffer and takes the argmin of each, without the norms
that make the answer right. Memory is what the look-up adds to a fresh process at its highest.
"""

import argparse
import functools
import statistics

import torch
from torch import Tensor

from benchmarks.measure import Work, in_fresh_process, interleaved, markdown_table, peak_memory, ratio
from popgen.nn.codebook import PAIRS_IN_FLIGHT, nearest_codes


def vectors_and_codes(num_vectors: int, dim: int, num_codes: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns random ones."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    return draw(num_vectors, dim), draw(num_codes, dim)


def look_up(*sizes: int, device: str) -> Work:
    """Returns what looks all vectors up."""
    vectors, codes = vectors_and_codes(*sizes, device)
    return lambda: nearest_codes(vectors, codes)


def product_and_argmin(*sizes: int, device: str) -> Work:
    """Returns what forms the products alone, and their argmin."""
    vectors, codes = vectors_and_codes(*sizes, device)
    rows = PAIRS_IN_FLIGHT[torch.device(device).type] // len(codes)
    buffer = torch.empty(rows, len(codes), device=device)

    def work() -> None:
        for chunk in vectors.split(rows):
            torch.mm(chunk, codes.T, out=buffer[: len(chunk)]).argmin(1)

    return work


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--num_codes", type=int, default=1_024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    sizes, device = (arguments.num_vectors, arguments.dim, arguments.num_codes), arguments.device
    contenders = {
        "look-up": (look_up(*sizes, device=device), 1),
        "alone": (product_and_argmin(*sizes, device=device), 1),
    }
    times = interleaved(contenders, arguments.rounds, torch.device(device))
    memory = in_fresh_process(peak_memory, functools.partial(look_up, *sizes, device=device))
    cells = [f"{size:,}" for size in sizes]
    cells += [f"{statistics.median(times[name]):.3g}" for name in contenders]
    cells += [
        f"{ratio(times['look-up'], times['alone']):.2f}",
        f"{memory:.0f}",
        f"{4 * sizes[0] * sizes[1] / 2**20:.0f}",
    ]
    headings = ["vectors", "dim", "codes", "s", "s of product and argmin", "ratio", "MiB", "MiB of the vectors"]
    print(markdown_table(headings, [cells]))


if __name__ == "__main__":
    main()
