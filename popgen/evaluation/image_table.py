"""What an evaluation says of every image, in a file that an interrupted evaluation continues and several share.

Images are evaluated in chunks, most often of a hundred, each on its own, with noise of its own. So it does not matter
which process evaluates a chunk, or when: parts of the file by different processes make one table. Processes that run
together also tell each other what they have found, and the first one writes the table.
"""

import contextlib
import csv
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from popgen.distributed import ALONE, Processes
from popgen.errors import ArgumentError, DataError, UnfinishedEvaluationError
from popgen.evaluation.progress import Progress
from popgen.files import write_whole

IMAGES_IN_CHUNK = 100  # an interruption loses no more
MAX_DIGITS = 20  # of a shard

Columns = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of several parts of an evaluation, which take its chunks of images in turn.

    Args:
        index: which part, from 1.
        number: of parts.

    Example:
        >>> Shard.parse("2/4")
        Shard(index=2, number=4)
    """

    index: int = 1
    number: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Returns the shard that a text such as "2/4" names.

        Raises:
            ArgumentError: if it names none.
        """
        index, slash, number = text.partition("/")
        decimal = slash and index.isdecimal() and number.isdecimal() and len(text) <= MAX_DIGITS
        if not (decimal and 1 <= int(index) <= int(number)):
            raise ArgumentError(f"shard must be a part and the number of parts, such as 1/4 or 4/4, got {text!r}")
        return cls(int(index), int(number))

    def owns(self, chunk: int) -> bool:
        """Whether a chunk, counted from 0, belongs to it."""
        return chunk % self.number == self.index - 1


@dataclasses.dataclass(frozen=True)
class ImageTable:
    """Where the numbers of every image are kept.

    Args:
        path: of the CSV file; what is not complete lies beside it, a file for each part. None keeps nothing.
        shard: the part of the images that is evaluated here.
        processes: that evaluate a part each, in place of shards.

    Example:
        >>> columns = ImageTable().fill({}, 150, lambda images: {"square": torch.tensor(images).square()})
        >>> columns["square"][-1], columns["square"].shape
        (tensor(22201., dtype=torch.float64), torch.Size([150]))
    """

    path: pathlib.Path | None = None
    shard: Shard = Shard()
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        if self.processes.size > 1:
            if self.shard != Shard():
                raise ArgumentError(
                    f"shard must be left out where {self.processes.size} processes run together, got "
                    f"{self.shard.index}/{self.shard.number}"
                )
            object.__setattr__(self, "shard", Shard(self.processes.rank + 1, self.processes.size))

    def fill(
        self,
        identity: Mapping[str, Any],
        count: int,
        compute: Callable[[range], Mapping[str, Tensor]],
        progress: Progress | None = None,
        images_in_chunk: int = IMAGES_IN_CHUNK,
    ) -> Columns:
        """Returns the columns of all images, float64, shape `(count,)`; those on file are not computed again.

        The column `seconds` is the time that an image took.

        Args:
            identity: everything that the numbers depend on; a file of another evaluation is not read.
            count: of images.
            compute: returns the columns of a range of images.
            progress: called with the first column of images that were on file.
            images_in_chunk: written at once, and what shards take in turn.

        Raises:
            UnfinishedEvaluationError: if images of other shards are missing; this shard is done.
            ArgumentError: if processes that run together differ in the identity.
            DataError: if what is on file, or another process finds, has other columns.
        """
        rows, names = self._read(identity)
        self.processes.check_same(identity)  # and all have read before any writes
        self._begin_part(identity)
        with self.processes.side_by_side() as check_others:
            for chunk in range(math.ceil(count / images_in_chunk)):
                check_others()
                images = range(chunk * images_in_chunk, min(count, (chunk + 1) * images_in_chunk))
                if not self.shard.owns(chunk):
                    continue
                if all(image in rows for image in images):
                    if progress is not None:
                        progress(torch.tensor([rows[image][0] for image in images]))
                    continue
                found, names = self._found_in(images, names, compute)
                self._append(identity, names, found)
                rows |= found
            gathered = self.processes.all_gather_object((rows, names))
        for rank, (other_rows, other_names) in enumerate(gathered):
            if names and other_names and names != other_names:
                raise DataError(f"process {rank} forms the columns {', '.join(other_names)}, not {', '.join(names)}")
            rows, names = rows | other_rows, names or other_names
        missing = [image for image in range(count) if image not in rows]
        if missing:
            rows, names = self._read(identity)  # other shards may have finished meanwhile
            missing = [image for image in range(count) if image not in rows]
        if missing:
            raise UnfinishedEvaluationError(
                f"shard {self.shard.index}/{self.shard.number} is finished, and {len(missing):,} of {count:,} images "
                "belong to shards that are not; the last one to finish, or the same command without --shard, writes "
                "the record"
            )
        rows = {image: rows[image] for image in range(count)}
        if self.processes.first:
            self._finish(identity, names, rows)
        table = torch.tensor(list(rows.values()), dtype=torch.float64)
        return dict(zip(names, table.unbind(1), strict=True))

    def _found_in(
        self, images: range, names: list[str], compute: Callable[[range], Mapping[str, Tensor]]
    ) -> tuple[dict[int, list[float]], list[str]]:
        """Returns the rows of some images, computed, and the names of their columns."""
        started = time.perf_counter()
        columns = {name: column.double().cpu() for name, column in compute(images).items()}
        columns["seconds"] = torch.full((len(images),), (time.perf_counter() - started) / len(images)).double()
        if names and names != list(columns):
            raise DataError(
                f"{self.path} has the columns {', '.join(names)}, and an evaluation forms {', '.join(columns)}: "
                "delete it and its parts"
            )
        return dict(zip(images, torch.stack(list(columns.values()), dim=1).tolist(), strict=True)), list(columns)

    def _read(self, identity: Mapping[str, Any]) -> tuple[dict[int, list[float]], list[str]]:
        """Returns the rows on file by image, and the names of their columns."""
        rows: dict[int, list[float]] = {}
        names: list[str] = []
        for path in [] if self.path is None else [self.path, *_parts(self.path)]:
            if not path.is_file() or not path.stat().st_size:  # one that another shard has just begun
                continue
            found = read_table(path)
            if found.identity != dict(identity) or (names and names != found.names):
                print(f"{path.name} is of another evaluation and is not used", file=sys.stderr, flush=True)
                continue
            names = found.names
            rows |= found.rows
        return rows, names

    def _begin_part(self, identity: Mapping[str, Any]) -> None:
        """Leaves of this shard's file what is whole and of this evaluation."""
        if self.path is None or not (part := _part(self.path, self.shard)).is_file():
            return
        found = read_table(part)
        if found.identity == dict(identity):
            write_whole(part, (_header(identity, found.names) + _text(found.rows)).encode())
        else:
            part.unlink()

    def _append(self, identity: Mapping[str, Any], names: list[str], rows: Mapping[int, list[float]]) -> None:
        if self.path is None:
            return
        part = _part(self.path, self.shard)
        new = not part.is_file()
        with part.open("a") as file:
            file.write((_header(identity, names) if new else "") + _text(rows))

    def _finish(self, identity: Mapping[str, Any], names: list[str], rows: Mapping[int, list[float]]) -> None:
        """Writes the whole table in one piece, and removes its parts."""
        if self.path is None:
            return
        write_whole(self.path, (_header(identity, names) + _text(rows)).encode())
        for part in _parts(self.path):
            part.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class StoredTable:
    """A table as it lies on file.

    Attributes:
        identity: of the evaluation; None where the file does not begin as a table does.
        names: of the columns.
        rows: by image; what is not a whole row was not written to its end, and is left out.

    Example: `read_table` returns one.
    """

    identity: dict[str, Any] | None
    names: list[str]
    rows: dict[int, list[float]]

    def columns(self) -> Columns:
        """Returns the columns of all images, float64, in the images' order."""
        table = torch.tensor([self.rows[image] for image in sorted(self.rows)], dtype=torch.float64)
        return dict(zip(self.names, table.view(len(self.rows), len(self.names)).unbind(1), strict=True))


def read_table(path: pathlib.Path) -> StoredTable:
    """Returns the table in a file, whole or in part.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "images.csv"
        ...     _ = ImageTable(path).fill({"seed": 3}, 2, lambda images: {"log_p_x": torch.tensor([-1.5, -2.0])})
        ...     read_table(path).identity, path.read_text().splitlines()[1]
        ({'seed': 3}, 'image,log_p_x,seconds')
    """
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    try:
        identity = json.loads(lines[0].removeprefix("# "))
        names = next(csv.reader(lines[1:2]))[1:]
    except (IndexError, StopIteration, ValueError, RecursionError, csv.Error):
        return StoredTable(None, [], {})
    if not isinstance(identity, dict):
        return StoredTable(None, [], {})
    rows = {}
    for line in lines[2:]:
        fields = line.split(",")
        if line.endswith("\n") and len(fields) == 1 + len(names):
            with contextlib.suppress(ValueError):
                rows[int(fields[0])] = [float(field) for field in fields[1:]]
    return StoredTable(identity, names, rows)


def _part(path: pathlib.Path, shard: Shard) -> pathlib.Path:
    """Returns where a shard of a table lies."""
    return path.with_name(f"{path.stem}.part-{shard.index}-of-{shard.number}.csv")


def _parts(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the parts of a table that there are."""
    return sorted(path.parent.glob(f"{path.stem}.part-*-of-*.csv"))


def _header(identity: Mapping[str, Any], names: list[str]) -> str:
    return f"# {json.dumps(dict(identity))}\n{','.join(['image', *names])}\n"


def _text(rows: Mapping[int, list[float]]) -> str:
    return "".join(f"{image},{','.join(map(repr, values))}\n" for image, values in rows.items())
