"""Trains a grid or random points: python -m launch.sweep --gin_file=configs/vae.gin --sweep='LATENT_DIM = [20, 40]'."""

import dataclasses
import pathlib
import sys

import torch
from absl import flags

from launch import command
from popgen.errors import PopgenError, TrainingError, check_integer
from popgen.sweeps.points import grid, parse, random_points
from popgen.sweeps.processes import Job, places, run_all, visible_devices
from popgen.sweeps.sweep import Run, SweepDirectory, check_points
from popgen.sweeps.table import check_result, rows_of, sorted_rows, table, write_csv
from popgen.training.run_directory import RunDirectory, default_root

FLAGS = flags.FLAGS
flags.DEFINE_multi_string(
    "gin_file", [], "A config file of every run; may be repeated, later files override earlier ones."
)
flags.DEFINE_multi_string("gin_bindings", [], "A binding of every run; may be repeated.")
flags.DEFINE_multi_string(
    "sweep", [], "What differs: 'Adam.lr = [1e-4, 2e-4]', range(5), uniform(0, 1), log_uniform(1e-5, 1)."
)
flags.DEFINE_string("sweep_dir", None, "Where the runs are kept; default $EXPERIMENT_DIR/<config name>_sweep.")
flags.DEFINE_integer("num_random", None, "Number of points drawn at random; by default the whole grid is run.")
flags.DEFINE_integer("seed", 0, "Random seed of the random points; that of a run is Experiment.seed.")
flags.DEFINE_integer("max_parallel", None, "Runs at a time; default one on each GPU, or one on the CPU.")
flags.DEFINE_integer("max_points", 100, "More points than these are taken for a mistake.")
flags.DEFINE_string("sort_by", "best_loss", "The result that the table is sorted by, such as log_p_x.")
flags.DEFINE_bool("table_only", False, "Print the table of what is there and train nothing.")
flags.DEFINE_bool("dry_run", False, "Check every point and list them; train nothing.")
flags.DEFINE_bool("reconfigure", False, "Continue earlier runs under a changed configuration.")


def main() -> None:
    """Trains every point that is not finished, and prints the table."""
    if not FLAGS.gin_file and not FLAGS.sweep_dir:
        raise PopgenError(
            "--gin_file and --sweep, or --sweep_dir and --table_only must be given; --help lists the options"
        )
    default_path = default_root() / f"{command.config_name(FLAGS.gin_file)}_sweep"
    sweep = SweepDirectory(pathlib.Path(FLAGS.sweep_dir) if FLAGS.sweep_dir else default_path)
    if FLAGS.table_only:
        if not sweep.list_path.is_file():
            raise PopgenError(f"there is no sweep in {str(sweep.path)!r}; --sweep_dir names what launch.sweep wrote")
        check_result(FLAGS.sort_by, list(sweep.runs().values()))
        show(sweep)
        return
    if not FLAGS.gin_file or not FLAGS.sweep:
        raise PopgenError("--gin_file and --sweep must be given; --help lists the options")
    if FLAGS.max_parallel is not None:
        check_integer("max_parallel", FLAGS.max_parallel, minimum=1)
    swept = parse(FLAGS.sweep)
    if FLAGS.num_random is None:
        points = grid(swept, FLAGS.max_points)
    else:
        points = random_points(swept, FLAGS.num_random, FLAGS.seed, FLAGS.max_points)
    runs, jobs = check_points(FLAGS.gin_file, FLAGS.gin_bindings, points, sweep, FLAGS.reconfigure)
    check_result(FLAGS.sort_by, runs)
    print(f"{len(runs)} points, {len(runs) - len(jobs)} of them finished, in {sweep.path}", flush=True)
    if FLAGS.dry_run:
        print("\n".join(run.name for run in runs))
        return
    with sweep.locked():
        train(sweep, runs, jobs)


def train(sweep: SweepDirectory, runs: list[Run], jobs: list[Job]) -> None:
    """Runs the jobs of a sweep and shows the table, also of what an interruption leaves.

    A run that another process trains, such as one that a sweep which was killed has left, is not touched.

    Raises:
        TrainingError: naming the runs that failed, or are left to others.
    """
    busy = {job.name for job in jobs if RunDirectory(sweep.path / job.name).is_in_use()}
    jobs = [job for job in jobs if job.name not in busy]
    for name in sorted(busy):
        print(f"in use    {name}: another process trains it", flush=True)
    by_name = {run.name: run for run in runs}
    failures: dict[str, str] = {}
    sweep.record(*runs)

    def started(job: Job) -> None:
        print(f"started   {job.name}; its output: {job.log}", flush=True)

    def ended(job: Job, failure: str | None) -> None:
        sweep.record(dataclasses.replace(by_name[job.name], failure=failure))
        if failure is not None:
            failures[job.name] = failure
        print(f"{'finished' if failure is None else 'failed':<9} {job.name}", flush=True)

    environments = places(visible_devices(), FLAGS.max_parallel, len(jobs), torch.get_num_threads()) if jobs else []
    print(f"follow it with: tensorboard --logdir {sweep.path}", flush=True)
    try:
        run_all(jobs, environments, started, ended)
    finally:
        show(sweep)
    if failures:
        for name, failure in failures.items():
            print(f"{name}: {failure}", file=sys.stderr)
        raise TrainingError(f"{len(failures)} of {len(runs)} runs failed; the same command tries them again")
    if busy:
        raise TrainingError(
            f"{len(busy)} of {len(runs)} runs are trained by other processes; the same command goes on with them"
        )


def show(sweep: SweepDirectory) -> None:
    """Prints the table, and writes it with every result."""
    rows = sorted_rows(rows_of(sweep), FLAGS.sort_by)
    write_csv(sweep.table_path, rows)
    print(f"\n{table(rows, FLAGS.sort_by)}\n\nwith every result: {sweep.table_path}", flush=True)


if __name__ == "__main__":
    command.start(main, required=(), again=lambda: "goes on with the runs that are not finished")
