"""Records of evaluations, as files and as curves."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from popgen.errors import ArgumentError, check_choice
from popgen.evaluation.annealed import ESTIMATOR_VERSION
from popgen.evaluation.evaluator import Evaluator
from popgen.evaluation.figures import evaluation_figure
from popgen.evaluation.image_table import read_table
from popgen.files import json_ready, to_python, write_json
from popgen.summaries import Writer


@dataclasses.dataclass(frozen=True)
class Configuration:
    """The text of a run's configuration, to be kept with its results.

    Attributes:
        given: as it was asked for, includes and overrides merged.
        operative: every value that was used, defaults too.
        settings: what was bound, by short name, for the HParams tab.
        compared: the settings that are columns there; all if there are none.

    Example: `run` takes one.
    """

    given: str
    operative: str
    settings: Mapping[str, bool | int | float | str]
    compared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.compared:
            check_choice("hparam", name, tuple(self.settings))


RECORD_NAME = "evaluation_step{step}_{weights}_{num_samples}x{num_examples}{precision}.json"


@dataclasses.dataclass(frozen=True)
class EvaluationFiles:
    """Where an evaluation of a checkpoint lies: a JSON record, and of a model of images a table and a figure beside it.

    Args:
        directory: of the run.
        step: of the checkpoint.
        weights: "raw" or "averaged".
        num_samples: of the evaluation.
        num_examples: of the evaluation.
        precision: of its matrix products.

    Example:
        >>> EvaluationFiles(pathlib.Path("run"), 40, "raw", num_samples=5_000, num_examples=10_000).record_path.name
        'evaluation_step00000040_raw_5000x10000.json'
    """

    directory: pathlib.Path
    step: int
    weights: str
    num_samples: int
    num_examples: int
    precision: str = "fp32"

    @property
    def record_path(self) -> pathlib.Path:
        """The record, strict JSON."""
        return self.directory / RECORD_NAME.format(
            step=f"{self.step:08d}",
            weights=self.weights,
            num_samples=self.num_samples,
            num_examples=self.num_examples,
            precision="" if self.precision == "fp32" else f"_{self.precision}",
        )

    @property
    def images_path(self) -> pathlib.Path:
        """The table of all images, see `popgen.evaluation.image_table`."""
        return self.record_path.with_name(f"{self.record_path.stem}_images.csv")

    @property
    def annealed_path(self) -> pathlib.Path:
        """The table of the images that are checked by annealing, see `popgen.evaluation.annealed`."""
        return self.record_path.with_name(f"{self.record_path.stem}_annealed.csv")

    @property
    def tag(self) -> str:
        """Under which TensorBoard shows the results: raw and averaged weights, and precisions, are curves of their own.

        Example:
            >>> EvaluationFiles(pathlib.Path("run"), 40, "averaged", num_samples=5_000, num_examples=10_000).tag
            'evaluation_averaged'
        """
        special = [name for name in (self.weights, self.precision) if name not in ("raw", "fp32")]
        return "_".join(["evaluation", *special])

    @property
    def figure_path(self) -> pathlib.Path:
        """The figure of the table."""
        return self.record_path.with_suffix(".png")

    def write(self, writer: Writer, record: Mapping[str, Any], evaluator: Evaluator) -> None:
        """Writes the record, what the headline names as scalars too, and the figure of the table if there is one.

        What is not a finite number, such as the standard error of a single image, is `null` in the file. The file comes
        last: where it has these results already, so does the event file, and they are not shown twice.

        Raises:
            ArgumentError: if the headline of the evaluator names what the record lacks; all else is written.
        """
        results = {name: to_python(record[name]) for name in evaluator.headline if name in record}
        if not self._has_on_file(json_ready(results)):
            if self.images_path.is_file():
                figure = evaluation_figure(read_table(self.images_path).columns())
                figure.savefig(self.figure_path)
                writer.figure(self.tag, figure, self.step)
            writer.scalars(self.tag, results, self.step)
            writer.sync()
        write_json(self.record_path, record)
        missing = [name for name in evaluator.headline if name not in record]
        if missing:
            raise ArgumentError(
                f"{type(evaluator).__name__}.headline names {', '.join(missing)}, which its evaluate does not return; "
                f"the other results are in {self.record_path}"
            )

    def annealing_on_file(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the check by annealing that the record on file holds, if today's would find the same numbers."""
        found = self._on_file()
        if any(found.get(name) != record.get(name) for name in ("model_sha256", "images_sha256", "seed")):
            return {}
        if found.get("annealed_estimator_version", ESTIMATOR_VERSION) != ESTIMATOR_VERSION:  # older records do not say
            return {}
        check = {name: value for name, value in found.items() if name.startswith(("annealed_", "simulated_"))}
        return {name: math.nan if value is None else value for name, value in check.items()}

    def _has_on_file(self, results: Mapping[str, Any]) -> bool:
        found = self._on_file()
        return bool(found) and all(found.get(name) == value for name, value in results.items())

    def _on_file(self) -> dict[str, Any]:
        try:
            found = json.loads(self.record_path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def read_record(path: pathlib.Path) -> dict[str, Any]:
    """Returns the record of an evaluation; a number that is `null` in the file is not a number.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "record.json"
        ...     write_json(path, {"elbo": -90.5, "elbo_standard_error": math.nan})
        ...     read_record(path)
        {'elbo': -90.5, 'elbo_standard_error': nan}
    """
    return {name: math.nan if value is None else value for name, value in json.loads(path.read_text()).items()}


def evaluation_records(
    directory: pathlib.Path, step: int | None = None, weights: str = "*", num_samples: int | None = None
) -> list[pathlib.Path]:
    """Returns the records of evaluations in a run directory: all, or those of a step, weights or number of samples.

    Those that were made at a lower precision are not among them.

    Example:
        >>> evaluation_records(pathlib.Path("nowhere"), step=40, weights="raw")
        []
    """
    pattern = RECORD_NAME.format(
        step="*" if step is None else f"{step:08d}",
        weights=weights,
        num_samples="*" if num_samples is None else num_samples,
        num_examples="*",
        precision="",
    )
    return sorted(path for path in directory.glob(pattern) if path.stem.rpartition("x")[2].isdecimal())
