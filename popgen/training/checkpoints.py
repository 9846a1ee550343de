"""Checkpoints: tensors and numbers only, checksummed, written atomically.

A checkpoint is an ordinary file of `torch.save`, so `torch.load(path, weights_only=True)` reads it. Its header is JSON
in the comment field of that zip archive: the format's version and the SHA-256 digest of everything before it. `load`
checks both before it reads a tensor.
"""

import hashlib
import io
import json
import pathlib
import pickle
import struct
import zipfile
from typing import Any

import torch

from popgen.errors import CheckpointError, reason_of
from popgen.training.files import write_whole

FORMAT = "popgen checkpoint"
VERSION = 1


def save(path: pathlib.Path, contents: dict[str, Any], keep: pathlib.Path | None = None) -> None:
    """Writes a checkpoint; a reader finds the old file or the whole new one, never a part. One writer at a time.

    Args:
        path: where to; its folder must exist.
        contents: nested dictionaries of tensors, numbers and strings.
        keep: where the checkpoint that was there goes, once the new one is complete on the disk.

    Raises:
        RunDirectoryError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder) / "latest.ckpt", {"weight": torch.ones(2)})
        ...     load(pathlib.Path(folder) / "latest.ckpt")
        {'weight': tensor([1., 1.])}
    """
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    archive = buffer.getbuffer()
    header = {"format": FORMAT, "version": VERSION, "sha256": hashlib.sha256(archive).hexdigest()}
    comment = json.dumps(header).encode()
    write_whole(path, archive[:-2], struct.pack("<H", len(comment)) + comment, keep=keep, what="the checkpoint ")


def load(path: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of a checkpoint, its tensors on the CPU.

    Example: `save` shows both.

    Raises:
        CheckpointError: if it is missing, damaged, not a checkpoint, or of a later version.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
    archive, header = _split(path, data)
    if header.get("version") != VERSION:
        raise CheckpointError(f"{path} has format version {header.get('version')!r}; this popgen reads {VERSION}")
    if hashlib.sha256(archive).hexdigest() != header.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its contents do not match its checksum")
    try:
        return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds more than tensors, numbers and strings, and is not loaded") from error


def load_numbers(path: pathlib.Path) -> dict[str, int | float | str]:
    """Returns the numbers and strings at the top of a checkpoint; its tensors are not read, nor its checksum formed.

    Raises:
        CheckpointError: if it is missing, damaged or not a checkpoint.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder) / "latest.ckpt", {"step": 3, "weight": torch.ones(2)})
        ...     load_numbers(pathlib.Path(folder) / "latest.ckpt")
        {'step': 3}
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of popgen, or is damaged: {reason_of(error)}") from error
    return {name: value for name, value in contents.items() if isinstance(value, int | float | str)}


def _split(path: pathlib.Path, data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Returns the archive as it was before its comment was added, and the header in the comment."""
    try:
        comment = zipfile.ZipFile(io.BytesIO(data)).comment
        header = json.loads(comment)
        if not comment or header["format"] != FORMAT:
            raise ValueError("no header")
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of popgen, or was cut short") from error
    return data[: -len(comment) - 2] + b"\0\0", header
