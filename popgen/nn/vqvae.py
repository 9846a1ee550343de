"""Vector quantisers (van den Oord et al. 2017, Neural Discrete Representation Learning, arXiv 1711.00937).

A quantiser maps vectors of any leading shape to their nearest codes. It never changes itself: `transition` returns the
next values of its buffers, for a pure training step to keep, and `load` sets them in a loop of one's own.

    quantised = quantiser(encoder(x))                  # with the codes as they are
    loss = ... + 0.25 * commitment_loss(vectors, quantised.codes)
    changes, num_revived = quantiser.transition(vectors, quantised.indices, uniform)

A transition has two halves: `observe` sums over the vectors of a batch, or of a part of it, and `advance` makes the
next values of the sum of all parts.
"""

import abc
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from popgen.errors import ArgumentError, check_integer, check_number
from popgen.nn.codebook import (
    Codebook,
    CodeUsage,
    assigned_sums,
    cluster,
    drawn_vectors,
    empty_codebook,
    nearest_codes,
    revive_dead_codes,
    revive_from_drawn,
    update_codebook,
    update_from_sums,
)

__all__ = [
    "CodeUsage",
    "Codebook",
    "GradientQuantiser",
    "MovingAverageQuantiser",
    "Quantised",
    "Quantiser",
    "ResidualQuantiser",
    "cluster",
    "empty_codebook",
    "jitter",
    "nearest_codes",
    "revive_dead_codes",
    "straight_through",
    "update_codebook",
]


class Quantised(NamedTuple):
    """What a quantiser makes of vectors.

    Attributes:
        values: the nearest codes, whose gradient goes straight through to the vectors; what a decoder is given.
        codes: the nearest codes, whose gradient goes to the codebook if it is learned by gradient; what losses compare.
        indices: of the codes; a residual quantiser has one more axis, of its codebooks.
    """

    values: Float[Tensor, "*shape dim"]
    codes: Float[Tensor, "*shape dim"]
    indices: Int64[Tensor, "..."]


def straight_through(vectors: Float[Tensor, "*shape"], codes: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns the codes, exactly, with the gradient of the identity in the vectors (section 3.2 of the paper).

    Example:
        >>> vectors = torch.zeros(2, requires_grad=True)
        >>> (3 * straight_through(vectors, torch.tensor([0.1, 0.7]))).sum().backward()
        >>> vectors.grad
        tensor([3., 3.])
    """
    return codes.detach() + (vectors - vectors.detach())


class Quantiser(nn.Module, abc.ABC):
    """One codebook of K codes, or several in turn.

    Example: `MovingAverageQuantiser` is one.

    Attributes:
        num_codes: K of each codebook.
        code_dim: size of a code.
        num_codebooks: how many codes stand for one vector.
    """

    num_codes: int
    code_dim: int
    num_codebooks: int = 1

    @abc.abstractmethod
    def forward(self, vectors: Float[Tensor, "*shape dim"]) -> Quantised:
        """Returns the nearest codes.

        Raises:
            ArgumentError: if the last axis is not of size `code_dim`.
        """

    @abc.abstractmethod
    def look_up(self, indices: Int64[Tensor, "..."]) -> Float[Tensor, "*shape dim"]:
        """Returns the vectors that indices stand for."""

    @abc.abstractmethod
    def observe(
        self, vectors: Float[Tensor, "*shape dim"], indices: Int64[Tensor, "..."], uniform: Float[Tensor, "books codes"]
    ) -> dict[str, Tensor]:
        """Returns all that `advance` needs of some vectors: by name, sums over them.

        Args:
            vectors: those of one step, or a part of them, quantised before the codebook moves.
            indices: what `forward` made of them.
            uniform: noise in [0, 1), shape `(num_codebooks, num_codes)`, that chooses where dead codes go; outside it
                for codes whose vector is chosen from another part.

        Raises:
            ArgumentError: if a codebook learns from the vectors, and the noise has another shape.
        """

    @abc.abstractmethod
    def advance(
        self, buffers: Mapping[str, Tensor], observed: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the next values of some buffers of this module by name, and the number of codes revived.

        Args:
            buffers: their values before; those of the module itself are not used.
            observed: the sums of the whole batch.
        """

    def transition(
        self, vectors: Float[Tensor, "*shape dim"], indices: Int64[Tensor, "..."], uniform: Float[Tensor, "books codes"]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the next values of this module's buffers by name, and the number of codes revived.

        Args:
            vectors: those of one step, quantised before the codebook moves.
            indices: what `forward` made of them.
            uniform: noise in [0, 1), shape `(num_codebooks, num_codes)`, that chooses where dead codes go.

        Raises:
            ArgumentError: as `observe`.
        """
        return self.advance(dict(self.named_buffers()), self.observe(vectors, indices, uniform))

    @abc.abstractmethod
    def initialise(
        self, vectors: Float[Tensor, "count dim"], uniform: Float[Tensor, "books codes"], num_updates: int
    ) -> None:
        """Sets the codes to the k-means centres of the vectors of some first batches, in place.

        Args:
            vectors: from the encoder, all batches together.
            uniform: noise in [0, 1), shape `(num_codebooks, num_codes)`.
            num_updates: the number of batches.

        Raises:
            ArgumentError: if there are fewer vectors than codes, or the noise has another shape.
        """

    @torch.no_grad()
    def load(self, changes: dict[str, Tensor]) -> None:
        """Sets the buffers that `transition` returned, in place."""
        buffers = dict(self.named_buffers())
        for name, value in changes.items():
            buffers[name].copy_(value)

    def _check_uniform(self, uniform: Tensor) -> None:
        found, expected = tuple(uniform.shape), (self.num_codebooks, self.num_codes)
        if found != expected:
            raise ArgumentError(f"uniform must have shape (num_codebooks, num_codes) = {expected}, got {found}")


class _SingleCodebook(Quantiser):
    """A quantiser whose one codebook is the tensor `codes`, however it is learned."""

    codes: Tensor

    def forward(self, vectors: Float[Tensor, "*shape dim"]) -> Quantised:
        """Returns the nearest codes."""
        indices = nearest_codes(vectors, self.codes)
        codes = self.look_up(indices)
        return Quantised(straight_through(vectors, codes.to(vectors.dtype)), codes, indices)

    def look_up(self, indices: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Returns the codes at some indices."""
        return F.embedding(indices, self.codes)


class GradientQuantiser(_SingleCodebook):
    """A codebook that is learned by gradient: add `popgen.losses.codebook_loss` (the second term of eq. 3).

    Args:
        num_codes: K.
        code_dim: size of a code.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> quantiser = GradientQuantiser(num_codes=128, code_dim=64)
        >>> quantised = quantiser(torch.randn(100, 7, 7, 64))
        >>> quantised.values.shape, quantised.indices.shape
        (torch.Size([100, 7, 7, 64]), torch.Size([100, 7, 7]))
    """

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.num_codes = check_integer("GradientQuantiser.num_codes", num_codes, minimum=1)
        self.code_dim = check_integer("GradientQuantiser.code_dim", code_dim, minimum=1)
        self.codes = nn.Parameter(torch.randn(num_codes, code_dim))

    def observe(
        self, vectors: Float[Tensor, "*shape dim"], indices: Int64[Tensor, "*shape"], uniform: Tensor
    ) -> dict[str, Tensor]:
        """Returns nothing: the optimizer moves this codebook."""
        return {}

    def advance(
        self, buffers: Mapping[str, Tensor], observed: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Returns nothing: the optimizer moves this codebook."""
        return {}, torch.zeros((), dtype=torch.int64, device=self.codes.device)

    @torch.no_grad()
    def initialise(self, vectors: Float[Tensor, "count dim"], uniform: Tensor, num_updates: int = 1) -> None:
        """Sets the codes to the k-means centres of some vectors, in place."""
        self._check_uniform(uniform)
        self.codes.copy_(cluster(vectors, self.num_codes, uniform[0], num_updates).codes)


class MovingAverageQuantiser(_SingleCodebook):
    """A codebook whose codes are moving averages of the vectors assigned to them (appendix A.1 of the paper).

    Args:
        num_codes: K.
        code_dim: size of a code.
        decay: γ of the averages.
        smoothing: ε of the Laplace smoothing of counts.
        least_usage: a code whose average count is below this fraction of the mean is revived; 0 revives none.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> quantiser = MovingAverageQuantiser(num_codes=128, code_dim=64)
        >>> vectors = torch.randn(100, 7, 7, 64)
        >>> changes, num_revived = quantiser.transition(vectors, quantiser(vectors).indices, torch.rand(1, 128))
        >>> quantiser.load(changes)  # in a loop of one's own
        >>> sorted(changes)
        ['codes', 'counts', 'sums', 'weights']
    """

    counts: Tensor
    sums: Tensor
    weights: Tensor

    def __init__(
        self, num_codes: int, code_dim: int, decay: float = 0.99, smoothing: float = 1e-5, least_usage: float = 0.03
    ) -> None:
        super().__init__()
        self.num_codes = check_integer("MovingAverageQuantiser.num_codes", num_codes, minimum=1)
        self.code_dim = check_integer("MovingAverageQuantiser.code_dim", code_dim, minimum=1)
        self.decay = check_number("MovingAverageQuantiser.decay", decay, minimum=0.0, below=1.0)
        self.smoothing = check_number("MovingAverageQuantiser.smoothing", smoothing, minimum=0.0)
        self.least_usage = check_number("MovingAverageQuantiser.least_usage", least_usage, minimum=0.0, maximum=1.0)
        for name, value in empty_codebook(torch.randn(num_codes, code_dim))._asdict().items():
            self.register_buffer(name, value)

    @property
    def codebook(self) -> Codebook:
        """The state of the codebook."""
        return Codebook(self.codes, self.counts, self.sums, self.weights)

    def observe(
        self, vectors: Float[Tensor, "*shape dim"], indices: Int64[Tensor, "*shape"], uniform: Tensor
    ) -> dict[str, Tensor]:
        """Returns number and sum of the vectors of each code, and a vector for each code that may be dead."""
        self._check_uniform(uniform)
        return {
            "seen": assigned_sums(vectors, indices, self.num_codes, self.sums.dtype),
            "drawn": drawn_vectors(vectors, uniform[0]),
        }

    def advance(
        self, buffers: Mapping[str, Tensor], observed: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the codebook after its averages have seen the vectors and dead codes were revived."""
        codebook = Codebook(**{name: buffers[name] for name in Codebook._fields})
        codebook = update_from_sums(codebook, observed["seen"], self.decay, self.smoothing)
        codebook, num_revived = revive_from_drawn(codebook, observed["drawn"], self.least_usage)
        return codebook._asdict(), num_revived

    def initialise(self, vectors: Float[Tensor, "count dim"], uniform: Tensor, num_updates: int = 1) -> None:
        """Sets codes, counts and sums to those of the k-means clusters of some vectors, in place."""
        self._check_uniform(uniform)
        self.load(cluster(vectors, self.num_codes, uniform[0], num_updates)._asdict())


class ResidualQuantiser(Quantiser):
    """Several moving-average codebooks in turn, each for what the ones before it have left.

    z ≈ Σ_i e_i, where e_i is the code of codebook i nearest to z - e_1 - ... - e_{i-1} (Vasuki and Vanathi 2006;
    Zeghidour et al. 2021, https://arxiv.org/abs/2107.03312, algorithm 1). Indices have a last axis of codebooks.

    Args:
        num_codebooks: how many.
        num_codes: K of each.
        code_dim: size of a code.
        decay: γ of the averages.
        smoothing: ε of the Laplace smoothing of counts.
        least_usage: as in `MovingAverageQuantiser`.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> quantiser = ResidualQuantiser(num_codebooks=4, num_codes=128, code_dim=64)
        >>> quantiser(torch.randn(100, 7, 7, 64)).indices.shape
        torch.Size([100, 7, 7, 4])
    """

    def __init__(
        self,
        num_codebooks: int,
        num_codes: int,
        code_dim: int,
        decay: float = 0.99,
        smoothing: float = 1e-5,
        least_usage: float = 0.03,
    ) -> None:
        super().__init__()
        self.num_codebooks = check_integer("ResidualQuantiser.num_codebooks", num_codebooks, minimum=1)
        self.num_codes = check_integer("ResidualQuantiser.num_codes", num_codes, minimum=1)
        self.code_dim = check_integer("ResidualQuantiser.code_dim", code_dim, minimum=1)
        self.stages = nn.ModuleList(
            MovingAverageQuantiser(num_codes, code_dim, decay, smoothing, least_usage) for _ in range(num_codebooks)
        )

    def _stages(self) -> list[MovingAverageQuantiser]:
        return cast(list[MovingAverageQuantiser], list(self.stages))

    def _zeros(self, vectors: Tensor) -> Tensor:
        """Returns a sum of no codes, in their precision: residuals of bfloat16 vectors are not rounded again."""
        return torch.zeros_like(vectors, dtype=self._stages()[0].codes.dtype)

    def forward(self, vectors: Float[Tensor, "*shape dim"]) -> Quantised:
        """Returns the sum of the codes that the stages choose in turn."""
        total, indices = self._zeros(vectors), []
        for stage in self._stages():
            stage_indices = nearest_codes(vectors.detach() - total, stage.codes)
            total = total + stage.look_up(stage_indices)
            indices.append(stage_indices)
        return Quantised(straight_through(vectors, total.to(vectors.dtype)), total, torch.stack(indices, dim=-1))

    def look_up(self, indices: Int64[Tensor, "*shape books"]) -> Float[Tensor, "*shape dim"]:
        """Returns the sums of the codes at some indices; those of the first stages alone give a coarser sum.

        Raises:
            ArgumentError: if the last axis has no codebook, or more than there are.
        """
        if not 1 <= indices.shape[-1] <= self.num_codebooks:
            raise ArgumentError(
                f"indices must have 1 to {self.num_codebooks} codebooks on their last axis, got shape "
                f"{tuple(indices.shape)}"
            )
        codes = [stage.look_up(chosen) for stage, chosen in zip(self._stages(), indices.unbind(-1), strict=False)]
        return torch.stack(codes).sum(0)

    def observe(
        self, vectors: Float[Tensor, "*shape dim"], indices: Int64[Tensor, "*shape books"], uniform: Tensor
    ) -> dict[str, Tensor]:
        """Returns the sums of every stage, over what the ones before it left."""
        self._check_uniform(uniform)
        observed: dict[str, Tensor] = {}
        total = self._zeros(vectors)
        for i, stage in enumerate(self._stages()):
            sums = stage.observe(vectors.detach() - total, indices[..., i], uniform[i : i + 1])
            observed.update({f"stages.{i}.{name}": value for name, value in sums.items()})
            total = total + stage.look_up(indices[..., i])
        return observed

    def advance(
        self, buffers: Mapping[str, Tensor], observed: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the next state of every stage."""
        changes: dict[str, Tensor] = {}
        revived = []
        for i, stage in enumerate(self._stages()):
            prefix = f"stages.{i}."
            stage_changes, num_revived = stage.advance(within(prefix, buffers), within(prefix, observed))
            changes.update({f"{prefix}{name}": value for name, value in stage_changes.items()})
            revived.append(num_revived)
        return changes, torch.stack(revived).sum()

    @torch.no_grad()
    def initialise(self, vectors: Float[Tensor, "count dim"], uniform: Tensor, num_updates: int = 1) -> None:
        """Sets each stage to the k-means clusters of what the ones before it leave, in place."""
        self._check_uniform(uniform)
        for i, stage in enumerate(self._stages()):
            stage.initialise(vectors, uniform[i : i + 1], num_updates)
            vectors = vectors - stage(vectors).codes


def within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a part of a module, by their names there.

    Example:
        >>> sorted(within("stages.1.", {"stages.1.codes": torch.zeros(1), "stages.0.codes": torch.zeros(1)}))
        ['codes']
    """
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def jitter(
    values: Float[Tensor, "batch time dim"], uniform: Float[Tensor, "batch time"], probability: float = 0.12
) -> Float[Tensor, "batch time dim"]:
    """Returns a sequence of codes in which each is, with some probability, replaced by one of its neighbours in time.

    The regulariser of Chorowski et al. 2019 (https://arxiv.org/abs/1901.08810, section 2.3): codes that are slow to
    change lose nothing by it. Left and right are equally likely; the neighbour beyond an end is the end itself.

    Args:
        values: codes in time, shape `(batch, time, dim)`.
        uniform: noise in [0, 1), shape `(batch, time)`.
        probability: of a replacement.

    Raises:
        ArgumentError: if `probability` is not within [0, 1], or the shapes do not fit.

    Example:
        >>> values = torch.arange(4.0).view(1, 4, 1)
        >>> jitter(values, uniform=torch.tensor([[0.9, 0.05, 0.11, 0.9]])).flatten()
        tensor([0., 0., 3., 3.])
    """
    check_number("probability", probability, minimum=0.0, maximum=1.0)
    if values.ndim != 3 or uniform.shape != values.shape[:2]:
        raise ArgumentError(
            f"values must have shape (batch, time, dim) and uniform (batch, time), got {tuple(values.shape)} and "
            f"{tuple(uniform.shape)}"
        )
    offsets = (uniform < probability).long() - 2 * (uniform < probability / 2).long()  # -1 left, 1 right, 0 stay
    places = torch.arange(values.shape[1], device=values.device) + offsets
    return values.take_along_dim(places.clamp(0, max(0, values.shape[1] - 1))[..., None], dim=1)
