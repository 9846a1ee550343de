"""Whole runs and evaluations of several processes: written once, stopped together, continued by any number of them."""

import dataclasses
import functools
import os
import pathlib
import re
import signal
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from benchmarks.kills import flat, make_experiment
from benchmarks.together import Outcome, results_of, together
from launch.command import STOPPED, stop_requests
from launch.train import check_same_configuration
from popgen.datasets.images import ImageData
from popgen.distributed import ALONE, Processes
from popgen.errors import ConfigError, UnfinishedEvaluationError
from popgen.evaluation.annealed import check_by_annealing
from popgen.evaluation.image_table import ImageTable, Shard, read_table
from popgen.experiment import Configuration, Experiment, evaluate, run
from popgen.prepared import prepare
from popgen.training import loop
from popgen.training.objectives import NegativeELBO
from popgen.training.run_directory import RunDirectory
from popgen.training.state import state_to_tensors


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A process that has several threads is not to be forked."""
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports what every child would import


@dataclasses.dataclass(frozen=True)
class Values:
    """Images in float64, so that sums in another order make no difference that grows to be seen."""

    def load(self) -> ImageData:
        generator = torch.Generator().manual_seed(0)
        light = torch.rand(390, 64, generator=generator, dtype=torch.float64) < torch.linspace(0.1, 0.9, 64)
        return ImageData(light[:60].double(), light[60:].double(), (8, 8), "fixed")


def exact_experiment(kind: str, **changes: Any) -> Experiment:
    experiment = make_experiment(kind, **{"dataset": Values(), "num_steps": 24, "max_gradient_norm": 50.0} | changes)
    experiment.model.double()
    return experiment


def run_in(path: pathlib.Path, kind: str, processes: Processes, **changes: Any) -> dict[str, Any]:
    """Trains in a directory as the command does, and returns the last state."""
    directory, experiment = RunDirectory(path), exact_experiment(kind, **changes)
    configuration = Configuration("given", "operative", {})
    if not processes.first:
        with stop_requests(quiet=True) as stop:
            return state_to_tensors(run(experiment, directory, configuration, stop, processes))
    with directory.locked(), stop_requests() as stop:
        return state_to_tensors(run(experiment, directory, configuration, stop, processes))


def run_by(size: int, path: pathlib.Path, kind: str, **changes: Any) -> list[Outcome]:
    if size == 1:
        return [Outcome(0, "", run_in(path, kind, ALONE, **changes))]
    return together(functools.partial(run_in, path, kind, **changes), size)


def assert_close_checkpoints(first: pathlib.Path, second: pathlib.Path, name: str) -> None:
    one, other = (flat(RunDirectory(path).load_checkpoint(name)) for path in (first, second))
    assert one.keys() == other.keys() and len(one) > 40
    for key, value in one.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(value, other[key], rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
        elif isinstance(value, float):
            assert value == pytest.approx(other[key], abs=1e-9), key
        else:
            assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key


def curves(path: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith("steps_per_second")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def names(path: pathlib.Path) -> list[str]:
    """Returns the files of a run, event files without the part that tells processes apart."""
    found = (str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != ".lock")
    return sorted(re.sub(r"tfevents.*", "tfevents", name) for name in found)


@pytest.mark.parametrize("kind", ["vae", "vqvae"])
def test_a_run_changes_hands_and_ends_as_it_would_have(kind: str, tmp_path: pathlib.Path) -> None:
    """Two processes, one, and two again against two, and against one: states to 1e-9, the same files and curves."""
    for size, num_steps in ((2, 8), (1, 15), (2, 24)):
        outcomes = run_by(size, tmp_path / "handed", kind, num_steps=num_steps)
        assert [outcome.status for outcome in outcomes] == [0] * size, outcomes[0].said
        first, *others = (flat(outcome.result) for outcome in outcomes)
        assert first["/step"] == num_steps and 0 < first["/best_step"] <= num_steps
        for other in others:
            assert first.keys() == other.keys()
            for name, value in first.items():
                same = torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
                assert same, f"{name} is not the same in all processes"
    run_by(2, tmp_path / "two", kind)
    run_by(1, tmp_path / "one", kind)
    for name in ("latest", "best", "10", "20"):
        for other in ("handed", "one"):
            assert_close_checkpoints(tmp_path / "two", tmp_path / other, name)
    assert names(tmp_path / "two") == names(tmp_path / "one"), "the second process writes nothing"
    two, one = curves(tmp_path / "two"), curves(tmp_path / "one")
    assert two.keys() == one.keys() and {"train/loss", "train/gradient_norm", "test/loss"} < two.keys()
    for tag, points in two.items():
        assert [step for step, _ in points] == [step for step, _ in one[tag]]
        assert [value for _, value in points] == pytest.approx([value for _, value in one[tag]], rel=1e-6, abs=1e-6), (
            tag
        )


class AskedToStop(NegativeELBO):
    """Sends one process a request to stop in the middle of a run."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        object.__setattr__(self, "rank", rank)

    def settings(self, step: int) -> dict[str, float]:
        if step == 6 and int(os.environ.get("RANK", 0)) == self.rank:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)
        return super().settings(step)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_stop_where_one_is_asked_to(rank: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "ASKING_SECONDS", 0.0)  # before every step
    outcomes = run_by(2, tmp_path / "run", "vae", objective=AskedToStop(rank))
    said = "".join(outcome.said for outcome in outcomes)
    assert [outcome.status for outcome in outcomes] == [STOPPED, STOPPED], said
    assert said.count("stopped at step 7, which is saved; the same command goes on from there") == 1
    assert RunDirectory(tmp_path / "run").load_checkpoint("latest")["step"] == 7
    assert run_by(2, tmp_path / "run", "vae", objective=NegativeELBO())[1].result["step"] == 24
    run_by(2, tmp_path / "whole", "vae", objective=NegativeELBO())
    assert_close_checkpoints(tmp_path / "run", tmp_path / "whole", "latest")


class Dies(NegativeELBO):
    """Kills one process in the middle of a run."""

    def settings(self, step: int) -> dict[str, float]:
        if step == 9 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().settings(step)


def test_a_run_whose_process_was_killed_goes_on(tmp_path: pathlib.Path) -> None:
    outcomes = run_by(2, tmp_path / "run", "vae", objective=Dies())
    assert [outcome.status for outcome in outcomes] == [1, -signal.SIGKILL]
    assert outcomes[0].said.startswith("error: another process of this run has ended")
    assert outcomes[0].said.count("\n") == 1
    assert run_by(2, tmp_path / "run", "vae", objective=NegativeELBO())[0].result["step"] == 24
    run_by(2, tmp_path / "whole", "vae", objective=NegativeELBO())
    assert_close_checkpoints(tmp_path / "run", tmp_path / "whole", "latest")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_size": 21}, "error: Experiment.batch_size must be a multiple of the 2 processes, got 21\n"),
        ({"batch_size": 100}, "error: batch_size must be at most the 60 training images, got 100\n"),
        ({"pretrained": {"nobody": "x"}}, "error: Experiment.pretrained: VAE has no part 'nobody'; it has "),
    ],
)
def test_a_mistake_is_said_by_one(changes: dict[str, Any], said: str, tmp_path: pathlib.Path) -> None:
    outcomes = run_by(2, tmp_path / "run", "vae", **changes)
    assert [outcome.status for outcome in outcomes] == [1, 1]
    text = "".join(outcome.said for outcome in outcomes)
    assert text.startswith(said) and text.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_processes_must_have_one_configuration() -> None:
    given = ["Experiment.seed = 3\nAdam.lr = 0.1", "Experiment.seed = 3\nAdam.lr = 0.1", "Experiment.seed = 4"]
    check_same_configuration(given[:2])
    expected = r"process 2 .* than process 0 \(Adam.lr: 0.1 -> \(not set\); Experiment.seed: 3 -> 4\)"
    with pytest.raises(ConfigError, match=expected):
        check_same_configuration(given)


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluated(path: pathlib.Path | None, processes: Processes) -> dict[str, Any]:
    """Returns the record of an evaluation in float32 of 330 images, four chunks."""
    experiment = make_experiment("vae", dataset=Values())
    prepared = prepare(experiment, torch.device("cpu"))
    prepared.model.eval()
    return evaluate(prepared, 30, None, 1, table=ImageTable(path, processes=processes))


@pytest.mark.parametrize("size", [2, 3])
def test_an_evaluation_shared_out_is_that_of_one_process(size: int, tmp_path: pathlib.Path) -> None:
    alone, path = evaluated(None, ALONE), tmp_path / "images.csv"
    records = results_of(functools.partial(evaluated, path), size)
    for record in records:
        assert record["processes"] == size
        for name, value in alone.items():
            if isinstance(value, float) and "seconds" not in name:
                assert record[name] == pytest.approx(value, abs=1e-5), name
    assert records[0]["log_p_x"] == records[1]["log_p_x"]
    assert names(tmp_path) == ["images.csv"] and len(read_table(path).rows) == 330


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"identity": {"num_samples": 50}},
            "process 1 was asked for something else than process 0 (num_samples: 20 -> 50)",
        ),
        ({"identity": {}}, "process 1 was asked for something else than process 0 (num_samples: 20 -> None)"),
        ({"column": "cube"}, "forms the columns "),
    ],
    ids=["other", "missing", "columns"],
)
def test_processes_that_evaluate_different_things_make_no_table(
    changes: dict[str, Any], said: str, tmp_path: pathlib.Path
) -> None:
    """One line, from one of them, and nothing is written where that can be known before."""

    def work(processes: Processes) -> None:
        own = {"identity": {"num_samples": 20}, "column": "square"} | (changes if processes.rank else {})
        table = ImageTable(tmp_path / "images.csv", processes=processes)
        table.fill(own["identity"], 330, lambda images: {own["column"]: torch.tensor(images).square()})

    outcomes = together(work, size=2)
    assert [outcome.status for outcome in outcomes] == [1, 1]
    assert said in "".join(outcome.said for outcome in outcomes) and not (tmp_path / "images.csv").is_file()
    assert names(tmp_path) == [] or "column" in changes


def test_a_check_by_annealing_is_shared_out_too(tmp_path: pathlib.Path) -> None:
    """Each process has a chunk of its own, and all have the numbers of one alone."""
    experiment = make_experiment("vae", dataset=Values())
    prepared = prepare(experiment, torch.device("cpu"))

    def checked(processes: Processes) -> dict[str, Any]:
        path = None if processes is ALONE else tmp_path / "annealed.csv"
        table = ImageTable(path, processes=processes)
        return check_by_annealing(prepared.model, prepared.data.test[:12], 20, 3, 2, num_leapfrog_steps=2, table=table)

    alone = checked(ALONE)
    assert results_of(checked, 2) == [alone, alone]
    assert names(tmp_path) == ["annealed.csv"] and len(read_table(tmp_path / "annealed.csv").rows) == 12


def test_an_evaluation_goes_on_with_another_number_of_processes(tmp_path: pathlib.Path) -> None:
    """What a shard has left is not computed again."""
    path = tmp_path / "images.csv"

    def work(processes: Processes) -> list[int]:
        asked: list[int] = []

        def compute(images: range) -> dict[str, Tensor]:
            asked.extend(images)
            return {"square": torch.tensor(images).square()}

        columns = ImageTable(path, processes=processes).fill({}, 330, compute)
        assert torch.equal(columns["square"], torch.arange(330).square().double())
        return asked

    with pytest.raises(UnfinishedEvaluationError):
        ImageTable(path, Shard(2, 4)).fill({}, 330, lambda images: {"square": torch.tensor(images).square()})
    asked = results_of(work, size=2)
    assert sorted(asked[0] + asked[1]) == [*range(100), *range(200, 330)]
    assert asked[0] == [*range(100), *range(200, 300)]
