"""The commands, as a user runs them: `python -m launch.…` in processes of their own, see `tests.commands`."""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from filelock import FileLock
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.together import free_port
from popgen.training import checkpoints
from tests.commands import REPOSITORY, run_module

PARTS = """
import dataclasses, torch
from popgen.datasets.images import ImageData

@dataclasses.dataclass(frozen=True)
class Squares:
    largest: float = 1.0

    def load(self):
        grey = torch.zeros(200, 28, 28, dtype=torch.uint8)
        for i in range(200):
            grey[i, i % 14 : i % 14 + 10, 4:20] = 255
        values = self.largest * grey.flatten(1).float() / 255
        return ImageData(values[:100], values[100:], (28, 28), "squares")
"""
CONFIG = """
from __gin__ import dynamic_registration
import own_parts
from popgen import experiment
from popgen.models import vae
include "configs/{base}.gin"
experiment.Experiment.dataset = @own_parts.Squares()
experiment.Experiment.num_steps = 4
experiment.Experiment.batch_size = 10
experiment.Experiment.eval_every = 2
experiment.Experiment.log_every = 1
experiment.Experiment.final_num_samples = 0
"""


class Workspace:
    """A directory with a dataset of one's own and a config that names it, and a way to run commands there."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        (path / "own_parts.py").write_text(PARTS)
        for base in ("vae", "vamp_hsnf"):
            (path / f"{base}_squares.gin").write_text(CONFIG.format(base=base))

    def run(self, command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        if command in ("evaluate", "sample"):
            arguments = (*arguments, "--trust_config")  # the dataset is of these tests' own module
        path = os.pathsep.join((str(REPOSITORY), str(self.path)))
        inherited = {name: value for name, value in os.environ.items() if name not in ("EXPERIMENT_DIR", "POPGEN_DATA")}
        variables = {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
        return run_module(f"launch.{command}", arguments, self.path, variables)

    def succeed(self, command: str, *arguments: str, **environment: str) -> str:
        done = self.run(command, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr and "it/s" not in done.stderr, done.stderr  # quiet without a terminal
        return done.stdout

    def fail(self, command: str, *arguments: str, **environment: str) -> str:
        """Runs a command that must fail with one line on standard error, and returns that line."""
        done = self.run(command, *arguments, **environment)
        assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace with a trained run of the headline model in `run`; tests do not change it."""
    workspace = Workspace(tmp_path_factory.mktemp("trained"))
    workspace.printed = workspace.succeed("train", "--gin_file=vamp_hsnf_squares.gin", "--run_dir=run")
    return workspace


def test_train_leaves_what_it_says(trained):
    run = trained.path / "run"
    assert "tensorboard --logdir run" in trained.printed and "launch.evaluate --run_dir=run" in trained.printed
    for name in ("config.gin", "operative_config.gin", "checkpoints/latest.ckpt", "checkpoints/best.ckpt"):
        assert (run / name).is_file(), name
    assert "SigmoidAnnealing.maximum = 1.0" in (run / "operative_config.gin").read_text()  # a default
    with Image.open(run / "samples" / "best.png") as picture:
        assert min(picture.size) > 500
    state = torch.load(run / "checkpoints" / "latest.ckpt", weights_only=True)
    assert state["step"] == 4
    events = EventAccumulator(str(run))
    events.Reload()
    assert {event.step for event in events.Scalars("train/loss")} == {1, 2, 3, 4}
    assert {event.step for event in events.Scalars("test/loss")} == {2, 4}


def test_evaluate_prints_logs_and_writes_the_record(trained):
    printed = trained.succeed("evaluate", "--run_dir=run", "--num_samples=20", "--num_examples=30")
    (path,) = (trained.path / "run").glob("evaluation_*20x30.json")
    record = json.loads(path.read_text())
    assert record["num_samples"] == 20 and record["num_examples"] == 30 and record["step"] in (2, 4)
    assert record["elbo"] <= record["log_p_x"] < 0 < record["log_p_x_standard_error"]
    assert record["binarisation_protocol"] == "squares"
    assert f"{record['log_p_x']:.3f}" in printed
    events = EventAccumulator(str(trained.path / "run"))
    events.Reload()
    assert events.Scalars("evaluation/log_p_x")[-1].value == pytest.approx(record["log_p_x"], rel=1e-6)


def test_evaluate_checks_itself_by_annealing(trained):
    arguments = (
        "--num_samples=20",
        "--num_examples=7",
        "--annealed_images=5",
        "--num_temperatures=4",
        "--num_chains=2",
    )
    printed = trained.succeed("evaluate", "--run_dir=run", *arguments)
    (path,) = (trained.path / "run").glob("evaluation_*20x7.json")
    record = json.loads(path.read_text())
    assert record["annealed_num_images"] == 5 and record["simulated_lower"] < record["simulated_upper"]
    assert f"{record['annealed_log_p_x']:.3f}" in printed and "simulated images" in printed
    trained.succeed("evaluate", "--run_dir=run", *arguments[:2])
    assert json.loads(path.read_text())["simulated_gap"] == record["simulated_gap"], "the check is kept"
    assert "annealed_images must be" in trained.fail("evaluate", "--run_dir=run", "--annealed_images=-1")
    before = set((trained.path / "run").iterdir())
    too_few = ("--num_samples=20", "--num_examples=8", "--annealed_images=2", "--num_chains=0")
    assert "num_chains must be" in trained.fail("evaluate", "--run_dir=run", *too_few)
    assert set((trained.path / "run").iterdir()) == before, "before anything is estimated"


def test_a_check_of_one_image_is_kept_and_has_no_error(trained):
    arguments = ("evaluate", "--run_dir=run", "--num_samples=20", "--num_examples=3")
    check = ("--annealed_images=1", "--num_temperatures=4", "--num_chains=2")
    first, again = trained.succeed(*arguments, *check), trained.succeed(*arguments)
    assert "± nan" in first and first.splitlines()[-2:] == again.splitlines()[-2:]


def test_an_evaluation_at_another_precision_is_another_record(trained):
    arguments = ("evaluate", "--run_dir=run", "--num_samples=20", "--num_examples=9")
    trained.succeed(*arguments)
    (path,) = (trained.path / "run").glob("evaluation_*20x9.json")
    before = path.read_bytes()
    trained.succeed(*arguments, "--precision=bf16")
    assert path.read_bytes() == before
    (other,) = (trained.path / "run").glob("evaluation_*20x9_bf16.json")
    assert json.loads(other.read_text())["precision"] == "bf16"
    events = EventAccumulator(str(trained.path / "run"))
    events.Reload()
    assert len(events.Scalars("evaluation_bf16/log_p_x")) == 1


def test_a_diverged_checkpoint_has_a_record_too(trained):
    """Log p(x) of which is not a number, nor has it a histogram."""
    shutil.copytree(trained.path / "run", trained.path / "diverged")
    path = trained.path / "diverged/checkpoints/best.ckpt"
    tensors = checkpoints.load(path)
    name = next(iter(tensors["parameters"]))
    tensors["parameters"][name].fill_(float("nan"))
    checkpoints.save(path, tensors)
    trained.succeed("evaluate", "--run_dir=diverged", "--num_samples=30", "--num_examples=5")
    (path,) = (trained.path / "diverged").glob("evaluation_*30x5.json")
    assert json.loads(path.read_text())["log_p_x"] is None


def test_shards_of_an_evaluation_make_one_record(trained):
    """All 14 images belong to the first shard, and the second one waits for it; both have a part of the check."""
    arguments = ("evaluate", "--run_dir=run", "--num_samples=6", "--num_examples=14")
    arguments += ("--annealed_images=12", "--num_temperatures=3", "--num_chains=2")
    assert "shard 2/2 is finished, and 10 of 12 images" in trained.succeed(*arguments, "--shard=2/2")
    assert not list((trained.path / "run").glob("evaluation_*6x14.json"))
    trained.succeed(*arguments, "--shard=1/2")
    (path,) = (trained.path / "run").glob("evaluation_*6x14.json")
    record = json.loads(path.read_text())
    assert record["command"].startswith("python -m launch.evaluate --run_dir=run --num_samples=6")
    table = path.with_name(f"{path.stem}_images.csv").read_text().splitlines()
    assert len(table) == 2 + 14 and table[1].startswith("image,log_p_x,")
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 1_000
    for file in (trained.path / "run").glob("evaluation_*6x14*"):
        file.unlink()
    trained.succeed(*arguments)
    alone = json.loads(path.read_text())
    results = [name for name in alone if "log_p_x" in name or name.startswith(("annealed_", "simulated_"))]
    assert {name: alone[name] for name in results} == {name: record[name] for name in results} and len(results) > 12
    assert "shard must be a part" in trained.fail(*arguments, "--shard=3/2")


def test_processes_are_asked_for_the_same_evaluation(trained):
    """Else all end before any work, with one line that says what differs."""
    before = set((trained.path / "run").iterdir())
    arguments = ("evaluate", "--run_dir=run", "--num_examples=10")
    own = (("--num_samples=20",), ("--num_samples=50", "--weights=averaged", "--num_chains=3"))
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with concurrent.futures.ThreadPoolExecutor() as threads:
        ended = [
            threads.submit(trained.run, *arguments, *options, RANK=str(rank), **together)
            for rank, options in enumerate(own)
        ]
    assert [done.result().returncode for done in ended] == [1, 1]
    assert "".join(done.result().stderr for done in ended) == (
        "error: process 1 was asked for something else than process 0 "
        "(--weights: raw -> averaged; --num_samples: 20 -> 50; --num_chains: 16 -> 3)\n"
    )
    assert set((trained.path / "run").iterdir()) == before


def test_evaluate_by_checkpoint_and_averaged_weights(trained):
    records = []
    for arguments in (["--checkpoint=latest"], ["--checkpoint=latest", "--weights=averaged"]):
        trained.succeed("evaluate", "--run_dir=run", "--num_samples=5", "--num_examples=8", *arguments)
        name = f"evaluation_step00000004_{'averaged' if len(arguments) == 2 else 'raw'}_5x8.json"
        records.append(json.loads((trained.path / "run" / name).read_text()))
    assert [record["weights"] for record in records] == ["raw", "averaged"]
    assert records[0]["log_p_x"] != records[1]["log_p_x"]
    line = trained.fail("evaluate", "--run_dir=run", "--checkpoint=3")
    assert "no checkpoint '3'" in line and "latest" in line and "best" in line


def test_sample_writes_one_picture(trained):
    trained.succeed("sample", "--run_dir=run", "--out=grid.png", "--num_samples=16")
    with Image.open(trained.path / "grid.png") as picture:
        assert picture.mode == "L" and len(picture.getcolors(256)) > 10
    first = (trained.path / "grid.png").read_bytes()
    trained.succeed("sample", "--run_dir=run", "--out=grid.png", "--num_samples=16", f"--seed={2**64}")
    assert (trained.path / "grid.png").read_bytes() != first, "a seed may be as large as Experiment.seed"
    assert "seed must be an integer of at" in trained.fail("sample", "--run_dir=run", "--out=a.png", "--seed=-1")
    assert "no folder" in trained.fail("sample", "--run_dir=run", "--out=nowhere/grid.png")
    assert "name of a PNG, such as samples.png" in trained.fail("sample", "--run_dir=run", "--out=grid.jpg")


def test_a_dry_run_imports_no_more_than_it_needs():
    """Of what a run needs later, or never: every one of these costs a start-up a good part of a second."""
    program = (
        "import runpy, sys\n"
        "sys.argv = ['train', '--gin_file=configs/vamp_hsnf.gin', '--dry_run']\n"
        "try:\n    runpy.run_module('launch.train', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = set(re.findall(r"'(\w+)'", done.stderr.splitlines()[-1]))
    assert {"torch", "gin"} <= loaded
    assert not loaded & {"torchvision", "matplotlib", "tensorboard", "PIL", "scipy", "sklearn", "soundfile", "soxr"}


def test_dry_run_prints_and_writes_nothing(workspace):
    printed = workspace.succeed(
        "train", "--gin_file=configs/vamp_hsnf.gin", "--dry_run", "--gin_bindings=BinaryMNIST.data_dir = '/nowhere'"
    )
    for part in ("Experiment.num_steps = 1000000", "total          3,916,864", "(600, 784) -> (600, 600)"):
        assert part in printed
    assert not (workspace.path / "experiments").exists()


def test_the_run_directory_has_a_default(workspace):
    workspace.succeed("train", "--gin_file=vae_squares.gin")
    assert (workspace.path / "experiments" / "vae_squares" / "config.gin").is_file()
    workspace.succeed("train", "--gin_file=vae_squares.gin", EXPERIMENT_DIR=str(workspace.path / "elsewhere"))
    assert (workspace.path / "elsewhere" / "vae_squares" / "config.gin").is_file()


def test_training_that_ends_in_an_evaluation_prints_its_table(workspace):
    """Of one image, which has no standard error: the file has `null` there."""
    bindings = [f"--gin_bindings=Experiment.{name}" for name in ("final_num_samples = 3", "final_num_examples = 1")]
    printed = workspace.succeed("train", "--gin_file=vae_squares.gin", "--run_dir=run", *bindings)
    (path,) = (workspace.path / "run").glob("evaluation_*3x1.json")
    record = json.loads(path.read_text())
    assert f"{record['log_p_x']:.3f} ± nan nats (IWAE, 3 samples, 1 test images)" in printed
    assert f"evaluation: run/{path.name}" in printed and "samples: run/samples/best.png" in printed


def test_a_run_continues_and_a_changed_configuration_is_refused(workspace):
    def step() -> int:
        return torch.load(workspace.path / "run/checkpoints/latest.ckpt", weights_only=True)["step"]

    command = ("train", "--gin_file=vae_squares.gin", "--run_dir=run")
    longer = "--gin_bindings=Experiment.num_steps = 6"
    workspace.succeed(*command)
    before = (workspace.path / "run/checkpoints/latest.ckpt").read_bytes()
    line = workspace.fail(*command, longer, "--gin_bindings=Adam.lr = 0.5")
    for part in ("Experiment.num_steps: 4 -> 6", "Adam.lr: 0.0002 -> 0.5", "--reconfigure", "--overwrite"):
        assert part in line
    assert (workspace.path / "run/checkpoints/latest.ckpt").read_bytes() == before
    workspace.succeed(*command, longer, "--reconfigure")
    assert step() == 6
    (workspace.path / "run/own.txt").write_text("kept")
    workspace.succeed(*command, "--overwrite")
    assert step() == 4 and (workspace.path / "run/own.txt").is_file()
    files = {path: path.read_bytes() for path in (workspace.path / "run").rglob("*") if path.is_file()}
    too_large = "--gin_bindings=Experiment.batch_size = 101"
    assert "batch_size must be at most the 100" in workspace.fail(*command, "--overwrite", too_large)
    assert "'max_exp_avg_sq'" in workspace.fail(*command, "--reconfigure", "--gin_bindings=Adam.amsgrad = True")
    assert {path: path.read_bytes() for path in files} == files, "a mistake loses nothing"
    (workspace.path / "run/config.gin").unlink()
    assert "config.gin is missing" in workspace.fail(*command, longer)
    workspace.succeed(*command, "--reconfigure")
    line = workspace.fail(*command, "--gin_bindings=LATENT_DIM = 7", "--reconfigure")
    assert "the checkpoint is of another model" in line and "(80, 300) in the checkpoint" in line
    assert "give one of them" in workspace.fail(*command, "--overwrite", "--reconfigure")


def test_overwriting_is_not_done_again_by_a_restart(workspace):
    """Torchrun starts the same command again when a process has died, and that one then goes on."""
    command = ("train", "--gin_file=vae_squares.gin", "--run_dir=own run", "--overwrite")
    printed = workspace.succeed(*command)
    assert "tensorboard --logdir 'own run'\n" in printed and "launch.evaluate --run_dir='own run' " in printed
    latest = workspace.path / "own run/checkpoints/latest.ckpt"
    before = latest.stat().st_mtime_ns
    workspace.succeed(*command, TORCHELASTIC_RESTART_COUNT="1")
    assert latest.stat().st_mtime_ns == before, "nothing was left to train"
    workspace.succeed(*command)
    assert latest.stat().st_mtime_ns > before


def test_an_orphaned_binding_is_listed_in_one_line(workspace):
    printed = workspace.succeed(
        "train", "--gin_file=vae_squares.gin", "--gin_bindings=Experiment.optimizer = @torch.optim.SGD"
    )
    assert "not used by this configuration: Adam.fused, Adam.lr\n" in printed


def test_help_is_no_failure(workspace):
    assert "--out: The PNG to write" in workspace.succeed("sample", "--help")


def test_bad_flags(workspace):
    assert "'bogus'; --help lists the options" in workspace.fail("train", "--bogus")
    assert "--seed=three: invalid literal" in workspace.fail("sample", "--run_dir=run", "--seed=three")
    assert "--nodry_run=3 does not take an argument" in workspace.fail("train", "--nodry_run=3")


def test_bad_calls(workspace):
    assert "--gin_file must be given" in workspace.fail("train")
    assert "configs/vae.gin" in workspace.fail("train", "--gin_file=configs/vaee.gin")
    assert "unexpected argument 'extra'" in workspace.fail("train", "--gin_file=configs/vae.gin", "extra")
    assert "did you mean num_steps or num_replicas?" in workspace.fail(
        "train", "--gin_file=configs/vae.gin", "--gin_bindings=Experiment.num_step = 3"
    )
    assert "there is no run in 'nothing'" in workspace.fail("evaluate", "--run_dir=nothing")
    assert not (workspace.path / "experiments").exists()


def test_a_run_directory_in_use_or_not_writable(workspace):
    (workspace.path / "run").mkdir()
    with FileLock(workspace.path / "run" / ".lock"):
        line = workspace.fail("train", "--gin_file=vae_squares.gin", "--run_dir=run")
    assert "in use by another process" in line
    (workspace.path / "file").write_text("")
    line = workspace.fail("train", "--gin_file=vae_squares.gin", "--run_dir=file/run")
    assert "not writable" in line and "--run_dir" in line


def test_data_that_is_missing_or_does_not_fit(workspace):
    command = ("train", "--gin_file=configs/vae.gin", "--run_dir=run")
    line = workspace.fail(*command, "--gin_bindings=BinaryMNIST.download = False", POPGEN_DATA="empty")
    assert "empty/MNIST/raw" in line and "configs/quickstart.gin" in line
    line = workspace.fail("train", "--gin_file=vae_squares.gin", "--gin_bindings=Squares.largest = 2.0")
    assert "values from 0 to 2" in line and "[0, 1]" in line
    line = workspace.fail("train", "--gin_file=vae_squares.gin", "--gin_bindings=INPUT_DIM = 100")
    assert "(100, 784)" in line and "(count, 100)" in line


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_knows_few_characters_loses_no_evaluation(trained, encoding: str) -> None:
    arguments = ("--run_dir=run", "--num_samples=30", "--num_examples=5")
    assert "log p(x)" in trained.succeed("evaluate", *arguments, PYTHONIOENCODING=encoding)


def test_who_reads_along_may_stop_to(workspace) -> None:
    """`head` closes the pipe when it has its line: no traceback."""
    command = [sys.executable, "-m", "launch.train", "--gin_file=vae_squares.gin", "--dry_run"]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(workspace.path)))}
    with subprocess.Popen(
        command, cwd=workspace.path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert said == "" and process.returncode == 1


@pytest.mark.parametrize("seconds", ["nan", "inf", "0.5"])
def test_a_timeout_is_a_number_of_seconds(workspace, seconds: str) -> None:
    assert "process_timeout" in workspace.fail("evaluate", "--run_dir=run", f"--process_timeout={seconds}")
