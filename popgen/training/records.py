"""Records of evaluations, as files and as curves."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from popgen.evaluation.figures import evaluation_figure
from popgen.evaluation.image_table import read_table
from popgen.summaries import Writer
from popgen.training.files import write_whole


@dataclasses.dataclass(frozen=True)
class EvaluationFiles:
    """Where an evaluation of a checkpoint lies: a JSON record, and of a model of images a table and a figure beside it.

    Args:
        directory: of the run.
        step: of the checkpoint.
        weights: "raw" or "average".
        num_samples: of the evaluation.
        num_examples: of the evaluation.

    Example:
        >>> EvaluationFiles(pathlib.Path("run"), 40, "raw", num_samples=5_000, num_examples=10_000).record.name
        'evaluation_step00000040_raw_5000x10000.json'
    """

    directory: pathlib.Path
    step: int
    weights: str
    num_samples: int
    num_examples: int

    @property
    def record(self) -> pathlib.Path:
        """The record, strict JSON."""
        size = f"{self.num_samples}x{self.num_examples}"
        return self.directory / f"evaluation_step{self.step:08d}_{self.weights}_{size}.json"

    @property
    def images(self) -> pathlib.Path:
        """The table of all images, see `popgen.evaluation.image_table`."""
        return self.record.with_name(f"{self.record.stem}_images.csv")

    @property
    def figure(self) -> pathlib.Path:
        """The figure of the table."""
        return self.record.with_suffix(".png")

    def write(self, writer: Writer, record: Mapping[str, Any], headline: Sequence[str]) -> None:
        """Writes the record, what the headline names as scalars too, and the figure of the table if there is one.

        What is not a finite number, such as the standard error of a single image, is `null` in the file.
        """
        writer.scalars("evaluation", {name: record[name] for name in headline}, self.step)
        strict = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        write_whole(self.record, (json.dumps(strict, indent=2, allow_nan=False) + "\n").encode())
        if self.images.is_file():
            figure = evaluation_figure(read_table(self.images).columns())
            figure.savefig(self.figure)
            writer.figure("evaluation", figure, self.step)
