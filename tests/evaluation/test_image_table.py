"""Tables of images: an interrupted one is continued, shards make one, and another evaluation's is never used."""

import os
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

from popgen.datasets.images import ImageData
from popgen.errors import ArgumentError, DataError, UnfinishedEvaluationError
from popgen.evaluation.evaluator import EvaluationSettings, Results, VAEEvaluator
from popgen.evaluation.image_table import IMAGES_IN_CHUNK, ImageTable, Shard, read_table
from popgen.evaluation.likelihood import evaluate_elbo, importance_estimate
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.vamp_prior import VampPrior

COUNT = 250  # three chunks, the last one not whole


class Counted:
    """Columns of images, and which images they were asked for."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.fails_at = fails_at

    def __call__(self, images: range) -> dict[str, Tensor]:
        if self.fails_at in images:
            raise KeyboardInterrupt
        self.asked += images
        return {"log_p_x": -torch.tensor(images) / 3.0, "pareto_shape": torch.tensor(images).sqrt()}


def assert_whole(columns: dict[str, Tensor]) -> None:
    """The columns are those of all images, in order."""
    assert list(columns) == ["log_p_x", "pareto_shape", "seconds"]
    assert torch.equal(columns["log_p_x"], (-torch.arange(COUNT) / 3.0).double())
    assert torch.equal(columns["pareto_shape"], torch.arange(COUNT).sqrt().double())
    assert (columns["seconds"] >= 0.0).all()


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "evaluation_images.csv"


def names(path: pathlib.Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def test_a_table_in_memory_writes_nothing(path: pathlib.Path) -> None:
    assert_whole(ImageTable().fill({}, COUNT, Counted()))
    assert names(path) == []


def test_an_interrupted_table_is_continued(path: pathlib.Path) -> None:
    """What was finished is neither lost nor done again, nor is it another number."""
    with pytest.raises(KeyboardInterrupt):
        ImageTable(path).fill({"seed": 1}, COUNT, Counted(fails_at=205))
    assert names(path) == ["evaluation_images.part-1-of-1.csv"]
    rest, shown = Counted(), []
    assert_whole(ImageTable(path).fill({"seed": 1}, COUNT, rest, shown.append))
    assert rest.asked == list(range(200, 250))
    assert torch.cat(shown).tolist() == pytest.approx([-image / 3.0 for image in range(200)])
    assert names(path) == ["evaluation_images.csv"]
    again = Counted()
    assert_whole(ImageTable(path).fill({"seed": 1}, COUNT, again))
    assert again.asked == []


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_row_cut_short_is_not_believed(path: pathlib.Path, cut: int) -> None:
    """A process killed while it writes; the chunk is computed again, and nothing is glued to the torn line."""
    with pytest.raises(KeyboardInterrupt):
        ImageTable(path).fill({}, COUNT, Counted(fails_at=205))
    part = path.with_name("evaluation_images.part-1-of-1.csv")
    part.write_text(part.read_text()[:-cut])
    rest = Counted()
    assert_whole(ImageTable(path).fill({}, COUNT, rest))
    assert rest.asked == list(range(100, 250))


def test_a_kill_while_the_part_is_cleaned_loses_no_row(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        ImageTable(path).fill({}, COUNT, Counted(fails_at=205))
    part = path.with_name("evaluation_images.part-1-of-1.csv")
    before = part.read_bytes()

    def killed(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        ImageTable(path).fill({}, COUNT, Counted())
    monkeypatch.undo()
    assert part.read_bytes() == before
    rest = Counted()
    assert_whole(ImageTable(path).fill({}, COUNT, rest))
    assert rest.asked == list(range(200, 250))


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shards_make_one_table(path: pathlib.Path, order: tuple[int, ...]) -> None:
    *first, last = order
    for index in first:
        with pytest.raises(UnfinishedEvaluationError, match=rf"shard {index}/3 is finished, and \d+ of 250 images"):
            ImageTable(path, Shard(index, 3)).fill({}, COUNT, Counted())
    counted = Counted()
    assert_whole(ImageTable(path, Shard(last, 3)).fill({}, COUNT, counted))
    assert counted.asked == list(range((last - 1) * IMAGES_IN_CHUNK, min(COUNT, last * IMAGES_IN_CHUNK)))
    assert names(path) == ["evaluation_images.csv"]


def test_a_part_that_another_shard_has_just_begun_is_passed_over(path: pathlib.Path, capsys) -> None:
    path.with_name(f"{path.stem}.part-2-of-2.csv").touch()
    with pytest.raises(UnfinishedEvaluationError):
        ImageTable(path, Shard(1, 2)).fill({"seed": 3}, COUNT, Counted())
    assert capsys.readouterr().err == ""


def test_the_whole_takes_over_from_shards(path: pathlib.Path) -> None:
    with pytest.raises(UnfinishedEvaluationError):
        ImageTable(path, Shard(2, 3)).fill({}, COUNT, Counted())
    counted = Counted()
    assert_whole(ImageTable(path).fill({}, COUNT, counted))
    assert counted.asked == [*range(100), *range(200, 250)]


@pytest.mark.parametrize("stage", ["part", "whole"])
def test_a_table_of_another_evaluation_is_not_used(path: pathlib.Path, stage: str, capsys) -> None:
    if stage == "part":
        with pytest.raises(KeyboardInterrupt):
            ImageTable(path).fill({"seed": 1}, COUNT, Counted(fails_at=205))
    else:
        ImageTable(path).fill({"seed": 1}, COUNT, Counted())
    counted = Counted()
    assert_whole(ImageTable(path).fill({"seed": 2}, COUNT, counted))
    assert counted.asked == list(range(COUNT))
    assert "is of another evaluation and is not used" in capsys.readouterr().err
    assert read_table(path).identity == {"seed": 2} and names(path) == ["evaluation_images.csv"]


@pytest.mark.parametrize("content", [b"", b"\n", b"# {}\n", b"PK\x03\x04\xff\xfe", b"# {\nimage,log_p_x\n0,1\n"])
def test_a_file_that_is_no_table_is_replaced(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)
    assert_whole(ImageTable(path).fill({"seed": 1}, COUNT, Counted()))
    assert_whole(read_table(path).columns())


def test_columns_that_an_evaluation_does_not_form_are_an_error(path: pathlib.Path) -> None:
    """As they are where another version of popgen began the evaluation."""
    with pytest.raises(KeyboardInterrupt):
        ImageTable(path).fill({}, COUNT, Counted(fails_at=205))
    with pytest.raises(
        DataError, match="has the columns log_p_x, pareto_shape, seconds, and an evaluation forms other"
    ):
        ImageTable(path).fill({}, COUNT, lambda images: {"other": torch.tensor(images)})


@pytest.mark.parametrize(
    "content",
    [
        "# [1]\nimage,a\n0,1.0\n",
        "# " + "[" * 10_000 + "\n",
        "# {}\na" + "a" * 140_000 + "\n",
        "# {}\n\n",
        "# {}\nimage\n",
    ],
    ids=["no dictionary", "deep", "long", "no names", "no columns"],
)
def test_odd_files_are_read_as_empty_tables(content: str, path: pathlib.Path) -> None:
    path.write_text(content)
    found = read_table(path)
    assert found.rows == {} and found.columns() == {}


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3", "1.0/2"])
def test_bad_shards_are_named(text: str) -> None:
    with pytest.raises(ArgumentError, match="shard must be a part and the number of parts, such as 1/4 or 4/4, got"):
        Shard.parse(text)


def evaluate(table: ImageTable, progress=None, **changes: Any) -> Results:
    """Returns an evaluation of a small model with every part; `weight` is added to a weight, `level` to a pixel."""
    torch.manual_seed(3)
    vae = VAE(
        GaussianEncoder(16, 3, 6),
        BernoulliDecoder(3, 16, 6),
        VampPrior(16, num_components=4),
        HouseholderSylvesterFlow(3, 6, num_flows=2, num_reflections=2),
    )
    images = 255 * torch.randint(0, 2, (COUNT, 16), dtype=torch.uint8)
    vae.decoder.logits.bias.data[3] += changes.pop("weight", 0.0)
    images[-1, 0] ^= changes.pop("level", 0)
    data = ImageData(images, images, (4, 4), "noise")
    arguments = {"num_samples": 60, "seed": 2, **changes}
    settings = EvaluationSettings(progress=progress, table=table, **arguments)
    results = VAEEvaluator().evaluate(vae, data, images, settings)
    del results["seconds_of_images"]
    return results


def test_an_evaluation_does_not_depend_on_how_it_was_cut_up(path: pathlib.Path) -> None:
    """In one piece, in two shards, or interrupted and continued."""
    whole = evaluate(ImageTable())
    with pytest.raises(UnfinishedEvaluationError):
        evaluate(ImageTable(path, Shard(1, 2)))
    assert evaluate(ImageTable(path, Shard(2, 2))) == whole
    path.unlink()

    seen = 0

    def interrupt(bounds: Tensor) -> None:
        nonlocal seen
        seen += len(bounds)
        if seen > 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(ImageTable(path), interrupt)
    assert len(read_table(path.with_name("evaluation_images.part-1-of-1.csv")).rows) == 100
    assert evaluate(ImageTable(path)) == whole


@pytest.mark.parametrize(
    "change",
    [{"weight": 0.5}, {"level": 255}, {"num_samples": 61}, {"seed": 3}, {"precision": "bf16"}],
    ids=lambda change: next(iter(change)),
)
def test_rows_are_used_again_only_by_the_same_evaluation(change: dict, path: pathlib.Path, capsys) -> None:
    first = evaluate(ImageTable(path))
    assert evaluate(ImageTable(path)) == first and not capsys.readouterr().err
    again = evaluate(ImageTable(path), **change)
    assert "is of another evaluation and is not used" in capsys.readouterr().err
    assert again == evaluate(ImageTable(), **change) and again["log_p_x"] != first["log_p_x"]


@pytest.mark.parametrize("name", ["torch.__version__", "popgen.evaluation.evaluator.ESTIMATOR_VERSION"])
def test_rows_of_another_version_are_not_used(name: str, path: pathlib.Path, monkeypatch, capsys) -> None:
    evaluate(ImageTable(path))
    monkeypatch.setattr(name, "99")
    evaluate(ImageTable(path))
    assert "is of another evaluation and is not used" in capsys.readouterr().err


def test_the_parts_of_a_row_are_those_of_its_image(path: pathlib.Path) -> None:
    """Whatever the chunk: the noise of an image is that of its place in the whole set."""
    torch.manual_seed(3)
    vae = VAE(GaussianEncoder(16, 3, 6), BernoulliDecoder(3, 16, 6), VampPrior(16, num_components=4))
    images = 255 * torch.randint(0, 2, (1_050, 16), dtype=torch.uint8)
    settings = EvaluationSettings(5, seed=2, table=ImageTable(path))
    VAEEvaluator().evaluate(vae, ImageData(images, images, (4, 4), "noise"), images, settings)
    found = read_table(path).columns()
    for index in (7, 150, 1_020):
        alone = images[index : index + 1]
        bound = importance_estimate(vae, alone, 5, seed=2, first_image=index).log_p_x
        assert found["log_p_x"][index].item() == pytest.approx(bound.item(), abs=1e-5)
        for name, part in evaluate_elbo(vae, alone, seed=2, first_image=index).items():
            assert found[name][index].item() == pytest.approx(part.item(), abs=1e-5)
    parts = evaluate_elbo(vae, images[:1].expand(1_050, -1), seed=2)
    assert len(parts["elbo"].unique()) > 1_000, "no two images share it"


def test_the_chunks_of_an_evaluation_meet_different_noise(path: pathlib.Path) -> None:
    """Equal images have equal bounds where their noise is the same, and else only by a coincidence of rounding."""
    torch.manual_seed(3)
    vae = VAE(GaussianEncoder(16, 3, 6), BernoulliDecoder(3, 16, 6), VampPrior(16, num_components=4))
    images = torch.full((COUNT, 16), 255, dtype=torch.uint8)
    data = ImageData(images, images, (4, 4), "noise")
    VAEEvaluator().evaluate(vae, data, images, EvaluationSettings(10, seed=2, table=ImageTable(path)))
    assert len(read_table(path).columns()["log_p_x"].unique()) > COUNT - 10
