"""What parses files, each given one as bytes; `benchmarks.fuzz` and the tests of odd files feed them."""

import contextlib
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Iterator

import numpy as np
import soundfile
import torch

from popgen import config
from popgen.datasets.audio import read_audio
from popgen.datasets.binary_mnist import BinaryMNIST, _read_amat
from popgen.datasets.mnist_rows import MNISTRows
from popgen.errors import PopgenError
from popgen.evaluation.image_table import ImageTable, read_table
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.priors import StandardNormalPrior
from popgen.training import checkpoints
from popgen.training.state import TrainState, initial_state, state_from_tensors, state_to_tensors
from popgen.training.weights import model_of_checkpoint

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
GIN_WORDS = (
    "import from as include popgen popgen.models torch.nn torch.optim torch.os.system @ % () gin.singleton gin.macro "
    "gin.REQUIRED scope/ __import__ __class__ [ ] { } 1000000000000 1e308 None True experiment.Experiment. dataset "
    "model=@vae.VAE() %A A= B=[%A,%A] data_dir download objective vae.VAE."
)
MNIST_FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class Target:
    """What parses files, given one as bytes.

    Args:
        folder: to write in.
    """

    max_length = 4_096

    def __init__(self, folder: pathlib.Path) -> None:
        self.path = folder / "input"

    def seeds(self) -> Iterator[bytes]:
        """Yields inputs that the project's own code wrote."""
        raise NotImplementedError

    def parse(self, data: bytes) -> None:
        """Parses an input; raises a PopgenError where it is no good."""
        raise NotImplementedError

    def words(self) -> list[str]:
        """Returns what the fuzzer should try to insert."""
        return []


class IDX(Target):
    """The four files of MNIST; the first byte of an input says which one the rest is, and who reads them."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.raw = folder / "MNIST" / "raw"
        self.raw.mkdir(parents=True)
        self.good = [self.file(index) for index in range(4)]

    def file(self, index: int) -> bytes:
        """Returns a small one of the four files."""
        shape = (3,) if index % 2 else (3, 28, 28)
        sizes = b"".join(size.to_bytes(4, "big") for size in shape)
        return bytes([0, 0, 8, len(shape)]) + sizes + (np.arange(np.prod(shape)) % 10).astype(np.uint8).tobytes()

    def seeds(self) -> Iterator[bytes]:
        """Yields each file, for both readers."""
        for index, content in enumerate(self.good):
            for reader in range(2):
                yield bytes([index + 4 * reader]) + content

    def parse(self, data: bytes) -> None:
        """Loads the images, or their rows and labels."""
        for index, (name, content) in enumerate(zip(MNIST_FILES, self.good, strict=True)):
            (self.raw / name).write_bytes(data[1:] if data and data[0] % 4 == index else content)
        dataset = MNISTRows if data and data[0] // 4 % 2 else BinaryMNIST
        dataset(data_dir=str(self.folder), download=False).load()


class Amat(Target):
    """A text file of Larochelle and Murray, of two images."""

    def seeds(self) -> Iterator[bytes]:
        """Yields two images."""
        yield ("0 1 " * 392 + "\n").encode() * 2
        yield b"0 1\n"

    def parse(self, data: bytes) -> None:
        """Reads it."""
        self.path.with_name("binarized_mnist_train.amat").write_bytes(data)
        _read_amat(self.path.parent, 2, "train")


class Wav(Target):
    """A sound file."""

    def seeds(self) -> Iterator[bytes]:
        """Yields sounds of several kinds."""
        for subtype in ("PCM_16", "PCM_U8", "PCM_24", "FLOAT", "ULAW", "MS_ADPCM", "GSM610"):
            channels = 1 if subtype == "GSM610" else 2
            buffer = io.BytesIO()
            soundfile.write(buffer, np.zeros((64, channels)) + 0.25, 8_000, format="WAV", subtype=subtype)
            yield buffer.getvalue()
        for kind in ("FLAC", "OGG", "AIFF", "W64", "CAF"):
            buffer = io.BytesIO()
            soundfile.write(buffer, np.zeros((64, 1)) + 0.25, 8_000, format=kind)
            yield buffer.getvalue()

    def parse(self, data: bytes) -> None:
        """Reads it as it is, and at another rate."""
        self.path.write_bytes(data)
        read_audio(self.path)
        read_audio(self.path, sample_rate=16_000)


class Gin(Target):
    """The configuration of somebody else's run."""

    max_length = 8_192

    def seeds(self) -> Iterator[bytes]:
        """Yields the saved text of every config."""
        for path in sorted((REPOSITORY / "configs").glob("*.gin")):
            yield config.load([str(path)]).configuration.given.encode()
        head = "from __gin__ import dynamic_registration\nfrom popgen import experiment\n"
        yield f"{head}experiment.Experiment.seed = 3\n".encode()

    def words(self) -> list[str]:
        """Returns what configurations are made of."""
        return GIN_WORDS.split(" ")

    def parse(self, data: bytes) -> None:
        """Builds it, if it may be, and compares it with another."""
        self.path.write_bytes(data)
        text = data.decode(errors="replace")
        with contextlib.suppress(PopgenError):
            config.differences(text, "Experiment.seed = 3")
        config.load_foreign(self.path, {"parameters": {}, "buffers": {}})


class Checkpoint(Target):
    """A checkpoint; the first byte of an input says whether the rest is the file, its archive or the pickle in it."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        checkpoints.save(self.path, state_to_tensors(self.state()))
        with zipfile.ZipFile(self.path) as archive:
            self.entries = {name: archive.read(name) for name in archive.namelist()}
        (self.pickle,) = (name for name in self.entries if name.endswith("/data.pkl"))

    def state(self) -> TrainState:
        """Returns that of a tiny model."""
        self.model = VAE(GaussianEncoder(4, 1, 2), BernoulliDecoder(1, 4, 2), StandardNormalPrior())
        return initial_state(self.model, torch.optim.Adam, seed=0)

    def seeds(self) -> Iterator[bytes]:
        """Yields a whole checkpoint, its archive and its pickle."""
        content = self.path.read_bytes()
        archive, _ = checkpoints._split(self.path, content)
        yield b"\0" + content
        yield b"\1" + archive
        yield b"\2" + self.entries[self.pickle]
        for contents in ({"step": 1}, [1, "a", None, 2.5], {"parameters": {"a": torch.ones(2)}}):
            buffer = io.BytesIO()
            torch.save(contents, buffer)
            with zipfile.ZipFile(buffer) as own:
                yield b"\2" + own.read(next(name for name in own.namelist() if name.endswith("/data.pkl")))

    def parse(self, data: bytes) -> None:
        """Loads it, as an evaluation and as a resumed run would."""
        kind, content = data[:1], data[1:]
        if kind == b"\2":
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                for name, entry in self.entries.items():
                    archive.writestr(name, content if name == self.pickle else entry)
            content = buffer.getvalue()
        if kind in (b"\1", b"\2") and len(content) > 2:
            digest = hashlib.sha256(content).hexdigest()
            comment = json.dumps({"format": checkpoints.FORMAT, "version": 1, "sha256": digest}).encode()
            content = content[:-2] + len(comment).to_bytes(2, "little") + comment
        self.path.write_bytes(content)
        contents = checkpoints.load_state(self.path)
        with contextlib.suppress(PopgenError):
            model_of_checkpoint(self.model, contents, "averaged")
        state_from_tensors(contents, self.state())

    max_length = 16_384


class Table(Target):
    """A table of images."""

    def seeds(self) -> Iterator[bytes]:
        """Yields one of three images."""
        path = self.path.with_name("seed.csv")
        ImageTable(path).fill({"seed": 3}, 3, lambda images: {"log_p_x": -torch.tensor(images) / 3.0})
        yield path.read_bytes()

    def parse(self, data: bytes) -> None:
        """Reads it, and continues an evaluation that may be its own."""
        self.path.write_bytes(data)
        found = read_table(self.path)
        found.columns()
        table = ImageTable(self.path)
        table.fill(found.identity or {}, 3, lambda images: {"log_p_x": -torch.tensor(images) / 3.0})


TARGETS: dict[str, type[Target]] = {
    "idx": IDX,
    "amat": Amat,
    "wav": Wav,
    "gin": Gin,
    "checkpoint": Checkpoint,
    "table": Table,
}
