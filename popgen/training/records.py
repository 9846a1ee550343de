"""Records of evaluations, as files and as curves."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from popgen.summaries import Writer
from popgen.training.run_directory import RunDirectory


def write_record(directory: RunDirectory, writer: Writer, record: Mapping[str, Any]) -> pathlib.Path:
    """Writes the record of an evaluation as JSON and as scalars, and returns the path of the JSON file.

    What is not a finite number, such as the standard error of a single image, is `null` in the file.

    Example: `run` calls it.
    """
    bounds = {name: record[name] for name in ("log_p_x", "log_p_x_standard_error", "elbo", "reconstruction", "kl")}
    writer.scalars("evaluation", bounds, record["step"])
    name = "evaluation_step{step:08d}_{weights}_{num_samples}x{num_images}.json".format(**record)
    path = directory.path / name
    strict = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    path.write_text(json.dumps(strict, indent=2, allow_nan=False) + "\n")
    return path
