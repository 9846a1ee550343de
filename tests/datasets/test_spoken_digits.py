"""Spoken digits: the real recordings, made-up folders, and downloads that succeed, fail and are cut short."""

import http.server
import io
import os
import pathlib
import tarfile
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import soundfile
import torch

from popgen.datasets import spoken_digits
from popgen.datasets.audio import read_recordings
from popgen.datasets.spoken_digits import Recording, SpokenDigits, content_sha256
from popgen.errors import ArgumentError, DataError

SPEAKERS, NUM_TAKES = ("anna", "bert", "carl"), 8


def wav(seed: int, count: int) -> bytes:
    """Returns a file of noise."""
    file = io.BytesIO()
    samples = np.random.default_rng(seed).integers(-(2**15), 2**15, count, dtype=np.int16)
    soundfile.write(file, samples, 8_000, subtype="PCM_16", format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """All recordings of three speakers, by name; each has a length of its own."""
    names = [f"{digit}_{name}_{take}.wav" for name in SPEAKERS for digit in range(10) for take in range(NUM_TAKES)]
    return {name: wav(number, 100 + number) for number, name in enumerate(names)}


@pytest.fixture
def recordings(tmp_path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """`tmp_path/spoken_digits/recordings`, with the files in it."""
    folder = tmp_path / "spoken_digits" / "recordings"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# --- the real recordings ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speech_dir() -> pathlib.Path:
    """The folder that holds spoken_digits/recordings; tests that need it are skipped where it is absent."""
    shared = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
    for root in (pathlib.Path(os.environ.get("POPGEN_DATA") or "data"), shared):
        if (root / "spoken_digits" / "recordings").is_dir():
            return root
    pytest.skip("needs the Free Spoken Digit Dataset in $POPGEN_DATA")


@pytest.mark.speech
def test_real_recordings(speech_dir: pathlib.Path) -> None:
    data = SpokenDigits(str(speech_dir), validation_takes=5, download=False).load()
    assert (len(data.train), len(data.test), len(data.validation)) == (2_400, 300, 300)
    assert data.sample_rate == 8_000 and data.window == 4_096
    assert data.classes["speaker"] == ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
    lengths, names = torch.cat([data.train.lengths, data.test.lengths, data.validation.lengths]), []
    for split, takes in ((data.train, range(10, 50)), (data.test, range(5)), (data.validation, range(5, 10))):
        names += split.names
        pairs = 10 * split.labels["speaker"] + split.labels["digit"]
        assert pairs.bincount().tolist() == [len(takes)] * 60
        assert {Recording.parse(name).take for name in split.names} == set(takes)
    assert len(names) == len(set(names)) == 3_000
    assert (int(lengths.min()), names[lengths.argmin()]) == (1_148, "6_yweweler_3.wav")
    assert int(lengths.max()) == 18_262


@pytest.mark.speech
def test_real_recordings_have_the_checksum_of_the_archive(speech_dir: pathlib.Path) -> None:
    paths = sorted((speech_dir / "spoken_digits" / "recordings").glob("*.wav"))
    everything = read_recordings(paths, [path.name for path in paths], {}, 8_000, resample=False)
    assert content_sha256(everything) == spoken_digits.ARCHIVE_SHA256
    assert len(everything) == spoken_digits.ARCHIVE_NUM_FILES
    assert max(path.stat().st_size for path in paths) < spoken_digits.MEMBER_MAX_BYTES


# --- folders that are there ------------------------------------------------------------------------------------------


def test_splits_and_labels(tmp_path: pathlib.Path, recordings: pathlib.Path) -> None:
    data = SpokenDigits(str(tmp_path), window=50, validation_takes=2, download=False).load()
    assert data.classes == {"speaker": SPEAKERS, "digit": tuple("0123456789")}
    for split, takes in ((data.test, range(5)), (data.validation, range(5, 7)), (data.train, range(7, 8))):
        expected = {f"{digit}_{name}_{take}.wav" for name in SPEAKERS for digit in range(10) for take in takes}
        assert set(split.names) == expected and len(split) == len(expected)
        batch = split.padded(torch.arange(len(split)))
        for index, name in enumerate(split.names):
            said = Recording.parse(name)
            assert SPEAKERS[int(split.labels["speaker"][index])] == said.speaker
            assert int(split.labels["digit"][index]) == said.digit
            samples, rate = soundfile.read(recordings / name, dtype="float32")
            assert np.array_equal(batch.values[index, : batch.lengths[index]].numpy(), samples) and rate == 8_000


def test_other_places(tmp_path: pathlib.Path, recordings: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(SpokenDigits(str(tmp_path / "spoken_digits"), download=False).load().test) == 150
    monkeypatch.setenv("POPGEN_DATA", str(tmp_path))
    data = SpokenDigits(download=False).load()
    assert len(data.test) == 150 and len(data.train) == 90 and data.validation is None


def test_a_held_out_speaker(tmp_path: pathlib.Path, recordings: pathlib.Path) -> None:
    whole, without = (
        SpokenDigits(str(tmp_path), validation_takes=1, held_out_speaker=name, download=False).load()
        for name in (None, "bert")
    )
    assert without.classes == whole.classes
    assert without.test.names == whole.test.names
    assert torch.equal(without.test.labels["speaker"], whole.test.labels["speaker"])
    for name in ("train", "validation"):
        kept = (whole.split(name).labels["speaker"] != 1).nonzero().squeeze(1)
        expected, found = whole.split(name).select(kept), without.split(name)
        assert found.names == expected.names and torch.equal(found.values, expected.values)
        assert found.labels["speaker"].unique().tolist() == [0, 2]


def test_short_recordings_are_padded_or_refused(tmp_path: pathlib.Path, recordings: pathlib.Path) -> None:
    batch = SpokenDigits(str(tmp_path), window=200).load().batches(90, seed=0).draw(0, torch.Generator())
    assert batch.values.shape == (90, 200) and 100 < int(batch.lengths.min()) < int(batch.lengths.max()) == 200
    with pytest.raises(DataError, match=r'0_anna_0.wav is shorter than a training window.* short="pad"'):
        SpokenDigits(str(tmp_path), window=200, short="refuse").load()
    assert SpokenDigits(str(tmp_path), window=100, short="refuse").load().window == 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"held_out_speaker": "dora"}, "held_out_speaker must be one of anna, bert, carl, got 'dora'"),
        ({"validation_takes": 3}, "validation_takes must leave a take to train on, of 8 with 5 for the test, got 3"),
    ],
)
def test_what_the_recordings_cannot_give(
    tmp_path: pathlib.Path, recordings: pathlib.Path, arguments: dict, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        SpokenDigits(str(tmp_path), **arguments).load()


@pytest.mark.parametrize("name", ["3_bert_0.wav", "9_carl_7.wav", "0_anna_4.wav"])
def test_a_missing_recording_is_named(tmp_path: pathlib.Path, recordings: pathlib.Path, name: str) -> None:
    (recordings / name).unlink()
    with pytest.raises(DataError, match=f"recordings is not complete: it lacks {name}; delete it"):
        SpokenDigits(str(tmp_path)).load()


def test_folders_that_hold_something_else(tmp_path: pathlib.Path, recordings: pathlib.Path) -> None:
    (recordings / "notes.txt").write_text("is left alone")
    SpokenDigits(str(tmp_path)).load()
    soundfile.write(recordings / "0_anna_3.wav", np.zeros(100), 16_000)
    with pytest.raises(DataError, match="0_anna_3.wav has a sample rate of 16,000 Hz, not 8,000"):
        SpokenDigits(str(tmp_path)).load()
    (recordings / "0_anna_3.wav").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="0_anna_3.wav is not an audio file that can be read"):
        SpokenDigits(str(tmp_path)).load()
    (recordings / "Zero_anna.wav").write_bytes(b"")
    with pytest.raises(DataError, match="must be named {digit}_{speaker}_{take}.wav, got Zero_anna.wav"):
        SpokenDigits(str(tmp_path)).load()


def test_an_empty_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "recordings").mkdir()
    with pytest.raises(DataError, match="holds no recordings"):
        SpokenDigits(str(tmp_path)).load()


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"data_dir": 3}, ArgumentError, "SpokenDigits.data_dir must be a path, got 3"),
        ({"window": 0}, ArgumentError, "SpokenDigits.window must be an integer of at least 1, got 0"),
        ({"short": "cut"}, ArgumentError, "SpokenDigits.short must be one of refuse, pad, got 'cut'"),
        ({"validation_takes": -1}, ArgumentError, "SpokenDigits.validation_takes must be an integer"),
        ({"held_out_speaker": 2}, ArgumentError, "SpokenDigits.held_out_speaker must be the name of a speaker, got 2"),
    ],
)
def test_arguments_outside_their_domain(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        SpokenDigits(**arguments)


# --- downloads -------------------------------------------------------------------------------------------------------


def tar(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """Returns an archive as GitHub makes them, all below one folder, with symbolic links if asked for."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return file.getvalue()


class Server:
    """A local web server with one file.

    Attributes:
        content: what it sends; None for the answer 404.
        announced: the length that it announces; None for no length.
        num_requests: how often it was asked.
    """

    def __init__(self) -> None:
        self.content: bytes | None = b""
        self.announced: int | None = None
        self.num_requests = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.num_requests += 1
                if server.content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                if server.announced is not None:
                    self.send_header("Content-Length", str(server.announced))
                self.end_headers()
                self.wfile.write(server.content)

            def log_message(self, *arguments) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def server(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> Iterator[Server]:
    """A server that has the archive; no proxy stands between."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path_factory.mktemp("original")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    paths = sorted(folder.iterdir())
    original = read_recordings(paths, [path.name for path in paths], {}, 8_000)
    monkeypatch.setattr(
        spoken_digits, "ARCHIVE_URL", f"http://127.0.0.1:{server.http.server_address[1]}/archive.tar.gz"
    )
    monkeypatch.setattr(spoken_digits, "ARCHIVE_NUM_FILES", len(files))
    monkeypatch.setattr(spoken_digits, "ARCHIVE_SHA256", content_sha256(original))
    server.content = tar(in_archive(files))
    server.announced = len(server.content)
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def in_archive(files: dict[str, bytes]) -> dict[str, bytes]:
    return {"digits-1.0/README.md": b"hello", **{f"digits-1.0/recordings/{name}": files[name] for name in files}}


def check_download_error(root: pathlib.Path, reason: str) -> None:
    """One line that says what happened and what would be right, and nothing left behind."""
    with pytest.raises(DataError, match=reason) as caught:
        SpokenDigits(str(root)).load()
    message = str(caught.value)
    assert "\n" not in message
    for part in ("the download failed", str(root / "spoken_digits" / "recordings"), "POPGEN_DATA", "PluckedStrings"):
        assert part in message
    assert not root.is_dir() or list(root.iterdir()) == []


@pytest.mark.parametrize("announced", [True, False])
def test_recordings_are_downloaded_once(
    tmp_path: pathlib.Path, server: Server, files: dict[str, bytes], announced: bool
) -> None:
    root = tmp_path / "new" / "folder"
    server.announced = server.announced if announced else None
    data = SpokenDigits(str(root)).load()
    assert len(data.test) == 150 and len(data.train) == 90
    found = {path.name: path.read_bytes() for path in (root / "spoken_digits" / "recordings").iterdir()}
    assert found == files
    assert [path.name for path in root.iterdir()] == ["spoken_digits"]
    assert [path.name for path in (root / "spoken_digits").iterdir()] == ["recordings"]
    SpokenDigits(str(root)).load()
    assert server.num_requests == 1


def test_nothing_is_downloaded_unasked(tmp_path: pathlib.Path, server: Server) -> None:
    with pytest.raises(DataError, match="downloading is off.*SpokenDigits.data_dir") as caught:
        SpokenDigits(str(tmp_path), download=False).load()
    assert "\n" not in str(caught.value) and server.num_requests == 0 and list(tmp_path.iterdir()) == []


def test_only_recordings_are_unpacked(tmp_path: pathlib.Path, server: Server, files: dict[str, bytes]) -> None:
    """Whatever else an archive holds, nothing of it is written, least of all outside the folder."""
    evil = {
        "/tmp/popgen-evil/recordings/0_anna_0.wav": b"x",
        "../../evil.wav": b"x",
        "digits-1.0/recordings/../../../0_evil_0.wav": b"x",
        "digits-1.0/recordings/deeper/0_evil_0.wav": b"x",
        "digits-1.0/recordings/evil.py": b"x",
        "digits-1.0/0_evil_0.wav": b"x",
        "digits-1.0/recordings": b"x",
        "digits-1.0/recordings/2_evil_0.wav/x": b"x",
    }
    links = {"digits-1.0/recordings/1_evil_0.wav": "/etc/passwd"}
    server.content = tar({**evil, **in_archive(files)}, links)
    server.announced = len(server.content)
    root = tmp_path / "a" / "b" / "c"
    SpokenDigits(str(root)).load()
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {f"a/b/c/spoken_digits/recordings/{name}" for name in files}


def test_a_download_cut_short(tmp_path: pathlib.Path, server: Server) -> None:
    assert server.content is not None
    whole = server.content
    server.content = whole[: len(whole) // 2]
    check_download_error(tmp_path, f"announced {len(whole):,} bytes and sent {len(whole) // 2:,}|IncompleteRead")
    server.announced = None
    check_download_error(tmp_path, "the download failed")
    server.content, server.announced = whole, len(whole)
    assert len(SpokenDigits(str(tmp_path)).load().test) == 150


@pytest.mark.parametrize("content", [b"", b"<html>login</html>", b"\x1f\x8b" + bytes(100)])
def test_an_answer_that_is_no_archive(tmp_path: pathlib.Path, server: Server, content: bytes) -> None:
    server.content, server.announced = content, len(content)
    check_download_error(tmp_path, "the download failed")


def test_a_server_without_the_archive(tmp_path: pathlib.Path, server: Server) -> None:
    server.content = None
    check_download_error(tmp_path / "mistyped" / "data", "HTTP Error 404")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_listen(tmp_path: pathlib.Path, server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    check_download_error(tmp_path, "Connection refused")


def change(files: dict[str, bytes], how: str) -> dict[str, bytes]:
    files = dict(files)
    if how == "a recording is missing":
        del files["3_bert_2.wav"]
    elif how == "there is one more":
        files["0_dora_0.wav"] = wav(0, 100)
    elif how == "one is another":
        files["3_bert_2.wav"] = wav(12_345, 200)
    elif how == "two are exchanged":
        files["3_bert_2.wav"], files["4_bert_2.wav"] = files["4_bert_2.wav"], files["3_bert_2.wav"]
    elif how == "one is damaged":
        files["3_bert_2.wav"] = files["3_bert_2.wav"][:60]
    else:
        files["3_bert_2.wav"] = wav(0, spoken_digits.MEMBER_MAX_BYTES)
    return files


@pytest.mark.parametrize(
    "how, reason",
    [
        ("a recording is missing", "must hold 240 recordings, got 239"),
        ("there is one more", "must hold 240 recordings, got 241"),
        ("one is another", "must have the SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}"),
        ("two are exchanged", "must have the SHA-256"),
        ("one is damaged", "3_bert_2.wav is cut short"),
        ("one is far too long", "3_bert_2.wav of the archive has 2,097,196 bytes, more than a recording"),
    ],
)
def test_an_archive_of_something_else(
    tmp_path: pathlib.Path, server: Server, files: dict[str, bytes], how: str, reason: str
) -> None:
    server.content = tar(in_archive(change(files, how)))
    server.announced = len(server.content)
    check_download_error(tmp_path, reason)


def test_an_answer_without_end(tmp_path: pathlib.Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken_digits, "ARCHIVE_MAX_BYTES", 1_000)
    check_download_error(tmp_path, "sends more than 1,000 bytes")


def test_an_interruption_leaves_nothing_behind(
    tmp_path: pathlib.Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: pathlib.Path) -> None:
        assert len(list(folder.iterdir())) == 240
        raise KeyboardInterrupt

    monkeypatch.setattr(spoken_digits, "_check_archive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SpokenDigits(str(tmp_path)).load()
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_faster(
    tmp_path: pathlib.Path, server: Server, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = spoken_digits._check_archive

    def slow(folder: pathlib.Path) -> None:
        check(folder)
        place = tmp_path / "spoken_digits" / "recordings"
        place.mkdir(parents=True)
        for name, content in files.items():
            (place / name).write_bytes(content)

    monkeypatch.setattr(spoken_digits, "_check_archive", slow)
    assert len(SpokenDigits(str(tmp_path)).load().test) == 150
    assert [path.name for path in tmp_path.iterdir()] == ["spoken_digits"]


def test_a_folder_that_cannot_be_made(tmp_path: pathlib.Path, server: Server) -> None:
    (tmp_path / "file").write_text("not a folder")
    check_download_error(tmp_path / "file", "Not a directory")
    assert server.num_requests == 0
