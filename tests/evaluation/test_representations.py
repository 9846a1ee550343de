"""What is probed: the frames of a model and the plain features of the same steps; and who counts as never heard."""

import dataclasses

import pytest
import torch

from popgen.datasets.sequences import SequenceData, Sequences
from popgen.errors import ArgumentError, DataError
from popgen.evaluation.log_mel import LogMel
from popgen.evaluation.representations import describe_row, probe_rows, representations, unseen_labels
from popgen.models.cpc import CPC
from popgen.nn.cpc import GRUContext, LinearPredictors, RowEncoder, StridedConvEncoder

KERNELS, STRIDES = (4, 2), (2, 1)  # frames see six steps, two apart


def make_model(seed: int, encoder: type = StridedConvEncoder) -> CPC:
    torch.manual_seed(seed)
    frames = encoder(6, KERNELS, STRIDES) if encoder is StridedConvEncoder else encoder(5, 6)
    return CPC(frames, GRUContext(6, 8), LinearPredictors(8, 6, num_steps=2))


def make_data(heard: tuple[int, ...] = (0, 1, 2), sample_rate: int | None = 1_000, features: int | None = None):
    """Returns recordings whose loudness tells the digit, and whose mean tells who speaks."""
    generator = torch.Generator().manual_seed(0)
    splits = []
    for speakers, takes in ((heard, 12), ((0, 1, 2), 5)):
        each = [(speaker, digit) for speaker in speakers for digit in range(2) for _ in range(takes)]
        values = [
            (0.1 + digit) * torch.randn(*(30,) if features is None else (30, features), generator=generator) + 8.0 * who
            for who, digit in each
        ]
        speaker, digit = torch.tensor(each).unbind(1)
        labels = {"speaker": speaker.clone(), "digit": digit.clone()}
        splits.append(Sequences(torch.cat(values), torch.full((len(each),), 30), labels))
    classes = {"speaker": ("ann", "ben", "eve"), "digit": ("0", "1")}
    return SequenceData(*splits, None, window=30, classes=classes, sample_rate=sample_rate)


def loudness(values, lengths):
    frames = values.unfold(1, 10, 5)
    return frames.std(-1, keepdim=True), torch.ones(frames.shape[:2], dtype=torch.bool)


def test_representations_are_those_of_the_model_and_of_the_steps_it_sees() -> None:
    model, untrained, data = make_model(1), make_model(2), make_data()
    batch = data.test.padded(torch.arange(4))
    lengths = torch.tensor([30, 20, 7, 5])
    found = {
        name: represent(batch.values, lengths)
        for name, represent in representations(model, untrained, data, (3,)).items()
    }
    mask = torch.arange(13) < torch.tensor([13, 8, 1, 0])[:, None]
    for features, usable in found.values():
        assert torch.equal(usable, mask) and features.shape[:2] == mask.shape
    log_mel = LogMel(1_000, window=6, hop=2)(batch.values)
    expected = {
        "context": model.represent(batch.values, lengths),
        "encoding": model.encode(batch.values),
        "log-mel, 1 frame": log_mel,
        "context, untrained": untrained.represent(batch.values, lengths),
        "encoding, untrained": untrained.encode(batch.values),
    }
    assert set(found) == {*expected, "log-mel, 3 frames"}
    for name, features in expected.items():
        torch.testing.assert_close(found[name][0], features)
    torch.testing.assert_close(found["log-mel, 3 frames"][0][:, 5], log_mel[:, 3:6].flatten(1))


def test_what_is_no_audio_is_compared_with_its_own_steps() -> None:
    model, data = make_model(1, RowEncoder), make_data(sample_rate=None, features=5)
    batch = data.test.padded(torch.arange(4))
    found = representations(model, model, data, (2,))
    torch.testing.assert_close(found["steps, 1 frame"](batch.values, batch.lengths)[0], batch.values)
    stacked = found["steps, 2 frames"](batch.values, batch.lengths)[0]
    torch.testing.assert_close(stacked[:, 1:], torch.cat([batch.values[:, :-1], batch.values[:, 1:]], dim=-1))
    waveforms = make_data(sample_rate=None)
    batch = waveforms.test.padded(torch.arange(4))
    windows = representations(make_model(1), make_model(1), waveforms)["steps, 1 frame"](batch.values, batch.lengths)[0]
    torch.testing.assert_close(windows[:, 3], batch.values[:, 6:12])


@pytest.mark.parametrize("sample_rate", [1_000, None])
def test_padding_is_in_no_frame_that_counts(sample_rate: int | None) -> None:
    """Whatever stands there, and however little: sequences too short for one frame have none, alone as well."""
    model, data = make_model(1), make_data(sample_rate=sample_rate)
    values, lengths = torch.randn(4, 30), torch.tensor([30, 20, 7, 5])
    changed = torch.where(torch.arange(30) < lengths[:, None], values, 100.0)
    for name, represent in representations(model, make_model(2), data, (3,)).items():
        (found, usable), (other, _) = represent(values, lengths), represent(changed, lengths)
        assert usable.sum(1).tolist() == [13, 8, 1, 0], name
        torch.testing.assert_close(found[usable], other[usable], msg=name)
        short, none = represent(values[3:, :5], lengths[3:])
        assert short.shape == (1, 1, found.shape[2]) and none.tolist() == [[False]], name


def test_a_speaker_never_heard_is_a_column_of_its_own() -> None:
    """The digit is told from loudness, for whoever speaks; the speaker from the mean, among those who were heard."""
    everyone, data = make_data(), make_data(heard=(0, 1))
    assert unseen_labels(data)["speaker"].tolist() == (data.test.labels["speaker"] == 2).tolist()
    assert not unseen_labels(data)["digit"].any()

    def level(values, lengths):
        frames = values.unfold(1, 10, 5)
        return frames.mean(-1, keepdim=True), torch.ones(frames.shape[:2], dtype=torch.bool)

    digit, nothing = probe_rows({"loudness": loudness, "level": level}, data, "digit")
    assert digit.accuracy > 0.95 and digit.unseen_accuracy > 0.95 and digit.dim == 1
    assert abs(nothing.accuracy - 0.5) < 0.2 and abs(nothing.unseen_accuracy - 0.5) < 0.2
    (who,) = probe_rows({"level": level}, data, "speaker")
    assert who.accuracy > 0.95 and who.unseen_accuracy is None
    (who,) = probe_rows({"level": level}, everyone, "speaker")
    assert who.accuracy > 0.95 and who.unseen_accuracy is None and "  " in describe_row(who)
    seen_alone = dataclasses.replace(data, test=data.test.select((data.test.labels["speaker"] < 2).nonzero()[:, 0]))
    (again,) = probe_rows({"loudness": loudness}, seen_alone, "digit")
    assert again.unseen_accuracy is None and again.accuracy > 0.95


def test_a_probe_never_sees_test_labels() -> None:
    """Where those are exchanged, it is wrong as often as it was right."""

    data = make_data()
    exchanged = {**data.test.labels, "digit": 1 - data.test.labels["digit"]}
    turned = dataclasses.replace(data, test=dataclasses.replace(data.test, labels=exchanged))
    (right,), (wrong,) = (probe_rows({"loudness": loudness}, one, "digit") for one in (data, turned))
    assert right.accuracy > 0.95 and wrong.accuracy == pytest.approx(1.0 - right.accuracy)
    assert wrong.strength == right.strength


def test_the_same_question_has_the_same_answer() -> None:
    data, model = make_data(heard=(0, 1)), make_model(1)
    first, again = (list(probe_rows(representations(model, make_model(2), data), data, "digit", 5)) for _ in range(2))
    assert first == again and len(first) == 7


@pytest.mark.usefixtures("as_a_user")
def test_what_does_not_fit_is_one_line() -> None:
    data, model = make_data(), make_model(1)
    with pytest.raises(ArgumentError, match="target must be one of speaker, digit, got 'word'"):
        next(probe_rows(representations(model, model, data), data, "word"))
    with pytest.raises(ArgumentError, match="stacked must be an integer of at least 1, got 0"):
        representations(model, model, data, (0,))
    only_eve = dataclasses.replace(data, test=data.test.select((data.test.labels["speaker"] == 2).nonzero()[:, 0]))
    only_eve = dataclasses.replace(
        only_eve, train=data.train.select((data.train.labels["speaker"] < 2).nonzero()[:, 0])
    )
    with pytest.raises(DataError, match="no test sequence has a speaker that training sequences have"):
        next(probe_rows(representations(model, model, only_eve), only_eve, "speaker"))
