"""What a run shows: a small writer with TensorBoard behind it, and grids of images."""

import io
import os
import pathlib
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from popgen.errors import RunDirectoryError
from popgen.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVENT_FILES = "events.out.tfevents."
PADDING = 2  # pixels between the images of a grid and around it
SCALE = 2  # side of the square of a PNG that each pixel becomes


def image_grid(
    images: Float[Tensor, "count size"], image_shape: tuple[int, int], columns: int
) -> UInt8[Tensor, "height width"]:
    """Returns images laid out in rows on a dark grey ground, as uint8 levels.

    Args:
        images: values in [0, 1], flattened.
        image_shape: height and width of each.
        columns: images in a row.

    Example:
        >>> image_grid(torch.rand(10, 784), (28, 28), columns=5).shape
        torch.Size([62, 152])
    """
    height, width = image_shape
    rows = -(-len(images) // columns)
    row_height, column_width = height + PADDING, width + PADDING
    grid = torch.full((rows * row_height + PADDING, columns * column_width + PADDING), 64, dtype=torch.uint8)
    levels = (images.detach().cpu().float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    for i, image in enumerate(levels.view(-1, height, width)):
        top, left = PADDING + (i // columns) * row_height, PADDING + (i % columns) * column_width
        grid[top : top + height, left : left + width] = image
    return grid


def write_png(path: pathlib.Path, levels: UInt8[Tensor, "height width"]) -> None:
    """Writes grey levels as a PNG, each pixel enlarged to `SCALE` × `SCALE`.

    Raises:
        RunDirectoryError: if it cannot be written; an earlier file is as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "grid.png"
        ...     write_png(path, torch.zeros(8, 8, dtype=torch.uint8))
        ...     path.stat().st_size > 0
        True
    """
    from PIL import Image

    enlarged, content = levels.repeat_interleave(SCALE, 0).repeat_interleave(SCALE, 1), io.BytesIO()
    Image.fromarray(enlarged.numpy()).save(content, format="PNG")
    write_whole(path, content.getbuffer())


def write_wav(path: pathlib.Path, waveform: Float[Tensor, " time"], sample_rate: int) -> None:
    """Writes a waveform in [-1, 1] as 16-bit PCM; what is beyond is clipped.

    Raises:
        RunDirectoryError: if it cannot be written; an earlier file is as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "silence.wav"
        ...     write_wav(path, torch.zeros(8_000), sample_rate=8_000)
        ...     path.stat().st_size
        16044
    """
    import soundfile

    samples, content = waveform.detach().cpu().float().clamp(-1.0, 1.0).numpy(), io.BytesIO()
    soundfile.write(content, samples, sample_rate, subtype="PCM_16", format="WAV")
    write_whole(path, content.getbuffer())


class Writer:
    """Writes scalars, images, sounds, text and hyper-parameters of a run for TensorBoard.

    What a call writes is the operating system's when it returns, and survives the death of the process. TensorBoard
    reads the files of a run in the order of their names and does not come back to one that it has left: so a new one
    sorts after all that are there, and a writer begins another when a later one has appeared, that of an evaluation
    during training for example.

    Args:
        directory: the run directory.
        purge_step: hide what an earlier process wrote at or after this step, when a run is continued.

    Raises:
        RunDirectoryError: if the file cannot be written, for example because the disk is full; so do all methods.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = Writer(pathlib.Path(folder))
        ...     writer.scalars("train", {"loss": 90.0}, step=1)
        ...     writer.close()
        ...     len(list(pathlib.Path(folder).glob("events.*")))
        1
    """

    def __init__(self, directory: pathlib.Path, purge_step: int | None = None) -> None:
        # slow to import, and a dry run needs none
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._event_type, self._summary, self._record_writer = event_pb2.Event, summary, RecordWriter
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._begin_file()
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write({"session_log": start}, step=purge_step)

    def scalars(self, group: str, values: Mapping[str, float | int], step: int) -> None:
        """Writes each value as `group/name`."""
        self._write(
            *({"summary": self._summary.scalar(f"{group}/{key}", value)} for key, value in values.items()), step=step
        )

    def image(self, name: str, levels: UInt8[Tensor, "height width"], step: int) -> None:
        """Writes a grey picture."""
        self._write({"summary": self._summary.image(name, levels.numpy(), dataformats="HW")}, step=step)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        """Writes a figure of matplotlib."""
        from torch.utils.tensorboard._utils import figure_to_image

        picture = figure_to_image(figure, close=False)
        self._write({"summary": self._summary.image(name, picture, dataformats="CHW")}, step=step)

    def sound(self, name: str, waveform: Float[Tensor, " time"], sample_rate: int, step: int) -> None:
        """Writes a waveform in [-1, 1]."""
        samples = waveform.detach().cpu().float().clamp(-1.0, 1.0)
        self._write({"summary": self._summary.audio(name, samples[None], sample_rate=sample_rate)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Writes text, shown as it is (indented by four, which Markdown takes for code)."""
        shown = "\n".join("    " + line for line in text.splitlines())
        self._write({"summary": self._summary.text(name, shown)}, step=step)

    def hyper_parameters(
        self, settings: Mapping[str, bool | int | float | str], metrics: Sequence[str], compared: Sequence[str] = ()
    ) -> None:
        """Writes the row of this run in the HParams tab.

        Args:
            settings: by name.
            metrics: full names of scalars that are written elsewhere.
            compared: the settings that are columns; all if there are none.
        """
        columns = {name: settings[name] for name in compared or settings}
        described, _, _ = self._summary.hparams(columns, dict.fromkeys(metrics, 0.0))
        _, start, end = self._summary.hparams(dict(settings), {})
        self._write(*({"summary": summary} for summary in (described, start, end)), step=0)

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, *events: dict[str, Any], step: int) -> None:
        """Writes some events at once, so that a process is not killed between them."""
        if any(name > self._path.name for name in self._names()):
            self._file.close()
            self._begin_file()
        self._append(*(self._event_type(wall_time=time.time(), step=step, **event) for event in events))

    def _append(self, *events: Any) -> None:
        content = io.BytesIO()
        for event in events:
            self._record_writer(content).write(event.SerializeToString())
        left, size = content.getbuffer(), self._file.tell()
        try:
            while left:  # a disk may take a part of it and be full
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.seek(size)
            self._file.truncate()
            raise self._failure(error) from error

    def _begin_file(self) -> None:
        """Opens a file whose name sorts after all others; the name begins with the seconds of the clock."""
        stamps = [int(match[0]) for name in self._names() if (match := re.search(r"\d+", name))]
        stamp = max(int(time.time()), max(stamps, default=0) + 1)
        self._path = self._directory / f"{EVENT_FILES}{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        try:
            self._file = self._path.open("xb", buffering=0)
        except OSError as error:
            raise self._failure(error) from error
        self._append(self._event_type(wall_time=time.time(), file_version="brain.Event:2"))

    def _names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self._directory) if name.startswith(EVENT_FILES)]
        except OSError as error:  # the directory was moved or removed, or its disk is gone
            raise RunDirectoryError(f"cannot write the curves in {self._directory}: {error}") from error

    def _failure(self, error: OSError) -> RunDirectoryError:
        return RunDirectoryError(f"cannot write the curves {self._path}: {error}")
