"""Audio files: formats, channels and rates, what is refused and how, and folders of files."""

import contextlib
import math
import os
import pathlib
import warnings

import numpy as np
import pytest
import soundfile
import torch

from popgen.datasets.audio import WavFolder, audio_sample_rate, read_audio, read_recordings, to_pcm
from popgen.errors import ArgumentError, DataError

RATE = 8_000


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Returns 16-bit samples."""
    return np.random.default_rng(seed).integers(-(2**15), 2**15, count, dtype=np.int16)


def write(path: pathlib.Path, samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


# --- one file --------------------------------------------------------------------------------------------------------


def test_a_name_that_is_no_text(tmp_path: pathlib.Path) -> None:
    plain, odd = tmp_path / "a.wav", tmp_path / os.fsdecode(b"\xff.wav")
    soundfile.write(plain, np.full(100, 0.25), 8_000)
    odd.write_bytes(plain.read_bytes())
    assert torch.equal(read_audio(odd), read_audio(plain))


def test_sixteen_bits_are_read_and_kept_exactly(tmp_path: pathlib.Path) -> None:
    samples = np.arange(-(2**15), 2**15, dtype=np.int32).astype(np.int16)
    waveform = read_audio(write(tmp_path / "all.wav", samples))
    assert waveform.dtype == torch.float32 and waveform.shape == (2**16,)
    assert torch.equal(waveform.double(), torch.from_numpy(samples).double() / 32_768)
    assert torch.equal(to_pcm(waveform), torch.from_numpy(samples))


@pytest.mark.parametrize("subtype, tolerance", [("PCM_U8", 2**-7), ("PCM_24", 0.0), ("PCM_32", 0.0), ("FLOAT", 0.0)])
def test_other_formats(tmp_path: pathlib.Path, subtype: str, tolerance: float) -> None:
    expected = torch.from_numpy(noise(1_000)).double() / 32_768
    waveform = read_audio(write(tmp_path / "a.wav", expected.numpy(), subtype=subtype))
    torch.testing.assert_close(waveform.double(), expected, rtol=0, atol=tolerance)


def test_channels_are_averaged(tmp_path: pathlib.Path) -> None:
    channels = np.stack([noise(500, seed) for seed in range(3)], axis=1)
    waveform = read_audio(write(tmp_path / "a.wav", channels))
    expected = torch.from_numpy(channels.astype(np.float64).mean(1) / 32_768)
    torch.testing.assert_close(waveform.double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rate", [44_100, 16_000, 11_025, 6_000])
def test_resampling_keeps_a_tone(tmp_path: pathlib.Path, rate: int) -> None:
    """A tone below both Nyquist frequencies comes out as the same tone, sampled at the new rate."""
    tone = 0.5 * np.sin(2 * math.pi * 700.0 * np.arange(rate) / rate + 0.3)
    waveform = read_audio(write(tmp_path / "a.wav", tone, rate, "FLOAT"), sample_rate=RATE)
    assert waveform.shape == (RATE,)
    expected = 0.5 * torch.sin(2 * math.pi * 700.0 * torch.arange(RATE, dtype=torch.float64) / RATE + 0.3)
    torch.testing.assert_close(waveform.double()[400:-400], expected[400:-400], rtol=0, atol=2e-4)


def test_resampling_folds_nothing_back(tmp_path: pathlib.Path) -> None:
    tone = 0.5 * np.sin(2 * math.pi * 5_000.0 * np.arange(16_000) / 16_000)
    waveform = read_audio(write(tmp_path / "a.wav", tone, 16_000, "FLOAT"), sample_rate=RATE)
    assert waveform[400:-400].abs().max() < 1e-3


def test_resampling_does_not_leave_the_range(tmp_path: pathlib.Path) -> None:
    square = np.where(np.arange(4_000) // 37 % 2, 32_767, -32_768).astype(np.int16)
    waveform = read_audio(write(tmp_path / "a.wav", square, 16_000), sample_rate=RATE)
    assert waveform.abs().max() == 1.0


def test_the_rate_of_a_file(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.wav", noise(10), 22_050)
    assert audio_sample_rate(path) == 22_050
    assert len(read_audio(path)) == len(read_audio(str(path), sample_rate=22_050, resample=False)) == 10


def test_a_file_whose_size_was_never_filled_in(tmp_path: pathlib.Path) -> None:
    """Programs that write to a pipe leave the largest number where the size should be."""
    samples = noise(300)
    path = write(tmp_path / "a.wav", samples)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert torch.equal(to_pcm(read_audio(path)), torch.from_numpy(samples))


# --- what is refused -------------------------------------------------------------------------------------------------


def check_refused(path: pathlib.Path, message: str, **arguments) -> None:
    """One line that begins with the file and says what is wrong."""
    with pytest.raises(DataError, match=message) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        read_audio(path, **arguments)
    assert str(caught.value).startswith(f"{path} ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"RI", b"<html>not found</html>", bytes(4_000), b"RIFF" + bytes(40), b"\xff" * 99])
def test_what_is_no_audio(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    check_refused(path, "is not an audio file that can be read: ")


def test_no_file_and_a_folder_and_no_bytes(tmp_path: pathlib.Path) -> None:
    check_refused(tmp_path / "a.wav", "a.wav is not there")
    check_refused(tmp_path, "is not a file")
    (tmp_path / "b.wav").write_bytes(b"")
    check_refused(tmp_path / "b.wav", "b.wav is empty: it has no bytes")
    with pytest.raises(DataError, match="is not there"):
        audio_sample_rate(tmp_path / "a.wav")


def test_a_format_that_cannot_be_searched(tmp_path: pathlib.Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(1_600, 0.25), 8_000, subtype="GSM610")
    waveform = read_audio(tmp_path / "a.wav")
    assert 1_600 <= len(waveform) <= 1_920 and abs(waveform[:100].mean() - 0.25) < 0.1


def test_the_length_in_a_header_is_not_believed(tmp_path: pathlib.Path) -> None:
    """A FLAC file says how many samples it has; memory is taken for those that come."""
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(1_000), 8_000)
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F  # the upper four of 36 bits
    path.write_bytes(content)
    with soundfile.SoundFile(path) as file:
        assert file.frames > 2**35
    with contextlib.suppress(DataError):
        assert len(read_audio(path)) <= 1_000


@pytest.mark.parametrize("rate", [1, 10**9])
def test_rates_that_are_too_far_apart(tmp_path: pathlib.Path, rate: int) -> None:
    """A second of a file of 1 Hz would come to any size."""
    soundfile.write(tmp_path / "a.wav", np.zeros(1_000), rate)
    with pytest.raises(DataError, match=f"a.wav has a sample rate of {rate:,} Hz, too far from 16,000 Hz"):
        read_audio(tmp_path / "a.wav", sample_rate=16_000)


def test_more_samples_than_a_file_should_hold(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((20_000, 2)), 8_000)
    monkeypatch.setattr("popgen.datasets.audio.MAX_SAMPLES", 30_000)
    with pytest.raises(DataError, match="a.wav holds more than 30,000 samples"):
        read_audio(tmp_path / "a.wav")


def test_no_samples(tmp_path: pathlib.Path) -> None:
    check_refused(write(tmp_path / "a.wav", noise(0)), "is empty: it holds no samples")


@pytest.mark.parametrize("kept", [1_043, 1_000, 100, 44])
def test_a_file_cut_short(tmp_path: pathlib.Path, kept: int) -> None:
    path = write(tmp_path / "a.wav", noise(501))
    whole = path.read_bytes()
    assert len(whole) == 1_046
    path.write_bytes(whole[:kept])
    check_refused(path, f"is cut short: its header announces 1,046 bytes, but it has {kept:,}")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite(tmp_path: pathlib.Path, wrong: float) -> None:
    samples = np.zeros((1_000, 2))
    samples[600:, 1] = wrong
    check_refused(write(tmp_path / "a.wav", samples, RATE, "FLOAT"), "NaN or infinite samples, the first at 0.075 s")


def test_samples_outside_the_range(tmp_path: pathlib.Path) -> None:
    samples = np.linspace(-1.25, 1.0, 10)
    path = write(tmp_path / "a.wav", samples, RATE, "FLOAT")
    check_refused(path, r"samples outside \[-1, 1\], up to 1.25 in size: divide it by its peak")


def test_another_rate_where_resampling_is_off(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.wav", noise(100), 16_000)
    check_refused(path, "has a sample rate of 16,000 Hz, not 8,000", sample_rate=RATE, resample=False)


def test_too_short_to_be_resampled(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.wav", noise(1), 44_100)
    check_refused(path, "none of its 1 samples is left at 8,000 Hz", sample_rate=RATE)


def test_a_recording_shorter_than_a_window(tmp_path: pathlib.Path) -> None:
    paths = [write(tmp_path / f"{count}.wav", noise(count)) for count in (100, 99)]
    assert len(read_recordings(paths, ["a", "b"], {}, RATE, min_length=99)) == 2
    with pytest.raises(DataError, match=r'99.wav is shorter .* it has 99 samples at 8,000 Hz, not 100.*short="pad"'):
        read_recordings(paths, ["a", "b"], {}, RATE, min_length=100)


# --- folders ---------------------------------------------------------------------------------------------------------


COUNTS = {"a/1.wav": 500, "a/2.WAV": 300, "b/1.wav": 700, "b/c/1.wav": 400, "top.wav": 600, "z.wav": 350}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Six files at several depths, and two that are no WAV files."""
    for seed, (name, count) in enumerate(reversed(COUNTS.items())):
        write(tmp_path / "sounds" / name, noise(count, len(COUNTS) - 1 - seed))
    (tmp_path / "sounds" / "readme.txt").write_text("no sound")
    (tmp_path / "sounds" / "folder.wav").mkdir()
    return tmp_path / "sounds"


def all_names(data) -> dict[str, tuple[str, ...]]:
    splits = {"train": data.train, "test": data.test, "validation": data.validation}
    return {name: split.names for name, split in splits.items() if split is not None}


def test_every_file_is_in_one_split(folder: pathlib.Path) -> None:
    data = WavFolder(str(folder), window=200, test_fraction=1 / 3, validation_fraction=1 / 6).load()
    names = all_names(data)
    assert {name: len(of_split) for name, of_split in names.items()} == {"train": 3, "test": 2, "validation": 1}
    assert sorted(name for of_split in names.values() for name in of_split) == sorted(COUNTS)
    for split in (data.train, data.test, data.validation):
        assert split.names == tuple(sorted(split.names)) and split.labels == {}
        batch = split.padded(torch.arange(len(split)))
        for name, values, length in zip(split.names, batch.values, batch.lengths.tolist(), strict=True):
            assert length == COUNTS[name]
            expected = torch.from_numpy(noise(COUNTS[name], list(COUNTS).index(name))).double() / 32_768
            assert torch.equal(values[:length].double(), expected)
    assert data.sample_rate == RATE and data.window == 200 and data.classes == {}


def test_the_split_is_a_function_of_the_seed(folder: pathlib.Path) -> None:
    def split(seed: int) -> dict[str, tuple[str, ...]]:
        return all_names(WavFolder(str(folder), window=10, test_fraction=0.5, seed=seed).load())

    state = torch.get_rng_state()
    assert split(0) == split(0)
    assert len({str(split(seed)) for seed in range(8)}) > 4
    assert torch.equal(state, torch.get_rng_state())


def test_a_fraction_is_at_least_one_file(folder: pathlib.Path) -> None:
    names = all_names(WavFolder(str(folder), window=10, test_fraction=0.01, validation_fraction=0.01).load())
    assert [len(names[split]) for split in ("train", "test", "validation")] == [4, 1, 1]


def test_the_folder_is_a_label(folder: pathlib.Path) -> None:
    data = WavFolder(str(folder), window=10, label="folder", test_fraction=0.4).load()
    assert data.classes == {"folder": ("a", "b", "c", "sounds")}
    for split in (data.train, data.test):
        for name, label in zip(split.names, split.labels["folder"].tolist(), strict=True):
            assert data.classes["folder"][label] == (folder / name).parent.name


def test_files_of_other_rates(folder: pathlib.Path) -> None:
    write(folder / "b/1.wav", noise(1_400), 16_000)
    data = WavFolder(str(folder), window=10).load()
    assert data.sample_rate == RATE
    assert {
        **dict(zip(data.train.names, data.train.lengths.tolist(), strict=True)),
        **dict(zip(data.test.names, data.test.lengths.tolist(), strict=True)),
    } == COUNTS
    assert WavFolder(str(folder), window=10, sample_rate=16_000).load().train.lengths.sum() > data.train.lengths.sum()
    with pytest.raises(DataError, match=r"b/1.wav has a sample rate of 16,000 Hz, not 8,000, and resampling is off"):
        WavFolder(str(folder), window=10, resample=False).load()


def test_short_files_are_refused_or_padded(folder: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"a/2.WAV is shorter than a training window: it has 300 samples"):
        WavFolder(str(folder), window=301).load()
    data = WavFolder(str(folder), window=1_000, short="pad").load()
    batch = data.batches(5, seed=0).draw(0, torch.Generator())
    assert batch.values.shape == (5, 1_000) and (batch.lengths < 1_000).all()
    assert all(not values[length:].any() for values, length in zip(batch.values, batch.lengths.tolist(), strict=True))


def test_a_damaged_file_is_named(folder: pathlib.Path) -> None:
    (folder / "b/c/1.wav").write_bytes(b"something else")
    with pytest.raises(DataError, match="b/c/1.wav is not an audio file that can be read"):
        WavFolder(str(folder), window=10).load()


def test_folders_without_enough_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="WavFolder.data_dir must be a folder, got .*absent"):
        WavFolder(str(tmp_path / "absent")).load()
    for number in range(2):
        with pytest.raises(DataError, match=f"enough WAV files for training and test splits .*, got {number}"):
            WavFolder(str(tmp_path), window=10).load()
        write(tmp_path / f"{number}.wav", noise(100))
    assert len(WavFolder(str(tmp_path), window=10).load().train) == 1
    with pytest.raises(DataError, match="training, test and validation splits at .* validation_fraction 0.2, got 2"):
        WavFolder(str(tmp_path), window=10, validation_fraction=0.2).load()


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"data_dir": None}, ArgumentError, "WavFolder.data_dir must be a path, got None"),
        ({"window": 0}, ArgumentError, "WavFolder.window must be an integer of at least 1, got 0"),
        ({"sample_rate": 8_000.0}, ArgumentError, "WavFolder.sample_rate must be an integer"),
        ({"test_fraction": 0.0}, ArgumentError, "WavFolder.test_fraction must be above 0 and at most 1, got 0.0"),
        ({"test_fraction": 1.5}, ArgumentError, "WavFolder.test_fraction must be above 0 and at most 1, got 1.5"),
        ({"validation_fraction": -0.1}, ArgumentError, "WavFolder.validation_fraction must be at least 0 and at most"),
        ({"seed": -1}, ArgumentError, "WavFolder.seed must be an integer of at least 0, got -1"),
        ({"short": "drop"}, ArgumentError, "WavFolder.short must be one of refuse, pad, got 'drop'"),
        ({"label": "name"}, ArgumentError, "WavFolder.label must be one of folder, got 'name'"),
        ({"resample": "no"}, ArgumentError, "WavFolder.resample must be True or False, got 'no'"),
    ],
)
def test_arguments_outside_their_domain(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        WavFolder(**{"data_dir": "sounds", **arguments})
