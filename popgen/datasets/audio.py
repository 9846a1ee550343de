"""Recordings read from files, and a dataset that is a folder of them."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import soundfile
import soxr
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from popgen.datasets.sequences import SCALES, SequenceData, Sequences
from popgen.errors import (
    DataError,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_path,
    reason_of,
)
from popgen.streams import make_generator

SHORT = ("refuse", "pad")
FRAMES_IN_BLOCK = 2**14
MAX_SAMPLES = 2**31  # as many as the largest WAV file has
MAX_RATIO = 256  # of sample rates


def audio_sample_rate(path: str | os.PathLike) -> int:
    """Returns the sample rate of a file, Hz.

    Raises:
        DataError: if the file is missing or is no audio that can be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "silence.wav"
        ...     soundfile.write(path, np.zeros(100), 16_000)
        ...     audio_sample_rate(path)
        16000
    """
    with _open(pathlib.Path(path)) as file:
        return file.samplerate


def read_audio(
    path: str | os.PathLike, sample_rate: int | None = None, resample: bool = True
) -> Float[Tensor, " samples"]:
    """Returns the waveform of a file in [-1, 1], float32; several channels are averaged.

    Args:
        path: of a WAV file, or of another format that libsndfile reads.
        sample_rate: that the waveform is to have, Hz; None for that of the file.
        resample: whether a file of another rate is resampled (by the SoX resampler, high quality; what it overshoots
            is clipped) or refused.

    Raises:
        DataError: if the file is missing, cut short or no audio that can be read; holds nothing, what is not finite or
            what lies outside [-1, 1]; or has another rate and may not be resampled.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "stereo.wav"
        ...     soundfile.write(path, np.full((100, 2), [0.5, -0.25]), 16_000)
        ...     read_audio(path)[:2], read_audio(path, sample_rate=8_000).shape
        (tensor([0.1250, 0.1250]), torch.Size([50]))
    """
    path = pathlib.Path(path)
    with _open(path) as file:
        rate = file.samplerate
        if sample_rate is not None and rate != sample_rate and not resample:
            raise DataError(
                f"{path} has a sample rate of {rate:,} Hz, not {sample_rate:,}, and resampling is off: resample it, "
                "or turn resampling on"
            )
        ratio = 1.0 if sample_rate is None else sample_rate / rate
        if not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
            raise DataError(f"{path} has a sample rate of {rate:,} Hz, too far from {sample_rate:,} Hz to be resampled")
        channels = _read_frames(path, file)
    if len(channels) == 0:
        raise DataError(f"{path} is empty: it holds no samples")
    if not np.isfinite(channels).all():
        frame = int((~np.isfinite(channels)).any(1).argmax())
        raise DataError(f"{path} holds NaN or infinite samples, the first at {frame / rate:.3f} s")
    peak = float(np.abs(channels).max())
    if peak > 1.0:
        raise DataError(f"{path} holds samples outside [-1, 1], up to {peak:.4g} in size: divide it by its peak")
    waveform = channels.mean(1) if channels.shape[1] > 1 else channels[:, 0]
    if sample_rate is not None and rate != sample_rate:
        waveform = soxr.resample(waveform, rate, sample_rate, quality="HQ").clip(-1.0, 1.0)
        if len(waveform) == 0:
            raise DataError(f"{path} is too short: none of its {len(channels)} samples is left at {sample_rate:,} Hz")
    return torch.from_numpy(np.ascontiguousarray(waveform))


def _read_frames(path: pathlib.Path, file: soundfile.SoundFile) -> np.ndarray:
    """Returns the samples of an open file, `(frames, channels)`, for which no header is believed how many there are."""
    blocks = [np.empty((0, file.channels), np.float32)]
    frames = 0
    try:
        while len(block := file.read(FRAMES_IN_BLOCK, dtype="float32", always_2d=True)):
            blocks.append(block)
            frames += len(block)
            if frames * file.channels > MAX_SAMPLES:
                raise DataError(f"{path} holds more than {MAX_SAMPLES:,} samples: cut it into several files")
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read: {_reason(error)}") from error
    return np.concatenate(blocks)


def _open(path: pathlib.Path) -> soundfile.SoundFile:
    """Returns an open file whose size is what its header announces."""
    if not path.is_file():
        raise DataError(f"{path} is not there" if not path.exists() else f"{path} is not a file")
    try:
        with path.open("rb") as file:
            header = file.read(8)
        if not header:
            raise DataError(f"{path} is empty: it has no bytes")
        opened = soundfile.SoundFile(os.fsencode(path))  # a name need not be text
    except (OSError, soundfile.LibsndfileError) as error:
        raise DataError(f"{path} is not an audio file that can be read: {_reason(error)}") from error
    # libsndfile makes do with a data chunk that is cut short, and reads what is there.
    announced, size = 8 + int.from_bytes(header[4:], "little"), path.stat().st_size
    streamed = announced >= 2**31  # written by a program that could not go back to fill in the size
    if header.startswith(b"RIFF") and not streamed and announced > size + 1:  # some leave a last byte of padding out
        opened.close()
        raise DataError(f"{path} is cut short: its header announces {announced:,} bytes, but it has {size:,}")
    return opened


def _reason(error: Exception) -> str:
    """Returns what libsndfile says, without the path that it begins with."""
    return reason_of(error, error.error_string if isinstance(error, soundfile.LibsndfileError) else None)


def to_pcm(waveform: Float[Tensor, "*samples"]) -> Int16[Tensor, "*samples"]:
    """Returns a waveform in [-1, 1] as 16-bit samples; those that came from a file of 16 bits are its own.

    Example:
        >>> to_pcm(torch.tensor([-1.0, 0.0, 0.5, 1.0]))
        tensor([-32768,      0,  16384,  32767], dtype=torch.int16)
    """
    return (waveform * SCALES[torch.int16]).round().clamp(-32_768, 32_767).to(torch.int16)


def read_recordings(
    paths: Sequence[pathlib.Path],
    names: Sequence[str],
    labels: Mapping[str, Sequence[int]],
    sample_rate: int,
    resample: bool = True,
    min_length: int = 1,
) -> Sequences:
    """Returns recordings as 16-bit samples.

    Args:
        paths: of the files.
        names: one for each file.
        labels: each with an integer for each file.
        sample_rate: that all are to have, Hz.
        resample: whether a file of another rate is resampled or refused.
        min_length: samples that a recording must have.

    Raises:
        DataError: as `read_audio`, and if a recording is shorter than `min_length`.

    Example: `WavFolder` and `popgen.datasets.spoken_digits.SpokenDigits` call it.
    """
    recordings = []
    for path in paths:
        waveform = read_audio(path, sample_rate, resample)
        if len(waveform) < min_length:
            raise DataError(
                f"{path} is shorter than a training window: it has {len(waveform):,} samples at {sample_rate:,} Hz, "
                f'not {min_length:,}. Choose a smaller window, or short="pad"'
            )
        recordings.append(to_pcm(waveform))
    return Sequences(
        torch.cat(recordings) if recordings else torch.empty(0, dtype=torch.int16),
        torch.tensor([len(recording) for recording in recordings], dtype=torch.int64),
        {label: torch.tensor(values, dtype=torch.int64) for label, values in labels.items()},
        tuple(names),
    )


@dataclasses.dataclass(frozen=True)
class WavFolder:
    """The WAV files of a folder and of the folders in it, mixed to one channel and kept as 16-bit samples.

    The files, sorted by their paths, are split at random into training, test and validation files; the split is a
    function of the paths and `seed` alone.

    Args:
        data_dir: the folder.
        window: samples of a training window.
        sample_rate: Hz; None for that of the first file.
        resample: whether files of another rate are resampled or refused.
        test_fraction: of the files, rounded to at least one file.
        validation_fraction: likewise; 0 for no validation split.
        seed: of the split.
        short: what becomes of a file that is shorter than a window: "refuse" or "pad".
        label: "folder" makes the name of the folder that holds a file its label `folder`; None for no labels.

    Raises:
        ArgumentError: if an argument is outside its domain.
        DataError: by `load()`, if there are too few files or one of them cannot be used; the message names it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("a", "b", "c"):
        ...         soundfile.write(f"{folder}/{name}.wav", np.zeros(500), 8_000)
        ...     data = WavFolder(folder, window=100).load()
        >>> len(data.train), len(data.test), data.sample_rate
        (2, 1, 8000)
    """

    data_dir: str
    window: int = 4_096
    sample_rate: int | None = None
    resample: bool = True
    test_fraction: float = 0.1
    validation_fraction: float = 0.0
    seed: int = 0
    short: str = "refuse"
    label: str | None = None

    def __post_init__(self) -> None:
        check_path("WavFolder.data_dir", self.data_dir)
        check_integer("WavFolder.window", self.window, minimum=1)
        if self.sample_rate is not None:
            check_integer("WavFolder.sample_rate", self.sample_rate, minimum=1)
        check_flag("WavFolder.resample", self.resample)
        check_number("WavFolder.test_fraction", self.test_fraction, above=0.0, maximum=1.0)
        check_number("WavFolder.validation_fraction", self.validation_fraction, minimum=0.0, maximum=1.0)
        check_integer("WavFolder.seed", self.seed, minimum=0)
        check_choice("WavFolder.short", self.short, SHORT)
        if self.label is not None:
            check_choice("WavFolder.label", self.label, ("folder",))

    def load(self) -> SequenceData:
        """Returns the recordings.

        Raises:
            DataError: if there are too few files or one of them cannot be used.
        """
        folder = pathlib.Path(self.data_dir).absolute()
        if not folder.is_dir():
            raise DataError(f"WavFolder.data_dir must be a folder, got {self.data_dir}")
        found = (path for path in folder.rglob("*") if path.suffix.lower() == ".wav" and path.is_file())
        files = sorted((path.relative_to(folder).as_posix(), path) for path in found)
        counts = {
            "test": max(1, round(self.test_fraction * len(files))),
            "validation": max(1, round(self.validation_fraction * len(files))) if self.validation_fraction else 0,
        }
        if len(files) <= sum(counts.values()):
            splits = "training and test" if counts["validation"] == 0 else "training, test and validation"
            raise DataError(
                f"{self.data_dir} must hold enough WAV files for {splits} splits at test_fraction "
                f"{self.test_fraction:g} and validation_fraction {self.validation_fraction:g}, got {len(files)}"
            )
        sample_rate = self.sample_rate or audio_sample_rate(files[0][1])
        folders = sorted({path.parent.name for _, path in files})
        labels = {"folder": [folders.index(path.parent.name) for _, path in files]} if self.label else {}
        recordings = read_recordings(
            [path for _, path in files],
            [name for name, _ in files],
            labels,
            sample_rate,
            self.resample,
            self.window if self.short == "refuse" else 1,
        )
        order = torch.randperm(len(files), generator=make_generator("cpu", self.seed, "split of files"))
        sizes = [counts["test"], counts["validation"], len(files) - sum(counts.values())]
        test, validation, train = (recordings.select(part.sort().values) for part in order.split(sizes))
        return SequenceData(
            train,
            test,
            validation if counts["validation"] else None,
            self.window,
            {"folder": tuple(folders)} if self.label else {},
            sample_rate,
        )
