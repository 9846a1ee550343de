"""An embedded source of sounds that needs no network: plucked strings, one at a time and in chords.

A string is a delay line whose output, averaged with its neighbours in time, goes back into it: Digital Synthesis of
Plucked-String and Drum Timbres (Karplus and Strong 1983), https://doi.org/10.2307/3680062. Its length is a fraction of
a sample more than a whole number, for which the delay line is read by interpolation: Extensions of the Karplus-Strong
Plucked-String Algorithm (Jaffe and Smith 1983), https://doi.org/10.2307/3680063.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from popgen.datasets.audio import to_pcm
from popgen.datasets.sequences import SequenceData, Sequences
from popgen.errors import ArgumentError, check_integer, check_number
from popgen.streams import make_generator

CHORDS = {"note": (0,), "fifth": (0, 7), "major": (0, 4, 7), "minor": (0, 3, 7)}  # semitones above the root
LOWEST_ROOT, NUM_ROOTS = 40, 25  # MIDI numbers: from E2, 82.4 Hz, to E4, 329.6 Hz
NOTE_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
MAX_NOTES = max(map(len, CHORDS.values()))
MIN_SAMPLE_RATE = 4_000  # Hz, eight samples in the shortest period, that of B4

MAX_DELAY = 0.05  # seconds before the first pluck
INTERVAL_RANGE = (0.5, 1.0)  # seconds from a pluck to the next
MAX_STRUM = 0.02  # seconds from one string of a chord to the next
DECAY_RANGE = (1.0, 4.0)  # seconds in which the slowest partial falls by 60 dB
SMOOTHING_RANGE = (0.02, 0.2)  # of the average in the loop: the higher, the sooner high partials die away
POSITION_RANGE = (0.1, 0.5)  # where the string is plucked, as a fraction of its length
BRIGHTNESS_RANGE = (1.0, 2.0)  # partial k begins at k^-brightness
LOUDNESS_RANGE = (0.3, 0.9)  # the peak of a recording
ATTACK, RELEASE = 0.003, 0.02  # seconds of rise and fall, so that nothing clicks

LOOP_TAPS = 6  # an average of three samples, then cubic interpolation between four
CHUNK_SIZE = 64  # recordings; bounds the working memory


@dataclasses.dataclass(frozen=True)
class PluckedStrings:
    """Plucked strings: in every recording one note or chord, plucked again every half to whole second.

    The recordings are a function of `seed` alone, and are made when they are loaded, several hundred seconds of
    sound in a second. They are kept as 16-bit samples. The labels are `chord` ("note", "fifth", "major" or "minor"),
    whose classes are balanced, and `root`, from E2 to E4, uniform and independent of it.

    Args:
        num_train: training recordings.
        num_test: test recordings.
        num_validation: validation recordings; 0 for no such split.
        seconds: of each recording.
        sample_rate: Hz.
        window: samples of a training window.
        seed: of everything random.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> data = PluckedStrings(num_train=8, num_test=4, seconds=0.5, window=2_000).load()
        >>> data.train.lengths.tolist()[:2], data.train.labels["chord"].bincount().tolist(), data.classes["chord"]
        ([4000, 4000], [2, 2, 2, 2], ('note', 'fifth', 'major', 'minor'))
    """

    num_train: int = 1_000
    num_test: int = 200
    num_validation: int = 0
    seconds: float = 2.0
    sample_rate: int = 8_000
    window: int = 4_096
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("PluckedStrings.num_train", self.num_train, minimum=1)
        check_integer("PluckedStrings.num_test", self.num_test, minimum=1)
        check_integer("PluckedStrings.num_validation", self.num_validation, minimum=0)
        check_number("PluckedStrings.seconds", self.seconds, minimum=0.1)
        check_integer("PluckedStrings.sample_rate", self.sample_rate, minimum=MIN_SAMPLE_RATE)
        check_integer("PluckedStrings.window", self.window, minimum=1)
        check_integer("PluckedStrings.seed", self.seed, minimum=0)
        if self.window > round(self.seconds * self.sample_rate):
            raise ArgumentError(
                f"PluckedStrings.window must be at most the {round(self.seconds * self.sample_rate):,} samples of a "
                f"recording, got {self.window:,}"
            )

    def load(self) -> SequenceData:
        """Returns the recordings, made now."""

        def make(count: int, stream: str) -> Sequences:
            waveforms, labels = make_recordings(count, self.seconds, self.sample_rate, self.seed, stream)
            lengths = torch.full((count,), waveforms.shape[1])
            return Sequences(to_pcm(waveforms).flatten(), lengths, labels)

        roots = range(LOWEST_ROOT, LOWEST_ROOT + NUM_ROOTS)
        return SequenceData(
            train=make(self.num_train, "train"),
            test=make(self.num_test, "test"),
            validation=make(self.num_validation, "validation") if self.num_validation else None,
            window=self.window,
            classes={
                "chord": tuple(CHORDS),
                "root": tuple(f"{NOTE_NAMES[midi % 12]}{midi // 12 - 1}" for midi in roots),
            },
            sample_rate=self.sample_rate,
        )


class _Plucks(NamedTuple):
    """Everything random about the strings of recordings; all but the last two broadcast to one shape.

    Attributes:
        midi: pitch, `(recordings, 1, notes)`.
        sounds: whether the chord has such a note, likewise.
        begin: sample at which the string is plucked, `(recordings, plucks, notes)`.
        end: sample at which it is damped, likewise.
        decay: seconds to -60 dB, `(recordings, 1, notes)`.
        smoothing: of the loop, likewise.
        position: of the pluck along the string, `(recordings, plucks, notes)`.
        brightness: `(recordings, 1, 1)`.
        phase: of the partials, `(recordings, plucks, notes, partials)`.
        loudness: peak of the recording, `(recordings, 1)`.
    """

    midi: Tensor
    sounds: Tensor
    begin: Tensor
    end: Tensor
    decay: Tensor
    smoothing: Tensor
    position: Tensor
    brightness: Tensor
    phase: Tensor
    loudness: Tensor


def make_recordings(
    num_recordings: int, seconds: float, sample_rate: int, seed: int, stream: str
) -> tuple[Float[Tensor, "recordings samples"], dict[str, Int64[Tensor, " recordings"]]]:
    """Returns waveforms in [-1, 1] and the labels `chord` and `root`, the same ones for the same arguments.

    No global random state is read or changed. Another version of torch or another processor may round differently.

    Args:
        num_recordings: how many.
        seconds: of each.
        sample_rate: Hz.
        seed: chooses the recordings.
        stream: names an independent set of recordings under the same seed.

    Example:
        >>> waveforms, labels = make_recordings(2, seconds=0.5, sample_rate=8_000, seed=0, stream="train")
        >>> waveforms.shape, sorted(labels)
        (torch.Size([2, 4000]), ['chord', 'root'])
    """
    with torch.device("cpu"):  # whatever the caller's default device
        generator = make_generator("cpu", seed, "plucked strings", stream)
        chord = torch.randperm(num_recordings, generator=generator) % len(CHORDS)
        root = torch.randint(NUM_ROOTS, (num_recordings,), generator=generator)
        waveforms = [
            _perform(
                _draw_plucks(chords, roots, seconds, sample_rate, generator), round(seconds * sample_rate), sample_rate
            )
            for chords, roots in zip(chord.split(CHUNK_SIZE), root.split(CHUNK_SIZE), strict=True)
        ]
        return torch.cat(waveforms), {"chord": chord, "root": root}


def _draw_plucks(chord: Tensor, root: Tensor, seconds: float, sample_rate: int, generator: torch.Generator) -> _Plucks:
    """Returns the plucks of recordings of some chords and roots, both `(recordings,)`."""
    num_plucks = math.ceil(seconds / INTERVAL_RANGE[0])
    num_partials = math.ceil(sample_rate / 2 / midi_frequency(LOWEST_ROOT))

    def uniform(limits: tuple[float, float], *shape: int) -> Tensor:
        noise = torch.rand(len(chord), *shape, generator=generator, dtype=torch.float64)
        return limits[0] + (limits[1] - limits[0]) * noise

    semitones = torch.tensor([[*notes, *[0] * (MAX_NOTES - len(notes))] for notes in CHORDS.values()])
    sounds = torch.arange(MAX_NOTES) < torch.tensor([[len(notes)] for notes in CHORDS.values()])
    first = uniform((0.0, MAX_DELAY), 1)
    onsets = torch.cat([first, first + uniform(INTERVAL_RANGE, num_plucks).cumsum(1)], dim=1)[:, :, None]
    strum = uniform((0.0, MAX_STRUM), num_plucks, 1) * torch.arange(MAX_NOTES)
    return _Plucks(
        midi=(LOWEST_ROOT + root[:, None] + semitones[chord])[:, None],
        sounds=sounds[chord][:, None],
        begin=((onsets[:, :-1] + strum) * sample_rate).long(),
        end=((onsets[:, 1:] + torch.zeros(MAX_NOTES, dtype=torch.float64)) * sample_rate).long(),
        decay=uniform(DECAY_RANGE, 1, MAX_NOTES),
        smoothing=uniform(SMOOTHING_RANGE, 1, MAX_NOTES),
        position=uniform(POSITION_RANGE, num_plucks, MAX_NOTES),
        brightness=uniform(BRIGHTNESS_RANGE, 1, 1),
        phase=uniform((0.0, 2.0 * math.pi), num_plucks, MAX_NOTES, num_partials),
        loudness=uniform(LOUDNESS_RANGE, 1),
    )


def _perform(plucks: _Plucks, size: int, sample_rate: int) -> Float[Tensor, "recordings {size}"]:
    """Returns the recordings, `(recordings, size)`."""
    heard = plucks.sounds & (plucks.begin < size)

    def of_heard(field: Tensor) -> Tensor:
        return field.expand(heard.shape)[heard]

    begin, length = of_heard(plucks.begin), of_heard(plucks.end - plucks.begin)
    fade = round(RELEASE * sample_rate)
    tones = pluck(
        midi_frequency(of_heard(plucks.midi).double()),
        of_heard(plucks.decay),
        of_heard(plucks.smoothing),
        partials(of_heard(plucks.position), of_heard(plucks.brightness), plucks.phase.shape[-1]),
        plucks.phase[heard],
        int(length.max()) + fade,
        sample_rate,
    )
    times = torch.arange(tones.shape[1], dtype=torch.float64)
    tones *= _rise((times + 1) / (ATTACK * sample_rate)) * _rise((length[:, None] + fade - times) / fade)

    played = torch.zeros(len(heard), size + tones.shape[1], dtype=torch.float32)
    recording = heard.nonzero()[:, 0]
    for note, (row, first) in enumerate(zip(recording.tolist(), begin.tolist(), strict=True)):
        played[row, first : first + tones.shape[1]] += tones[note]
    played = played[:, :size] * _rise(torch.arange(size, 0, -1, dtype=torch.float64) / fade)
    return played * (plucks.loudness.float() / played.abs().amax(1, keepdim=True))


def _rise(time: Tensor) -> Float[Tensor, "..."]:
    """Returns a smooth step from 0 at 0 to 1 at 1."""
    return (0.5 * math.pi * time.clamp(0.0, 1.0)).sin().square().float()


def midi_frequency(midi: Any) -> Any:
    """Returns the frequency of a MIDI number, or of a tensor of them, in equal temperament, Hz.

    Example:
        >>> midi_frequency(69), round(midi_frequency(40), 2)
        (440.0, 82.41)
    """
    return 440.0 * 2.0 ** ((midi - 69) / 12)


def partials(
    position: Float[Tensor, " notes"], brightness: Float[Tensor, " notes"], num_partials: int
) -> Float[Tensor, "notes {num_partials}"]:
    """Returns the amplitudes of the partials of plucked strings, |sin(π k position)| k^-brightness for k = 1, 2, …

    A string that is let go at half its length lacks the even ones.

    Example:
        >>> partials(torch.tensor([0.5]), torch.tensor([2.0]), 3).round(decimals=3).abs()
        tensor([[1.0000, 0.0000, 0.1110]])
    """
    k = torch.arange(1, num_partials + 1, dtype=position.dtype)
    return (math.pi * k * position[:, None]).sin().abs() * k ** -brightness[:, None]


def pluck(
    frequency: Float[Tensor, " notes"],
    decay: Float[Tensor, " notes"],
    smoothing: Float[Tensor, " notes"],
    amplitudes: Float[Tensor, "notes partials"],
    phases: Float[Tensor, "notes partials"],
    num_samples: int,
    sample_rate: int,
) -> Float[Tensor, "notes {num_samples}"]:
    """Returns the sound of plucked strings, float32; each begins at a peak of about 1.

    y_n = g [(1 - s) u_n + s / 2 (u_(n-1) + u_(n+1))], where u_n = y at n - period, by cubic interpolation, s is the
    smoothing and g = 10^(-3 period / decay). What precedes y_0, the burst of noise of Karplus and Strong, is a periodic
    function with the given partials, so that it has no mean, and no partial is missing by chance.

    Args:
        frequency: Hz, at most an eighth of the sample rate.
        decay: seconds in which the string would fall by 60 dB without smoothing.
        smoothing: s, from 0 to 0.5.
        amplitudes: of the partials; those beyond nine tenths of half the sample rate are left out.
        phases: of the partials, radians.
        num_samples: to be made.
        sample_rate: Hz.

    Raises:
        ArgumentError: if a frequency is not above 0 and at most an eighth of the sample rate.

    Example:
        >>> tone = pluck(*torch.tensor([[440.0], [2.0], [0.1]]), *torch.ones(2, 1, 5), 8_000, sample_rate=8_000)
        >>> tone.shape
        torch.Size([1, 8000])
    """
    if len(frequency) and not 0.0 < float(frequency.min()) <= float(frequency.max()) <= sample_rate / 8:
        raise ArgumentError(
            f"frequency must be above 0 and at most an eighth of the sample rate of {sample_rate} Hz, got "
            f"{frequency.min():g} to {frequency.max():g}"
        )
    period = sample_rate / frequency.double()
    delay = period.floor().long() - 2  # the average looks one sample ahead, and so does the interpolation
    taps = (
        _loop_filter(period - period.floor(), smoothing.double())
        * 10.0 ** (-3.0 * period / (decay * sample_rate))[:, None]
    )
    weights = taps.float()[:, :, None].unbind(1)
    reach = LOOP_TAPS - 1
    past, block = int(delay.max()) + reach, int(delay.min())

    num_blocks = math.ceil(num_samples / block)
    played = torch.empty(len(frequency), past + num_blocks * block, dtype=torch.float32)
    played[:, :past] = _burst(period, amplitudes, phases, past)
    # As many samples as the shortest delay has depend on what is already there alone.
    sources = past - delay[:, None] - reach + torch.arange(block + reach)
    for first in range(0, num_blocks * block, block):
        source = played.gather(1, sources + first)
        out = weights[0] * source[:, reach:]
        for k in range(1, LOOP_TAPS):
            out += weights[k] * source[:, reach - k : reach - k + block]
        played[:, past + first : past + first + block] = out
    return played[:, past : past + num_samples]


def _loop_filter(fraction: Tensor, smoothing: Tensor) -> Float[Tensor, "notes taps"]:
    """Returns filters that average three neighbours and delay by two samples and a fraction, `(notes, LOOP_TAPS)`."""
    nodes = range(4)
    shift = 1.0 + fraction
    # Lagrange's cubic, used between its middle nodes, where it amplifies nothing.
    cubic = torch.stack(
        [math.prod([(shift - j) / (k - j) for j in nodes if j != k], start=torch.ones_like(shift)) for k in nodes],
        dim=1,
    )
    average = torch.stack([0.5 * smoothing, 1.0 - smoothing, 0.5 * smoothing], dim=1)
    return torch.stack([F.pad(average[:, i : i + 1] * cubic, (i, 2 - i)) for i in range(3)]).sum(0)


def _burst(period: Tensor, amplitudes: Tensor, phases: Tensor, size: int) -> Float[Tensor, "notes {size}"]:
    """Returns the last `size` samples before the start of a periodic function, at a peak of about 1."""
    k = torch.arange(1, amplitudes.shape[1] + 1)
    amplitudes = torch.where(k < 0.45 * period[:, None], amplitudes, 0.0)
    cycles = torch.arange(-size, 0) / period[:, None]
    angles = 2.0 * math.pi * (cycles[:, :, None] * k).remainder(1.0).float() + phases.float()[:, None]
    burst = (angles.cos() @ amplitudes.float()[:, :, None]).squeeze(2)
    last_period = cycles >= -1.0  # earlier samples are there for the sake of lower strings
    return burst / (burst.abs() * last_period).amax(1, keepdim=True)
