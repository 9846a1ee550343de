"""The GE2E loss against loops over the equations of the paper."""

import math

import pytest
import torch
from torch import Tensor

from popgen.errors import ArgumentError
from popgen.losses import ge2e_loss
from popgen.losses.ge2e import ge2e_similarities

SHAPES = [(3, 4, 5), (2, 2, 3), (2, 5, 2), (6, 2, 8)]


def make_embeddings(shape: tuple[int, int, int] = (3, 4, 5)) -> Tensor:
    """Returns embeddings in float64."""
    return torch.randn(shape, dtype=torch.float64)


def similarity(embeddings: Tensor, speaker: int, utterance: int, other: int, scale: float, offset: float) -> float:
    """Returns eq. 9 of the paper for one utterance and one centroid, with eqs. 1, 4 and 8, by loops."""
    units = [[vector / math.sqrt(sum(v**2 for v in vector.tolist())) for vector in row] for row in embeddings]
    members = [unit for i, unit in enumerate(units[other]) if other != speaker or i != utterance]
    centroid = sum(members[1:], members[0]) / len(members)
    product = sum((units[speaker][utterance] * centroid).tolist())
    return scale * product / math.sqrt(sum(v**2 for v in centroid.tolist())) + offset


@pytest.mark.parametrize("form", ["softmax", "contrast"])
def test_is_formed_in_float32_whatever_the_precision(form: str) -> None:
    """Of the same rounded embeddings, as bfloat16 and under autocast."""
    embeddings = make_embeddings().bfloat16()
    exact = ge2e_loss(embeddings.double(), 10.0, -5.0, form)
    for values, autocast in ((embeddings, False), (embeddings.float(), True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = ge2e_loss(values, 10.0, -5.0, form)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["softmax", "contrast"])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_what_the_paper_says(shape: tuple[int, int, int], form: str) -> None:
    """Eq. 6 or eq. 7, one utterance after another."""
    embeddings, scale, offset = make_embeddings(shape), 3.5, -1.25
    found, similarities = ge2e_loss(embeddings, scale, offset, form), ge2e_similarities(embeddings, scale, offset)
    assert found.shape == shape[:2]
    for j in range(shape[0]):
        for i in range(shape[1]):
            s = [similarity(embeddings, j, i, k, scale, offset) for k in range(shape[0])]
            assert similarities[j, i].tolist() == pytest.approx(s)
            if form == "softmax":
                expected = -s[j] + math.log(sum(math.exp(value) for value in s))
            else:
                sigmoids = [1.0 / (1.0 + math.exp(-value)) for value in s]
                expected = 1.0 - sigmoids[j] + max(value for k, value in enumerate(sigmoids) if k != j)
            assert found[j, i].item() == pytest.approx(expected)


def test_lengths_of_embeddings_do_not_matter() -> None:
    """Each is divided by its own."""
    embeddings = make_embeddings()
    lengths = 0.1 + 5.0 * torch.rand(3, 4, 1, dtype=torch.float64)
    torch.testing.assert_close(ge2e_loss(embeddings * lengths, 10.0, -5.0), ge2e_loss(embeddings, 10.0, -5.0))


def test_the_offset_matters_to_the_contrast_alone() -> None:
    """It cancels in the softmax."""
    embeddings = make_embeddings()
    torch.testing.assert_close(ge2e_loss(embeddings, 10.0, 3.0), ge2e_loss(embeddings, 10.0, -5.0))
    assert not torch.allclose(
        ge2e_loss(embeddings, 10.0, 3.0, "contrast"), ge2e_loss(embeddings, 10.0, -5.0, "contrast")
    )


@pytest.mark.parametrize("form, guess", [("softmax", math.log(4)), ("contrast", 1.0)])
def test_speakers_that_are_all_the_same_cost_a_guess(form: str, guess: float) -> None:
    """And speakers at right angles next to nothing, even in float32, where the softmax keeps its digits."""
    same = torch.ones(4, 3, 5)
    torch.testing.assert_close(ge2e_loss(same, 10.0, -5.0, form), torch.full((4, 3), guess))
    apart = ge2e_loss(torch.eye(4).repeat_interleave(3, 0).view(4, 3, 4), 30.0, -15.0, form)
    expected = 3.0 * math.exp(-30.0) if form == "softmax" else 2.0 * torch.sigmoid(torch.tensor(-15.0)).item()
    assert apart.flatten().tolist() == pytest.approx([expected] * 12, rel=1e-4 if form == "softmax" else 0.3)


@pytest.mark.parametrize("form", ["softmax", "contrast"])
def test_gradients(form: str) -> None:
    """Of embeddings, scale and offset, by finite differences; the scale may be a parameter."""
    scale, offset = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (4.0, -1.0))
    embeddings = make_embeddings().requires_grad_()
    assert torch.autograd.gradcheck(lambda e, w, b: ge2e_loss(e, w, b, form), (embeddings, scale, offset))
    torch.testing.assert_close(ge2e_loss(embeddings, scale, offset, form), ge2e_loss(embeddings, 4.0, -1.0, form))


def test_descent_gathers_each_speaker() -> None:
    """A few steps bring utterances to their own centroid and away from the others."""
    embeddings = make_embeddings((4, 5, 6)).requires_grad_()
    optimizer = torch.optim.Adam([embeddings], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        ge2e_loss(embeddings, 10.0, -5.0).sum().backward()
        optimizer.step()
    assert (ge2e_similarities(embeddings, 1.0, 0.0).argmax(-1) == torch.arange(4)[:, None]).all()
    assert ge2e_loss(embeddings, 10.0, -5.0).max() < 0.01


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 1, 5), (0, 4, 5), (3, 4), (3, 4, 5, 6)])
def test_too_few_speakers_or_utterances_are_refused(as_a_user, shape: tuple[int, ...]) -> None:
    """The message says how many there must be."""
    with pytest.raises(ArgumentError, match="at least 2 speakers and 2 utterances, got") as error:
        ge2e_loss(torch.zeros(shape), 10.0, -5.0)
    assert str(error.value).endswith(str(shape))


def test_bad_arguments_are_named(as_a_user) -> None:
    """The scale must be above nought, and the form known."""
    for scale in (0.0, -1.0):
        with pytest.raises(ArgumentError, match=f"scale must be above 0, got {scale}"):
            ge2e_loss(make_embeddings(), scale, 0.0)
    with pytest.raises(ArgumentError, match="scale must be a finite number, got nan"):
        ge2e_loss(make_embeddings(), math.nan, 0.0)
    with pytest.raises(ArgumentError, match="form must be one of softmax, contrast, got 'hinge'"):
        ge2e_loss(make_embeddings(), 1.0, 0.0, form="hinge")
