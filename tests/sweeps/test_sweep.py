"""The plan of a sweep: what is checked before anything starts, what is left to do, and with which commands."""

import pathlib

import pytest

from popgen import config
from popgen.errors import ArgumentError, ConfigError, DataError, RunDirectoryError
from popgen.sweeps.points import grid, parse
from popgen.sweeps.sweep import SweepDirectory, check_points
from popgen.training.run_directory import RunDirectory
from tests.test_commands import Workspace

FIXED = ["HIDDEN_DIM = 8", "Experiment.final_num_samples = 0"]


@pytest.fixture
def sweep(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> SweepDirectory:
    """The directory of a sweep, in a working directory with a config and a data set of one's own."""
    Workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return SweepDirectory(pathlib.Path("swept"))


def plan(sweep: SweepDirectory, *expressions: str, fixed: tuple[str, ...] = (), reconfigure: bool = False):
    points = grid(parse(expressions), max_points=100)
    return check_points(["vae_squares.gin"], [*FIXED, *fixed], points, sweep, reconfigure)


def pretend(sweep: SweepDirectory, point: str, step: int) -> None:
    """Leaves what training of a point up to a step would."""
    given = config.load(["vae_squares.gin"], [*FIXED, point.replace("=", " = ")]).configuration.given
    directory = RunDirectory(sweep.path / point)
    directory.checkpoints_path.mkdir(parents=True)
    directory.config_path.write_text(given)
    directory.save_checkpoint("latest", {"step": step, "best_loss": 9.0, "best_step": step})


def test_every_point_is_a_run_of_launch_train(sweep: SweepDirectory) -> None:
    runs, jobs = plan(sweep, "LATENT_DIM = [2, 3]", "torch.optim.Adam.lr = [1e-3]")
    assert [run.name for run in runs] == [job.name for job in jobs]
    assert jobs[1].command[1:] == [
        "-m",
        "launch.train",
        "--run_dir=swept/LATENT_DIM=3,torch.optim.Adam.lr=0.001",
        "--gin_file=vae_squares.gin",
        *(f"--gin_bindings={binding}" for binding in FIXED),
        "--gin_bindings=LATENT_DIM = 3",
        "--gin_bindings=torch.optim.Adam.lr = 0.001",
        "--hparam=LATENT_DIM",
        "--hparam=Adam.lr",
    ]
    assert runs[1].values == {"LATENT_DIM": "3", "torch.optim.Adam.lr": "0.001"} and runs[1].num_steps == 4
    assert not sweep.path.exists()


def test_what_is_finished_is_left_and_what_is_not_goes_on(sweep: SweepDirectory) -> None:
    pretend(sweep, "LATENT_DIM=2", step=4)
    pretend(sweep, "LATENT_DIM=3", step=2)
    runs, jobs = plan(sweep, "LATENT_DIM = [2, 3, 4]")
    assert len(runs) == 3 and [job.name for job in jobs] == ["LATENT_DIM=3", "LATENT_DIM=4"]


def test_a_damaged_latest_checkpoint_stops_nothing(sweep: SweepDirectory) -> None:
    for number, step in ((2, 4), (3, 2)):
        pretend(sweep, f"LATENT_DIM={number}", step=step)
    directory = RunDirectory(sweep.path / "LATENT_DIM=2")
    directory.save_checkpoint("best", {"step": 3, "best_loss": 8.0, "best_step": 3})
    directory.checkpoint_path("latest").write_bytes(b"half of it")
    runs, jobs = plan(sweep, "LATENT_DIM = [2, 3]")
    assert runs[0].numbers(sweep.path) == {"step": 3, "best_loss": 8.0, "best_step": 3}
    assert len(jobs) == 2, "training goes on from what is whole"
    directory.checkpoint_path("best").unlink()
    assert runs[0].numbers(sweep.path) == {}


def test_another_configuration_is_reported(sweep: SweepDirectory) -> None:
    pretend(sweep, "LATENT_DIM=2", step=4)
    pretend(sweep, "LATENT_DIM=3", step=2)
    longer = ("Experiment.num_steps = 6",)
    with pytest.raises(RunDirectoryError) as refusal:
        plan(sweep, "LATENT_DIM = [2, 3, 4]", fixed=longer)
    for part in (
        "swept/LATENT_DIM=2 (experiment.Experiment.num_steps: 4 -> 6), and 1 more",
        "--reconfigure",
        "nothing was started",
    ):
        assert part in str(refusal.value)
    _, jobs = plan(sweep, "LATENT_DIM = [2, 3, 4]", fixed=longer, reconfigure=True)
    assert ["--reconfigure" in job.command for job in jobs] == [True, True, False]
    _, jobs = plan(sweep, "LATENT_DIM = [2]", fixed=("Experiment.log_every = 7",), reconfigure=True)
    assert len(jobs) == 1  # every step was taken, but under another configuration


def test_mistakes_name_the_point(sweep: SweepDirectory) -> None:
    with pytest.raises(ConfigError, match=r"latent_dim must be .* got 0 .*at the point LATENT_DIM=0"):
        plan(sweep, "LATENT_DIM = [2, 0]")
    with pytest.raises(ConfigError, match=r"nothing uses the binding 'Adam\.lr = 0\.1'.*at the point Adam\.lr=0\.1"):
        plan(sweep, "Adam.lr = [0.1]", fixed=("Experiment.optimizer = @torch.optim.SGD",))
    values = "[1e-3, 1e-4]"
    with pytest.raises(ArgumentError, match="sweep names Adam.lr and torch.optim.Adam.lr, which are the same"):
        plan(sweep, f"Adam.lr = {values}", f"torch.optim.Adam.lr = {values}")
    with pytest.raises(ConfigError, match="same configuration"):
        plan(sweep, "Experiment.optimizer = [@torch.optim.Adam, @Adam]")
    with pytest.raises(ArgumentError, match="LATENT_DIM is both swept and bound"):
        plan(sweep, "LATENT_DIM = [2]", fixed=("LATENT_DIM = 3",))
    with pytest.raises(ArgumentError, match="Adam.lr is both swept and bound"):
        plan(sweep, f"Adam.lr = {values}", fixed=("torch.optim.Adam.lr = 1e-3",))
    with pytest.raises(DataError, match=r"values from 0 to 2.*at the point Squares.largest=2.0"):
        plan(sweep, "Squares.largest = [1.0, 2.0]")
    with pytest.raises(DataError, match=r"no validation split.*at the point Experiment.selection_split=validation"):
        plan(sweep, "Experiment.selection_split = ['test', 'validation']")
    assert not sweep.path.exists()


def test_replicas_are_not_swept(sweep: SweepDirectory) -> None:
    with pytest.raises(ConfigError, match="Experiment.num_replicas must be 1 in a sweep, got 3: sweep Experiment.seed"):
        plan(sweep, "LATENT_DIM = [2, 3]", fixed=("Experiment.num_replicas = 3",))


def test_one_process_holds_a_sweep(sweep: SweepDirectory) -> None:
    again = SweepDirectory(sweep.path)
    with sweep.locked(), pytest.raises(RunDirectoryError, match="another process runs the sweep"), again.locked():
        raise AssertionError("nothing may run here")
    (sweep.path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="not writable"), SweepDirectory(sweep.path / "file" / "sub").locked():
        raise AssertionError("nothing may run here")
