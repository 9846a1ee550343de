"""Times the generation of samples by a WaveNet against recomputing its receptive field, in turns, in one run.

    python -m benchmarks.generate                              # 30 layers of 64 channels, cycles of 1, 4, 7 and 10
    python -m benchmarks.generate --cycles 10 --batch_size 8

The first table is of whole calls of `generate`, plain and compiled, with all that they prepare; recomputing is one
forward pass over the receptive field for every new sample. The second one asks whether a step costs more later in a
sequence than in its first thousand, with the steps called one by one in one thread.
"""

import argparse
import statistics

import torch
from torch import Tensor

from benchmarks.measure import Work, interleaved, markdown_table, ratio
from popgen.models.wavenet import START, CategoricalOutput, WaveNet

STEPS = 1_000  # that are compared early and late in a sequence


def random_model(num_layers: int, channels: int, cycle: int, device: str) -> WaveNet:
    """Returns a categorical one with random weights."""
    torch.manual_seed(0)
    return WaveNet(CategoricalOutput(), channels, channels, num_layers, cycle).to(device)


@torch.no_grad()
def recomputed(model: WaveNet, codes: Tensor, uniform: Tensor) -> Tensor:
    """Returns a code drawn after others by a forward pass over those that its density depends on."""
    window = codes[:, max(0, codes.shape[1] - model.receptive_field) :]
    density = model(torch.nn.functional.pad(window, (0, 1)))  # a place for the new one
    return type(density)(density.logits[:, -1]).sample(uniform)


def stepping(model: WaveNet, uniform: Tensor, before: int | None) -> Work:
    """Returns what takes a step for each row of the noise: the first ones, or those that go on after some others."""
    weights = model.step_weights()

    def start() -> tuple[Tensor, tuple]:
        return torch.full_like(uniform[0], START, dtype=torch.int64), model.initial_state(uniform.shape[1])

    def go_on(codes: Tensor, state: tuple, noise: Tensor) -> tuple[Tensor, tuple]:
        for now in noise:
            density, state = model.step(codes, state, weights=weights)
            codes = density.sample(now)
        return codes, state

    if before is None:
        return lambda: go_on(*start(), uniform)
    reached = go_on(*start(), uniform.repeat(-(-before // len(uniform)), 1)[:before])

    def later() -> tuple[Tensor, tuple]:
        nonlocal reached
        reached = go_on(*reached, uniform)
        return reached

    return later


def speed(cycle: int, arguments: argparse.Namespace) -> list[str]:
    """Returns the row of one dilation cycle."""
    device, batch = arguments.device, arguments.batch_size
    model = random_model(arguments.num_layers, arguments.channels, cycle, device)
    uniform = torch.rand(batch, arguments.samples, device=device)
    codes = torch.randint(256, (batch, model.receptive_field), device=device)
    contenders = {
        "plain": (lambda: model.generate(uniform), arguments.samples),
        "compiled": (lambda: model.generate(uniform, compiled=True), arguments.samples),
        "recomputed": (lambda: recomputed(model, codes, uniform[:, 0]), 1),
    }
    times = interleaved(contenders, arguments.rounds, torch.device(device))
    rates = [f"{batch / statistics.median(times[name]):,.0f}" for name in contenders]
    ratios = [f"{ratio(times['recomputed'], times[name]):.0f}" for name in ("plain", "compiled")]
    return [str(cycle), f"{model.receptive_field:,}", *rates, *ratios]


def positions(cycle: int, arguments: argparse.Namespace) -> list[str]:
    """Returns the row of one dilation cycle: a step early and late."""
    model = random_model(arguments.num_layers, arguments.channels, cycle, arguments.device)
    uniform = torch.rand(STEPS, arguments.batch_size, device=arguments.device)
    contenders = {
        "first": (stepping(model, uniform, None), len(uniform)),
        "later": (stepping(model, uniform, arguments.later), len(uniform)),
    }
    times = interleaved(contenders, arguments.rounds, torch.device(arguments.device))
    cells = [f"{1e6 * statistics.median(times[name]):.0f}" for name in contenders]
    return [str(cycle), *cells, f"{ratio(times['later'], times['first']):.2f}"]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_layers", type=int, default=30)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--cycles", type=int, nargs="+", default=[1, 4, 7, 10])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1_000, help="that a call generates")
    parser.add_argument("--later", type=int, default=10_000, help="steps before the later ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    unit = "samples / s"
    headings = ["cycle", "receptive field", f"{unit}, plain", f"{unit}, compiled", f"{unit}, recomputed"]
    headings += ["plain ÷ recomputed", "compiled ÷ recomputed"]
    print(markdown_table(headings, [speed(cycle, arguments) for cycle in arguments.cycles]), "\n", flush=True)
    torch.set_num_threads(1)
    headings = ["cycle", f"µs of the first {STEPS:,} steps", f"µs after {arguments.later:,}", "ratio"]
    print(markdown_table(headings, [positions(cycle, arguments) for cycle in arguments.cycles[-1:]]))


if __name__ == "__main__":
    main()
