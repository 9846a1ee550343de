"""InfoNCE, the loss of contrastive predictive coding: which of several candidates belongs to a context?

Representation Learning with Contrastive Predictive Coding (van den Oord et al. 2018), https://arxiv.org/abs/1807.03748.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from popgen.errors import ArgumentError, check_integer
from popgen.precision import at_least_float32

ROUNDING = 64.0  # units in the last place of the largest score by which the same score may differ


def info_nce(
    scores: Float[Tensor, "*shape candidates"], mask: Bool[Tensor, "*shape candidates-1"] | None = None
) -> Float[Tensor, "*shape"]:
    """Returns -log of the softmax of the positive's score among all candidates', nats, at least in float32.

        L = -log( f(x, c) / Σ_j f(x_j, c) ),   log f being the scores        (eq. 4 of the paper)

    It is zero where the mask leaves the positive alone.

    Args:
        scores: log f of the positive, which comes first, and of the negatives.
        mask: which of the negatives take part, shape `(*shape, candidates - 1)`; all of them by default.

    Raises:
        ArgumentError: if there is no candidate, or the mask has another shape.

    Example:
        >>> info_nce(torch.zeros(3, 8))  # log 8: nothing tells the candidates apart
        tensor([2.0794, 2.0794, 2.0794])
    """
    scores = _masked(scores, mask)
    return torch.logsumexp(scores, -1) - scores[..., 0]


def contrastive_accuracy(
    scores: Float[Tensor, "*shape candidates"], mask: Bool[Tensor, "*shape candidates-1"] | None = None
) -> Float[Tensor, "*shape"]:
    """Returns the probability of choosing the positive if ties for the highest score are broken at random.

    So m candidates with one score give 1/m, not 1. Scores that differ by no more than rounding are one score: equal
    frames have such, where those of positives and negatives are different products. It is one where the mask leaves
    the positive alone.

    Args:
        scores: of the positive, which comes first, and of the negatives.
        mask: which of the negatives take part; all of them by default.

    Raises:
        ArgumentError: if there is no candidate, or the mask has another shape.

    Example:
        >>> contrastive_accuracy(torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    scores = _masked(scores.detach(), mask)
    positive, highest = scores[..., :1], scores.amax(-1, keepdim=True)
    largest = scores.abs().masked_fill(scores.isinf(), 0.0).amax(-1, keepdim=True)
    rounding = ROUNDING * torch.finfo(scores.dtype).eps * largest
    chosen = (highest - positive <= rounding)[..., 0]
    return chosen.to(scores.dtype) / ((scores - positive).abs() <= rounding).sum(-1)


def mutual_information_bound(loss: Float[Tensor, "*shape"], num_candidates: int) -> Float[Tensor, "*shape"]:
    """Returns log N - L, nats, whose expectation is a lower bound on the mutual information of context and positive.

    (Section 2.3 and appendix A.1 of the paper.) Two things limit what it says:

    - It saturates: L is not negative, so the bound never exceeds log N, however much information there is.
    - It holds only where the N - 1 negatives are draws from the marginal distribution of the positives, independent of
      each other and of the context. Negatives that are chosen to be harder, that exclude the positive, or that the
      context has seen make it a number without this meaning; `CPC.independent_terms` has negatives that keep it.

    Args:
        loss: L of `info_nce`, or a mean of it.
        num_candidates: N, the positive and the negatives.

    Raises:
        ArgumentError: if `num_candidates` is not an integer of at least 1.

    Example:
        >>> mutual_information_bound(info_nce(torch.tensor([[9.0, 0.0, 0.0, 0.0]])), num_candidates=4)
        tensor([1.3859])
    """
    return math.log(check_integer("num_candidates", num_candidates, minimum=1)) - loss


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the scores in at least float32, minus infinity where the mask leaves a negative out."""
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ArgumentError(f"scores must have the positive on their last axis, got shape {tuple(scores.shape)}")
    scores = at_least_float32(scores)
    if mask is None:
        return scores
    expected = (*scores.shape[:-1], scores.shape[-1] - 1)
    if tuple(mask.shape) != expected:
        raise ArgumentError(f"mask must have one value for each negative, shape {expected}, got {tuple(mask.shape)}")
    return torch.cat([scores[..., :1], scores[..., 1:].masked_fill(~mask, -math.inf)], dim=-1)
