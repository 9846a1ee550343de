"""The record of an evaluation: what it says, that it can be repeated, and that its file is strict JSON."""

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import popgen
from popgen.datasets.images import ImageData
from popgen.errors import ArgumentError
from popgen.evaluation.annealed import ESTIMATOR_VERSION
from popgen.evaluation.evaluator import VAEEvaluator
from popgen.evaluation.likelihood import estimate_log_likelihood, evaluate_elbo, importance_estimate
from popgen.experiment import Experiment, evaluate
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.priors import GaussianMixturePrior
from popgen.prepared import PreparedExperiment
from popgen.provenance import commit
from popgen.summaries import Writer
from popgen.training.records import EvaluationFiles

KEYS = {
    *("log_p_x", "log_p_x_standard_error", "elbo", "elbo_standard_error", "reconstruction", "kl"),
    *("log_q_z_given_x", "log_p_z", "log_det", "active_units"),
    *("log_p_x_of_1_samples", "log_p_x_of_7_samples", "monte_carlo_error", "effective_sample_size_median"),
    *("num_samples", "num_examples", "step", "split", "seed"),
    *(
        "dataset",
        "binarisation_protocol",
        "selection_split",
        "precision",
        "training_precision",
        "compiled",
        "num_threads",
        "headline",
        "selected_by",
        "dtype",
        "device",
        "seconds",
        "popgen_version",
        "commit",
        "torch_version",
        "python_version",
        "hardware",
        "processes",
        "model_sha256",
        "images_sha256",
        "seconds_of_images",
        "bits_per_dimension",
    ),
}


class Noise:
    """Random binary 4 × 4 images."""

    def __repr__(self) -> str:
        return "Noise()"

    def load(self) -> ImageData:
        images = 255 * torch.randint(0, 2, (30, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
        return ImageData(images[:20], images[20:], (4, 4), "noise")


@pytest.fixture
def experiment() -> Experiment:
    vae = VAE(GaussianEncoder(16, 2, 6), BernoulliDecoder(2, 16, 6), GaussianMixturePrior(3, 2))
    return Experiment(model=vae, dataset=Noise(), seed=5)


def prepared(experiment: Experiment) -> PreparedExperiment:
    return PreparedExperiment(experiment, Noise().load(), experiment.model)


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def written(
    experiment: Experiment, path: pathlib.Path, num_examples: int | None
) -> tuple[dict[str, Any], pathlib.Path]:
    """Returns the record of an evaluation with 7 samples as it was formed, and the file that holds it."""
    record = evaluate(prepared(experiment), 7, num_examples, step=40)
    record.update(checkpoint="best", weights="raw")
    writer, files = Writer(path), EvaluationFiles(path, 40, "raw", 7, record["num_examples"])
    files.write(writer, record, experiment.evaluator)
    writer.close()
    return record, files.record_path


def test_values(experiment: Experiment) -> None:
    data = Noise().load()
    record = evaluate(prepared(experiment), 7, 6, step=40)
    assert set(record) == KEYS
    log_p_x = estimate_log_likelihood(experiment.model, data.test[:6], 7, seed=5).numpy().astype(np.float64)
    elbo = evaluate_elbo(experiment.model, data.test[:6], seed=5)["elbo"].numpy().astype(np.float64)
    for name, values in (("log_p_x", log_p_x), ("elbo", elbo)):
        assert record[name] == pytest.approx(values.mean(), rel=1e-9)
        assert record[f"{name}_standard_error"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(6), rel=1e-9)
    assert record["elbo"] == pytest.approx(record["reconstruction"] - record["kl"], rel=1e-6)
    assert record["kl"] == pytest.approx(record["log_q_z_given_x"] - record["log_p_z"], rel=1e-6)
    expected = {"num_samples": 7, "num_examples": 6, "step": 40, "split": "test", "seed": 5, "device": "cpu"}
    expected |= {"dataset": "Noise()", "binarisation_protocol": "noise", "precision": "fp32", "log_det": 0.0}
    expected |= {"dtype": "float32"}
    expected |= {"popgen_version": popgen.__version__, "commit": commit(), "torch_version": torch.__version__}
    assert {name: record[name] for name in expected} == expected
    assert record["bits_per_dimension"] == pytest.approx(-record["log_p_x"] / 16 / math.log(2))
    lines = experiment.evaluator.describe(record).splitlines()
    assert lines[1].split() == ["bits/dimension", f"{record['bits_per_dimension']:.4f}"]
    assert ["active", "units", str(record["active_units"])] in [line.split() for line in lines]
    assert record["seconds"] >= record["seconds_of_images"] - 0.1 and record["active_units"] in (0, 1, 2)
    assert record["log_p_x_of_1_samples"] < record["log_p_x_of_7_samples"] == record["log_p_x"]
    assert record["monte_carlo_error"] > 0.0 and 1.0 < record["effective_sample_size_median"] < 7.0


def test_evidence_of_many_samples(experiment: Experiment) -> None:
    """Means over images of what `importance_estimate` says of each, the worst images first, and a warning of them."""
    data = Noise().load()
    record = evaluate(prepared(experiment), 200, None, step=40)
    estimate = importance_estimate(experiment.model, data.test, 200, seed=5)
    for size, bound in estimate.bounds.items():
        assert record[f"log_p_x_of_{size}_samples"] == pytest.approx(bound.double().mean().item())
    assert list(estimate.bounds) == [1, 10, 100, 200]
    errors = estimate.monte_carlo_error.double().numpy()
    assert record["monte_carlo_error"] == pytest.approx(np.sqrt((errors**2).sum()) / 10)
    sizes = estimate.effective_sample_size.double().numpy()
    assert record["effective_sample_size_median"] == pytest.approx(np.median(sizes)), "of an even count too"
    shapes = estimate.pareto_shape
    assert record["pareto_shape_median"] == pytest.approx(np.median(shapes.double().numpy()))
    assert record["worst_images"] == shapes.argsort(descending=True).tolist()
    assert record["images_of_reliable_pareto_shape"] == (shapes < 1.0 - 1.0 / math.log10(200)).sum() == 9
    described = VAEEvaluator().describe(record)
    assert "(1), " in described and "(200)" in described and "below 0.57 for 9 of 10 images" in described
    assert "warning" not in VAEEvaluator().describe({**record, "images_of_reliable_pareto_shape": 10})
    worse = VAEEvaluator().describe({**record, "images_of_reliable_pareto_shape": 8})
    assert f"unreliable for 2 images, such as {record['worst_images'][0]}, " in worse
    assert "k̂" not in VAEEvaluator().describe(evaluate(prepared(experiment), 7, None, step=1))


@pytest.mark.parametrize("shapes", [[math.nan, 0.2, 0.4, 0.9], [math.nan] * 4])
def test_an_image_whose_weights_have_no_known_shape_is_not_called_reliable(shapes: list[float]) -> None:
    columns = dict.fromkeys(("log_p_x_of_50_samples", "monte_carlo_error", "effective_sample_size"), torch.ones(4))
    found = VAEEvaluator().summary({**columns, "pareto_shape": torch.tensor(shapes)})
    known = [shape for shape in shapes if not math.isnan(shape)]
    assert found["images_of_reliable_pareto_shape"] == sum(shape < 1.0 - 1.0 / math.log10(50) for shape in known)
    assert math.isnan(shapes[found["worst_images"][0]])
    assert found["pareto_shape_median"] == pytest.approx(sorted(known)[1] if known else math.nan, nan_ok=True)


def test_a_record_can_be_repeated(experiment: Experiment) -> None:
    """The same but for the time it took; the whole test set is the default."""
    torch.manual_seed(1)
    first = evaluate(prepared(experiment), 7, None, step=1)
    torch.manual_seed(2)
    second = evaluate(prepared(experiment), 7, 10, step=1)
    times = {"seconds": 0, "seconds_of_images": 0}
    assert first | times == second | times


@pytest.mark.parametrize("num_examples", [None, 3, 1])
def test_the_file_is_strict_json(experiment: Experiment, num_examples: int | None, tmp_path: pathlib.Path) -> None:
    record, file = written(experiment, tmp_path, num_examples)
    found = json.loads(file.read_text(), parse_constant=refuse)
    assert file.name == f"evaluation_step00000040_raw_7x{num_examples or 10}.json"
    assert set(found) == KEYS | {"checkpoint", "weights"}
    undefined = {"log_p_x_standard_error", "elbo_standard_error"} if num_examples == 1 else set()
    assert {name for name, value in found.items() if value is None} == undefined
    assert {name for name, value in record.items() if isinstance(value, float) and math.isnan(value)} == undefined
    assert {name: value for name, value in found.items() if name not in undefined} == {
        name: value for name, value in record.items() if name not in undefined
    }


def test_bounds_are_also_curves(experiment: Experiment, tmp_path: pathlib.Path) -> None:
    record, _ = written(experiment, tmp_path, 4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("log_p_x", "log_p_x_standard_error", "elbo", "reconstruction", "kl"):
        (event,) = events.Scalars(f"evaluation/{name}")
        assert event.step == 40 and event.value == pytest.approx(record[name], rel=1e-6)


def test_raw_and_averaged_weights_are_curves_of_their_own(experiment: Experiment, tmp_path: pathlib.Path) -> None:
    """Both evaluations are of one step: in one curve they would be two points above one another."""
    writer, values = Writer(tmp_path), {"raw": -9.0, "averaged": -8.0}
    for weights, value in values.items():
        record = dict.fromkeys(VAEEvaluator.headline, value)
        EvaluationFiles(tmp_path, 40, weights, 7, 4).write(writer, record, experiment.evaluator)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for tag, value in (("evaluation/log_p_x", -9.0), ("evaluation_averaged/log_p_x", -8.0)):
        assert [event.value for event in events.Scalars(tag)] == [value]


class Promises(VAEEvaluator):
    """An evaluator whose headline names what it does not return."""

    headline = ("log_p_x", "perplexity")


def test_a_headline_that_is_not_returned_loses_no_record(experiment: Experiment, tmp_path: pathlib.Path) -> None:
    files, record = EvaluationFiles(tmp_path, 40, "raw", 7, 4), {"log_p_x": np.float32(-1.5), "rows": torch.ones(2)}
    writer = Writer(tmp_path)
    with pytest.raises(ArgumentError, match=r"^Promises\.headline names perplexity, which .* in .*_raw_7x4\.json$"):
        files.write(writer, record, Promises())
    writer.close()
    assert json.loads(files.record_path.read_text()) == {"log_p_x": -1.5, "rows": [1.0, 1.0]}


@pytest.mark.parametrize(
    "num_samples, num_examples, message",
    [
        (0, None, "num_samples must be an integer of at least 1, got 0"),
        (5, 0, "num_examples must be an integer of at least 1, got 0"),
        (5, 11, "num_examples must be at most the 10 test examples, got 11"),
    ],
)
def test_arguments(experiment: Experiment, num_samples: int, num_examples: int | None, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        evaluate(prepared(experiment), num_samples, num_examples, step=0)


@pytest.mark.parametrize("other", [None, "model_sha256", "images_sha256", "seed", "annealed_estimator_version"])
def test_a_check_by_annealing_is_kept_for_what_it_was_made_of_alone(other: str | None, tmp_path: pathlib.Path) -> None:
    """Another model, other images, another seed or another estimator: what annealing has found is not said of these."""
    files, about = EvaluationFiles(tmp_path, 40, "raw", 7, 4), {"model_sha256": "a", "images_sha256": "b", "seed": 3}
    found = {"annealed_log_p_x": -9.0, "simulated_gap": None, "annealed_estimator_version": ESTIMATOR_VERSION}
    on_file = {**about, **found, "log_p_x": -9.5}
    if other is not None:
        on_file[other] = -1
    files.record_path.write_text(json.dumps(on_file))
    kept = files.annealing_on_file(about)
    assert kept == ({} if other else pytest.approx({**found, "simulated_gap": math.nan}, nan_ok=True))
