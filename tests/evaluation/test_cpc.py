"""What an evaluation says of a CPC, against the model's own terms one batch at a time; and its objective."""

import math

import pytest
import torch

from popgen.datasets.sequences import SequenceBatch, SequenceData, Sequences
from popgen.distributed import Processes
from popgen.distributions.codes import CategoricalOutput
from popgen.errors import ArgumentError, DataError
from popgen.evaluation.cpc import CPCEvaluator, contrastive_terms
from popgen.evaluation.evaluator import EvaluationSettings
from popgen.evaluation.image_table import ImageTable, Shard
from popgen.evaluation.statistics import standard_error_of_ratio
from popgen.experiment import Experiment, evaluate
from popgen.models.cpc import CPC
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.models.wavenet import WaveNet
from popgen.nn.cpc import GRUContext, LinearPredictors, StridedConvEncoder
from popgen.nn.priors import StandardNormalPrior
from popgen.prepared import PreparedExperiment
from popgen.streams import make_generator
from popgen.training.sequence_objectives import ContrastiveLoss

LENGTHS = (40, 29, 8, 40, 35, 17, 4)


def make_model(negatives: str = "batch", num_negatives: int = 5) -> CPC:
    torch.manual_seed(0)
    encoder = StridedConvEncoder(6, kernel_sizes=(4, 2), strides=(2, 1))
    label = "speaker" if negatives == "speaker" else None
    return CPC(encoder, GRUContext(6, 8), LinearPredictors(8, 6, num_steps=2), negatives, num_negatives, label)


def make_data() -> SequenceData:
    generator = torch.Generator().manual_seed(1)
    labels = {"speaker": torch.tensor([0, 1, 1, 0, 0, 1, 1])}
    split = Sequences(torch.rand(sum(LENGTHS), generator=generator) - 0.5, torch.tensor(LENGTHS), labels)
    return SequenceData(split, split, None, window=40, classes={"speaker": ("anna", "ben")}, sample_rate=1_000)


def test_guessing_has_the_loss_of_guessing() -> None:
    model = make_model()
    with torch.no_grad():
        model.predictors.layer.weight.zero_()
    record = CPCEvaluator(batch_size=4).evaluate(model, make_data(), make_data().test, EvaluationSettings(3, seed=0))
    assert record["loss"] == pytest.approx(math.log(6.0)) == record["loss_of_guessing"]
    assert record["mutual_information_ahead_1"] == pytest.approx(0.0, abs=1e-6)
    assert record["loss_standard_error"] == pytest.approx(0.0, abs=1e-6)


def test_guessing_among_the_frames_of_a_sequence_has_its_own_loss() -> None:
    """Draws of the positive are no candidates: C of n - k frames, binomially, so that log(6 - C) is expected."""
    model, data = make_model("sequence"), make_data()
    expected, pairs = 0.0, 0.0
    for length in LENGTHS:
        for k in (1, 2):
            count = max(0, (length - 6) // 2 + 1 - k)  # frames that can be positives, and anchors
            for drawn in range(5):  # of five; with all five there is no pair
                chance = math.comb(5, drawn) * (count - 1) ** (5 - drawn) / count**5 if count else 0.0
                expected += count * chance * math.log(6 - drawn)
                pairs += count * chance
    record = CPCEvaluator(batch_size=4).evaluate(model, data, data.test, EvaluationSettings(60, seed=0))
    assert record["loss_of_guessing"] == pytest.approx(expected / pairs, rel=5e-3)
    assert expected / pairs < math.log(6.0) - 0.05
    with torch.no_grad():
        model.predictors.layer.weight.zero_()
    record = CPCEvaluator(batch_size=4).evaluate(model, data, data.test, EvaluationSettings(3, seed=0))
    assert record["loss"] == pytest.approx(record["loss_of_guessing"])


@pytest.mark.parametrize("negatives", ["batch", "sequence", "speaker"])
def test_a_batch_without_two_frames_is_left_out(negatives: str) -> None:
    """A recording that is scored alone and is too short changes no mean; where all are, one line says so."""
    model, data = make_model(negatives), make_data()
    lengths = torch.tensor([40, 7, 40])
    split = Sequences(data.test.values[:87], lengths, {"speaker": torch.tensor([1, 0, 1])})
    batches = torch.randperm(3, generator=make_generator("cpu", 0, "evaluation", "batches")).split(2)
    assert batches[1].tolist() == [1], "the short one is alone"
    terms = contrastive_terms(model, split, num_draws=1, batch_size=2, seed=0)
    without = contrastive_terms(model, split.select(batches[0].sort().values), num_draws=1, batch_size=2, seed=0)
    assert terms.weight.tolist() == [without.weight[0], 0, without.weight[1]]
    with pytest.raises(DataError, match="none of the 1 sequences has a frame with another ahead"):
        contrastive_terms(model, split.select(torch.tensor([1])), num_draws=1, batch_size=2, seed=0)


def test_one_batch_of_everything_is_what_the_model_says_of_it() -> None:
    """Each sequence at its own place, whatever the order in which they were scored."""
    model, test, reported = make_model(num_negatives=2_000), make_data().test, []
    terms = contrastive_terms(model, test, num_draws=2, batch_size=7, seed=0, progress=reported.append)
    batch = test.padded(torch.arange(7))
    uniform = torch.rand(model.noise_shape(7), generator=torch.Generator().manual_seed(5))
    expected = model(batch.values, batch.lengths, uniform)
    for draw in (slice(0, 7), slice(7, 14)):
        assert torch.equal(terms.weight[draw], expected.weight)
        torch.testing.assert_close(terms.loss[draw], expected.loss, rtol=0.02, atol=0.0)
    assert not torch.equal(terms.loss[:7], terms.loss[7:])
    (loss,) = reported
    torch.testing.assert_close(loss.sort().values, terms.loss.view(2, 7).mean(0).sort().values)


def test_results_are_means_over_pairs() -> None:
    model, data = make_model(), make_data()
    evaluator = CPCEvaluator(batch_size=3)
    terms = contrastive_terms(model, data.test, num_draws=4, batch_size=3, seed=1)
    record = evaluator.evaluate(model, data, data.test, EvaluationSettings(4, seed=1))
    pairs = (terms.loss * terms.weight).double().sum() / terms.weight.sum()
    assert record["loss"] == pytest.approx(pairs.item(), rel=1e-5)
    for k in (1, 2):
        weights = terms.step_weights[:, k - 1].double()
        for name, values in (("loss", terms.step_losses), ("accuracy", terms.step_accuracies)):
            expected = ((values[:, k - 1] * weights).sum() / weights.sum()).item()
            assert record[f"{name}_ahead_{k}"] == pytest.approx(expected, rel=1e-5)
    assert 0.0 < record["accuracy"] < 1.0
    validated = evaluator.validate(model, data.test, seed=1)
    once = contrastive_terms(model, data.test, num_draws=1, batch_size=3, seed=1)
    assert validated["loss"] == pytest.approx(once.means()["loss"].item(), rel=1e-5)
    record |= {"num_samples": 4, "num_examples": 7}
    printed = evaluator.describe(record).splitlines()
    assert len(printed) == 4 and f"{record['loss']:.3f}" in printed[0] and "mutual information" in printed[1]


@pytest.mark.parametrize("negatives", ["batch", "sequence", "speaker"])
@pytest.mark.parametrize("bound_batch_size, limit", [(3, 3.0), (64, 7.0)])
def test_the_bound_has_negatives_of_its_own(negatives: str, bound_batch_size: int, limit: float) -> None:
    """One of each other recording of a batch, whatever the model was trained against."""
    model, data = make_model(negatives), make_data()
    evaluator = CPCEvaluator(batch_size=7, bound_batch_size=bound_batch_size)
    record = evaluator.evaluate(model, data, data.test, EvaluationSettings(4, seed=1))
    terms = contrastive_terms(model, data.test, 4, bound_batch_size, seed=1, independent=True)
    assert terms.step_guesses.exp().max().item() <= limit + 1e-4
    for k in (1, 2):
        known = terms.step_weights[:, k - 1] > 0
        bounds = (terms.step_guesses - terms.step_losses)[known, k - 1]
        assert record[f"mutual_information_ahead_{k}"] == pytest.approx(bounds.mean().item(), abs=1e-6)
    assert record["mutual_information_limit"] == pytest.approx(math.log(limit))


def test_one_recording_has_no_bound() -> None:
    data = make_data()
    record = CPCEvaluator(batch_size=7).evaluate(make_model(), data, data.test[:1], EvaluationSettings(1, seed=0))
    assert not [name for name in record if name.startswith("mutual_information")]
    described = CPCEvaluator().describe({**record, "num_samples": 1, "num_examples": 1})
    assert "mutual" not in described and len(described.splitlines()) == 4


def test_standard_error_of_a_ratio_is_that_of_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 20, (4_000, 60), generator=generator).double()
    totals = weights * (1.0 + 0.3 * torch.randn(weights.shape, generator=generator, dtype=torch.float64))
    ratios = totals.sum(1) / weights.sum(1)
    errors = torch.tensor([standard_error_of_ratio(t, w) for t, w in zip(totals[:200], weights[:200], strict=True)])
    assert errors.mean().item() == pytest.approx(ratios.std().item(), rel=0.05)
    assert math.isnan(standard_error_of_ratio(totals[0, :1], weights[0, :1]))


@pytest.mark.parametrize("negatives", ["batch", "sequence", "speaker"])
def test_the_objective_is_the_mean_over_pairs(negatives: str) -> None:
    model, objective = make_model(negatives), ContrastiveLoss()
    batch = make_data().test.padded(torch.arange(7))
    noise = objective.draw_noise(model, batch, torch.Generator().manual_seed(0))
    assert noise.shape == (7, 5) and noise.min() >= 0.0 and noise.max() < 1.0
    loss, metrics, changes = objective(model, batch, noise, {}, {})
    terms = model(batch.values, batch.lengths, noise, batch.labels)
    torch.testing.assert_close(loss, (terms.loss * terms.weight).sum() / terms.weight.sum())
    assert not changes and not any(metric.requires_grad for metric in metrics.values())
    weights = terms.step_weights.sum(0)
    accuracies = torch.stack([metrics["accuracy_ahead_1"], metrics["accuracy_ahead_2"]])
    torch.testing.assert_close(metrics["accuracy"], (accuracies * weights).sum() / weights.sum())
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0.0 for parameter in model.parameters())


@pytest.mark.parametrize("negatives", ["batch", "speaker"])
def test_a_blank_batch_has_a_pair_for_every_step(negatives: str) -> None:
    model = make_model(negatives)
    batch = ContrastiveLoss().blank_batch(model, 3)
    assert isinstance(batch, SequenceBatch)
    noise = ContrastiveLoss().draw_noise(model, batch, torch.Generator())
    assert bool((model(batch.values, batch.lengths, noise, batch.labels).step_weights > 0).all())


@pytest.mark.usefixtures("as_a_user")
def test_what_does_not_fit_is_one_line() -> None:
    vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
    with pytest.raises(ArgumentError, match="ContrastiveLoss trains a CPC, and the model is a VAE"):
        ContrastiveLoss().check_model(vae)

    class Data:
        def load(self) -> SequenceData:
            return make_data()

    wavenet = WaveNet(CategoricalOutput(), 8, 8, num_layers=2, dilation_cycle=2)
    with pytest.raises(ArgumentError, match="CPCEvaluator evaluates a CPC, and the model is a WaveNet"):
        from popgen.training.sequence_objectives import NegativeLogLikelihood

        Experiment(model=wavenet, dataset=Data(), objective=NegativeLogLikelihood(), evaluator=CPCEvaluator())
    cpc = Experiment(model=make_model(), dataset=Data(), objective=ContrastiveLoss(), evaluator=CPCEvaluator())
    for table, advice in (
        (ImageTable(shard=Shard(1, 2)), "leave --shard out"),
        (ImageTable(processes=Processes(rank=0, size=2)), "run it in one process"),
    ):
        with pytest.raises(ArgumentError, match=f"CPCEvaluator evaluates in one piece; {advice}"):
            evaluate(PreparedExperiment(cpc, make_data(), cpc.model), 1, None, step=0, table=table)
    with pytest.raises(ArgumentError, match="CPCEvaluator.batch_size must be an integer of at least 1, got 0"):
        CPCEvaluator(batch_size=0)
    with pytest.raises(ArgumentError, match="final_num_samples must be an integer of at least 1"):
        CPCEvaluator().check_num_samples("final_num_samples", 0)
    with pytest.raises(DataError, match="no label 'speaker'"):
        model = make_model("speaker")
        model.check_examples(Sequences(torch.zeros(50), torch.tensor([50])))


def test_the_standard_error_is_over_recordings_and_not_over_draws() -> None:
    """Several draws for a recording are one recording: what they come to together is what varies."""
    model, data = make_model(), make_data()
    terms = contrastive_terms(model, data.test, num_draws=9, batch_size=3, seed=1)
    record = CPCEvaluator(batch_size=3).evaluate(model, data, data.test, EvaluationSettings(9, seed=1))
    losses, pairs = (value.view(9, -1).double().sum(0) for value in (terms.loss * terms.weight, terms.weight))
    residuals, count = losses - losses.sum() / pairs.sum() * pairs, len(losses)
    expected = (count / (count - 1) * residuals.square().sum()).sqrt() / pairs.sum()
    assert record["loss_standard_error"] == pytest.approx(expected.item(), rel=1e-5)
