"""Bits per sample against a loop over recordings, and what is shown."""

import dataclasses
import math
import types

import pytest
import torch

from popgen.datasets.sequences import SequenceBatch, SequenceData, Sequences
from popgen.distributions.codes import CategoricalOutput
from popgen.distributions.mu_law import mu_law_encode
from popgen.errors import ArgumentError, DataError
from popgen.evaluation import wavenet as evaluation
from popgen.evaluation.evaluator import EvaluationSettings
from popgen.evaluation.shown import Sound
from popgen.evaluation.spectrogram import spectrogram
from popgen.evaluation.wavenet import WaveNetEvaluator, log_densities
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.models.wavenet import WaveNet
from popgen.nn.priors import StandardNormalPrior
from popgen.training.sequence_objectives import NegativeLogLikelihood

LENGTHS = (50, 3, 120, 77)


def make_model(classes: dict[str, int] | None = None) -> WaveNet:
    torch.manual_seed(0)
    return WaveNet(CategoricalOutput(), 8, 8, num_layers=4, dilation_cycle=2, classes=classes)


def make_data() -> SequenceData:
    generator = torch.Generator().manual_seed(1)
    labels = {"digit": torch.tensor([2, 0, 1, 2]), "speaker": torch.tensor([0, 1, 1, 0])}
    split = Sequences(torch.rand(sum(LENGTHS), generator=generator) - 0.5, torch.tensor(LENGTHS), labels)
    classes = {"speaker": ("anna", "ben"), "digit": ("nought", "one", "two")}
    return SequenceData(split, split, None, window=40, classes=classes, sample_rate=1_000)


def log_density_alone(model: WaveNet, sequences: Sequences, index: int) -> torch.Tensor:
    one = sequences[index : index + 1]
    return model.log_density(mu_law_encode(one.values[None]), one.labels)[0]


@pytest.mark.parametrize("at_once", [1, 100, 32_768])
def test_recordings_count_alone_however_they_are_batched(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SAMPLES_AT_ONCE", at_once)
    model, test, reported = make_model({"digit": 3}), make_data().test, []
    found = log_densities(model, test, reported.append)
    expected = torch.stack([log_density_alone(model, test, index).double().sum() for index in range(4)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        torch.cat(reported).sort().values, (-expected / torch.tensor(LENGTHS) / math.log(2)).sort().values
    )


def test_no_batch_is_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding included: short recordings beside long ones are as long as these."""
    monkeypatch.setattr(evaluation, "SAMPLES_AT_ONCE", 1_000)
    lengths = torch.tensor([40, *[200] * 20, 1_500])
    model, batches = make_model(), []
    model.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0].shape))
    log_densities(model, Sequences(torch.rand(int(lengths.sum())) - 0.5, lengths))
    assert sum(count for count, _ in batches) == len(lengths) + 1, "the longest passes in two pieces"
    assert all(count * length <= 1_000 + model.receptive_field for count, length in batches)


def test_a_long_recording_passes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with all that it depends on before it, so that the sum is that of the whole."""
    model, longest = make_model().double(), []
    recording = Sequences(torch.rand(1_000, dtype=torch.float64) - 0.5, torch.tensor([1_000]))
    whole = log_densities(model, recording)
    monkeypatch.setattr(evaluation, "SAMPLES_AT_ONCE", 90)
    model.register_forward_pre_hook(lambda module, inputs: longest.append(inputs[0].shape[1]))
    torch.testing.assert_close(log_densities(model, recording), whole, rtol=1e-12, atol=0.0)
    assert max(longest) == 90 + model.receptive_field and len(longest) == 12


def test_silence_is_black_and_what_is_soft_is_dark() -> None:
    tone = torch.sin(0.5 * torch.arange(4_000))
    assert spectrogram(torch.zeros(4_000)).max() == 0
    loud, soft = (spectrogram(scale * tone).double().mean() for scale in (0.5, 1e-4))
    assert spectrogram(0.5 * tone).max() == spectrogram(0.05 * tone).max() == 255 and soft < 0.5 * loud


def test_results_are_means_over_samples() -> None:
    model, data = make_model(), make_data()
    evaluator = WaveNetEvaluator()
    every = torch.cat([log_density_alone(model, data.test, index) for index in range(4)]).double()
    bits = -every.mean().item() / math.log(2)
    validated = evaluator.validate(model, data.test, seed=0)
    assert validated["bits_per_sample"] == pytest.approx(bits) and validated["loss"] == pytest.approx(
        -every.mean().item()
    )
    results = evaluator.evaluate(model, data, data.test, EvaluationSettings(1, seed=0))
    assert results["bits_per_sample"] == pytest.approx(bits)
    assert 0.0 < results["bits_per_sample_standard_error"] < 1.0
    codes = mu_law_encode(data.train.values)
    frequencies = (codes.bincount(minlength=256).double() + results["unigram_bits_smoothing"]).log2()
    frequencies -= math.log2(len(codes) + 256 * results["unigram_bits_smoothing"])
    assert results["unigram_bits"] == pytest.approx(-frequencies[codes].mean().item())
    record = {**results, "num_examples": 4}
    assert f"{bits:7.3f}" in evaluator.describe(record)
    alone = evaluator.evaluate(model, data, data.test[:1], EvaluationSettings(1, seed=0))
    assert math.isnan(alone["bits_per_sample_standard_error"])


def test_baselines_are_made_of_training_recordings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data, chosen, counted = make_data(), [], []
    data = dataclasses.replace(data, train=data.train[:3])
    count = evaluation.count_contexts
    monkeypatch.setattr(evaluation, "choose_smoothing", lambda codes, order: chosen.append(len(codes)) or 0.25)
    monkeypatch.setattr(
        evaluation, "count_contexts", lambda codes, order: counted.append(len(codes)) or count(codes, order)
    )
    results = WaveNetEvaluator().evaluate(make_model(), data, data.test, EvaluationSettings(1, seed=0))
    assert chosen == counted == [3, 3]
    assert results["unigram_bits_smoothing"] == results["context_model_bits_smoothing"] == 0.25


def test_the_standard_error_is_that_of_resampled_recordings() -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(20, 60, (60,), generator=generator)
    loud = torch.rand(60, generator=generator).repeat_interleave(lengths)
    values = (torch.rand(len(loud), generator=generator) - 0.5) * loud
    data = SequenceData(Sequences(values, lengths), Sequences(values, lengths), None, 20, {}, 1_000)
    model = make_model()
    stated = WaveNetEvaluator().evaluate(model, data, data.test, EvaluationSettings(1, seed=0))[
        "bits_per_sample_standard_error"
    ]
    bits = -log_densities(model, data.test) / math.log(2)
    chosen = torch.randint(60, (4_000, 60), generator=generator)
    means = bits[chosen].sum(1) / lengths[chosen].sum(1)
    assert stated == pytest.approx(means.std().item(), rel=0.1)


def test_what_is_shown() -> None:
    model, data = make_model({"digit": 3, "speaker": 2}), make_data()
    shown = WaveNetEvaluator(seconds=0.3).show(model, data, 3, torch.Generator().manual_seed(0))
    assert list(shown) == [
        "samples",
        "recordings",
        "sample_0_anna_nought",
        "sample_1_ben_one",
        "sample_2_anna_two",
    ]
    sound = shown["sample_1_ben_one"]
    assert isinstance(sound, Sound) and sound.waveform.shape == (300,) and sound.sample_rate == 1_000
    again = WaveNetEvaluator(seconds=0.3).show(model, data, 3, torch.Generator().manual_seed(0))
    assert torch.equal(again["sample_1_ben_one"].waveform, sound.waveform)


def test_loss_leaves_padding_out() -> None:
    model, data = make_model({"digit": 3}), make_data()
    batch = data.test.padded(torch.arange(4))
    loss, metrics, changes = NegativeLogLikelihood()(model, batch, None, {}, {})
    every = torch.cat([log_density_alone(model, data.test, index) for index in range(4)])
    torch.testing.assert_close(loss, -every.mean())
    assert metrics["bits_per_sample"].item() == pytest.approx(loss.item() / math.log(2)) and not changes
    noisy = SequenceBatch(batch.values.masked_fill(batch.values == 0.0, 0.7), batch.lengths, batch.labels, batch.starts)
    torch.testing.assert_close(NegativeLogLikelihood()(model, noisy, None, {}, {})[0], loss)
    inside = batch._replace(starts=torch.tensor([0, 5, 0, 1]))
    firsts = torch.cat([torch.arange(len(log_density_alone(model, data.test, i))) == 0 for i in range(4)])
    owners = torch.cat([torch.full_like(log_density_alone(model, data.test, i), i) for i in range(4)])
    kept = ~(firsts & ((owners == 1) | (owners == 3)))
    torch.testing.assert_close(NegativeLogLikelihood()(model, inside, None, {}, {})[0], -every[kept].mean())
    assert NegativeLogLikelihood().weight(inside) == len(every) - 2
    infinite = types.SimpleNamespace(log_density=lambda codes: torch.where(batch.real, -1.0, -math.inf))
    assert NegativeLogLikelihood()(lambda codes, labels: infinite, batch, None, {}, {})[0] == 1.0


@pytest.mark.usefixtures("as_a_user")
def test_what_does_not_fit_is_one_line() -> None:
    vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
    with pytest.raises(ArgumentError, match="NegativeLogLikelihood trains a WaveNet, and the model is a VAE"):
        NegativeLogLikelihood().check_model(vae)
    with pytest.raises(ArgumentError, match="num_samples must be 1 for a WaveNet, got 5"):
        WaveNetEvaluator().check_num_samples("num_samples", 5)
    with pytest.raises(ArgumentError, match="WaveNetEvaluator.seconds must be at least 0.01, got 0"):
        WaveNetEvaluator(seconds=0)
    test = make_data().test
    make_model({"digit": 3, "speaker": 5}).check_examples(test)
    with pytest.raises(DataError, match="WaveNet.classes has 'word', but the sequences have the labels digit, speaker"):
        make_model({"word": 3}).check_examples(test)
    with pytest.raises(DataError, match=r"WaveNet.classes\['digit'\] must be at least 3 for these sequences, got 2"):
        make_model({"digit": 2}).check_examples(test)
    rows = Sequences(torch.rand(10, 28), torch.tensor([10]))
    with pytest.raises(DataError, match=r"a WaveNet takes waveforms, got steps of shape \(28,\)"):
        make_model().check_examples(rows)
