"""The table of what CPC learns of speech, from probes that are there; its command parses."""

import json
import pathlib
import statistics

import pytest

from benchmarks.cpc_speech import SPEAKERS, Run, accuracies, summary, text
from tests.commands import run_module


def write_probe(folder: pathlib.Path, run: Run, context: float, log_mel: float = 0.25) -> None:
    rows = [
        {"representation": "context", "accuracy": context, "unseen_accuracy": context - 0.25},
        {"representation": "log-mel, 1 frame", "accuracy": log_mel, "unseen_accuracy": log_mel - 0.125},
    ]
    (folder / run.name).mkdir()
    (folder / run.name / f"probe_{run.target}_step00000002_raw.json").write_text(json.dumps({"rows": rows}))


def test_the_table_is_of_means_over_speakers_then_over_seeds(tmp_path: pathlib.Path) -> None:
    """A seed counts among the digits once all speakers are there; plain features are told apart."""
    for seed in range(3):
        write_probe(tmp_path, Run("batch", None, seed), 0.9 + seed / 100)
        for place, speaker in enumerate(SPEAKERS[: 6 - (seed == 2)]):
            write_probe(tmp_path, Run("speaker", speaker, seed), 0.5 + place / 10 + seed / 100)
    rows = {row["features"]: row for row in summary(tmp_path, seeds=3)}
    assert set(rows) == {"context, negatives of the batch", "context, negatives of the speaker", "log-mel, 1 frame"}
    assert rows["context, negatives of the batch"]["speaker"] == pytest.approx([0.9, 0.91, 0.92])
    assert rows["context, negatives of the batch"]["digit"] == []
    assert rows["context, negatives of the speaker"]["digit"] == pytest.approx([0.5, 0.51])  # 0.25 + mean of 0 ... 0.5
    assert rows["context, negatives of the speaker"]["digit_of"]["jackson"] == pytest.approx([0.35, 0.36, 0.37])
    assert rows["context, negatives of the speaker"]["digit_of"]["yweweler"] == pytest.approx([0.75, 0.76])
    assert rows["log-mel, 1 frame"]["speaker"] == [0.25] * 3 and rows["log-mel, 1 frame"]["digit"] == [0.125] * 2
    lines = text(list(rows.values())).splitlines()
    deviation = statistics.stdev([0.9, 0.91, 0.92])
    assert any(f"0.910 ± {deviation:.3f} (3)" in line for line in lines)
    assert next(line for line in lines if "log-mel" in line).count("0.125") == 7  # the same for all seeds: no deviation


def test_a_run_that_was_not_probed_has_no_accuracies(tmp_path: pathlib.Path) -> None:
    assert accuracies(tmp_path, Run("batch", "theo", 0)) is None
    assert (Run("batch", "theo", 1).name, Run("batch", "theo", 1).target) == ("batch_theo_1", "digit")
    assert (Run("speaker", None, 0).name, Run("speaker", None, 0).target) == ("speaker_everyone_0", "speaker")


def test_the_command_parses() -> None:
    done = run_module("benchmarks.cpc_speech", ["--help"])
    assert done.returncode == 0 and "--part" in done.stdout, done.stderr
