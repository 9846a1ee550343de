"""Files that are whole or not there."""

import contextlib
import os
import pathlib

from popgen.errors import RunDirectoryError


def write_whole(
    path: pathlib.Path, *parts: bytes | memoryview, keep: pathlib.Path | None = None, what: str = ""
) -> None:
    """Writes a file; a reader finds the old one or the whole new one, never a part. One writer at a time.

    Args:
        path: where to; its folder must exist.
        parts: the content, in order.
        keep: where the old file goes, once the new one is complete on the disk.
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
    temporary = path.with_name(f".writing-{path.name}")
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


def _keep(path: pathlib.Path, keep: pathlib.Path) -> None:
    """Gives a file a second name, in place of what had it, so that its own name is never without a file."""
    if keep.is_file() and keep.samefile(path):  # left by a process that was killed just after this
        return
    second = keep.with_name(f".writing-{keep.name}")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:  # a file system without hard links: the name is without a file until the new one has it
        second = path
    os.replace(second, keep)
