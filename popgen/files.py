"""Files that are whole or not there, and folders that one process holds."""

import contextlib
import glob
import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from filelock import FileLock, Timeout

from popgen.errors import RunDirectoryError

LOCK_NAME = ".lock"
ABANDONED_SECONDS = 3_600.0


def write_whole(
    path: pathlib.Path, *parts: bytes | memoryview, keep: pathlib.Path | None = None, what: str = ""
) -> None:
    """Writes a file; a reader finds the old one or the whole new one, never a part, however many write.

    What a process that was killed an hour ago or more left of the same file goes.

    Args:
        path: where to; its folder must exist.
        parts: the content, in order.
        keep: where the old file goes, once the new one is complete on the disk; then only one may write at a time.
        what: names the file in an error, for example "the checkpoint ".

    Raises:
        RunDirectoryError: if it cannot be written; the old file is as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "notes"
        ...     for text in (b"old", b"new"):
        ...         write_whole(path, text, keep=path.with_name("before"))
        ...     path.read_text(), path.with_name("before").read_text()
        ('new', 'old')
    """
    temporary = _unfinished(path)
    _remove_abandoned(path)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.is_file():
            _keep(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {what}{path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value as strict JSON, indented, as `write_whole` does; what `json_ready` makes of it.

    Raises:
        RunDirectoryError: if it cannot be written; the old file is as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "record.json"
        ...     write_json(path, {"error": math.nan})
        ...     print(path.read_text().strip())
        {
          "error": null
        }
    """
    write_whole(path, (json.dumps(json_ready(value), indent=2, allow_nan=False) + "\n").encode())


def json_ready(value: Any) -> Any:
    """Returns a value of JSON with None, its `null`, wherever a number is infinite or NaN.

    Tensors, and the numbers and arrays of NumPy, become numbers and lists.

    Example:
        >>> json_ready({"loss": 1.5, "errors": [0.5, math.inf]})
        {'loss': 1.5, 'errors': [0.5, None]}
    """
    value = to_python(value)
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_python(value: Any) -> Any:
    """Returns a tensor, or a number or an array of NumPy, as a number or lists of them, and all else as it is.

    Example:
        >>> import torch
        >>> to_python(torch.tensor(1.5)), to_python("text")
        (1.5, 'text')
    """
    return value.tolist() if hasattr(value, "tolist") else value


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder for what is put into it; where that fails, what it made and is empty goes again.

    Raises:
        OSError: if it cannot be made.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with contextlib.suppress(ConnectionError), new_folder(pathlib.Path(folder) / "data" / "raw"):
        ...         raise ConnectionError
        ...     os.listdir(folder)
        []
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def locked_folder(
    folder: pathlib.Path,
    in_use: str,
    not_writable: Callable[[str], str],
    timeout: float = 0.0,
    subfolders: Sequence[str] = (),
) -> Iterator[None]:
    """Creates a folder and holds it for this process; the operating system frees it when the process dies.

    If nothing has been written when an error ends this, the folders that it created go again.

    Args:
        folder: to hold.
        in_use: the error where another process holds it.
        not_writable: returns the error where it cannot be written, of the reason.
        timeout: seconds to wait for another process.
        subfolders: that are created in it.

    Raises:
        RunDirectoryError: if it cannot be written, or another process holds it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with locked_folder(pathlib.Path(folder) / "run", "it is in use", "it is not writable: {}".format):
        ...         (pathlib.Path(folder) / "run" / LOCK_NAME).is_file()
        True
    """
    lock = FileLock(folder / LOCK_NAME, timeout=timeout)
    created = [path for path in (folder, *(folder / name for name in subfolders)) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in subfolders:
            (folder / name).mkdir(exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunDirectoryError(in_use) from None
    except OSError as error:
        raise RunDirectoryError(not_writable(error.strerror or str(error))) from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # of a folder that is not empty
            for path in reversed(created):
                if path == folder and [entry.name for entry in folder.iterdir()] == [LOCK_NAME]:
                    (folder / LOCK_NAME).unlink()
                path.rmdir()
        raise
    finally:
        lock.release()


def _unfinished(path: pathlib.Path) -> pathlib.Path:
    """Returns the name of a file until it is whole: one for each writer, and `.writing-*` matches them all."""
    return path.with_name(f".writing-{uuid.uuid4().hex[:8]}-{path.name}")


def _remove_abandoned(path: pathlib.Path) -> None:
    """Removes what nobody has written to for long of a file that was to be whole."""
    for left in path.parent.glob(f".writing-*-{glob.escape(path.name)}"):
        with contextlib.suppress(OSError):  # another may do the same
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()


def _keep(path: pathlib.Path, keep: pathlib.Path) -> None:
    """Gives a file a second name, in place of what had it, so that its own name is never without a file."""
    if keep.is_file() and keep.samefile(path):  # left by a process that was killed just after this
        return
    second = _unfinished(keep)
    try:
        os.link(path, second)
    except OSError:  # a file system without hard links: the name is without a file until the new one has it
        second = path
    os.replace(second, keep)
