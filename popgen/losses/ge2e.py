"""The generalised end-to-end loss of speaker verification (Wan et al. 2018, https://arxiv.org/abs/1710.10467)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from popgen.errors import ArgumentError, check_choice, check_number
from popgen.precision import at_least_float32, full_precision

FORMS = ("softmax", "contrast")


def ge2e_similarities(
    embeddings: Float[Tensor, "speakers utterances dim"],
    scale: float | Float[Tensor, ""],
    offset: float | Float[Tensor, ""],
) -> Float[Tensor, "speakers utterances speakers"]:
    """Returns w · cos(e_ji, c_k) + b of every utterance i of speaker j and every speaker's centroid c_k.

    Embeddings are divided by their length first (eq. 4 of the paper), and centroids are their means (eq. 1). For its
    own speaker an utterance is left out of the centroid, without which it would be compared with itself (eqs. 8, 9).

    Args:
        embeddings: shape `(speakers, utterances, dim)`.
        scale: w, above zero. A number is checked; the value of a tensor is not, since that would wait for its
            device: keep a learned one positive, as the exponential of a parameter.
        offset: b.

    Raises:
        ArgumentError: if there are fewer than 2 speakers or utterances, or the scale is not above zero.

    Example:
        >>> ge2e_similarities(torch.eye(2).repeat_interleave(3, 0).view(2, 3, 2), scale=10.0, offset=-5.0)[:, 0]
        tensor([[ 5., -5.],
                [-5.,  5.]])
    """
    if embeddings.ndim != 3 or embeddings.shape[0] < 2 or embeddings.shape[1] < 2:
        raise ArgumentError(
            "embeddings must have shape (speakers, utterances, dim) with at least 2 speakers and 2 utterances, got "
            f"{tuple(embeddings.shape)}"
        )
    if not isinstance(scale, Tensor):
        check_number("scale", scale, above=0.0)
    speakers, utterances, _ = embeddings.shape
    vectors = F.normalize(at_least_float32(embeddings), dim=-1)
    totals = vectors.sum(1)
    others = (totals[:, None] - vectors) / (utterances - 1)
    with full_precision(vectors.device):
        to_all = torch.einsum("jid,kd->jik", vectors, F.normalize(totals / utterances, dim=-1))
    to_own = (vectors * F.normalize(others, dim=-1)).sum(-1)
    own = torch.eye(speakers, dtype=torch.bool, device=vectors.device)[:, None]
    return scale * torch.where(own, to_own[..., None], to_all) + offset


def ge2e_loss(
    embeddings: Float[Tensor, "speakers utterances dim"],
    scale: float | Float[Tensor, ""],
    offset: float | Float[Tensor, ""],
    form: str = "softmax",
) -> Float[Tensor, "speakers utterances"]:
    """Returns the loss of each utterance: it should be like its own speaker's others, and unlike other speakers.

        softmax:   -S_ji,j + log Σ_k exp S_ji,k                        (eq. 6 of the paper), nats
        contrast:  1 - σ(S_ji,j) + max_{k ≠ j} σ(S_ji,k)               (eq. 7), between 0 and 2

    Args:
        embeddings: shape `(speakers, utterances, dim)`, of any length: they are divided by it.
        scale: w, above zero; unchecked if it is a tensor, as in `ge2e_similarities`. The paper starts from 10.
        offset: b. The paper starts from -5.
        form: "softmax" or "contrast".

    Raises:
        ArgumentError: if there are fewer than 2 speakers or utterances, the scale is not above zero, or the form is
            unknown.

    Example:
        >>> speakers = torch.eye(2).repeat_interleave(3, 0).view(2, 3, 2)  # two speakers at right angles
        >>> ge2e_loss(speakers, scale=10.0, offset=-5.0)[0]  # log(1 + exp(-10))
        tensor([4.5399e-05, 4.5399e-05, 4.5399e-05])
    """
    check_choice("form", form, FORMS)
    similarities = ge2e_similarities(embeddings, scale, offset)
    own = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)[:, None]
    if form == "softmax":
        # log Σ_k exp(S_k - S_j): the difference is formed before the sum, so that small losses keep their digits.
        to_own = similarities.diagonal(dim1=0, dim2=2).T[..., None]
        return F.softplus((similarities - to_own).masked_fill(own, -torch.inf).logsumexp(-1))
    probabilities = similarities.sigmoid()
    return 1.0 - probabilities.diagonal(dim1=0, dim2=2).T + probabilities.masked_fill(own, 0.0).amax(-1)
