"""The wrong answers of contrastive predictive coding (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from popgen.errors import ArgumentError, check_choice, check_integer

NEGATIVE_KINDS = ("batch", "sequence", "speaker")


class Negatives(NamedTuple):
    """Frames that stand for the wrong answers.

    Attributes:
        indices: into the frames of the batch, one sequence after another (sequence · frames + frame).
        exist: whether there was a frame to choose from; where there was none, an index means nothing.
    """

    indices: Int64[Tensor, "batch steps negatives"]
    exist: Bool[Tensor, "batch steps negatives"]


def negative_indices(
    kind: str,
    uniform: Float[Tensor, "batch negatives"],
    num_frames: Int64[Tensor, " batch"],
    max_frames: int,
    num_steps: int,
    labels: Int64[Tensor, " batch"] | None = None,
) -> Negatives:
    """Returns frames drawn with equal probability, with replacement, from those that a kind of negatives allows.

    All anchors of a sequence share what is drawn for it, so that scores are one matrix product; the loss of each has
    the expectation that draws of its own would give. For the step k ahead the frames are those that can be positives
    k steps ahead, numbers k, k + 1, ... of their sequences: otherwise the first frames, which are often silent, would
    be known to be negatives.

    - "batch": frames of any sequence, the positive itself included. That is the distribution of the positives of the
      batch; but a context knows its own sequence's past, and may tell it from the future without knowing either.
    - "sequence": frames of the same sequence; what distinguishes sequences, such as the speaker, does not help. Where
      the positive itself is drawn, the caller masks it out.
    - "speaker": frames of other sequences with the same label; there may be none in a batch.

    Args:
        kind: "batch", "sequence" or "speaker".
        uniform: uniform on [0, 1), shape `(batch, negatives)`; a 1, to which a value may have been rounded, counts as
            the largest below it.
        num_frames: how many frames of each sequence are real, shape `(batch,)`; the others are never drawn.
        max_frames: frames of each sequence, padding included.
        num_steps: K.
        labels: of the sequences, for "speaker".

    Raises:
        ArgumentError: if the kind is unknown, "speaker" has no labels, or the shapes do not fit.

    Example:
        >>> uniform = torch.tensor([[0.0, 0.6, 0.99], [0.0, 0.6, 0.99]])
        >>> num_frames = torch.tensor([5, 3])  # 4 + 2 of them can be one step ahead
        >>> negative_indices("batch", uniform, num_frames, max_frames=5, num_steps=1).indices[:, 0]
        tensor([[1, 4, 7],
                [1, 4, 7]])
        >>> negative_indices("sequence", uniform, num_frames, max_frames=5, num_steps=1).indices[:, 0]
        tensor([[1, 3, 4],
                [6, 7, 7]])
    """
    check_choice("kind", kind, NEGATIVE_KINDS)
    check_integer("max_frames", max_frames, minimum=1)
    check_integer("num_steps", num_steps, minimum=1)
    batch = len(num_frames)
    if num_frames.ndim != 1 or uniform.ndim != 2 or len(uniform) != batch:
        shapes = f"{tuple(num_frames.shape)} and {tuple(uniform.shape)}"
        raise ArgumentError(f"num_frames must have shape (batch,) and uniform (batch, negatives), got {shapes}")
    same = torch.eye(batch, dtype=torch.bool, device=num_frames.device)
    if kind == "batch":
        allowed = torch.ones_like(same)
    elif kind == "sequence":
        allowed = same
    elif labels is None or labels.shape != num_frames.shape:
        given = "none" if labels is None else str(tuple(labels.shape))
        raise ArgumentError(f"labels must have shape {(batch,)} for kind 'speaker', got {given}")
    else:
        allowed = (labels[:, None] == labels) & ~same
    steps = torch.arange(1, num_steps + 1, device=num_frames.device)
    counts = (num_frames - steps[:, None]).clamp_min(0) * allowed[:, None]  # (batch, steps, of which sequence)
    ends = counts.cumsum(-1)
    total = ends[..., -1:]
    drawn = torch.minimum((uniform[:, None] * total).long(), total - 1).clamp_min(0)
    sequences = torch.searchsorted(ends, drawn, right=True).clamp_max(batch - 1)
    frames = drawn - (ends - counts).gather(-1, sequences) + steps[:, None]
    exist = (total > 0).expand(-1, -1, uniform.shape[1])
    return Negatives(sequences * max_frames + frames.clamp(0, max_frames - 1), exist)


def independent_negatives(
    uniform: Float[Tensor, "batch batch"], num_frames: Int64[Tensor, " batch"], max_frames: int, num_steps: int
) -> Negatives:
    """Returns one frame of each other sequence, drawn with equal probability from those that can be k steps ahead.

    Negative number j of a sequence is of sequence j; its own does not exist. Where sequences are independent, so are
    these negatives of each other and of the context: `mutual_information_bound` asks for such.

    Args:
        uniform: uniform on [0, 1), shape `(batch, batch)`.
        num_frames: how many frames of each sequence are real, shape `(batch,)`; the others are never drawn.
        max_frames: frames of each sequence, padding included.
        num_steps: K.

    Raises:
        ArgumentError: if the shapes do not fit.

    Example:
        >>> found = independent_negatives(torch.full((3, 3), 0.5), torch.tensor([5, 3, 1]), max_frames=5, num_steps=1)
        >>> found.indices[0, 0, found.exist[0, 0]]  # the last sequence has no frame one step ahead of another
        tensor([7])
    """
    check_integer("max_frames", max_frames, minimum=1)
    check_integer("num_steps", num_steps, minimum=1)
    batch = len(num_frames)
    if num_frames.ndim != 1 or tuple(uniform.shape) != (batch, batch):
        shapes = f"{tuple(num_frames.shape)} and {tuple(uniform.shape)}"
        raise ArgumentError(f"num_frames must have shape (batch,) and uniform (batch, batch), got {shapes}")
    steps = torch.arange(1, num_steps + 1, device=num_frames.device)[:, None]
    counts = (num_frames - steps).clamp_min(0)  # (steps, of which sequence)
    drawn = torch.minimum((uniform[:, None] * counts).long(), counts - 1).clamp_min(0)
    frames = torch.minimum(drawn + steps, torch.full_like(drawn, max_frames - 1))
    others = ~torch.eye(batch, dtype=torch.bool, device=num_frames.device)[:, None]
    return Negatives(torch.arange(batch, device=num_frames.device) * max_frames + frames, others & (counts > 0))
