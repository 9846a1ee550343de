"""Image grids and the TensorBoard writer, read back by TensorBoard itself."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from popgen.summaries import Writer, image_grid, write_png


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 3), (6, 3), (2, 4)])
def test_grid_holds_each_image_at_its_place(count, columns):
    images = torch.rand(count, 6)
    grid = image_grid(images, (2, 3), columns, padding=1)
    rows = -(-count // columns)
    assert grid.shape == (rows * 3 + 1, columns * 4 + 1)
    for i in range(count):
        top, left = 1 + 3 * (i // columns), 1 + 4 * (i % columns)
        expected = (images[i].view(2, 3) * 255).round().to(torch.uint8)
        assert torch.equal(grid[top : top + 2, left : left + 3], expected)
    assert (grid[0] == 64).all() and (grid[:, 0] == 64).all()


def test_values_outside_the_range_are_clipped():
    grid = image_grid(torch.tensor([[-1.0, 2.0]]), (1, 2), columns=1, padding=0)
    assert grid.tolist() == [[0, 255]]


def test_png_round_trip(tmp_path):
    levels = torch.arange(12, dtype=torch.uint8).view(3, 4) * 20
    write_png(tmp_path / "grid.png", levels, scale=3)
    with Image.open(tmp_path / "grid.png") as picture:
        read = np.asarray(picture)
    assert read.shape == (9, 12)
    assert np.array_equal(read[1::3, 1::3], levels.numpy())


def test_tensorboard_reads_what_the_writer_wrote(tmp_path):
    writer = Writer(tmp_path)
    for step in (1, 2):
        writer.scalars("train", {"loss": 90.0 / step, "active_units": 7}, step)
    writer.image("prior_samples", torch.arange(16, dtype=torch.uint8).view(4, 4), step=2)
    writer.text("config", "a.b = 1\nc.d = '<x>'", step=0)
    writer.hyper_parameters({"Adam.lr": 1e-3, "VAE.prior": "VampPrior"}, ["best/loss"])
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 90.0), (2, 45.0)]
    picture = Image.open(io.BytesIO(events.Images("prior_samples")[0].encoded_image_string))
    assert np.array_equal(np.asarray(picture.convert("L")), np.arange(16).reshape(4, 4))
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    a.b = 1\n    c.d = '<x>'" in text
    assert events.PluginTagToContent("hparams")


def test_a_continued_run_hides_what_came_after_its_checkpoint(tmp_path):
    first = Writer(tmp_path)
    for step in range(1, 6):
        first.scalars("train", {"loss": float(step)}, step)
    first.close()
    second = Writer(tmp_path, purge_step=4)
    second.scalars("train", {"loss": 40.0}, 4)
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
