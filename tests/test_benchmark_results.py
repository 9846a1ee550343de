"""Results: a run is collected as it is, and the README's table says what lies in results/."""

import csv
import dataclasses
import json
import pathlib
import re
import shutil

import pytest
import torch

from benchmarks import results
from popgen.datasets.images import ImageData
from popgen.errors import ArgumentError, PopgenError, RunDirectoryError
from popgen.experiment import Configuration, Experiment, run
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.priors import StandardNormalPrior
from popgen.provenance import hardware
from popgen.training.run_directory import RunDirectory


class Noise:
    """Random binary 4 × 4 images."""

    def load(self) -> ImageData:
        images = 255 * torch.randint(0, 2, (60, 16), dtype=torch.uint8)
        return ImageData(images[:40], images[40:], (4, 4), "noise")


def make_experiment() -> Experiment:
    vae = VAE(GaussianEncoder(16, 2, 6), BernoulliDecoder(2, 16, 6), StandardNormalPrior())
    steps = {"num_steps": 8, "eval_every": 4, "log_every": 2, "batch_size": 10}
    return Experiment(model=vae, dataset=Noise(), final_num_samples=30, **steps)


@pytest.fixture
def trained(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run of eight steps with an evaluation; results go to a folder of their own."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        run(make_experiment(), directory, Configuration("given", "operative", {}))
    return directory


def test_a_run_is_collected(trained: RunDirectory) -> None:
    (path,) = trained.path.glob("evaluation_*.json")
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"command": f"evaluate --run_dir={trained.path} --weights=raw"}))
    folder = results.collect(trained.path, "vae")
    (record,) = folder.glob("evaluation_*.json")
    expected = found | {"command": "evaluate --run_dir=experiments/vae --weights=raw"}
    assert json.loads(record.read_text()) == expected
    assert folder == results.RESULTS / "vae" / "seed_0"
    assert (folder / "config.gin").read_text() == "given"
    assert (folder / record.with_suffix(".png").name).stat().st_size > 1_000
    with (folder / "curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert [row["step"] for row in curve] == ["4", "8"]
    assert list(curve[0]) == ["step", "train/loss", "test/loss", "best/loss", "test/reconstruction", "test/kl"]
    assert min(float(row["test/loss"]) for row in curve) == pytest.approx(-json.loads(record.read_text())["elbo"])
    training = json.loads((folder / "training.json").read_text())
    assert training["steps"] == 8 and training["seconds_of_steps"] >= 0.0
    assert training["trained_on"] == hardware(torch.device("cpu"))
    assert results.collect(trained.path, "vae") == folder, "a run can be collected again"


def test_the_table_says_where_a_run_was_trained(trained: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where it was evaluated: as the run tells, on each machine that went on with it, or as one is told."""
    training_of = results.training_of

    def told(told_by_run: str, trained_on: str | None) -> str:
        monkeypatch.setattr(results, "training_of", lambda path: training_of(path)._replace(hardware=told_by_run))
        results.collect(trained.path, "vae", trained_on)
        return results.table(results.RESULTS).splitlines()[2].split(" | ")[-1]

    assert told("a GPU", None) == told("", "a GPU") == told("a GPU", "another") == "a GPU, fp32 |"
    assert told("", None) == "—, fp32 |", "where it was evaluated says nothing of it"
    monkeypatch.undo()
    monkeypatch.setattr("popgen.provenance.hardware", lambda device: "another machine")
    with trained.locked():
        experiment = dataclasses.replace(make_experiment(), num_steps=12)
        run(experiment, trained, Configuration("given", "operative", {}))
    assert results.training_of(trained.path).hardware == f"{hardware(torch.device('cpu'))} and another machine"


def test_the_table_says_at_which_precision_a_run_was_trained(trained: RunDirectory) -> None:
    """Where that has changed, at which step; an evaluation knows the last one alone."""
    with trained.locked():
        for num_steps, precision in ((8, "fp32"), (12, "bf16"), (14, "bf16")):
            experiment = dataclasses.replace(make_experiment(), num_steps=num_steps, precision=precision)
            run(experiment, trained, Configuration("given", f"a.Experiment.precision = '{precision}'", {}))
    folder = results.collect(trained.path, "vae")
    assert [row["training_precision"] for row in results.rows_of(folder)] == ["bf16"]
    expected = f"{hardware(torch.device('cpu'))}, fp32 to step 8, then bf16 |"
    assert results.table(results.RESULTS).splitlines()[2].split(" | ")[-1] == expected


def test_the_table_has_a_row_for_each_evaluation(trained: RunDirectory) -> None:
    for name in ("vamp", "vae", "vae_best", "zebra"):
        results.collect(trained.path, name)
    lines = results.table(results.RESULTS).splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == ["vae", "vamp", "vae_best"], "the other is in another table"
    (record,) = (
        json.loads(path.read_text()) for path in (results.RESULTS / "vae" / "seed_0").glob("evaluation_*.json")
    )
    assert f"| 0 | 8 | {record['step']} | test loss | raw | −84.04 | −{-record['log_p_x']:.2f} ± " in lines[2]
    assert "| raw | −84.04 | −" in lines[4], "that of the configuration that it varies"


def test_seeds_of_one_configuration_have_a_mean(trained: RunDirectory) -> None:
    """Rows of other weights, or of other steps, are not in it."""
    folder = results.collect(trained.path, "vae")
    (path,) = folder.glob("evaluation_*.json")
    record = json.loads(path.read_text())
    for seed, log_p_x in ((10, -84.0), (9, -86.0), (11, -91.0)):
        other = folder.with_name(f"seed_{seed}")
        shutil.copytree(folder, other)
        changed = record | {"seed": seed, "log_p_x": log_p_x, "weights": "averaged" if seed == 11 else "raw"}
        (other / path.name).write_text(json.dumps(changed))
    path.write_text(json.dumps(record | {"log_p_x": -88.0}))
    lines = results.table(results.RESULTS).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["0", "9", "10", "3 seeds", "11"]
    assert "| raw | −84.04 | **−86.00** ± 2.00 over seeds |" in lines[3]
    assert "(results/vae/seed_9)" in lines[1]


def test_only_what_differs_in_the_seed_alone_has_a_mean(trained: RunDirectory) -> None:
    folder = results.collect(trained.path, "vae")
    (path,) = folder.glob("evaluation_*.json")
    record = json.loads(path.read_text())
    changes = [
        {"binarisation_protocol": "threshold"},
        {"images_sha256": "others"},
        {"dtype": "float64"},
        {"num_samples": 7},
        {"checkpoint": "4", "step": 4},
        {"checkpoint": "6", "step": 6},
    ]
    for seed, change in enumerate(changes, start=1):
        other = folder.with_name(f"seed_{seed}")
        shutil.copytree(folder, other)
        (other / path.name).write_text(json.dumps(record | {"seed": seed} | change))
    text = results.table(results.RESULTS)
    assert "over seeds" not in text and "| step 4 |" in text and "| 7 × 20 |" in text and "| 30 × 20 |" in text


def test_what_was_best_once_has_no_row(trained: RunDirectory) -> None:
    folder = results.collect(trained.path, "vae")
    (path,) = folder.glob("evaluation_*.json")
    record = json.loads(path.read_text())
    (folder / "evaluation_step00000002_raw_30x20.json").write_text(json.dumps(record | {"step": 2}))
    (row,) = results.rows_of(folder)
    assert row["step"] == record["step"]


def test_other_models_have_a_table_of_their_own(trained: RunDirectory) -> None:
    """It shows what the headline of their evaluator names."""
    folder = results.collect(trained.path, "zebra")
    (path,) = folder.glob("evaluation_*.json")
    record = json.loads(path.read_text())
    headline = ["bits_per_sample", "bits_per_sample_standard_error", "accuracy", "codes_used"]
    found = {"bits_per_sample": -3.456, "bits_per_sample_standard_error": 0.0312, "accuracy": 0.5, "codes_used": 128}
    path.write_text(json.dumps(record | found | {"headline": headline}))
    results.collect(trained.path, "vae")
    (line,) = results.other_table(results.RESULTS).splitlines()[2:]
    assert line.startswith("| [`zebra`](results/zebra/seed_0) | 0 | 8 | ")
    assert "| raw | `bits_per_sample` −3.46 ± 0.03, `accuracy` 0.50, `codes_used` 128 | 20 | 0.0 |" in line
    assert "zebra" not in results.table(results.RESULTS)


def decimals(text: str) -> list[str]:
    """Returns the numbers with decimal places in a text."""
    return re.findall(r"(?<![\d,.])-?\d+\.\d+", text)


@pytest.mark.parametrize("name", sorted(path.name for path in results.RESULTS.iterdir()))
def test_what_a_config_expects_is_on_record(name: str) -> None:
    """Every number with decimal places in its `# Expected:` is found, to these places, in a record of its results."""
    (line,) = re.findall(r"^# Expected: (.+)$", (results.REPOSITORY / f"configs/{name}.gin").read_text(), re.MULTILINE)
    records = [json.loads(path.read_text()) for path in (results.RESULTS / name).glob("seed_*/evaluation_*.json")]
    values = [value for record in records for value in record.values() if isinstance(value, int | float)]
    for number in decimals(line):
        places = len(number.partition(".")[2])
        assert number in {f"{value:.{places}f}" for value in values}, f"{number} is in no record of results/{name}"


def test_a_run_of_any_name_is_collected_as_it_is(trained: RunDirectory, tmp_path: pathlib.Path, monkeypatch) -> None:
    trained.path.rename(tmp_path / "best")
    monkeypatch.chdir(tmp_path)
    (record,) = results.collect(pathlib.Path("best"), "vae").glob("evaluation_*.json")
    assert json.loads(record.read_text())["checkpoint"] == "best"


def test_what_cannot_be_collected_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RunDirectoryError, match="has no evaluation"):
        results.collect(tmp_path, "vae")
    (tmp_path / "evaluation_step00000001_raw_5x5.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="no curves"):
        results.collect(tmp_path, "vae")
    with pytest.raises(PopgenError, match="has no table"):
        results.in_readme("text", "table", "results")


def test_the_table_goes_between_its_marks() -> None:
    begin, end = "<!-- mine: begin -->", "<!-- mine: end -->"
    once = results.in_readme(f"before\n{begin}\nold\n{end}\nafter", "| new |", "mine")
    assert once == f"before\n{begin}\n\n| new |\n\n{end}\nafter"
    assert results.in_readme(once, "| new |", "mine") == once


def test_the_readme_says_what_the_results_say() -> None:
    readme = results.README.read_text()
    assert results.readme_with_tables(readme) == readme


def test_a_mistake_leaves_what_was_collected(trained: RunDirectory) -> None:
    folder = results.collect(trained.path, "vae")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (record,) = trained.path.glob("evaluation_*.json")
    for name in ("", ".", "../vae", "a/b"):
        with pytest.raises(ArgumentError, match=r"name must be that of one folder in results, got '"):
            results.collect(trained.path, name)
    whole = record.read_text()
    for text, message in ((whole[:40], "is damaged"), ('{"seed": 0, "step": 8}', "lacks log_p_x"), ("[]", "lacks")):
        record.write_text(text)
        with pytest.raises(RunDirectoryError, match=message):
            results.collect(trained.path, "vae")
    record.write_text(whole)
    trained.operative_config_path.unlink()
    with pytest.raises(RunDirectoryError, match=r"operative_config.gin is missing"):
        results.collect(trained.path, "vae")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
