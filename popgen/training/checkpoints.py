"""Checkpoints: tensors and numbers only, checksummed, written atomically.

A checkpoint is an ordinary file of `torch.save`, so `torch.load(path, weights_only=True)` reads it. Its header is JSON
in the comment field of that zip archive: the format's version and the SHA-256 digest of everything before it. `load`
checks both before it reads a tensor, and loads nothing that is larger than the file.
"""

import hashlib
import io
import json
import math
import pathlib
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from popgen.errors import ArgumentError, CheckpointError, reason_of
from popgen.files import write_whole

FORMAT = "popgen checkpoint"
VERSION = 1
FIRST_BYTES = b"PK\3\4"  # what begins otherwise torch would read in another format
MAX_DEPTH = 16


def save(path: pathlib.Path, contents: dict[str, Any], keep: pathlib.Path | None = None) -> None:
    """Writes a checkpoint; a reader finds the old file or the whole new one, never a part. One writer at a time.

    Args:
        path: where to; its folder must exist.
        contents: nested dictionaries of tensors, numbers and strings.
        keep: where the checkpoint that was there goes, once the new one is complete on the disk.

    Raises:
        CheckpointError: if `load` would refuse it; the old file is as it was.
        RunDirectoryError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder) / "latest.ckpt", {"weight": torch.ones(2)})
        ...     load(pathlib.Path(folder) / "latest.ckpt")
        {'weight': tensor([1., 1.])}
    """
    buffer = io.BytesIO()
    _check_loads(path, contents, math.inf)
    contents = tree_map_only(torch.Tensor, _by_itself, contents)
    torch.save(contents, buffer)
    archive = buffer.getbuffer()
    _check_loads(path, contents, len(archive))
    header = {"format": FORMAT, "version": VERSION, "sha256": hashlib.sha256(archive).hexdigest()}
    comment = json.dumps(header).encode()
    write_whole(path, archive[:-2], struct.pack("<H", len(comment)) + comment, keep=keep, what="the checkpoint ")


def _check_loads(path: pathlib.Path, contents: dict[str, Any], size: int | float) -> None:
    found = _more_than_plain(contents, size, anywhere=True)
    if found is not None:
        raise CheckpointError(
            f"cannot write the checkpoint {path}, which could not be loaded: {found}, and it may hold tensors, numbers "
            "and strings, in lists and dictionaries"
        )


def _by_itself(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor that is alone in its memory, all of which is saved.

    A slice would take the whole along, and one that is expanded is larger than its memory, which `load` refuses.
    """
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


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
    refused = f"{path} holds more than tensors, numbers and strings, and is not loaded"
    try:
        contents = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can make torch's reader raise what it likes
        raise CheckpointError(refused) from error
    if not isinstance(contents, dict) or _more_than_plain(contents, len(archive)) is not None:
        raise CheckpointError(refused)
    return contents


def load_state(path: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of a checkpoint of a training state, see `popgen.training.state.state_to_tensors`.

    Raises:
        CheckpointError: as `load`, and if a field is missing or of another kind.

    Example: `load_checkpoint` of a run directory calls it.
    """
    contents = load(path)
    for name, (described, fits) in FIELDS.items():
        if name not in contents and name not in LATER_FIELDS:
            raise CheckpointError(f"{path} holds no training state: it has no {name!r}")
        if name in contents and not fits(contents[name]):
            raise CheckpointError(f"{path} holds no training state: its {name!r} must be {described}")
    return contents


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def _are_generators(value: Any) -> bool:
    return _are_tensors(value) and all(state.dtype == torch.uint8 and state.ndim == 1 for state in value.values())


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups = value.get("param_groups")
    return (
        all(isinstance(moments, dict) for moments in value["state"].values())
        and isinstance(groups, list)
        and all(
            isinstance(group, dict) and isinstance(group.get("params"), list) and all(map(_is_count, group["params"]))
            for group in groups
        )
    )


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "step": ("a number of steps", _is_count),
    "parameters": ("tensors by name", _are_tensors),
    "buffers": ("tensors by name", _are_tensors),
    "auxiliary": ("tensors by name", _are_tensors),
    "optimizer": ("the state of an optimizer", _is_optimizer),
    "optimizer_name": ("a name", lambda value: isinstance(value, str)),
    "optimizer_defaults": ("options by name", lambda value: isinstance(value, dict)),
    "weight_average": ("tensors by name, or None", lambda value: value is None or _are_tensors(value)),
    "generators": ("random states by name", _are_generators),
    "skipped": ("tensors by name", _are_tensors),
    "recent": ("tensors by name", _are_tensors),
    "best_loss": ("a number", lambda value: isinstance(value, float)),
    "best_step": ("a number of steps", _is_count),
}
LATER_FIELDS = (
    "auxiliary",
    "optimizer_name",
    "optimizer_defaults",
    "skipped",
    "recent",
)  # earlier checkpoints have none


def check_plain(what: str, contents: dict) -> None:
    """Raises ArgumentError if contents are more than a checkpoint may hold.

    Args:
        what: they are, for the error.
        contents: nested dictionaries and lists.

    Example:
        >>> check_plain("the optimizer's options", {"lr": 1e-3, "dtype": torch.float32})
        Traceback (most recent call last):
            ...
        popgen.errors.ArgumentError: the optimizer's options must be tensors, numbers and strings, or no checkpoint of
        them could be loaded; dtype is a torch.dtype
    """
    found = _more_than_plain(contents, math.inf, anywhere=True)
    if found is not None:
        raise ArgumentError(
            f"{what} must be tensors, numbers and strings, or no checkpoint of them could be loaded; {found}"
        )


def _more_than_plain(contents: dict, size: int | float, anywhere: bool = False) -> str | None:
    """Returns what in contents is more than dictionaries and lists of tensors, numbers and strings; None if nothing is.

    A pickle can hold itself, hold one thing many times over, and give a tensor any shape by strides of zero. Types must
    be just these: torch's reader knows no others, not even numpy's float64, which is a float.

    Args:
        contents: to look through.
        size: how many bytes the tensors may be together.
        anywhere: whether tensors may be on any device.
    """
    left: list[tuple[Any, str, int]] = [(contents, "", 0)]
    seen, num_bytes = {id(contents)}, 0
    while left:
        value, name, depth = left.pop()
        kind = type(value)
        parts: list[tuple[Any, str]] = []
        if kind is torch.Tensor:
            num_bytes += value.numel() * value.element_size()
            on_device = not value.is_meta if anywhere else value.device.type == "cpu"
            if value.layout != torch.strided or value.is_quantized or not on_device:
                return f"{name} is a tensor that is sparse, quantised or on another device"
            if num_bytes > size:
                return f"{name} is a tensor that shares its memory with others"
        elif kind in (dict, OrderedDict, Counter):
            for key, item in value.items():
                inner = f"{name}.{key}" if name else str(key)
                if type(key) not in (str, int, bool):
                    return f"{inner} has a key of type {_type_name(key)}"
                parts += [(key, inner), (item, inner)]
        elif kind in (list, tuple, torch.Size):
            parts = [(item, f"{name}.{number}") for number, item in enumerate(value)]
        elif kind is int and abs(value) >= 2**64:
            return f"{name} is an integer of more than 64 bits"
        elif kind not in (int, bool, float, str, NoneType):
            return f"{name} is a {_type_name(value)}"
        if parts and depth >= MAX_DEPTH:
            return f"{name} is nested more than {MAX_DEPTH} deep"
        for part, inner in parts:
            if id(part) not in seen:
                seen.add(id(part))
                left.append((part, inner, depth + 1))
    return None


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


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
    except Exception as error:  # as above
        raise CheckpointError(f"{path} is not a checkpoint of popgen, or is damaged: {reason_of(error)}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} is not a checkpoint of popgen")
    return {name: value for name, value in contents.items() if isinstance(value, int | float | str)}


def _split(path: pathlib.Path, data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Returns the archive as it was before its comment was added, and the header in the comment."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        header = json.loads(archive.comment)
        if not archive.comment or header["format"] != FORMAT:
            raise ValueError("no header")
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, NotImplementedError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of popgen, or was cut short") from error
    entries = archive.infolist()
    # torch compresses nothing. What is compressed, or lies in the file once for many entries, could come to any size.
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not data.startswith(FIRST_BYTES) or not stored or sum(entry.file_size for entry in entries) > len(data):
        raise CheckpointError(
            f"{path} is not as torch writes it: its parts are compressed, or are larger than the file"
        )
    return data[: -len(archive.comment) - 2] + b"\0\0", header
