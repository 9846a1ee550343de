"""Log-mel features of waveforms: what a learned representation of speech has to beat."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from popgen.errors import ArgumentError, check_integer


def mel_of_hertz(frequency: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns frequencies on the mel scale of HTK, 2595 log10(1 + f / 700).

    Example:
        >>> mel_of_hertz(torch.tensor([0.0, 700.0, 4000.0]))
        tensor([   0.0000,  781.1729, 2146.0647])
    """
    return 2595.0 * torch.log10(1.0 + frequency / 700.0)


def mel_filters(sample_rate: int, num_bins: int, num_mels: int) -> Float[Tensor, "bins mels"]:
    """Returns triangular filters, equally wide on the mel scale and half overlapping, float64.

    Filter i rises from 0 at point i to 1 at point i + 1 and falls to 0 at point i + 2, in hertz, of num_mels + 2 points
    that divide the mel scale from 0 to half the sample rate equally (the HTK book, section 5.6).

    Args:
        sample_rate: in hertz.
        num_bins: frequencies from 0 to half the sample rate.
        num_mels: number of filters.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> mel_filters(sample_rate=8_000, num_bins=129, num_mels=40).shape
        torch.Size([129, 40])
    """
    check_integer("sample_rate", sample_rate, minimum=1)
    check_integer("num_bins", num_bins, minimum=2)
    check_integer("num_mels", num_mels, minimum=1)
    bins = torch.linspace(0.0, sample_rate / 2.0, num_bins, dtype=torch.float64)
    highest = mel_of_hertz(bins[-1])
    steps = torch.arange(num_mels + 2, dtype=torch.float64) / (num_mels + 1)
    points = 700.0 * (10.0 ** (steps * highest / 2595.0) - 1.0)
    below, centre, above = points[:-2], points[1:-1], points[2:]
    rising, falling = (bins[:, None] - below) / (centre - below), (above - bins[:, None]) / (above - centre)
    return torch.minimum(rising, falling).clamp_min(0.0)


class LogMel(nn.Module):
    """log of the energy of a windowed stretch of a waveform in each of several mel filters.

    Frames are unpadded, as those of an encoder: frame i sees the samples from i · hop to i · hop + window - 1, under a
    Hann window. A stretch is padded with zeros before its Fourier transform until every filter has a frequency of its
    own. Energies have a floor of 1e-8, above what rounding to 16 bits leaves, so that silence is finite.

    Args:
        sample_rate: in hertz.
        window: samples that a frame sees; the receptive field of a network to be compared with.
        hop: samples between two frames.
        num_mels: number of filters.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> log_mel = LogMel(sample_rate=8_000, window=225, hop=80)
        >>> log_mel(torch.zeros(3, 8_000)).shape
        torch.Size([3, 98, 40])
    """

    FLOOR = 1e-8
    hann: Tensor
    filters: Tensor

    def __init__(self, sample_rate: int, window: int, hop: int, num_mels: int = 40) -> None:
        super().__init__()
        self.receptive_field = check_integer("LogMel.window", window, minimum=3)
        self.hop = check_integer("LogMel.hop", hop, minimum=1)
        self.num_mels = check_integer("LogMel.num_mels", num_mels, minimum=1)
        self.transform_size = 1 << (window - 1).bit_length()
        while not (filters := mel_filters(sample_rate, self.transform_size // 2 + 1, num_mels)).any(0).all():
            self.transform_size *= 2
        hann = torch.hann_window(window, periodic=False, dtype=torch.float64)
        # Of unit energy: white noise of variance v has energy v at every frequency, whatever the window.
        self.register_buffer("hann", (hann / hann.square().sum().sqrt()).float(), persistent=False)
        self.register_buffer("filters", filters.float(), persistent=False)

    def num_frames(self, lengths: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """Returns how many frames lie wholly within the first `lengths` samples."""
        frames = torch.div(lengths - self.receptive_field, self.hop, rounding_mode="floor") + 1
        return frames.clamp_min(0)

    def forward(self, waveforms: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frames mels"]:
        """Returns the features of every frame.

        Waveforms shorter than one frame are padded with zeros to one, which `num_frames` does not count.

        Raises:
            ArgumentError: if these are not waveforms.
        """
        if waveforms.ndim != 2:
            raise ArgumentError(f"waveforms must have shape (batch, time), got {tuple(waveforms.shape)}")
        waveforms = F.pad(waveforms.to(self.hann.dtype), (0, max(0, self.receptive_field - waveforms.shape[1])))
        stretches = waveforms.unfold(1, self.receptive_field, self.hop) * self.hann
        if not len(waveforms):  # MKL's transform refuses nothing at all
            return stretches.new_empty(0, stretches.shape[1], self.filters.shape[1])
        energies = torch.fft.rfft(stretches, n=self.transform_size).abs().square()
        return (energies @ self.filters).clamp_min(self.FLOOR).log()


def stack_frames(features: Float[Tensor, "batch frames dim"], num_frames: int) -> Float[Tensor, "batch frames stacked"]:
    """Returns each frame together with the ones before it, the oldest first: the span that a causal context sees.

    Before the first frame stands the first frame itself.

    Args:
        features: shape `(batch, frames, dim)`.
        num_frames: n, how many frames make one; 1 leaves them as they are.

    Raises:
        ArgumentError: if `num_frames` is not an integer of at least 1.

    Example:
        >>> stack_frames(torch.arange(4.0).view(1, 4, 1), num_frames=3)[0]
        tensor([[0., 0., 0.],
                [0., 0., 1.],
                [0., 1., 2.],
                [1., 2., 3.]])
    """
    check_integer("num_frames", num_frames, minimum=1)
    count = features.shape[1]
    places = torch.arange(count, device=features.device)[:, None] + torch.arange(1 - num_frames, 1).to(features.device)
    return features[:, places.clamp_min(0)].flatten(2)
