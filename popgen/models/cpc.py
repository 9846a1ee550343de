"""Contrastive predictive coding (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748).

    z_t = encoder(x)_t    c_t = context(z_1, ..., z_t)    log f_k(x_{t+k}, c_t) = z_{t+k} · prediction_k(c_1, ..., c_t)

The loss asks, from the context after each frame, which of several encodings is the one k frames ahead.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from popgen.errors import ArgumentError, DataError, check_choice, check_integer
from popgen.losses import contrastive_accuracy, info_nce
from popgen.models.model import Model, check_equal
from popgen.nn.cpc import Context, FrameEncoder, Predictors
from popgen.nn.negatives import NEGATIVE_KINDS, Negatives, independent_negatives, negative_indices


class CPCTerms(NamedTuple):
    """The losses of a batch, each a mean over pairs of an anchor and the frame k ahead of it.

    A pair counts if both frames are real and there are negatives. What has no pair has weight zero and loss zero,
    so means weighted by the number of pairs are exact, over any number of batches.

    Attributes:
        loss: of each sequence, nats, the mean over all of its pairs.
        weight: how many pairs those are.
        step_losses: of each sequence and step.
        step_accuracies: how often the positive has the highest score; ties are broken at random, and draws of the
            positive itself are left out. Where there are no other draws, it is that of a guess, 1 / candidates.
        step_guesses: the loss that equal scores would have, the logarithm of the number of candidates.
        step_weights: how many pairs there are of each sequence and step.
    """

    loss: Float[Tensor, " batch"]
    weight: Int64[Tensor, " batch"]
    step_losses: Float[Tensor, "batch steps"]
    step_accuracies: Float[Tensor, "batch steps"]
    step_guesses: Float[Tensor, "batch steps"]
    step_weights: Int64[Tensor, "batch steps"]

    def means(self, pairs: Int64[Tensor, "whole steps"] | None = None) -> dict[str, Float[Tensor, ""]]:
        """Returns the loss, nats, and the accuracy: means over all pairs and over those of each step k ahead.

        Each pair has the same weight; what has no pair is zero.

        Args:
            pairs: the `step_weights` of a whole batch of which these sequences are a part: the results are then what
                this part adds to the means over the whole.
        """
        counts = (self.step_weights if pairs is None else pairs).sum(0)
        named = {}
        for name, values in (("loss", self.step_losses), ("accuracy", self.step_accuracies)):
            sums = (values * self.step_weights).sum(0)
            named[name] = sums.sum() / counts.sum().clamp_min(1)
            named |= {f"{name}_ahead_{k}": mean for k, mean in enumerate((sums / counts.clamp_min(1)).unbind(), 1)}
        return named

    @property
    def loss_of_guessing(self) -> Float[Tensor, ""]:
        """The mean over all pairs of the loss that equal scores would have, nats."""
        return _mean(self.step_guesses.flatten(), self.step_weights.flatten(), dim=0)

    @property
    def information_of_steps(self) -> Float[Tensor, " steps"]:
        """Log N - L of each step, nats, the mean over sequences of that over their pairs.

        It is not a number for a step so far ahead that no sequence has a pair. Of `CPC.independent_terms`, and of no
        others, it is a lower bound on mutual information in expectation.
        """
        counts = self.step_weights > 0
        return ((self.step_guesses - self.step_losses) * counts).sum(0) / counts.sum(0)


class Part(NamedTuple):
    """Sequences that follow each other in a batch, where the others are somewhere else.

    Attributes:
        first: number of the first of them in the batch.
        whole: returns a tensor of all sequences of the batch, given that of these, with its gradient.

    Example:
        >>> others = torch.ones(3, 2)
        >>> Part(first=3, whole=lambda tensor: torch.cat([others, tensor])).whole(torch.zeros(1, 2)).shape
        torch.Size([4, 2])
    """

    first: int
    whole: Callable[[Tensor], Tensor]


class CPC(Model):
    """Encoder, context and predictors, and the loss that trains them.

    All sequences of a batch have the same number of steps, and real ones come before padding. Padding is never an
    anchor, a positive or a negative, and no frame that counts sees it.

    Args:
        encoder: of sequences to frames.
        context: of frames.
        predictors: of the encodings 1, ..., K frames ahead.
        negatives: which frames are the wrong answers: "batch", "sequence" or "speaker" (`negative_indices`).
        num_negatives: draws for each sequence; all of its anchors share them.
        label: name of the label that sequences of one speaker share, for "speaker".

    Attributes:
        num_steps: K.
        num_candidates: the positive and the negatives; guessing has a loss of its logarithm, or less with "sequence",
            where draws of the positive are masked out (`CPCTerms.loss_of_guessing`).

    Raises:
        ArgumentError: if an argument is outside its domain, or the parts do not fit.

    Example:
        >>> from popgen.nn.cpc import GRUContext, LinearPredictors, StridedConvEncoder
        >>> encoder = StridedConvEncoder(hidden_dim=64, kernel_sizes=(10, 8, 4, 4), strides=(5, 4, 2, 2))
        >>> model = CPC(encoder, GRUContext(64, 32), LinearPredictors(32, 64, num_steps=12))
        >>> values, lengths = torch.randn(3, 8_000), torch.tensor([8_000, 4_000, 100])
        >>> terms = model(values, lengths, torch.rand(model.noise_shape(batch=3)))
        >>> terms.weight  # pairs; the last sequence has no frame
        tensor([1098,  498,    0])
        >>> model.represent(values, lengths).shape
        torch.Size([3, 98, 32])
    """

    def __init__(
        self,
        encoder: FrameEncoder,
        context: Context,
        predictors: Predictors,
        negatives: str = "batch",
        num_negatives: int = 64,
        label: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("CPC.negatives", negatives, NEGATIVE_KINDS)
        check_integer("CPC.num_negatives", num_negatives, minimum=1)
        if (negatives == "speaker") != (label is not None):
            raise ArgumentError(
                f"CPC.label must name a label if and only if negatives is 'speaker', got {label!r} with {negatives!r}"
            )
        sizes = (
            ("context.input_dim", context.input_dim, "encoder.encoding_dim", encoder.encoding_dim),
            ("predictors.context_dim", predictors.context_dim, "context.context_dim", context.context_dim),
            ("predictors.encoding_dim", predictors.encoding_dim, "encoder.encoding_dim", encoder.encoding_dim),
        )
        for pair in sizes:
            check_equal("CPC", *pair)
        self.encoder, self.context, self.predictors = encoder, context, predictors
        self.negatives, self.num_negatives, self.label = negatives, num_negatives, label
        self.num_steps = predictors.num_steps
        self.num_candidates = num_negatives + 1

    def noise_shape(self, batch: int) -> tuple[int, int]:
        """Returns the shape of the uniform noise of `forward` for a batch of that many sequences."""
        return batch, self.num_negatives

    def num_frames(self, lengths: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """Returns how many frames lie wholly within the first `lengths` steps."""
        return self.encoder.num_frames(lengths)

    def encode(self, values: Float[Tensor, "batch window ..."]) -> Float[Tensor, "batch frames encoding"]:
        """Returns the encodings z_t of all frames, those that see padding included.

        Raises:
            ArgumentError: if the sequences do not fit the encoder.
        """
        return self.encoder(values)

    def represent(
        self, values: Float[Tensor, "batch window ..."], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch frames context"]:
        """Returns the contexts c_t; zero from frame number `num_frames(lengths)` on.

        Raises:
            ArgumentError: if the sequences do not fit the encoder, or the lengths are not one for each.
        """
        if tuple(lengths.shape) != values.shape[:1]:
            raise ArgumentError(f"lengths must have shape {tuple(values.shape[:1])}, got {tuple(lengths.shape)}")
        contexts = self.context(self.encoder(values))
        places = torch.arange(contexts.shape[1], device=contexts.device)
        return contexts * (places < self.num_frames(lengths)[:, None])[..., None]

    def forward(
        self,
        values: Float[Tensor, "part window ..."],
        lengths: Int64[Tensor, " batch"],
        uniform: Float[Tensor, "batch negatives"],
        labels: Mapping[str, Tensor] | None = None,
        part: Part | None = None,
    ) -> CPCTerms:
        """Returns the losses.

        Args:
            values: waveforms, shape `(batch, window)`, or rows, shape `(batch, window, features)`.
            lengths: how many steps of each are real.
            uniform: uniform on [0, 1), of `noise_shape`; it chooses the negatives.
            labels: each of shape `(batch,)`, by name; needed where `label` is set.
            part: where `values` are those of a part of the batch alone: which one, and where the frames of the others
                come from, for they may be negatives. The losses are then those of the part.

        Raises:
            ArgumentError: if the shapes do not fit, the window has no two frames, or the label is missing.
        """
        frames = self._frames(values, lengths, uniform, self.num_negatives, part)
        num_frames, max_frames = self.num_frames(lengths), frames.shape[1]
        speakers = None if self.label is None else _label(labels, self.label)
        negatives = negative_indices(self.negatives, uniform, num_frames, max_frames, self.num_steps, speakers)
        first, candidates = (0, frames) if part is None else (part.first, part.whole(frames))
        num_frames = num_frames.narrow(0, first, len(values))
        negatives = Negatives(*(tensor.narrow(0, first, len(values)) for tensor in negatives))
        return self._terms(frames, candidates, num_frames, negatives, first, masked=self.negatives == "sequence")

    def independent_terms(
        self,
        values: Float[Tensor, "batch window ..."],
        lengths: Int64[Tensor, " batch"],
        uniform: Float[Tensor, "batch batch"],
    ) -> CPCTerms:
        """Returns the losses against one frame of each other sequence of the batch, whatever the model trains against.

        `CPCTerms.information_of_steps` of these is a lower bound on the mutual information I(x_{t+k}; c_t) of a pair of
        a sequence, in expectation over independent sequences, for any encoder and predictors (section 2.3 of the
        paper); it never exceeds the logarithm of the batch size. Negatives that share the anchor's sequence, as
        in training, are not independent of its context, and log N - L may then be above the information that there is.

        Args:
            values: as for `forward`.
            lengths: how many steps of each are real.
            uniform: uniform on [0, 1), shape `(batch, batch)`; it chooses the frames.

        Raises:
            ArgumentError: if the shapes do not fit, or the window has no two frames.
        """
        frames = self._frames(values, lengths, uniform, len(values))
        num_frames = self.num_frames(lengths)
        negatives = independent_negatives(uniform, num_frames, frames.shape[1], self.num_steps)
        return self._terms(frames, frames, num_frames, negatives, first=0, masked=True)

    def _frames(
        self, values: Tensor, lengths: Tensor, uniform: Tensor, num_negatives: int, part: Part | None = None
    ) -> Tensor:
        """Returns the encodings of sequences that fit, with their lengths and the noise of a whole batch."""
        self.encoder.check_values(values)
        batch = len(values) if part is None else lengths.numel()
        if tuple(lengths.shape) != (batch,) or tuple(uniform.shape) != (batch, num_negatives):
            raise ArgumentError(
                f"lengths must have shape {(batch,)} and uniform {(batch, num_negatives)}, got "
                f"{tuple(lengths.shape)} and {tuple(uniform.shape)}"
            )
        frames = self.encoder(values)
        if frames.shape[1] < 2:
            needed = self.encoder.receptive_field + self.encoder.hop
            raise ArgumentError(
                f"values must have at least {needed} steps, two frames, got {values.shape[1]}: use a longer window"
            )
        return frames

    def _terms(
        self, frames: Tensor, candidates: Tensor, num_frames: Tensor, negatives: Negatives, first: int, masked: bool
    ) -> CPCTerms:
        """Returns the losses of sequences from number `first` on; masked: missing and positive draws are left out."""
        predictions = self.predictors(self.context(frames))
        scores, collisions = self._scores(frames, candidates, predictions, negatives, first)
        distinct = negatives.exist[:, :, None] & ~collisions
        num_distinct, num_drawn = distinct.sum(-1), negatives.exist.sum(-1)[..., None]
        num_candidates = 1 + (num_distinct if masked else num_drawn.expand_as(num_distinct))
        places = torch.arange(frames.shape[1], device=frames.device)
        steps = torch.arange(1, self.num_steps + 1, device=frames.device)
        counts = (places + steps[:, None] < num_frames[:, None, None]) & (num_candidates > 1)
        losses = info_nce(scores, distinct if masked else None)
        # Where nothing but the positive was drawn there is nothing to tell apart: that is a guess, not a success.
        accuracies = torch.where(num_distinct > 0, contrastive_accuracy(scores, distinct), 1.0 / num_candidates)
        guesses = num_candidates.to(losses.dtype).log()
        step_weights = counts.sum(-1)
        step_losses, step_accuracies, step_guesses = (
            (values * counts).sum(-1) / step_weights.clamp_min(1) for values in (losses, accuracies, guesses)
        )
        return CPCTerms(
            loss=_mean(step_losses, step_weights, dim=1),
            weight=step_weights.sum(1),
            step_losses=step_losses,
            step_accuracies=step_accuracies,
            step_guesses=step_guesses,
            step_weights=step_weights,
        )

    def check_examples(self, examples: Any) -> None:
        """Checks that the sequences of a split fit the encoder and have what the loss needs.

        Args:
            examples: has `values` of shape `(total, ...)`, `lengths` and `labels`, as those of a split do.

        Raises:
            DataError: if a step has another shape, no sequence has two frames, or the label is missing.
        """
        shape = tuple(examples.values.shape[1:])
        if shape != self.encoder.value_shape:
            raise DataError(
                f"the steps of the sequences have shape {shape}, but the encoder takes {self.encoder.value_shape}"
            )
        if len(examples.lengths) == 0 or int(self.num_frames(examples.lengths).max()) < 2:
            longest = int(examples.lengths.max()) if len(examples.lengths) else 0
            raise DataError(
                f"the longest sequence has {longest} steps, but two frames take "
                f"{self.encoder.receptive_field + self.encoder.hop}: use longer ones, or an encoder that sees less"
            )
        if self.label is not None and self.label not in examples.labels:
            raise DataError(
                f"the sequences have no label {self.label!r}, only {', '.join(examples.labels) or 'none'}: set "
                "CPC.label to one of them"
            )

    def _scores(
        self, frames: Tensor, candidates: Tensor, predictions: Tensor, negatives: Negatives, first: int
    ) -> tuple[Tensor, Tensor]:
        """Returns log f of positives and negatives, and which of the negatives are the positive itself.

        The shapes are `(part, steps, frames, 1 + negatives)` and `(part, steps, frames, negatives)`. Candidates are all
        frames of the batch, and `frames` those of its sequences from number `first` on.
        """
        part, max_frames, _ = frames.shape
        vectors = F.embedding(negatives.indices, candidates.flatten(0, 1))
        to_negatives = predictions @ vectors.transpose(-1, -2)
        # A step at a time: views of the frames, where all steps at once would gather and scatter them.
        to_positives = [
            F.pad((predictions[:, k - 1, : max(0, max_frames - k)] * frames[:, k:]).sum(-1), (0, min(k, max_frames)))
            for k in range(1, self.num_steps + 1)
        ]
        scores = torch.cat([torch.stack(to_positives, dim=1)[..., None], to_negatives], dim=-1)
        steps = torch.arange(1, self.num_steps + 1, device=frames.device)
        places = torch.arange(max_frames, device=frames.device) + steps[:, None]
        positives = places + max_frames * torch.arange(first, first + part, device=frames.device)[:, None, None]
        return scores, positives[..., None] == negatives.indices[:, :, None]


def _mean(values: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Returns a weighted mean, zero if there is no weight."""
    return (values * weights).sum(dim) / weights.sum(dim).clamp_min(1)


def _label(labels: Mapping[str, Tensor] | None, name: str) -> Tensor:
    if labels is None or name not in labels:
        raise ArgumentError(f"labels must have {name!r}, got {', '.join(labels or {}) or 'none'}")
    return labels[name]
