"""Laws of plucked strings: in tune, decaying, without clicks and mean, reproducible, and what their labels say."""

import math

import pytest
import torch
from torch import Tensor

from popgen.datasets.plucked_strings import (
    CHORDS,
    LOUDNESS_RANGE,
    LOWEST_ROOT,
    NUM_ROOTS,
    PluckedStrings,
    _loop_filter,
    make_recordings,
    midi_frequency,
    partials,
    pluck,
)
from popgen.errors import ArgumentError


def one_string(frequency: float, decay: float, smoothing: float, sample_rate: int = 8_000) -> Tensor:
    """Returns two seconds of a string plucked at three tenths of its length, `(samples,)`."""
    amplitudes = partials(torch.tensor([0.3]), torch.tensor([1.0]), 60)
    phases = torch.rand(1, 60, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    settings = (torch.tensor([value]) for value in (frequency, decay, smoothing))
    return pluck(*settings, amplitudes, phases, 2 * sample_rate, sample_rate)[0]


def cents_off(sound: Tensor, frequency: float, sample_rate: int) -> float:
    """Returns how far the strongest component within a semitone of a frequency is from it."""
    size = 2**18
    spectrum = torch.fft.rfft(sound.double() * torch.hann_window(len(sound), dtype=torch.float64), n=size).abs()
    bins = torch.arange(len(spectrum)) * sample_rate / size
    near = (bins > frequency * 2 ** (-1 / 12)) & (bins < frequency * 2 ** (1 / 12))
    found = bins[near][spectrum[near].argmax()].item()
    return 1_200 * math.log2(found / frequency)


# --- one string ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_rate", [4_000, 8_000, 16_000])
@pytest.mark.parametrize("midi", [40, 47, 52.37, 64, 71])
@pytest.mark.parametrize("smoothing", [0.02, 0.2])
def test_a_string_is_in_tune(midi: float, sample_rate: int, smoothing: float) -> None:
    """The fundamental, and the second and third partials, whose delay the interpolation must not change either."""
    frequency = midi_frequency(midi)
    sound = one_string(frequency, 3.0, smoothing, sample_rate)
    assert abs(cents_off(sound, frequency, sample_rate)) < 3.0
    if frequency < sample_rate / 40:
        assert abs(cents_off(sound, 2 * frequency, sample_rate)) < 3.0
        assert abs(cents_off(sound, 3 * frequency, sample_rate)) < 3.0


@pytest.mark.parametrize("frequency", [82.0, 200.0, 493.0])
@pytest.mark.parametrize("decay", [1.0, 3.0])
def test_a_string_decays_as_it_says(frequency: float, decay: float) -> None:
    """Without smoothing, all of it falls by 60 dB in `decay` seconds, but for what the interpolation absorbs."""
    size = 2_400
    sound = one_string(frequency, decay, 0.0).double()
    window = torch.hann_window(size, dtype=torch.float64) * torch.exp(
        -2j * math.pi * frequency / 8_000 * torch.arange(size)
    )
    first, last = ((sound[start : start + size] * window).sum().abs() for start in (0, 8_000))
    found = 20 * math.log10(first / last)
    assert found == pytest.approx(60.0 / decay, rel=0.12)


def test_high_partials_die_first() -> None:
    def share_above(part: Tensor, frequency: float) -> float:
        """Returns the share of the power above a frequency."""
        spectrum = torch.fft.rfft(part.double() * torch.hann_window(len(part)).double()).abs().square()
        return (spectrum[int(frequency / 8_000 * len(part)) :].sum() / spectrum.sum()).item()

    sound = one_string(110.0, 4.0, 0.2)
    shares = [share_above(sound[start : start + 2_000], 500.0) for start in (0, 4_000, 14_000)]
    assert shares[0] > 3 * shares[1] > 9 * shares[2] > 0


def test_a_string_starts_loud_and_has_no_mean() -> None:
    for frequency in (82.41, 123.4, 300.0, 490.0):
        sound = one_string(frequency, 2.0, 0.1)
        assert 0.6 < sound[:200].abs().max() <= 1.05
        assert sound.mean().abs() < 2e-3 * sound.square().mean().sqrt() + 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loop_amplifies_nothing_and_delays_by_two_samples_and_a_fraction(smoothing: float) -> None:
    fraction = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    taps = _loop_filter(fraction, torch.full((50,), smoothing, dtype=torch.float64))
    frequencies = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    response = taps.to(torch.complex128) @ torch.exp(-1j * torch.arange(6)[:, None] * frequencies)
    torch.testing.assert_close(response[:, 0], torch.ones(50, dtype=torch.complex128))
    assert response.abs().max() < 1.0 + 1e-12
    low = 20  # a tenth of the Nyquist frequency
    delay = -response[:, 1:low].angle() / frequencies[1:low]
    torch.testing.assert_close(delay, (2.0 + fraction)[:, None].expand_as(delay), rtol=0, atol=2e-3)


def test_strings_do_not_hear_each_other() -> None:
    """A string sounds the same alone as beside others, whose delays set the size of the blocks."""
    frequencies = torch.tensor([82.5, 210.0, 490.0])
    settings = (frequencies, torch.full((3,), 2.0), torch.full((3,), 0.1), torch.ones(3, 8), torch.rand(3, 8))
    together = pluck(*settings, 3_000, 8_000)
    for index in range(3):
        alone = pluck(*(setting[index : index + 1] for setting in settings), 3_000, 8_000)
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-5)


def test_partials() -> None:
    """At a third of the length every third partial is missing."""
    amplitudes = partials(torch.tensor([1 / 3]), torch.tensor([0.0]), 6)[0]
    torch.testing.assert_close(amplitudes, torch.tensor([1.0, 1.0, 0.0] * 2) * math.sin(math.pi / 3), atol=1e-6, rtol=0)
    brighter, darker = partials(torch.tensor([0.3, 0.3]), torch.tensor([1.0, 2.0]), 4)
    torch.testing.assert_close(brighter / darker, torch.arange(1.0, 5.0))


@pytest.mark.parametrize("frequency", [-1.0, 0.0, 1_001.0, math.nan])
def test_frequencies_out_of_reach(frequency: float) -> None:
    one = torch.ones(1)
    with pytest.raises(ArgumentError, match="frequency must be above 0 and at most an eighth"):
        pluck(torch.tensor([frequency]), one, 0 * one, one[None], one[None], 100, 8_000)


# --- recordings ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recordings() -> tuple[Tensor, dict[str, Tensor]]:
    """A hundred recordings of two seconds."""
    return make_recordings(100, 2.0, 8_000, seed=0, stream="train")


def test_recordings_are_sound(recordings: tuple[Tensor, dict[str, Tensor]]) -> None:
    sound, _ = recordings
    assert sound.shape == (100, 16_000) and sound.isfinite().all()
    peaks = sound.abs().amax(1)
    assert LOUDNESS_RANGE[0] - 1e-6 <= peaks.min() < 0.4 and 0.8 < peaks.max() <= LOUDNESS_RANGE[1] + 1e-6
    assert (sound.mean(1).abs() < 0.02 * sound.square().mean(1).sqrt()).all()


def test_nothing_clicks(recordings: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Recordings begin and end in silence; what lies above nine tenths of the Nyquist frequency is faint everywhere."""
    sound, _ = recordings
    assert sound[:, 0].abs().max() < 0.03 and sound[:, -1].abs().max() < 1e-3
    spectra = torch.stft(sound, 128, 32, window=torch.hann_window(128), return_complex=True, center=False).abs()
    loudest = spectra.amax((1, 2))
    assert (spectra[:, 60:].amax((1, 2)) < 0.01 * loudest).all()
    times = torch.arange(16_000)
    clicking = torch.where(times < sound.abs().argmax(1, keepdim=True), sound, -sound)
    spectra = torch.stft(clicking, 128, 32, window=torch.hann_window(128), return_complex=True, center=False).abs()
    assert (spectra[:, 60:].amax((1, 2)) > 0.02 * loudest).all(), "the test hears a click"


def test_labels_say_what_sounds() -> None:
    """Every note of the chord is in tune, and the third that tells major from minor is the right one."""
    sound, labels = make_recordings(60, 0.5, 8_000, seed=0, stream="train")  # too short for a second pluck
    kinds = list(CHORDS)
    for index in range(60):
        root, kind = LOWEST_ROOT + int(labels["root"][index]), kinds[int(labels["chord"][index])]
        for semitones in CHORDS[kind]:
            assert abs(cents_off(sound[index], midi_frequency(root + semitones), 8_000)) < 10.0
        if kind in ("major", "minor"):
            power = {third: strength(sound[index], midi_frequency(root + third)) for third in (3, 4)}
            assert (power[4] > 3 * power[3]) == (kind == "major")


def strength(sound: Tensor, frequency: float) -> float:
    """Returns the amplitude at a frequency."""
    window = torch.hann_window(len(sound), dtype=torch.float64)
    times = torch.arange(len(sound), dtype=torch.float64) / 8_000
    return (sound.double() * window * torch.exp(-2j * math.pi * frequency * times)).sum().abs().item()


def test_labels_are_balanced_and_independent() -> None:
    _, labels = make_recordings(1_003, 0.1, 4_000, seed=0, stream="train")
    chords = labels["chord"].bincount(minlength=4)
    assert chords.max() - chords.min() <= 1
    assert (labels["chord"][1:] == labels["chord"][:-1]).float().mean().item() == pytest.approx(0.25, abs=0.07)
    roots = labels["root"].bincount(minlength=NUM_ROOTS)
    assert len(roots) == NUM_ROOTS and ((roots - 40.1).abs() < 5 * 40.1**0.5).all()


def test_each_pluck_is_louder_than_what_is_left_of_the_last(recordings: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Each recording of two seconds has at least two and at most four plucks."""
    sound, _ = recordings
    loudness = sound.unfold(1, 400, 200).square().mean(2).sqrt()
    onsets = ((loudness[:, 2:] > 1.2 * loudness[:, :-2]) & (loudness[:, 2:] > 0.1 * loudness.amax(1, True))).float()
    starts = (onsets.diff(dim=1) > 0).sum(1)
    assert (starts >= 1).float().mean() > 0.9 and starts.max() <= 4


# --- the dataset -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_samples() -> None:
    state = torch.get_rng_state()
    first, second = (make_recordings(70, 0.6, 8_000, seed=3, stream="train") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in ("chord", "root"))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(make_recordings(70, 0.6, 8_000, seed=3, stream="train")[0], first[0])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("seed, stream", [(4, "train"), (3, "test"), (33, "train")])
def test_other_seeds_and_streams_give_others(seed: int, stream: str) -> None:
    first, other = make_recordings(70, 0.6, 8_000, 3, "train")[0], make_recordings(70, 0.6, 8_000, seed, stream)[0]
    both = torch.cat([first, other])
    assert len(both.unique(dim=0)) == 140
    unit = both[:, :4_000] / both[:, :4_000].norm(dim=1, keepdim=True)
    similar = (unit @ unit.T - torch.eye(140)).abs()
    assert similar.max() < 0.97


def test_the_dataset() -> None:
    description = PluckedStrings(num_train=20, num_test=8, num_validation=4, seconds=0.75, window=3_000, seed=1)
    data = description.load()
    assert (len(data.train), len(data.test), len(data.validation)) == (20, 8, 4)
    assert data.train.lengths.tolist() == [6_000] * 20 and data.train.values.dtype == torch.int16
    assert data.classes["chord"] == tuple(CHORDS)
    names = data.classes["root"]
    assert len(names) == NUM_ROOTS and (names[0], names[8], names[-1]) == ("E2", "C3", "E4")
    sound, labels = make_recordings(8, 0.75, 8_000, seed=1, stream="test")
    batch = data.test.padded(torch.arange(8))
    torch.testing.assert_close(batch.values, sound, rtol=0, atol=0.6 / 32_768)
    assert torch.equal(batch.labels["root"], labels["root"])
    firsts = [split.padded(torch.arange(4)).values for split in (data.train, data.test, data.validation)]
    assert not torch.equal(firsts[0], firsts[1]) and not torch.equal(firsts[1], firsts[2])
    assert torch.equal(description.load().train.values, data.train.values)
    assert PluckedStrings(num_train=4, num_test=4).load().validation is None


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_train": 0}, "PluckedStrings.num_train must be an integer of at least 1, got 0"),
        ({"num_test": 0}, "PluckedStrings.num_test must be an integer of at least 1, got 0"),
        ({"num_validation": -1}, "PluckedStrings.num_validation must be an integer of at least 0, got -1"),
        ({"seconds": 0.01}, "PluckedStrings.seconds must be at least 0.1, got 0.01"),
        ({"sample_rate": 2_000}, "PluckedStrings.sample_rate must be an integer of at least 4000, got 2000"),
        ({"window": 0}, "PluckedStrings.window must be an integer of at least 1, got 0"),
        ({"window": 16_001}, "PluckedStrings.window must be at most the 16,000 samples of a recording, got 16,001"),
        ({"seed": 1.5}, "PluckedStrings.seed must be an integer of at least 0, got 1.5"),
    ],
)
def test_arguments_outside_their_domain(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        PluckedStrings(**arguments)
