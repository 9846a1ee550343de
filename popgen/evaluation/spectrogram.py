"""Spectrograms of waveforms, as pictures."""

import torch
from jaxtyping import Float
from torch import Tensor

from popgen.evaluation.shown import Picture

WINDOW, HOP = 256, 64  # samples
RANGE = 80.0  # dB below the loudest that are told from black
AUDIBLE = 0.0  # dB of what is white, at least; a tone at full scale has 36


@torch.no_grad()
def spectrogram(waveform: Float[Tensor, " time"]) -> Picture:
    """Returns the magnitudes of a waveform over time, in decibels: low frequencies below, loud is white.

    White is the loudest of the waveform; but of one that is nearly silent, what would be loud in another.

    Args:
        waveform: shape `(time,)`; a column of the picture is 64 samples, a row is 1/256 of the sample rate.

    Example:
        >>> spectrogram(torch.sin(torch.arange(6_400) * 0.5)).shape
        torch.Size([129, 101])
    """
    waveform = waveform.detach().cpu().float()
    magnitudes = torch.stft(
        waveform, WINDOW, HOP, window=torch.hann_window(WINDOW), pad_mode="constant", return_complex=True
    ).abs()
    decibels = 20.0 * magnitudes.clamp_min(1e-6).log10()
    loudest = decibels.max().clamp_min(AUDIBLE)
    levels = (decibels - loudest + RANGE).clamp_min(0.0) * (255.0 / RANGE)
    return levels.flip(0).round().to(torch.uint8)
