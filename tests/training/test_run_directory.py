"""Run directories: whose files are whose, and who may write."""

import pathlib

import pytest

from popgen.errors import CheckpointError, RunDirectoryError
from popgen.training.run_directory import RunDirectory

OF_A_RUN = [
    "config.gin",
    "operative_config.gin",
    "checkpoints/latest.ckpt",
    "checkpoints/latest.damaged",
    "checkpoints/previous.ckpt",
    "checkpoints/best.ckpt",
    "checkpoints/step_00001000.ckpt",
    "checkpoints/.writing-0f1e2d3c-latest.ckpt",
    "samples/best.png",
    "samples/best_sample_0.wav",
    "samples/step_00001000.png",
    "samples/step_00001000_sample_0.wav",
    "probe_digit_step00001000_raw.json",
    "evaluation_step00001000_raw_5000x10000.json",
    ".writing-0f1e2d3c-evaluation_step00001000_raw_5000x10000_images.part-1-of-1.csv",
    "events.out.tfevents.1700000000.host.1.0",
]
OF_A_USER = [
    "notes.md",
    "my_config.gin",
    "evaluation_notes.json",
    "samples/figure_for_the_paper.png",
    "checkpoints/the_good_one.ckpt",
    "plots/curve.png",
    "sub/config.gin",
]


def test_clear_removes_what_a_run_wrote_and_nothing_of_the_users(tmp_path: pathlib.Path) -> None:
    directory = RunDirectory(tmp_path)
    with directory.locked():
        for name in OF_A_RUN + OF_A_USER:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        assert directory.has_checkpoint()
        directory.clear()
        assert not directory.has_checkpoint()
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        assert left - {".lock"} == set(OF_A_USER)
        assert all((tmp_path / name).read_text() == name for name in OF_A_USER)
        directory.save_checkpoint("latest", {"step": 1})  # the folders are still there
        directory.clear()


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path: pathlib.Path) -> None:
    """But for the record of an evaluation, which may be one that another process is writing beside the run."""
    directory, record = RunDirectory(tmp_path), ".writing-0f1e2d3c-evaluation_step00001000_raw_5000x10000.json"
    with directory.locked():
        (directory.checkpoints_path / ".writing-0f1e2d3c-latest.ckpt").write_bytes(b"half")
        for name in (".writing-0f1e2d3c-config.gin", ".writing-0f1e2d3c-operative_config.gin", record):
            (tmp_path / name).write_bytes(b"half")
        directory.save_checkpoint("best", {"step": 1})
    with directory.locked():
        assert [path.name for path in directory.checkpoints_path.iterdir()] == ["best.ckpt"]
        assert [path.name for path in tmp_path.glob(".writing-*")] == [record]


def test_clear_of_an_empty_directory(tmp_path: pathlib.Path) -> None:
    directory = RunDirectory(tmp_path / "new")
    with directory.locked():
        directory.clear()
    assert directory.samples_path.is_dir() and directory.checkpoints_path.is_dir()


def test_checkpoints_may_lie_on_another_disk(tmp_path: pathlib.Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    directory = RunDirectory(run)
    with directory.locked():
        directory.save_checkpoint("latest", {"step": 1})
        assert (elsewhere / "latest.ckpt").is_file()
        directory.clear()
    assert list(elsewhere.iterdir()) == [] and (run / "checkpoints").is_symlink()


def test_a_place_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        message = f"{path} is not writable .* name another with --run_dir"
        with pytest.raises(RunDirectoryError, match=message), RunDirectory(path).locked():
            raise AssertionError("nothing may run here")


def test_names_of_steps(tmp_path: pathlib.Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.checkpoint_path("1000") == directory.checkpoint_path("00001000")
    assert directory.checkpoint_path("1000").name == "step_00001000.ckpt"
    assert directory.checkpoint_path("123456789").name == "step_123456789.ckpt"
    for name in ("-1", "1e3", "step_00001000", "BEST", "latest.ckpt", "1 000"):
        with pytest.raises(CheckpointError, match="checkpoint must be best, latest, previous or a step, got"):
            directory.checkpoint_path(name)


def test_a_missing_checkpoint_lists_what_there_is(tmp_path: pathlib.Path) -> None:
    directory = RunDirectory(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no checkpoint 'best'; it has no checkpoints yet"):
        directory.load_checkpoint("best")
    with directory.locked():
        for name in ("latest", "500", "1000"):
            directory.save_checkpoint(name, {"step": 1})
    with pytest.raises(CheckpointError, match="no checkpoint '700'; there are: latest, 1000, 500"):
        directory.load_checkpoint("700")


def test_clearing_replicas_may_be_interrupted_anywhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left are the first ones, and clearing again removes them."""
    whole = RunDirectory(tmp_path)
    for index in range(3):
        with whole.replica(index).locked():
            whole.replica(index).config_path.write_text("")
            whole.replica(index).save_checkpoint("latest", {"step": 1})
    clear = RunDirectory.clear

    def dies_at_the_second(directory: RunDirectory) -> None:
        if directory.path.name == "replica_1":
            raise KeyboardInterrupt
        clear(directory)

    monkeypatch.setattr(RunDirectory, "clear", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        clear(whole)
    assert [replica.path.name for replica in whole.replicas()] == ["replica_0", "replica_1"]
    monkeypatch.undo()
    whole.replica(0).config_path.unlink()
    whole.clear()
    assert not whole.has_checkpoint() and not list(tmp_path.glob("*/config.gin"))
