"""Grids against brute force, PNG files read back, and TensorBoard's own reader on what the writer wrote."""

import io
import pathlib
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

from popgen.errors import RunDirectoryError
from popgen.summaries import Writer, image_grid, write_png


def read(directory: pathlib.Path) -> EventAccumulator:
    """Returns everything that TensorBoard finds in a directory."""
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(directory: pathlib.Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(directory).Scalars(tag)]


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, columns", [(1, 1), (1, 4), (5, 1), (7, 3), (12, 4)])
@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 1)])
def test_grid_against_brute_force(count: int, columns: int, shape: tuple[int, int]) -> None:
    (height, width), padding = shape, 2
    images = torch.rand(count, height * width)
    grid = image_grid(images, shape, columns)
    rows = (count + columns - 1) // columns
    expected = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding), 64)
    for i in range(count):
        for y in range(height):
            for x in range(width):
                row = padding + (i // columns) * (height + padding) + y
                column = padding + (i % columns) * (width + padding) + x
                expected[row, column] = round(255 * images[i, y * width + x].item())
    assert grid.dtype == torch.uint8
    assert np.array_equal(grid.numpy(), expected)


def test_grid_clamps_and_takes_any_float() -> None:
    images = torch.tensor([[-3.0, 0.0, 1.0, 7.0]], dtype=torch.float64, requires_grad=True)
    assert image_grid(images, (2, 2), columns=1)[2:4, 2:4].tolist() == [[0, 0], [255, 255]]


def test_png_is_read_back(tmp_path: pathlib.Path) -> None:
    levels = torch.randint(0, 256, (5, 7), dtype=torch.uint8)
    write_png(tmp_path / "picture.png", levels)
    with Image.open(tmp_path / "picture.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (14, 10))
        pixels = np.asarray(image)
    assert np.array_equal(pixels, np.kron(levels.numpy(), np.ones((2, 2), dtype=np.uint8)))


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_scalars_are_read_back(tmp_path: pathlib.Path) -> None:
    writer = Writer(tmp_path)
    for step in (1, 2, 10):
        writer.scalars("train", {"loss": 1.5 * step, "elbo": -1.5 * step}, step)
    writer.scalars("test", {"loss": 7.0}, 10)
    writer.close()
    assert set(read(tmp_path).Tags()["scalars"]) == {"train/loss", "train/elbo", "test/loss"}
    assert scalars(tmp_path, "train/loss") == [(1, 1.5), (2, 3.0), (10, 15.0)]
    assert scalars(tmp_path, "train/elbo") == [(1, -1.5), (2, -3.0), (10, -15.0)]


def test_images_are_read_back(tmp_path: pathlib.Path) -> None:
    levels = torch.randint(0, 256, (6, 9), dtype=torch.uint8)
    writer = Writer(tmp_path)
    writer.image("prior_samples", levels, 4)
    writer.close()
    (event,) = read(tmp_path).Images("prior_samples")
    assert event.step == 4
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        pixels = np.asarray(image.convert("L"))
    assert np.array_equal(pixels, levels.numpy())


def test_text_is_shown_as_it_is(tmp_path: pathlib.Path) -> None:
    """Markdown takes every line that is indented by four for code, so nothing of it is set as a heading or a list."""
    text = "# a comment\nExperiment.seed = 3\n    indented = %gin.REQUIRED\n* not a list"
    writer = Writer(tmp_path)
    writer.text("config", text, 5)
    writer.close()
    (event,) = read(tmp_path).Tensors("config/text_summary")
    (shown,) = event.tensor_proto.string_val
    lines = shown.decode().split("\n")
    assert [line[4:] for line in lines] == text.split("\n") and all(line.startswith("    ") for line in lines)
    assert event.step == 5


@pytest.mark.parametrize("compared", [(), ("Adam.lr", "VampPrior.initialisation")])
def test_hyper_parameters_are_read_back(tmp_path: pathlib.Path, compared: tuple[str, ...]) -> None:
    settings = {"Adam.lr": 5e-4, "Experiment.seed": 3, "VampPrior.initialisation": "data", "BinaryMNIST.download": True}
    writer = Writer(tmp_path)
    writer.hyper_parameters(settings, ["best/loss", "evaluation/log_p_x"], compared)
    writer.scalars("best", {"loss": 90.0}, 1)
    writer.close()
    content = read(tmp_path).summary_metadata
    start = hparams_metadata.parse_session_start_info_plugin_data(
        content[hparams_metadata.SESSION_START_INFO_TAG].plugin_data.content
    )
    found = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert found == settings
    experiment = hparams_metadata.parse_experiment_plugin_data(
        content[hparams_metadata.EXPERIMENT_TAG].plugin_data.content
    )
    assert [info.name for info in experiment.hparam_infos] == list(compared or settings)
    assert [metric.name.tag for metric in experiment.metric_infos] == ["best/loss", "evaluation/log_p_x"]
    assert len(list(tmp_path.iterdir())) == 1, "one run is one event file, not a folder of its own for HParams"


def test_what_was_written_at_or_after_the_purge_step_is_hidden(tmp_path: pathlib.Path) -> None:
    first = Writer(tmp_path)
    for step in range(1, 9):
        first.scalars("train", {"loss": float(step)}, step)
    first.close()
    second = Writer(tmp_path, purge_step=6)
    second.scalars("train", {"loss": 60.0}, 6)
    second.close()
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 60.0)]


def test_a_file_that_was_cut_at_any_place_hides_nothing_of_the_next_one(tmp_path: pathlib.Path) -> None:
    """A process may be killed in the middle of a write; what it had written whole is seen, and what comes later."""
    first = Writer(tmp_path / "whole")
    for step in (1, 2, 3):
        first.scalars("train", {"loss": float(step)}, step)
    first.close()
    (whole,) = (tmp_path / "whole").iterdir()
    content = whole.read_bytes()
    record = (len(content) - len(content[: content.index(b"train/loss")])) // 3
    for length in range(len(content) - record, len(content) + 1, 5):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / whole.name).write_bytes(content[:length])
        second = Writer(folder, purge_step=3)
        second.scalars("train", {"loss": 30.0}, 3)
        second.close()
        assert scalars(folder, "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_new_file_sorts_after_all_others_whatever_the_clock_says(tmp_path: pathlib.Path) -> None:
    """TensorBoard reads them by name, and would otherwise take what is new for what is old."""
    (tmp_path / "events.out.tfevents.4000000000.host.1").write_bytes(b"")
    names = []
    for _ in range(3):
        Writer(tmp_path).close()
        names.append(max(path.name for path in tmp_path.iterdir()))
    assert names == sorted(set(names)) and names[-1].startswith("events.out.tfevents.4000000003.")


def test_two_writers_are_followed_as_they_write(tmp_path: pathlib.Path) -> None:
    """An evaluation writes while training does; TensorBoard has left the file of the one for that of the other."""
    events = EventAccumulator(str(tmp_path))
    training = Writer(tmp_path)
    for step in range(1, 5):
        training.scalars("train", {"loss": float(step)}, step)
        if step == 2:
            evaluation = Writer(tmp_path)
            evaluation.scalars("evaluation", {"loss": 20.0}, 1)
            evaluation.close()
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == list(range(1, step + 1))
    assert [event.value for event in events.Scalars("evaluation/loss")] == [20.0]
    training.close()


def test_a_write_that_fails_leaves_no_part_of_it(tmp_path: pathlib.Path) -> None:
    writer = Writer(tmp_path)
    writer.scalars("train", {"loss": 1.0}, 1)
    (path,) = tmp_path.iterdir()
    size = path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
    try:
        with pytest.raises(RunDirectoryError, match=f"cannot write the curves {path}: .*File too large"):
            writer.scalars("train", {"loss": 2.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.stat().st_size == size
    writer.scalars("train", {"loss": 3.0}, 3)
    writer.close()
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (3, 3.0)]
