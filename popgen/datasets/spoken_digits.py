"""The Free Spoken Digit Dataset: six speakers say the digits, fifty times each."""

import dataclasses
import hashlib
import http.client
import os
import pathlib
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from typing import IO, NamedTuple

import torch

from popgen.datasets.audio import SHORT, read_recordings
from popgen.datasets.data import DOWNLOAD_TIMEOUT_SECONDS, data_folder
from popgen.datasets.sequences import SequenceData, Sequences
from popgen.errors import ArgumentError, DataError, check_choice, check_integer, check_number, check_path, reason_of
from popgen.files import new_folder

SAMPLE_RATE = 8_000
NUM_TEST_TAKES = 5  # the test split that the dataset's authors chose
DIGITS = tuple("0123456789")
FILE_NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.wav")

ARCHIVE_URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/v1.0.10.tar.gz"
ARCHIVE_NUM_FILES = 3_000
ARCHIVE_SHA256 = "933b9925827ff2bdebc6156b55363e4a81edf799bda57a4422b3c619e1be1258"  # as `content_sha256` forms it
ARCHIVE_MAX_BYTES = 200 * 2**20  # ten times its size: what is longer is not the archive
MEMBER_MAX_BYTES = 2**20  # the longest recording has 40 kB


class Recording(NamedTuple):
    """What the name of a file says.

    Example:
        >>> Recording.parse("7_jackson_32.wav")
        Recording(digit=7, speaker='jackson', take=32)
    """

    digit: int
    speaker: str
    take: int

    @staticmethod
    def parse(name: str) -> "Recording":
        """Returns what a name says.

        Raises:
            DataError: if it is not {digit}_{speaker}_{take}.wav.
        """
        match = FILE_NAME.fullmatch(name)
        if match is None:
            raise DataError(f"recordings must be named {{digit}}_{{speaker}}_{{take}}.wav, got {name}")
        return Recording(int(match[1]), match[2], int(match[3]))


@dataclasses.dataclass(frozen=True)
class SpokenDigits:
    """Spoken digits, 8 kHz: 2,700 training and 300 test recordings of 0.14 to 2.3 seconds, 22 minutes in all.

    The Free Spoken Digit Dataset, version 1.0.10 (Jackson et al.,
    https://github.com/Jakobovski/free-spoken-digit-dataset, CC BY-SA 4.0). Takes 0 to 4 of every digit by every speaker
    are its authors' test split. The labels are `speaker`, in alphabetical order, and `digit`.

    Args:
        data_dir: holds, or receives, `spoken_digits/recordings/`; or holds `recordings/`. Default `$POPGEN_DATA`, or
            `data`.
        window: samples of a training window; three recordings in four are shorter than the default.
        short: what becomes of a recording that is shorter than a window: "pad" or "refuse".
        validation_takes: of every digit by every speaker to hold out, those after the test takes.
        held_out_speaker: a speaker to leave out of the training and validation splits. The test split and the labels
            stay as they are.
        max_speed: training windows are played at random speeds between one over it and it, by log-uniform draws: 1.25
            makes voices up to 1.25 times as high or as low. 1 leaves them as they are.
        download: fetch the recordings into `data_dir` if they are not there, about 16 MB from github.com.

    Raises:
        ArgumentError: if an argument is outside its domain.
        DataError: by `load()`, if recordings are missing or damaged.

    Example:
        >>> SpokenDigits(validation_takes=5).window
        4096
    """

    data_dir: str | None = None
    window: int = 4_096
    short: str = "pad"
    validation_takes: int = 0
    held_out_speaker: str | None = None
    max_speed: float = 1.0
    download: bool = True

    def __post_init__(self) -> None:
        if self.data_dir is not None:
            check_path("SpokenDigits.data_dir", self.data_dir)
        check_integer("SpokenDigits.window", self.window, minimum=1)
        check_choice("SpokenDigits.short", self.short, SHORT)
        check_integer("SpokenDigits.validation_takes", self.validation_takes, minimum=0)
        check_number("SpokenDigits.max_speed", self.max_speed, minimum=1.0)
        if not isinstance(self.held_out_speaker, str | None):
            raise ArgumentError(
                f"SpokenDigits.held_out_speaker must be the name of a speaker, got {self.held_out_speaker!r}"
            )

    def load(self) -> SequenceData:
        """Returns the recordings.

        Raises:
            DataError: if recordings are missing and cannot be downloaded, or are damaged.
        """
        root = data_folder(self.data_dir)
        folder = _find_or_download(root, self.download)
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".wav")
        recordings = [Recording.parse(path.name) for path in paths]
        speakers, num_takes = _check_complete(folder, recordings)
        if self.held_out_speaker is not None and self.held_out_speaker not in speakers:
            raise DataError(
                f"SpokenDigits.held_out_speaker must be one of {', '.join(speakers)}, got {self.held_out_speaker!r}"
            )
        if self.held_out_speaker is not None and len(speakers) == 1:
            raise DataError(f"{folder} has no other speaker than the held out {self.held_out_speaker}")
        first_train_take = NUM_TEST_TAKES + self.validation_takes
        if first_train_take >= num_takes:
            raise DataError(
                f"SpokenDigits.validation_takes must leave a take to train on, of {num_takes} with {NUM_TEST_TAKES} "
                f"for the test, got {self.validation_takes}"
            )
        labels = {
            "speaker": [speakers.index(recording.speaker) for recording in recordings],
            "digit": [recording.digit for recording in recordings],
        }
        min_length = self.window if self.short == "refuse" else 1
        names = [path.name for path in paths]
        everything = read_recordings(paths, names, labels, SAMPLE_RATE, resample=False, min_length=min_length)

        def choose(first: int, end: int, held_out: str | None) -> Sequences:
            chosen = [
                index
                for index, recording in enumerate(recordings)
                if first <= recording.take < end and recording.speaker != held_out
            ]
            return everything.select(torch.tensor(chosen))

        return SequenceData(
            train=choose(first_train_take, num_takes, self.held_out_speaker),
            test=choose(0, NUM_TEST_TAKES, None),
            validation=choose(NUM_TEST_TAKES, first_train_take, self.held_out_speaker)
            if self.validation_takes
            else None,
            window=self.window,
            classes={"speaker": speakers, "digit": DIGITS},
            sample_rate=SAMPLE_RATE,
            max_speed=self.max_speed,
        )


def content_sha256(sequences: Sequences) -> str:
    """Returns the SHA-256 of the names and samples of recordings, in hexadecimal digits.

    It is taken over every name in turn, a zero byte and the samples, int16 and least significant byte first; the
    headers of the files do not matter.

    Example:
        >>> content_sha256(Sequences(torch.zeros(3, dtype=torch.int16), torch.tensor([3]), names=("a.wav",)))[:16]
        '55582cb896d59267'
    """
    digest = hashlib.sha256()
    for name, samples in zip(sequences.names, sequences.values.split(sequences.lengths.tolist()), strict=True):
        digest.update(name.encode() + b"\0")
        digest.update(samples.numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def _check_complete(folder: pathlib.Path, recordings: Sequence[Recording]) -> tuple[tuple[str, ...], int]:
    """Returns the speakers and the number of takes of each digit by each of them.

    Raises:
        DataError: if a recording is missing.
    """
    if not recordings:
        raise DataError(f"{folder} holds no recordings: delete it to fetch them anew")
    speakers = tuple(sorted({recording.speaker for recording in recordings}))
    num_takes = 1 + max(recording.take for recording in recordings)
    known = set(recordings)
    for speaker in speakers:
        for digit in range(len(DIGITS)):
            for take in range(num_takes):
                if (digit, speaker, take) not in known:
                    raise DataError(
                        f"{folder} is not complete: it lacks {digit}_{speaker}_{take}.wav; delete it to fetch all "
                        "recordings anew"
                    )
    return speakers, num_takes


def _find_or_download(root: pathlib.Path, download: bool) -> pathlib.Path:
    """Returns the folder of the recordings."""
    places = (root / "spoken_digits" / "recordings", root / "recordings")
    for place in places:
        if place.is_dir():
            return place
    if not download:
        raise DataError(_missing_message(places[0], "downloading is off"))
    try:
        _download(root, places[0])
    except (OSError, http.client.HTTPException, tarfile.TarError, EOFError, zlib.error, DataError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the answer too, and keeps its connection open
        reason = reason_of(error)
        raise DataError(_missing_message(places[0], f"the download failed ({reason})")) from error
    return places[0]


def _missing_message(place: pathlib.Path, why: str) -> str:
    return (
        f"the Free Spoken Digit Dataset is not in {place} and {why}. Put its {{digit}}_{{speaker}}_{{take}}.wav files "
        "there, or set SpokenDigits.data_dir (or $POPGEN_DATA) to a folder that holds spoken_digits/recordings; or use "
        "popgen.datasets.plucked_strings.PluckedStrings, which needs no network"
    )


def _download(root: pathlib.Path, place: pathlib.Path) -> None:
    """Fetches the archive, checks what it holds and moves it to its place, or leaves nothing behind."""
    with (
        new_folder(place.parent),
        tempfile.TemporaryDirectory(dir=root, prefix=".downloading-", ignore_cleanup_errors=True) as temporary,
    ):
        archive, unpacked = pathlib.Path(temporary) / "archive.tar.gz", pathlib.Path(temporary) / "recordings"
        with archive.open("wb") as file:
            _fetch(ARCHIVE_URL, file)
        unpacked.mkdir()
        _unpack(archive, unpacked)
        _check_archive(unpacked)
        try:
            os.replace(unpacked, place)
        except OSError:
            if not place.is_dir():  # where it is one, another process was faster
                raise


def _fetch(url: str, file: IO[bytes]) -> None:
    """Writes what a URL answers to a file."""
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
        received = 0
        while block := response.read(2**20):
            received += len(block)
            if received > ARCHIVE_MAX_BYTES:
                raise DataError(f"{url} sends more than {ARCHIVE_MAX_BYTES:,} bytes")
            file.write(block)
        announced = response.headers.get("Content-Length")
    if announced is not None and int(announced) != received:
        raise DataError(f"{url} announced {int(announced):,} bytes and sent {received:,}")


def _unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the recordings of an archive into a folder, each under the last part of its name, and nothing else."""
    with tarfile.open(archive, "r:gz") as members:
        for member in members:
            parts = pathlib.PurePosixPath(member.name).parts
            if not (member.isreg() and len(parts) == 3 and parts[1] == "recordings" and FILE_NAME.fullmatch(parts[2])):
                continue
            content = members.extractfile(member)
            if content is None or member.size > MEMBER_MAX_BYTES:
                raise DataError(f"{member.name} of the archive has {member.size:,} bytes, more than a recording")
            with content, (folder / parts[2]).open("wb") as file:
                shutil.copyfileobj(content, file)


def _check_archive(folder: pathlib.Path) -> None:
    """Raises DataError unless a folder holds the recordings of the archive."""
    paths = sorted(folder.iterdir())
    if len(paths) != ARCHIVE_NUM_FILES:
        raise DataError(f"{ARCHIVE_URL} must hold {ARCHIVE_NUM_FILES:,} recordings, got {len(paths):,}")
    found = content_sha256(read_recordings(paths, [path.name for path in paths], {}, SAMPLE_RATE, resample=False))
    if found != ARCHIVE_SHA256:
        raise DataError(f"the recordings of {ARCHIVE_URL} must have the SHA-256 {ARCHIVE_SHA256}, got {found}")
