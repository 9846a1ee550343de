"""InfoNCE against the cross entropy, its saturation, and its bound on an information known in closed form."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from popgen.errors import ArgumentError
from popgen.losses import contrastive_accuracy, info_nce, mutual_information_bound


def make_scores(shape: tuple[int, ...] = (3, 5, 8)) -> Tensor:
    """Returns scores in float64."""
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3, 5, 8), (7, 2), (1, 4), (6,), (0, 4), (3, 1)])
def test_is_the_cross_entropy_of_the_first_candidate(shape: tuple[int, ...]) -> None:
    """Element by element, in nats; without negatives it is nought."""
    scores = make_scores(shape)
    flat = scores.reshape(-1, shape[-1])
    expected = F.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.int64), reduction="none")
    found = info_nce(scores)
    assert found.shape == shape[:-1]
    torch.testing.assert_close(found.flatten(), expected)


def test_a_mask_removes_negatives() -> None:
    """The loss is that of the candidates that are left, one example at a time, and masked scores get no gradient."""
    scores, mask = make_scores((20, 8)).requires_grad_(), torch.rand(20, 7) < 0.4
    mask[0] = False
    found = info_nce(scores, mask)
    for i in range(20):
        left = torch.cat([scores[i, :1], scores[i, 1:][mask[i]]])
        torch.testing.assert_close(found[i], -left.log_softmax(0)[0])
    assert found[0] == 0.0
    found.sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert torch.equal(scores.grad[:, 1:] != 0.0, mask)


@pytest.mark.parametrize("num_candidates", [1, 2, 9, 129])
def test_identical_scores_give_the_logarithm_of_their_number(num_candidates: int) -> None:
    """And the accuracy of a guess, and no information."""
    scores = torch.full((4, num_candidates), 3.7, dtype=torch.float64)
    torch.testing.assert_close(info_nce(scores), torch.full((4,), math.log(num_candidates), dtype=torch.float64))
    torch.testing.assert_close(contrastive_accuracy(scores), torch.full((4,), 1.0 / num_candidates).double())
    bound = mutual_information_bound(info_nce(scores), num_candidates)
    torch.testing.assert_close(bound, torch.zeros(4, dtype=torch.float64))


def test_the_order_of_the_negatives_and_a_constant_do_not_matter() -> None:
    """Only differences of scores do, and which one is first."""
    scores = make_scores()
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(7)])
    torch.testing.assert_close(info_nce(scores[..., order] + 100.0), info_nce(scores))
    assert torch.equal(contrastive_accuracy(scores[..., order]), contrastive_accuracy(scores))
    assert not torch.allclose(info_nce(scores.roll(1, -1)), info_nce(scores))


def test_accuracy_counts_the_highest_score() -> None:
    """Against argmax where there are no ties; a masked negative cannot win."""
    scores, mask = make_scores((200, 4)), torch.rand(200, 3) < 0.5
    assert torch.equal(contrastive_accuracy(scores), (scores.argmax(-1) == 0).double())
    masked = torch.cat([scores[:, :1], scores[:, 1:].masked_fill(~mask, -1e9)], dim=1)
    found = contrastive_accuracy(scores, mask)
    assert torch.equal(found, (masked.argmax(-1) == 0).double())
    assert not torch.equal(found, contrastive_accuracy(scores))


def test_ties_are_fractions() -> None:
    """A tie among three gives a third; ties among those that lose do not matter; a masked one is no tie."""
    scores = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(contrastive_accuracy(scores), torch.tensor([1.0 / 3.0, 0.0, 1.0]))
    mask = torch.tensor([[True, False, True]]).expand(3, 3)
    torch.testing.assert_close(contrastive_accuracy(scores, mask), torch.tensor([0.5, 0.0, 1.0]))
    assert contrastive_accuracy(scores, torch.zeros(3, 3, dtype=torch.bool)).tolist() == [1.0, 1.0, 1.0]


def test_what_differs_by_rounding_alone_is_a_tie() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-6, 1.0 - 1e-6, 0.0], [1.0, 1.0 + 1e-4, 1.0 - 1e-4, 0.0], [0.0] * 4])
    torch.testing.assert_close(contrastive_accuracy(scores), torch.tensor([1.0 / 3.0, 0.0, 0.25]))
    assert contrastive_accuracy(scores[:1].double()).item() == 0.0, "which is finer"


def test_the_bound_never_exceeds_log_n() -> None:
    """Not even for a critic that is certain, and right."""
    scores = make_scores((1_000, 6)) * 30.0
    scores[:500, 0] += 1_000.0
    bound = mutual_information_bound(info_nce(scores), 6)
    assert (bound <= math.log(6)).all()
    torch.testing.assert_close(bound[:500], torch.full((500,), math.log(6), dtype=torch.float64))


@pytest.mark.parametrize("correlation", [0.3, 0.9])
def test_bounds_the_information_of_correlated_gaussians(correlation: float) -> None:
    """With the density ratio as the critic it lies below -1/2 log(1 - ρ²), grows in N, and comes within 0.02 of it."""
    rho, count = correlation, 4_000
    information = -0.5 * math.log(1.0 - rho**2)
    noise = torch.randn(2, count, dtype=torch.float64)
    context, positive = noise[0], rho * noise[0] + math.sqrt(1.0 - rho**2) * noise[1]
    bounds, errors = [], []
    for num_candidates in (2, 8, 64, 512):
        x = torch.cat([positive[:, None], torch.randn(count, num_candidates - 1, dtype=torch.float64)], dim=1)
        log_p_x_given_c = torch.distributions.Normal(rho * context[:, None], math.sqrt(1.0 - rho**2)).log_prob(x)
        log_p_x = torch.distributions.Normal(0.0, 1.0).log_prob(x)
        losses = info_nce(log_p_x_given_c - log_p_x)
        bounds.append(mutual_information_bound(losses.mean(), num_candidates).item())
        errors.append(losses.std().item() / math.sqrt(count))
    assert all(bound < information + 4.0 * error for bound, error in zip(bounds, errors, strict=True))
    assert bounds[0] < bounds[1] < bounds[2] < bounds[3] + 4.0 * errors[3]
    assert bounds[0] < 0.8 * information
    assert abs(bounds[-1] - information) < 0.02 + 4.0 * errors[-1]


def test_half_precision_is_summed_in_float32() -> None:
    """And float64 stays float64."""
    scores = make_scores()
    rounded = scores.to(torch.bfloat16)
    assert info_nce(rounded).dtype == contrastive_accuracy(rounded).dtype == torch.float32
    assert torch.equal(info_nce(rounded), info_nce(rounded.float()))
    assert info_nce(scores).dtype == contrastive_accuracy(scores).dtype == torch.float64


def test_nothing_is_mutated_and_accuracy_has_no_gradient() -> None:
    """Inputs stay as they are."""
    scores, mask = make_scores().requires_grad_(), torch.rand(3, 5, 7) < 0.5
    before = scores.detach().clone(), mask.clone()
    info_nce(scores, mask).sum().backward()
    assert not contrastive_accuracy(scores, mask).requires_grad
    assert torch.equal(scores.detach(), before[0]) and torch.equal(mask, before[1])
    assert torch.autograd.gradcheck(lambda s: info_nce(s, mask), (make_scores().requires_grad_(),))


@pytest.mark.parametrize("function", [info_nce, contrastive_accuracy])
def test_wrong_shapes_are_refused(as_a_user, function) -> None:
    """The message says what the shape must be."""
    for scores in (torch.zeros(()), torch.zeros(3, 0)):
        with pytest.raises(ArgumentError, match="scores must have the positive on their last axis, got shape"):
            function(scores)
    with pytest.raises(ArgumentError, match=r"mask .* shape \(3, 4\), got \(3, 5\)"):
        function(torch.zeros(3, 5), torch.ones(3, 5, dtype=torch.bool))


@pytest.mark.parametrize("num_candidates", [0, -1, 2.5, True])
def test_a_bad_number_of_candidates_is_refused(as_a_user, num_candidates) -> None:
    """It must be an integer of at least 1."""
    with pytest.raises(ArgumentError, match="num_candidates must be an integer of at least 1, got"):
        mutual_information_bound(torch.zeros(3), num_candidates)


def test_the_bound_says_when_it_holds() -> None:
    """Whoever reads the help learns of saturation and of the marginal."""
    text = inspect.getdoc(mutual_information_bound) or ""
    assert "saturates" in text and "marginal" in text
