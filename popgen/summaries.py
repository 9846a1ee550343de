"""What a run shows: a small writer with TensorBoard behind it, and grids of images."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_grid(
    images: Float[Tensor, "count size"], image_shape: tuple[int, int], columns: int, padding: int = 2
) -> UInt8[Tensor, "height width"]:
    """Returns images laid out in rows on a dark grey ground, as uint8 levels.

    Args:
        images: values in [0, 1], flattened.
        image_shape: height and width of each.
        columns: images in a row.
        padding: pixels between them and around.

    Example:
        >>> image_grid(torch.rand(10, 784), (28, 28), columns=5).shape
        torch.Size([62, 152])
    """
    height, width = image_shape
    rows = -(-len(images) // columns)
    grid = torch.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding), 64, dtype=torch.uint8
    )
    levels = (images.detach().cpu().float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    for i, image in enumerate(levels.view(-1, height, width)):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        grid[top : top + height, left : left + width] = image
    return grid


def write_png(path: pathlib.Path, levels: UInt8[Tensor, "height width"], scale: int = 2) -> None:
    """Writes grey levels as a PNG, each pixel enlarged to `scale` × `scale`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "grid.png"
        ...     write_png(path, torch.zeros(8, 8, dtype=torch.uint8))
        ...     path.stat().st_size > 0
        True
    """
    from PIL import Image

    enlarged = levels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Image.fromarray(enlarged.numpy()).save(path, format="PNG")


def write_wav(path: pathlib.Path, waveform: Float[Tensor, " time"], sample_rate: int) -> None:
    """Writes a waveform in [-1, 1] as 16-bit PCM; what is beyond is clipped.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "silence.wav"
        ...     write_wav(path, torch.zeros(8_000), sample_rate=8_000)
        ...     path.stat().st_size
        16044
    """
    import soundfile

    soundfile.write(path, waveform.detach().cpu().float().clamp(-1.0, 1.0).numpy(), sample_rate, subtype="PCM_16")


class Writer:
    """Writes scalars, images, sounds, text and hyper-parameters of a run for TensorBoard.

    Args:
        directory: the run directory.
        purge_step: hide what an earlier process wrote at or after this step, when a run is continued.

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
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and a dry run needs none

        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def scalars(self, group: str, values: Mapping[str, float | int], step: int) -> None:
        """Writes each value as `group/name`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def image(self, name: str, levels: UInt8[Tensor, "height width"], step: int) -> None:
        """Writes a grey picture."""
        self._writer.add_image(name, levels.numpy(), step, dataformats="HW")

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        """Writes a figure of matplotlib."""
        self._writer.add_figure(name, figure, step, close=False)

    def sound(self, name: str, waveform: Float[Tensor, " time"], sample_rate: int, step: int) -> None:
        """Writes a waveform in [-1, 1]."""
        samples = waveform.detach().cpu().float().clamp(-1.0, 1.0)
        self._writer.add_audio(name, samples[None], step, sample_rate=sample_rate)

    def text(self, name: str, text: str, step: int) -> None:
        """Writes text, shown as it is (indented by four, which Markdown takes for code)."""
        self._writer.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)

    def hyper_parameters(
        self, settings: Mapping[str, bool | int | float | str], metrics: Sequence[str], compared: Sequence[str] = ()
    ) -> None:
        """Writes the row of this run in the HParams tab.

        Args:
            settings: by name.
            metrics: full names of scalars that are written elsewhere.
            compared: the settings that are columns; all if there are none.
        """
        from torch.utils.tensorboard.summary import hparams

        columns = {name: settings[name] for name in compared or settings}
        described, _, _ = hparams(columns, dict.fromkeys(metrics, 0.0))
        _, start, end = hparams(dict(settings), {})
        for summary in (described, start, end):
            self._writer._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """Writes what is pending and closes the file."""
        self._writer.close()
