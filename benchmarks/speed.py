"""Times training steps and evaluations against the textbook formulation and the bare matrix products, in one run.

    python -m benchmarks.speed                      # the three headline configs, where a GPU is, on it
    python -m benchmarks.speed --configs vae --rounds 5 --device cpu

A step draws and binarises its batch, forms loss and gradients, clips, updates, averages the weights, and reads metrics
now and then to see that they are finite, as training does. An evaluation is the bound with 5,000 samples an image. All
is float32, on the embedded digits; with --precision, the products of the project's networks in training are not. What
counts is the ratio of two columns: both were measured in turns, in one run. The products alone stand there twice: as
PyTorch forms them, and by the library that the project chose.
"""

import argparse
import functools
import platform
import statistics

import torch

from benchmarks.measure import Work, bare_products, in_fresh_process, interleaved, markdown_table, peak_memory, ratio
from popgen import config
from popgen.datasets.images import as_values
from popgen.evaluation.likelihood import estimate_log_likelihood
from popgen.precision import PRECISIONS
from popgen.prepared import PreparedExperiment, prepare
from popgen.training.loop import Hooks, train
from tests import textbook

CONFIGS = ("vae", "vamp", "vamp_hsnf")
DIGITS = "Experiment.dataset = @popgen.datasets.stroke_digits.StrokeDigits()"
MAX_GRADIENT_NORM = 100.0
STEPS = 20  # of one call
LEARNING_RATE = 2e-4


@functools.cache
def loaded(name: str, device: str, compiled: bool, *changes: str) -> PreparedExperiment:
    """Returns a config's experiment on the embedded digits, with some changes, prepared."""
    bindings = [
        DIGITS,
        f"Experiment.device = '{device}'",
        f"Experiment.compile = {compiled}",
        f"Experiment.max_gradient_norm = {MAX_GRADIENT_NORM}",
        *changes,
    ]
    experiment = config.load([f"configs/{name}.gin"], bindings).experiment
    return prepare(experiment, torch.device(device))


def project_training(name: str, device: str, compiled: bool, *changes: str) -> Work:
    """Returns what takes `STEPS` steps of a config."""
    prepared = loaded(name, device, compiled, *changes)
    state, (step, draw_batch) = prepared.initial_state(), prepared.training_functions()
    hooks = Hooks(100, lambda step, means: None, 10**9, lambda state: state, 10**9, lambda state: None)

    def work() -> None:
        nonlocal state
        state = train(state, step, draw_batch, state.step + STEPS, hooks)

    return work


def textbook_training(name: str, device: str) -> Work:
    """Returns what takes `STEPS` textbook steps of a config."""
    prepared = loaded(name, device, False)
    plain, images = textbook.Textbook.like(prepared.model), prepared.data.train.cpu()
    trainer = textbook.TextbookTrainer(plain, images, 100, LEARNING_RATE, MAX_GRADIENT_NORM)

    def work() -> None:
        for _ in range(STEPS):
            trainer.step()

    return work


def project_evaluation(name: str, device: str, compiled: bool, num_samples: int, num_images: int) -> Work:
    """Returns what evaluates some test images."""
    prepared = loaded(name, device, compiled)
    images = prepared.data.test[:num_images]
    return lambda: estimate_log_likelihood(prepared.model, images, num_samples, compiled=compiled)


def textbook_evaluation(name: str, device: str, num_samples: int) -> Work:
    """Returns what evaluates one test image in the textbook's way."""
    prepared = loaded(name, device, False)
    plain, images = textbook.Textbook.like(prepared.model), as_values(prepared.data.test[:1])
    return lambda: textbook.iwae(plain, images, num_samples)


def compare_training(name: str, device: torch.device, rounds: int, with_compile: bool, precision: str) -> list[str]:
    """Returns a row of the table of training steps, times in ms."""
    place, setting = str(device), f"Experiment.precision = '{precision}'"
    plain = project_training(name, place, False, setting)
    products, flops = bare_products(one_step(name, place), device)
    by_torch, _ = bare_products(one_step(name, place), device, by_torch=True)
    contenders: dict[str, tuple[Work, int]] = {"products by torch": (by_torch, 1)}
    contenders |= {"textbook": (textbook_training(name, place), STEPS), "plain": (plain, STEPS)}
    if with_compile:
        contenders["compiled"] = (project_training(name, place, True, setting), STEPS)
    contenders["products"] = (products, 1)
    times = interleaved(contenders, rounds, device)
    memory = [
        in_fresh_process(peak_memory, functools.partial(project_training, name, place, False, setting)),
        in_fresh_process(peak_memory, functools.partial(textbook_training, name, place)),
    ]
    return row(name, times, 1e3, flops, memory)


def one_step(name: str, device: str) -> Work:
    """Returns what takes one plain step: no graph, no compiler, so that its operations can be seen."""
    prepared = loaded(name, device, False, "Experiment.cuda_graph = False")
    state, (step, draw_batch) = prepared.initial_state(), prepared.training_functions()
    return lambda: step(state, draw_batch(0, state.generators["binarisation"]))


def compare_evaluation(name: str, device: torch.device, rounds: int, with_compile: bool, num_samples: int) -> list[str]:
    """Returns a row of the table of evaluations, times in s an image."""
    place = str(device)
    num_images = 80 if device.type == "cpu" else 1_280
    plain = project_evaluation(name, place, False, num_samples, num_images)
    products, flops = bare_products(plain, device)
    by_torch, _ = bare_products(plain, device, by_torch=True)
    contenders: dict[str, tuple[Work, int]] = {"products by torch": (by_torch, num_images)}
    contenders |= {"textbook": (textbook_evaluation(name, place, num_samples), 1), "plain": (plain, num_images)}
    if with_compile:
        contenders["compiled"] = (project_evaluation(name, place, True, num_samples, num_images), num_images)
    contenders["products"] = (products, num_images)
    times = interleaved(contenders, rounds, device)
    memory = [
        in_fresh_process(
            peak_memory, functools.partial(project_evaluation, name, place, False, num_samples, num_images)
        ),
        in_fresh_process(peak_memory, functools.partial(textbook_evaluation, name, place, num_samples)),
    ]
    return row(name, times, 1.0, flops / num_images, memory)


def row(name: str, times: dict[str, list[float]], scale: float, flops: float, memory: list[float]) -> list[str]:
    """Returns the cells: times, the ratios, GFLOP/s of the products alone, MiB of the project and the textbook."""
    fastest = times.get("compiled", times["plain"])
    cells = [name]
    for contender in ("textbook", "plain", "compiled", "products by torch", "products"):
        cells.append(f"{scale * statistics.median(times[contender]):.3g}" if contender in times else "-")
    cells += [f"{ratio(times['textbook'], times['plain']):.1f}", f"{ratio(times['textbook'], fastest):.1f}"]
    for products in ("products by torch", "products"):
        cells.append(f"{ratio(fastest, times[products]):.2f}")
    cells.append(f"{flops / statistics.median(times['products']) / 1e9:.0f}")
    return cells + [f"{memory[0]:.0f}", f"{memory[1]:.0f}"]


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=CONFIGS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--rounds", type=int, default=10, help="turns of each contender in training; a third in evaluation"
    )
    parser.add_argument("--num_samples", type=int, default=5_000)
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--only", choices=("training", "evaluation"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    on_cpu = platform.processor() or platform.machine()
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    print(f"torch {torch.__version__}, {processor}, {torch.get_num_threads()} threads, {arguments.precision}\n")
    columns = ["config", "textbook", "plain", "compiled", "products by torch.mm", "products as here"]
    columns += ["textbook / plain", "textbook / compiled", "compiled / products by torch.mm", "compiled / as here"]
    columns += ["products GFLOP/s", "MiB", "MiB of textbook"]
    if arguments.only != "evaluation":
        settings = (not arguments.no_compile, arguments.precision)
        rows = [compare_training(name, device, arguments.rounds, *settings) for name in arguments.configs]
        print(f"ms a training step, batch 100\n\n{markdown_table(columns, rows)}\n", flush=True)
    if arguments.only != "training":
        rounds = max(2, arguments.rounds // 3)
        rows = [
            compare_evaluation(name, device, rounds, not arguments.no_compile, arguments.num_samples)
            for name in arguments.configs
        ]
        print(
            f"s an image, bound with {arguments.num_samples:,} samples\n\n{markdown_table(columns, rows)}\n", flush=True
        )


if __name__ == "__main__":
    main()
