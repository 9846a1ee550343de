"""MNIST: the real files, damaged files, downloads that succeed, fail and are cut short, and Larochelle's files."""

import contextlib
import gc
import gzip
import hashlib
import http.server
import pathlib
import shutil
import socket
import threading
from collections.abc import Iterator

import pytest
import torch
import torchvision.datasets

from popgen.datasets import binary_mnist
from popgen.datasets.binary_mnist import BinaryMNIST
from popgen.errors import ArgumentError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
NUM_TRAIN, NUM_TEST = 20, 8
NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def idx(array: torch.Tensor) -> bytes:
    """Returns a uint8 tensor in the IDX format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + bytes(array.flatten().tolist())


@pytest.fixture(scope="module")
def images() -> dict[str, torch.Tensor]:
    """Grey levels of both splits, `(count, 28, 28)`."""
    generator = torch.Generator().manual_seed(0)
    return {
        split: torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        for split, count in (("train", NUM_TRAIN), ("t10k", NUM_TEST))
    }


@pytest.fixture(scope="module")
def idx_files(images) -> dict[str, bytes]:
    """The four files, by name."""
    files = {}
    for split, levels in images.items():
        files[f"{split}-images-idx3-ubyte"] = idx(levels)
        files[f"{split}-labels-idx1-ubyte"] = idx(torch.arange(len(levels), dtype=torch.uint8) % 10)
    return files


@pytest.fixture
def raw(tmp_path: pathlib.Path, idx_files: dict[str, bytes]) -> pathlib.Path:
    """`tmp_path/MNIST/raw`, with the four files in it."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in idx_files.items():
        (folder / name).write_bytes(content)
    return folder


# --- the real files --------------------------------------------------------------------------------------------------


@pytest.mark.mnist
def test_real_mnist_under_every_protocol(mnist_dir: pathlib.Path) -> None:
    dynamic, fixed, threshold = (
        BinaryMNIST(str(mnist_dir), protocol=protocol, download=False).load()
        for protocol in ("dynamic", "fixed", "threshold")
    )
    for data in (dynamic, fixed, threshold):
        assert data.train.shape == (60_000, 784) and data.test.shape == (10_000, 784)
        assert data.validation is None and data.image_shape == (28, 28)
        assert data.test.unique().tolist() == [0, 255]
    oracle = torchvision.datasets.MNIST(str(mnist_dir), train=True).data.flatten(1)
    assert torch.equal(dynamic.train, oracle)
    assert dynamic.train.double().mean().item() == pytest.approx(33.318421, abs=1e-6)
    assert torch.equal(dynamic.test, fixed.test) and not torch.equal(fixed.test, threshold.test)
    assert fixed.train.unique().tolist() == [0, 255]
    # A draw keeps the mean; a threshold does not.
    assert fixed.train.double().mean().item() == pytest.approx(33.318421, abs=0.02)
    assert torch.equal(threshold.train, torch.where(oracle >= 128, 255, 0).to(torch.uint8))
    differing = (fixed.train != threshold.train).double().mean().item()
    assert 0.02 < differing < 0.08


@pytest.mark.mnist
def test_real_mnist_with_a_validation_split(mnist_dir: pathlib.Path) -> None:
    whole, split = (
        BinaryMNIST(str(mnist_dir), protocol="threshold", validation_size=size, download=False).load()
        for size in (0, 10_000)
    )
    assert split.train.shape == (50_000, 784) and split.validation.shape == (10_000, 784)
    sums = torch.cat([split.train, split.validation]).sum(0)
    assert torch.equal(sums, whole.train.sum(0)), "together they are the 60,000 training images"


# --- files that are there --------------------------------------------------------------------------------------------


def test_files_are_read_as_they_are(tmp_path: pathlib.Path, raw: pathlib.Path, images) -> None:
    data = BinaryMNIST(str(tmp_path), download=False).load()
    assert torch.equal(data.train, images["train"].flatten(1))
    assert data.test.shape == (NUM_TEST, 784)
    for split, name in ((True, "train"), (False, "t10k")):
        assert torch.equal(torchvision.datasets.MNIST(str(tmp_path), train=split).data, images[name])


def test_the_environment_names_the_folder(tmp_path: pathlib.Path, raw: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setenv("POPGEN_DATA", str(tmp_path))
    assert len(BinaryMNIST(download=False).load().train) == NUM_TRAIN


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", [-1, -5, 7, 3, 0])
def test_a_file_cut_short_is_refused(tmp_path: pathlib.Path, raw: pathlib.Path, name: str, kept: int) -> None:
    whole = (raw / name).read_bytes()
    (raw / name).write_bytes(whole[:kept])
    with pytest.raises(DataError, match=name) as caught:
        BinaryMNIST(str(tmp_path)).load()
    if kept < 0:
        assert f"{len(whole):,} bytes" in str(caught.value) and f"has {len(whole[:kept]):,}" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_too_long_is_refused(tmp_path: pathlib.Path, raw: pathlib.Path, name: str) -> None:
    whole = (raw / name).read_bytes()
    (raw / name).write_bytes(whole + b"\0")
    with pytest.raises(DataError, match=f"{name} is damaged.* {len(whole):,} bytes .* has {len(whole) + 1:,}"):
        BinaryMNIST(str(tmp_path)).load()


@pytest.mark.parametrize("content", [b"<html>not found</html>", gzip.compress(b"x" * 500, mtime=0), bytes(20_000)])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_kind_is_refused(
    tmp_path: pathlib.Path, raw: pathlib.Path, name: str, content: bytes
) -> None:
    (raw / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is not an IDX file of MNIST \(it begins {content[:4].hex()}\)"):
        BinaryMNIST(str(tmp_path)).load()


def test_images_of_another_size_are_refused(tmp_path: pathlib.Path, raw: pathlib.Path) -> None:
    (raw / NAMES[0]).write_bytes(idx(torch.zeros(NUM_TRAIN, 14, 56, dtype=torch.uint8)))
    with pytest.raises(
        DataError, match=r"train-images-idx3-ubyte is damaged: its header announces shape \(20, 14, 56\)"
    ):
        BinaryMNIST(str(tmp_path)).load()


def test_files_without_images_are_refused(tmp_path: pathlib.Path, raw: pathlib.Path) -> None:
    (raw / NAMES[0]).write_bytes(idx(torch.zeros(0, 28, 28, dtype=torch.uint8)))
    with pytest.raises(DataError, match="train images"):
        BinaryMNIST(str(tmp_path)).load()


@pytest.mark.parametrize("missing", NAMES)
def test_missing_files_without_download(tmp_path: pathlib.Path, raw: pathlib.Path, missing: str) -> None:
    (raw / missing).unlink()
    with pytest.raises(DataError, match="downloading is off") as caught:
        BinaryMNIST(str(tmp_path), download=False).load()
    for part in (str(raw), *NAMES, "configs/quickstart.gin", "POPGEN_DATA", "BinaryMNIST.data_dir"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"protocol": "static"}, ArgumentError, "BinaryMNIST.protocol must be one of .*larochelle, got 'static'"),
        ({"binarisation_seed": -1}, ArgumentError, "BinaryMNIST.binarisation_seed must be an integer of at least 0"),
        ({"validation_size": 0.1}, ArgumentError, "BinaryMNIST.validation_size must be an integer"),
        ({"data_dir": 3}, ArgumentError, "BinaryMNIST.data_dir must be a path, got 3"),
    ],
)
def test_arguments_outside_their_domain(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        BinaryMNIST(**arguments)


# --- downloads -------------------------------------------------------------------------------------------------------


class Mirror:
    """A local web server that serves files from memory, and counts what it is asked for.

    Attributes:
        files: content by name; anything else is answered with 404.
        cut: the names of which only the first half of the announced length is sent.
        garbage: answer with something that is not HTTP.
        requests: the names that were asked for, in order.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.cut, self.garbage, self.requests = dict(files), set[str](), False, list[str]()
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.strip("/")
                content = mirror.files.get(name)
                mirror.requests.append(name)
                if mirror.garbage:
                    self.wfile.write(b"220 this is a mail server\r\n")
                elif content is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2] if name in mirror.cut else content)

            def log_message(self, *arguments) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"


@pytest.fixture
def mirror(idx_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A working mirror, which torchvision asks in place of the real ones; no proxy stands between."""
    archives = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in idx_files.items()}
    mirror = Mirror(archives)
    thread = threading.Thread(target=mirror.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [mirror.url])
    resources = [(f"{name}.gz", hashlib.md5(archives[f"{name}.gz"]).hexdigest()) for name in NAMES]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()
    thread.join()
    gc.collect(1)  # torchvision leaves the answers of failed requests open; see pytestmark


def closed_port() -> int:
    """Returns a local port that nothing listens on."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_download_error(caught: pytest.ExceptionInfo, raw: pathlib.Path) -> None:
    """One line that says what happened, where the files belong and what needs no network."""
    message = str(caught.value)
    assert "\n" not in message
    for part in ("the download failed", str(raw), *NAMES, "configs/quickstart.gin"):
        assert part in message


def test_files_are_downloaded_once(tmp_path: pathlib.Path, mirror: Mirror, images) -> None:
    dataset = BinaryMNIST(str(tmp_path / "new folder"))
    data = dataset.load()
    assert torch.equal(data.train, images["train"].flatten(1)) and len(data.test) == NUM_TEST
    assert set(mirror.requests) == {f"{name}.gz" for name in NAMES}
    mirror.requests.clear()
    assert torch.equal(dataset.load().test, data.test)
    assert mirror.requests == []


def test_the_socket_timeout_is_put_back(tmp_path: pathlib.Path, mirror: Mirror) -> None:
    previous = socket.getdefaulttimeout()
    BinaryMNIST(str(tmp_path)).load()
    assert socket.getdefaulttimeout() == previous
    mirror.files.clear()
    with pytest.raises(DataError):
        BinaryMNIST(str(tmp_path / "other")).load()
    assert socket.getdefaulttimeout() == previous


def test_a_mirror_that_does_not_listen(tmp_path: pathlib.Path, mirror: Mirror, monkeypatch) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{closed_port()}/"])
    with pytest.raises(DataError) as caught:
        BinaryMNIST(str(tmp_path)).load()
    check_download_error(caught, tmp_path / "MNIST" / "raw")


def test_a_second_mirror_is_asked(tmp_path: pathlib.Path, mirror: Mirror, monkeypatch) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{closed_port()}/", mirror.url])
    assert len(BinaryMNIST(str(tmp_path)).load().train) == NUM_TRAIN


def test_a_mirror_without_the_files(tmp_path: pathlib.Path, mirror: Mirror) -> None:
    mirror.files.clear()
    with pytest.raises(DataError) as caught:
        BinaryMNIST(str(tmp_path / "mistyped" / "data")).load()
    check_download_error(caught, tmp_path / "mistyped" / "data" / "MNIST" / "raw")
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_that_does_not_speak_http(tmp_path: pathlib.Path, mirror: Mirror) -> None:
    mirror.garbage = True
    with pytest.raises(DataError) as caught:
        BinaryMNIST(str(tmp_path)).load()
    check_download_error(caught, tmp_path / "MNIST" / "raw")


def test_a_folder_that_cannot_be_made(tmp_path: pathlib.Path, mirror: Mirror) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError) as caught:
        BinaryMNIST(str(tmp_path / "file")).load()
    check_download_error(caught, tmp_path / "file" / "MNIST" / "raw")


@pytest.mark.parametrize("name", NAMES)
def test_a_download_cut_short_is_mended_by_the_next(tmp_path: pathlib.Path, mirror: Mirror, images, name: str) -> None:
    dataset = BinaryMNIST(str(tmp_path))
    mirror.cut = {f"{name}.gz"}
    with pytest.raises(DataError) as caught:
        dataset.load()
    check_download_error(caught, tmp_path / "MNIST" / "raw")
    with pytest.raises(DataError):
        BinaryMNIST(str(tmp_path), download=False).load()
    mirror.cut = set()
    assert torch.equal(dataset.load().train, images["train"].flatten(1))


@pytest.mark.parametrize("name", NAMES)
def test_a_page_in_place_of_a_file_is_mended_by_the_next(
    tmp_path: pathlib.Path, mirror: Mirror, images, name: str
) -> None:
    """A captive portal answers everything with a page of its own and status 200."""
    dataset = BinaryMNIST(str(tmp_path))
    right = mirror.files[f"{name}.gz"]
    mirror.files[f"{name}.gz"] = gzip.compress(b"<html>please log in</html>")
    with pytest.raises(DataError):
        dataset.load()
    mirror.files[f"{name}.gz"] = right
    assert torch.equal(dataset.load().train, images["train"].flatten(1))


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_decompression_is_never_taken_for_good(
    tmp_path: pathlib.Path, mirror: Mirror, images, name: str
) -> None:
    """What a process leaves that is killed while it decompresses: this file in part, and none of the later ones."""
    dataset, raw = BinaryMNIST(str(tmp_path)), tmp_path / "MNIST" / "raw"
    dataset.load()
    for later in NAMES[NAMES.index(name) + 1 :]:
        (raw / later).unlink()
    (raw / name).write_bytes((raw / name).read_bytes()[:-1])
    try:
        data = dataset.load()
    except DataError as error:
        assert f"{name} is damaged" in str(error) and "delete it to fetch it anew" in str(error)
        (raw / name).unlink()
        data = dataset.load()
    assert torch.equal(data.train, images["train"].flatten(1)) and len(data.test) == NUM_TEST


def test_files_of_an_old_torchvision_do_not_stand_in(tmp_path: pathlib.Path, raw: pathlib.Path, images) -> None:
    """What is read is what was checked: the raw files, even beside the `processed` folder of old versions."""
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    other = (torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3))
    for name in ("training.pt", "test.pt"):
        torch.save(other, processed / name)
    assert torch.equal(BinaryMNIST(str(tmp_path)).load().train, images["train"].flatten(1))
    shutil.rmtree(raw)
    with pytest.raises(DataError) as caught:
        BinaryMNIST(str(tmp_path)).load()
    check_download_error(caught, raw)


# --- Larochelle and Murray's files -----------------------------------------------------------------------------------


@pytest.fixture
def amat(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Small files in Larochelle's format in `tmp_path`; the zeros and ones in them, by split."""
    files = {"train": (5, "train"), "validation": (3, "valid"), "test": (2, "test")}
    monkeypatch.setattr(binary_mnist, "LAROCHELLE_FILES", files)
    digits = {}
    for split, (count, name) in files.items():
        digits[split] = torch.randint(0, 2, (count, 784))
        lines = (" ".join(map(str, row)) + " \n" for row in digits[split].tolist())
        (tmp_path / f"binarized_mnist_{name}.amat").write_text("".join(lines))
    return digits


def test_larochelle_files_are_parsed(tmp_path: pathlib.Path, amat: dict[str, torch.Tensor]) -> None:
    data = BinaryMNIST(str(tmp_path), protocol="larochelle").load()
    assert data.protocol == "larochelle" and data.image_shape == (28, 28)
    for split, digits in amat.items():
        assert torch.equal(getattr(data, split), (255 * digits).to(torch.uint8))


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_an_absent_larochelle_file_is_named(tmp_path: pathlib.Path, amat, mirror: Mirror, name: str) -> None:
    path = tmp_path / f"binarized_mnist_{name}.amat"
    path.unlink()
    with pytest.raises(DataError, match="'larochelle' needs .* does not download it or put another") as caught:
        BinaryMNIST(str(tmp_path), protocol="larochelle").load()
    assert str(path) in str(caught.value)
    assert mirror.requests == []


@pytest.mark.parametrize("name", ["train", "valid", "test"])
@pytest.mark.parametrize("how", ["empty", "cut", "longer", "a two", "a letter", "a point"])
def test_a_damaged_larochelle_file_is_refused(tmp_path: pathlib.Path, amat, name: str, how: str) -> None:
    path = tmp_path / f"binarized_mnist_{name}.amat"
    text = path.read_text()
    changed = {
        "empty": "",
        "cut": text[: len(text) // 2],
        "longer": text + "1\n",
        "a two": "2" + text[1:],
        "a letter": "x" + text[1:],
        "a point": "." + text[1:],
    }
    path.write_text(changed[how])
    with pytest.raises(DataError, match=f"binarized_mnist_{name}.amat is damaged"):
        BinaryMNIST(str(tmp_path), protocol="larochelle").load()


def test_larochelle_counts_are_the_published_ones() -> None:
    assert binary_mnist.LAROCHELLE_FILES == {
        "train": (50_000, "train"),
        "validation": (10_000, "valid"),
        "test": (10_000, "test"),
    }


@pytest.mark.mnist
def test_published_files_are_known_and_others_named(
    mnist_dir: pathlib.Path, raw: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another data set may come in files of the same names, and its likelihoods are not MNIST's."""
    BinaryMNIST(str(mnist_dir), protocol="threshold", download=False).load()
    binary_mnist.read_mnist_labels(mnist_dir, False, "MNISTRows")
    assert capsys.readouterr().err == ""
    BinaryMNIST(str(raw.parents[1]), protocol="threshold", download=False).load()
    said = f"not the published MNIST: train-images-idx3-ubyte, t10k-images-idx3-ubyte in {raw}\n"
    assert capsys.readouterr().err == said
