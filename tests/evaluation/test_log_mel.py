"""Log-mel features against filters and Fourier sums written out, and what their frames see."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from popgen.errors import ArgumentError
from popgen.evaluation.log_mel import LogMel, mel_filters, mel_of_hertz, stack_frames


def triangle(frequency: float, index: int, num_mels: int, highest: float) -> float:
    """Returns the value of one filter at one frequency, by the natural logarithm and interpolation."""

    def hertz(point: int) -> float:
        mel = point / (num_mels + 1) * 1127.0104805 * math.log1p(highest / 700.0)
        return 700.0 * math.expm1(mel / 1127.0104805)

    left, centre, right = hertz(index), hertz(index + 1), hertz(index + 2)
    if left < frequency <= centre:
        return (frequency - left) / (centre - left)
    return (right - frequency) / (right - centre) if centre < frequency < right else 0.0


@pytest.mark.parametrize("sample_rate, num_bins, num_mels", [(8_000, 129, 40), (16_000, 257, 26), (8_000, 33, 1)])
def test_filters_are_triangles_on_the_mel_scale(sample_rate: int, num_bins: int, num_mels: int) -> None:
    """Bin by bin against another formula of the same scale."""
    filters = mel_filters(sample_rate, num_bins, num_mels)
    for i in range(num_bins):
        frequency = i * sample_rate / 2.0 / (num_bins - 1)
        expected = [triangle(frequency, m, num_mels, sample_rate / 2.0) for m in range(num_mels)]
        assert filters[i].tolist() == pytest.approx(expected, abs=1e-9)


def test_a_thousand_hertz_are_a_thousand_mel() -> None:
    """What the scale is defined by."""
    assert mel_of_hertz(torch.tensor(1000.0)).item() == pytest.approx(1000.0, abs=0.1)


def test_neighbouring_filters_add_to_one() -> None:
    """Between the first centre and the last."""
    filters = mel_filters(8_000, 2_049, 40)
    sums = filters.sum(1)
    between = slice(int(filters[:, 0].argmax()) + 1, int(filters[:, -1].argmax()))
    torch.testing.assert_close(sums[between], torch.ones_like(sums[between]))


def test_one_frame_by_a_fourier_sum() -> None:
    """Window, transform, energies, filters and logarithm, written out for one frame."""
    log_mel = LogMel(sample_rate=8_000, window=20, hop=7, num_mels=3)
    waveform = 0.3 * torch.randn(1, 40)
    found, size = log_mel(waveform)[0, 2], log_mel.transform_size
    window = [0.5 - 0.5 * math.cos(2.0 * math.pi * n / 19) for n in range(20)]
    norm = math.sqrt(sum(w**2 for w in window))
    samples = [w / norm * x for w, x in zip(window, waveform[0, 14:34].tolist(), strict=True)]
    for mel in range(3):
        energy = 0.0
        for k in range(size // 2 + 1):
            term = sum(x * cmath.exp(-2j * math.pi * k * n / size) for n, x in enumerate(samples))
            energy += triangle(k * 8_000 / size, mel, 3, 4_000.0) * abs(term) ** 2
        assert found[mel].item() == pytest.approx(math.log(energy), abs=1e-4)


@pytest.mark.parametrize("window, hop", [(225, 80), (465, 160), (30, 50), (3, 1)])
def test_a_frame_sees_its_own_stretch_and_no_more(window: int, hop: int) -> None:
    """As that of an encoder of the same receptive field and hop; every filter has a frequency of its own."""
    log_mel = LogMel(8_000, window, hop)
    waveform = torch.randn(1, 700).requires_grad_()
    features = log_mel(waveform)
    assert features.shape == (1, (700 - window) // hop + 1, 40)
    assert log_mel.filters.any(0).all()
    for i in range(0, features.shape[1], 5):
        (gradient,) = torch.autograd.grad(features[0, i].sum(), waveform, retain_graph=True)
        seen = gradient[0].nonzero()[:, 0]
        assert i * hop <= seen.min() <= i * hop + 1 and i * hop + window - 2 <= seen.max() < i * hop + window


def test_num_frames_counts_what_fits() -> None:
    """And shorter waveforms give one frame that is not counted."""
    log_mel = LogMel(8_000, 50, 20)
    for length in range(1, 150):
        count = int(log_mel.num_frames(torch.tensor([length])))
        frames = log_mel(torch.randn(1, length)).shape[1]
        assert (count, frames) == (0, 1) if length < 50 else count == frames
    assert log_mel(torch.zeros(0, 100)).shape == (0, 3, 40)


def test_silence_and_noise() -> None:
    """Silence is finite; white noise of unit variance has energy 1 at every frequency; a tone is where it should be."""
    log_mel = LogMel(8_000, 225, 80)
    assert torch.equal(log_mel(torch.zeros(2, 1_000)), torch.full((2, 10, 40), math.log(1e-8)))
    levels = log_mel(torch.randn(1, 400_000)).exp().mean((0, 1))
    torch.testing.assert_close(levels, log_mel.filters.sum(0), rtol=0.06, atol=0.0)
    tone = torch.sin(2.0 * math.pi * 1_000.0 * torch.arange(2_000) / 8_000.0)[None]
    centre = 2595.0 * math.log10(1.0 + 4_000.0 / 700.0) / 41.0 * (1.0 + log_mel(tone)[0, 3].argmax())
    assert abs(centre - 1_000.0) < 35.0


def test_frames_are_stacked_with_the_ones_before_them() -> None:
    """The oldest first, by loops; the first frame stands before the first."""
    features = torch.randn(2, 6, 3)
    for n in (1, 2, 4, 9):
        stacked = stack_frames(features, n)
        for t in range(6):
            expected = torch.cat([features[:, max(0, t - n + 1 + j)] for j in range(n)], dim=1)
            assert torch.equal(stacked[:, t], expected)
    assert stack_frames(torch.zeros(0, 6, 3), 2).shape == (0, 6, 6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LogMel(8_000, 1, 80), "LogMel.window must be an integer of at least 3, got 1"),
        (lambda: LogMel(8_000, 225, 0), "LogMel.hop must be an integer of at least 1, got 0"),
        (lambda: LogMel(8_000, 225, 80, 0), "LogMel.num_mels must be an integer of at least 1, got 0"),
        (lambda: LogMel(0, 225, 80), "sample_rate must be an integer of at least 1, got 0"),
        (lambda: LogMel(8_000, 225, 80)(torch.zeros(300)), r"shape \(batch, time\), got \(300,\)"),
        (lambda: stack_frames(torch.zeros(1, 2, 3), 0), "num_frames must be an integer of at least 1, got 0"),
        (lambda: mel_filters(8_000, 1, 4), "num_bins must be an integer of at least 2, got 1"),
    ],
)
def test_bad_arguments_are_named(as_a_user, call, message: str) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ArgumentError, match=message):
        call()


def test_device_and_type_follow_the_module() -> None:
    """Its tables move with it, and no state is saved."""
    log_mel = LogMel(8_000, 225, 80)
    waveform = torch.randn(1, 500)
    exact: Tensor = log_mel.double()(waveform.double())
    assert exact.dtype == torch.float64 and not log_mel.state_dict()
    torch.testing.assert_close(log_mel.float()(waveform).double(), exact, rtol=1e-4, atol=1e-4)
