"""Records of evaluations, as files and as curves."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from popgen.summaries import Writer
from popgen.training.run_directory import RunDirectory


def write_record(
    directory: RunDirectory, writer: Writer, record: Mapping[str, Any], headline: Sequence[str]
) -> pathlib.Path:
    """Writes the record of an evaluation as JSON, with what the headline names as scalars too, and returns its path.

    What is not a finite number, such as the standard error of a single image, is `null` in the file.

    Example: `run` calls it.
    """
    writer.scalars("evaluation", {name: record[name] for name in headline}, record["step"])
    name = "evaluation_step{step:08d}_{weights}_{num_samples}x{num_examples}.json".format(**record)
    path = directory.path / name
    strict = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    path.write_text(json.dumps(strict, indent=2, allow_nan=False) + "\n")
    return path
