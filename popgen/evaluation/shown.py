"""What a model has to show: pictures as grey levels, and sounds."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from popgen.summaries import Writer, write_png, write_wav

Picture = UInt8[Tensor, "height width"]


class Sound(NamedTuple):
    """A waveform in [-1, 1].

    Attributes:
        waveform: shape `(time,)`.
        sample_rate: Hz.
    """

    waveform: Float[Tensor, " time"]
    sample_rate: int


Shown = Picture | Sound


def save_shown(path: pathlib.Path, shown: Mapping[str, Shown]) -> list[pathlib.Path]:
    """Writes pictures below one another into one PNG, samples first, and sounds beside it, each as a WAV file.

    The originals are left out where there are reconstructions: each of those stands beside its own.

    Args:
        path: of the PNG; the sound `name` goes to `path` with `_name.wav` in place of its suffix.
        shown: by name.

    Returns:
        The files that were written.

    Example:
        >>> import tempfile
        >>> shown = {"samples": torch.zeros(8, 8, dtype=torch.uint8), "a": Sound(torch.zeros(100), sample_rate=8_000)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in save_shown(pathlib.Path(folder) / "best.png", shown)]
        ['best.png', 'best_a.wav']
    """
    written = []
    pictures = [cast(Tensor, shown[name]) for name in picture_names(shown)]
    if pictures:
        width = max(picture.shape[1] for picture in pictures)
        rows = [F.pad(picture, (0, width - picture.shape[1], 0, 6), value=0) for picture in pictures]
        write_png(path, torch.cat(rows))
        written.append(path)
    for name, sound in shown.items():
        if isinstance(sound, Sound):
            written.append(path.with_name(f"{path.stem}_{name}.wav"))
            write_wav(written[-1], *sound)
    return written


def picture_names(shown: Mapping[str, Shown]) -> list[str]:
    """Returns the names of the pictures that `save_shown` writes, in its order.

    Example:
        >>> grey = torch.zeros(8, 8, dtype=torch.uint8)
        >>> picture_names({"originals": grey, "reconstructions": grey, "prior_samples": grey})
        ['prior_samples', 'reconstructions']
    """
    names = [name for name, item in shown.items() if not isinstance(item, Sound)]
    if "reconstructions" in names:
        names = [name for name in names if name != "originals"]
    return sorted(names, key=lambda name: name != "prior_samples")


def write_shown(writer: Writer, shown: Mapping[str, Shown], step: int) -> None:
    """Writes pictures and sounds for TensorBoard.

    Example: `Recorder` calls it.
    """
    for name, item in shown.items():
        if isinstance(item, Sound):
            writer.sound(name, *item, step)
        else:
            writer.image(name, item, step)
