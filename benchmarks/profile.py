"""Shows where the time of a training step or an evaluation goes, operation by operation.

python -m benchmarks.profile vae
python -m benchmarks.profile vamp_hsnf --compile --evaluation --device cuda
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import synchronise
from benchmarks.speed import CONFIGS, STEPS, project_evaluation, project_training
from popgen.precision import PRECISIONS


def main() -> None:
    """Prints the operations with the most time of their own, on the GPU where there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", choices=CONFIGS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--evaluation", action="store_true")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the networks' products in training")
    parser.add_argument("--rows", type=int, default=30)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.evaluation:
        units, unit = (8 if device.type == "cpu" else 1_280), "image of 5,000 samples"
        work = project_evaluation(arguments.config, arguments.device, arguments.compile, 5_000, units)
    else:
        units, unit = STEPS, "step"
        precision = f"Experiment.precision = '{arguments.precision}'"
        work = project_training(arguments.config, arguments.device, arguments.compile, precision)
    work()
    work()
    synchronise(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        work()
        synchronise(device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: getattr(event, name), reverse=True)
    total = sum(getattr(event, name) for event in events)
    print(f"{total / units:,.1f} us an {unit}\n" if arguments.evaluation else f"{total / units:,.1f} us a {unit}\n")
    for event in events[: arguments.rows]:
        print(f"{getattr(event, name) / units:10.1f} us {event.count / units:8.1f} x  {event.key[:80]}")


if __name__ == "__main__":
    main()
