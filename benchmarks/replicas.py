"""Times the training step of R replicas against R times the step of one run, in turns, in one run.

    python -m benchmarks.replicas                                # the three headline configs, where a GPU is, on it
    python -m benchmarks.replicas --configs vae --replicas 2 8 --bindings 'HIDDEN_DIM = 32'

A step is that of `benchmarks.speed`: batch, binarisation, loss and gradients, clipping, update, average; all is float32
and the digits are the embedded ones. Replicas pay where the last column is above 1.
"""

import argparse
import functools
import pathlib
import statistics

import torch

from benchmarks.measure import Work, in_fresh_process, interleaved, markdown_table, peak_memory, ratio
from benchmarks.speed import CONFIGS, DIGITS, MAX_GRADIENT_NORM, STEPS
from popgen import config
from popgen.replicas import initial_states_of, prepare_replicas, replicated_training
from popgen.training.loop import Hooks, train
from popgen.training.replicas import mean_metrics_of_replicas

REPLICAS = (1, 2, 4, 8, 16)


def training(name: str, device: str, bindings: tuple[str, ...], num_replicas: int | None) -> Work:
    """Returns what takes `STEPS` steps of a config; None for a plain run, which a single replica is too."""
    files, limit = [f"configs/{name}.gin"], f"Experiment.max_gradient_norm = {MAX_GRADIENT_NORM}"
    given = [DIGITS, f"Experiment.device = '{device}'", limit, *bindings]
    if num_replicas is not None:
        given.append(f"Experiment.num_replicas = {num_replicas}")
    loaded = config.load_replicas(files, given, config.load(files, given).experiment)
    experiments = [one.experiment for one in loaded]
    prepared = prepare_replicas(experiments, torch.device(device))
    hooks = Hooks(100, lambda step, means: None, 10**9, lambda state: state, 10**9, lambda state: None)
    if num_replicas is None:
        state, functions = prepared[0].initial_state(), prepared[0].training_functions()
    else:
        state, functions = initial_states_of(prepared), replicated_training(prepared)
        hooks = hooks._replace(mean=mean_metrics_of_replicas)

    def work() -> None:
        nonlocal state
        state = train(state, *functions, state.step + STEPS, hooks)

    return work


def rows(name: str, device: torch.device, bindings: tuple[str, ...], replicas: list[int], rounds: int) -> list[list]:
    """Returns the rows of the table of a config."""
    prepare_work = functools.partial(training, name, str(device), bindings)
    contenders = {"alone": (prepare_work(None), STEPS)}
    contenders |= {str(number): (prepare_work(number), STEPS) for number in replicas}
    times = interleaved(contenders, rounds, device)
    memory = {
        number: in_fresh_process(peak_memory, functools.partial(prepare_work, number)) for number in (None, *replicas)
    }
    found = [[name, "alone", f"{1e3 * statistics.median(times['alone']):.2f}", "", "", f"{memory[None]:.0f}"]]
    for number in replicas:
        took = times[str(number)]
        each, gain = 1e3 * statistics.median(took) / number, number * ratio(times["alone"], took)
        cells = [f"{1e3 * statistics.median(took):.2f}", f"{each:.2f}", f"{gain:.2f}", f"{memory[number]:.0f}"]
        found.append([name, str(number), *cells])
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="names of configs/*.gin, VAEs of binary images")
    parser.add_argument("--replicas", nargs="+", type=int, default=REPLICAS)
    parser.add_argument("--bindings", nargs="+", default=[], help="changes to every config")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contender")
    arguments = parser.parse_args()
    for name in arguments.configs:
        if not pathlib.Path(f"configs/{name}.gin").is_file():
            parser.error(f"there is no configs/{name}.gin")
    device = torch.device(arguments.device)
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, float32, batch 100\n")
    found = []
    for name in arguments.configs:
        found += rows(name, device, tuple(arguments.bindings), list(arguments.replicas), arguments.rounds)
    headings = ["config", "replicas", "ms a step", "ms for each", "R times one run / R replicas", "MiB"]
    print(markdown_table(headings, found))


if __name__ == "__main__":
    main()
