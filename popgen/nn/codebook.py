"""Codebooks of vector quantisation, as values: look-up, and the transitions from one state of a codebook to the next.

The averages follow appendix A.1 of Neural Discrete Representation Learning (van den Oord et al. 2017,
https://arxiv.org/abs/1711.00937). Statistics are float32 at least, whatever the precision of the vectors. All that an
update or a revival has to know of the vectors is a sum over them, so that those of parts of a batch add up.
"""

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from popgen.errors import ArgumentError, check_integer
from popgen.precision import at_least_float32, full_precision

# (vector, code) pairs whose products are formed at once: on a CPU they fit the cache, on a GPU they fill it.
PAIRS_IN_FLIGHT = {"cpu": 2**18, "cuda": 2**26}


class Codebook(NamedTuple):
    """A codebook, and the moving averages that it is learned by.

    Attributes:
        codes: shape `(codes, dim)`.
        counts: moving average of the number of vectors that an update assigns to each code.
        sums: moving average of the sum of those vectors.
        weights: what part of each average is filled, 1 - decay^t after t updates from zero; the averages are divided
            by it. A code that was set from data has weight 1 at once.
    """

    codes: Float[Tensor, "codes dim"]
    counts: Float[Tensor, " codes"]
    sums: Float[Tensor, "codes dim"]
    weights: Float[Tensor, " codes"]

    @property
    def usage(self) -> Float[Tensor, " codes"]:
        """The debiased average number of vectors that an update assigns to each code; 0 before the first."""
        return self.counts / self.weights.clamp_min(torch.finfo(self.weights.dtype).tiny)


def empty_codebook(codes: Float[Tensor, "codes dim"]) -> Codebook:
    """Returns a codebook with these codes and averages of zero.

    Example:
        >>> empty_codebook(torch.randn(8, 2)).usage.sum()
        tensor(0.)
    """
    sums = torch.zeros_like(codes, dtype=torch.promote_types(codes.dtype, torch.float32))
    return Codebook(codes, sums[:, 0].clone(), sums, sums[:, 0].clone())


@torch.no_grad()
def nearest_codes(vectors: Float[Tensor, "*shape dim"], codes: Float[Tensor, "codes dim"]) -> Int64[Tensor, "*shape"]:
    """Returns the index of the code nearest to each vector, argmin_k |z - e_k|² (eq. 1 of the paper).

    The squared distance is |e|² / 2 - z·e but for terms that all codes share, so one matrix product of a bounded chunk
    of vectors at a time does. Both are centred on the mean of the half of the codes that is nearest to the mean code,
    so that neither an origin far away nor a few codes far out cost precision. In float32 the squared distance of the
    code chosen exceeds the least by at most about 1e-6 R², where R is the larger distance from that centre of the
    vector and of the code nearest to it: where codes are a thousandth of R apart, or less, it takes float64.

    Args:
        vectors: any leading shape, which may be empty.
        codes: shape `(codes, dim)`.

    Raises:
        ArgumentError: if the last axes differ.

    Example:
        >>> nearest_codes(torch.tensor([[0.9, 0.1], [-3.0, 0.0]]), codes=torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor([0, 1])
    """
    if vectors.shape[-1:] != codes.shape[-1:]:
        raise ArgumentError(
            f"vectors must have {codes.shape[-1]} values on their last axis, as the codes have, got shape "
            f"{tuple(vectors.shape)}"
        )
    dtype = torch.promote_types(codes.dtype, torch.float32)
    central = (codes.to(dtype) - codes.to(dtype).mean(0)).square().sum(1).argsort()[: (len(codes) + 1) // 2]
    centre = codes.to(dtype)[central].mean(0)
    centred = codes.to(dtype) - centre
    half_norms = 0.5 * centred.square().sum(1)
    flat = vectors.reshape(-1, vectors.shape[-1])
    rows = max(1, PAIRS_IN_FLIGHT.get(flat.device.type, PAIRS_IN_FLIGHT["cpu"]) // len(codes))
    indices = []
    with full_precision(flat.device):
        for chunk in flat.split(rows):
            centred_chunk = (chunk - centre).to(dtype)
            indices.append(torch.addmm(half_norms, centred_chunk, centred.T, alpha=-1).argmin(1))
    return torch.cat(indices).view(vectors.shape[:-1])


@torch.no_grad()
def assigned_sums(
    vectors: Float[Tensor, "*shape dim"],
    indices: Int64[Tensor, "*shape"],
    num_codes: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "codes columns"]:
    """Returns the number of vectors assigned to each code, and beside it their sum; shape `(codes, 1 + dim)`.

    Args:
        vectors: of a batch, or of a part of it.
        indices: of the code of each.
        num_codes: how many codes there are.
        dtype: of the sums.

    Example:
        >>> assigned_sums(torch.tensor([[2.0], [4.0]]), torch.tensor([0, 0]), num_codes=2)
        tensor([[2., 6.],
                [0., 0.]])
    """
    rows = vectors.detach().reshape(-1, vectors.shape[-1]).to(dtype)
    empty = torch.zeros(num_codes, 1 + rows.shape[1], dtype=rows.dtype, device=rows.device)
    return empty.index_add(0, indices.reshape(-1), torch.cat([torch.ones_like(rows[:, :1]), rows], dim=1))


@torch.no_grad()
def drawn_vectors(
    vectors: Float[Tensor, "*shape dim"], uniform: Float[Tensor, " codes"]
) -> Float[Tensor, "codes columns"]:
    """Returns a random vector for each code after a column of ones; shape `(codes, 1 + dim)`.

    Args:
        vectors: what is drawn from; if there are none, all is zero.
        uniform: noise that chooses a vector for each code, which lies in [0, 1). Where it does not, the row is zero:
            the vector is then drawn from another part of the batch, and the sum over all parts has each row once.

    Example:
        >>> drawn_vectors(torch.tensor([[5.0], [7.0]]), uniform=torch.tensor([0.1, 0.9, -0.3]))
        tensor([[1., 5.],
                [1., 7.],
                [0., 0.]])
    """
    rows = at_least_float32(vectors.detach().reshape(-1, vectors.shape[-1]))
    if len(rows) == 0:
        return torch.zeros(len(uniform), 1 + rows.shape[1], dtype=rows.dtype, device=rows.device)
    chosen = rows[(uniform * len(rows)).long().clamp(0, len(rows) - 1)]
    here = ((uniform >= 0) & (uniform < 1))[:, None]
    return torch.where(here, torch.cat([torch.ones_like(chosen[:, :1]), chosen], dim=1), 0.0)


@torch.no_grad()
def update_from_sums(
    codebook: Codebook, seen: Float[Tensor, "codes columns"], decay: float = 0.99, smoothing: float = 1e-5
) -> Codebook:
    """Returns the codebook after its averages have seen some vectors and the codes they were assigned to.

        N_k ← γ N_k + (1 - γ) n_k,   m_k ← γ m_k + (1 - γ) Σ z,   e_k = m_k / N_k           (eqs. 6 to 8 of the paper)

    N_k is smoothed (Laplace) as in the authors' code, (N_k + ε) / (N + K ε) · N with N = Σ_k N_k. A code that no vector
    was ever assigned to stays where it is, and so does everything when there are no vectors at all.

    Args:
        codebook: the state before.
        seen: n_k and Σ z of a whole batch, the `assigned_sums` of its vectors; add up those of its parts.
        decay: γ.
        smoothing: ε.

    Example:
        >>> codebook = empty_codebook(torch.tensor([[1.0], [-1.0]]))
        >>> seen = assigned_sums(torch.tensor([[2.0], [4.0]]), torch.tensor([0, 0]), num_codes=2)
        >>> update_from_sums(codebook, seen).codes.round(decimals=3)
        tensor([[ 3.],
                [-1.]])
    """
    num_codes = len(codebook.codes)
    new_weight = (1.0 - decay) * (seen[:, 0].sum() > 0).to(seen.dtype)
    counts = torch.lerp(codebook.counts, seen[:, 0], new_weight)
    sums = torch.lerp(codebook.sums, seen[:, 1:], new_weight)
    weights = torch.lerp(codebook.weights, torch.ones_like(codebook.weights), new_weight)
    updated = Codebook(codebook.codes, counts, sums, weights)
    usage = updated.usage
    total = usage.sum()
    smoothed = (usage + smoothing) / (total + num_codes * smoothing) * total
    scale = weights * smoothed
    moved = sums / torch.where(scale > 0, scale, 1.0)[:, None]
    changed = (usage > 0) & (new_weight > 0)
    return updated._replace(codes=torch.where(changed[:, None], moved.to(codebook.codes.dtype), codebook.codes))


def update_codebook(
    codebook: Codebook,
    vectors: Float[Tensor, "*shape dim"],
    indices: Int64[Tensor, "*shape"],
    decay: float = 0.99,
    smoothing: float = 1e-5,
) -> Codebook:
    """Returns what `update_from_sums` does, for the vectors of a whole batch.

    Args:
        codebook: the state before.
        vectors: of the batch.
        indices: `nearest_codes(vectors, codebook.codes)`.
        decay: as in `update_from_sums`.
        smoothing: as in `update_from_sums`.

    Example:
        >>> codebook = empty_codebook(torch.tensor([[1.0], [-1.0]]))
        >>> vectors = torch.tensor([[2.0], [4.0]])
        >>> update_codebook(codebook, vectors, nearest_codes(vectors, codebook.codes)).codes.round(decimals=3)
        tensor([[ 3.],
                [-1.]])
    """
    seen = assigned_sums(vectors, indices, len(codebook.codes), codebook.sums.dtype)
    return update_from_sums(codebook, seen, decay, smoothing)


@torch.no_grad()
def revive_from_drawn(
    codebook: Codebook, drawn: Float[Tensor, "codes columns"], least_usage: float = 0.03
) -> tuple[Codebook, Tensor]:
    """Returns the codebook with its dead codes put on random vectors, and how many there were.

    A code is dead if its average count is below `least_usage` times that of all codes. Count and sum of a revived code
    are set together, to the mean count and as many times the vector, so that it neither dies again at once nor is
    dragged back.

    Args:
        codebook: the state before.
        drawn: the `drawn_vectors` of a whole batch; add up those of its parts. A code whose row is zero is not
            revived.
        least_usage: a fraction of the mean count, so that it means the same whatever the size of a batch; 0 revives
            none, and a code that falls out of use then drifts to the origin with its smoothed count.

    Example:
        >>> seen = torch.tensor([[4.0, 4.0, 4.0], [0.0, 0.0, 0.0]])  # the second code was never used
        >>> drawn = drawn_vectors(torch.full((3, 2), 5.0), uniform=torch.rand(2))
        >>> revived, count = revive_from_drawn(update_from_sums(empty_codebook(torch.eye(2)), seen), drawn)
        >>> revived.codes[1], count
        (tensor([5., 5.]), tensor(1))
    """
    usage = codebook.usage
    count = usage.sum() / len(codebook.codes)
    dead = (codebook.weights > 0) & (usage < least_usage * count) & (drawn[:, 0] > 0)
    chosen = drawn[:, 1:].to(codebook.codes.dtype)
    revived = Codebook(
        codes=torch.where(dead[:, None], chosen, codebook.codes),
        counts=torch.where(dead, count, codebook.counts),
        sums=torch.where(dead[:, None], count * chosen.to(codebook.sums.dtype), codebook.sums),
        weights=torch.where(dead, 1.0, codebook.weights),
    )
    return revived, dead.sum()


def revive_dead_codes(
    codebook: Codebook,
    vectors: Float[Tensor, "*shape dim"],
    uniform: Float[Tensor, " codes"],
    least_usage: float = 0.03,
) -> tuple[Codebook, Tensor]:
    """Returns what `revive_from_drawn` does, for the vectors of a whole batch.

    Args:
        codebook: the state before.
        vectors: what the dead codes are put on; none are revived if there are none.
        uniform: noise in [0, 1) that chooses a vector for each code.
        least_usage: as in `revive_from_drawn`.

    Example:
        >>> vectors, indices = torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)
        >>> codebook = update_codebook(empty_codebook(torch.eye(2)), vectors, indices)
        >>> revived, count = revive_dead_codes(codebook, torch.full((3, 2), 5.0), uniform=torch.rand(2))
        >>> revived.codes[1], count
        (tensor([5., 5.]), tensor(1))
    """
    return revive_from_drawn(codebook, drawn_vectors(vectors, uniform), least_usage)


@torch.no_grad()
def cluster(
    vectors: Float[Tensor, "count dim"],
    num_codes: int,
    uniform: Float[Tensor, " codes"],
    num_updates: int = 1,
    num_iterations: int = 10,
) -> Codebook:
    """Returns a codebook of the k-means centres of some vectors, its counts and sums set to those of the clusters.

    The centres start as k-means++ does (Arthur and Vassilvitskii 2007): each new one is drawn with a probability in
    proportion to the squared distance from those before; a cluster that runs empty keeps its centre.

    Args:
        vectors: shape `(count, dim)`.
        num_codes: number of centres.
        uniform: noise in [0, 1), one for each centre.
        num_updates: the number of batches that the vectors are from; counts and sums are those of one batch.
        num_iterations: of Lloyd's algorithm. With none the centres are those that were drawn, and a cluster is the
            vectors nearest to one.

    Raises:
        ArgumentError: if there are fewer vectors than centres, or an argument is outside its domain.

    Example:
        >>> vectors = torch.tensor([[0.0], [0.2], [5.0], [5.2]])
        >>> cluster(vectors, num_codes=2, uniform=torch.tensor([0.1, 0.5])).codes.sort(0).values
        tensor([[0.1000],
                [5.1000]])
    """
    check_integer("num_codes", num_codes, minimum=1)
    check_integer("num_updates", num_updates, minimum=1)
    check_integer("num_iterations", num_iterations, minimum=0)
    if uniform.shape != (num_codes,):
        raise ArgumentError(f"uniform must have shape ({num_codes},), one for each centre, got {tuple(uniform.shape)}")
    if len(vectors) < num_codes:
        raise ArgumentError(f"num_codes must be at most the {len(vectors)} vectors that there are, got {num_codes}")
    vectors = at_least_float32(vectors.detach())
    codes = torch.empty(num_codes, vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    distances = torch.ones_like(vectors[:, 0])
    for i in range(num_codes):
        cumulative = distances.double().cumsum(0)
        chosen = torch.searchsorted(cumulative, uniform[i].double() * cumulative[-1], right=True)
        codes[i] = vectors[chosen.clamp_max(len(vectors) - 1)]
        nearest = (vectors - codes[i]).square().sum(1)
        distances = nearest if i == 0 else torch.minimum(distances, nearest)
    for iteration in range(max(1, num_iterations)):
        totals = assigned_sums(vectors, nearest_codes(vectors, codes), num_codes, vectors.dtype)
        if iteration < num_iterations:
            codes = torch.where(totals[:, :1] > 0, totals[:, 1:] / totals[:, :1].clamp_min(1.0), codes)
    totals = totals / num_updates
    return Codebook(codes, totals[:, 0], totals[:, 1:].clone(), torch.ones_like(totals[:, 0]))


@dataclasses.dataclass(frozen=True, eq=False)
class CodeUsage:
    """How often each code was used: a sum over any number of batches, which does not depend on their size.

    Attributes:
        counts: shape `(codes,)`.

    Example:
        >>> usage = CodeUsage.of(torch.tensor([0, 0, 1]), num_codes=4) + CodeUsage.of(torch.tensor([1]), num_codes=4)
        >>> usage.num_used, round(usage.perplexity, 3)
        (2, 2.0)
    """

    counts: Int64[Tensor, " codes"]

    @classmethod
    def of(cls, indices: Int64[Tensor, "*shape"], num_codes: int) -> "CodeUsage":
        """Returns the usage in some indices.

        Raises:
            ArgumentError: if an index is `num_codes` or more.
        """
        counts = torch.bincount(indices.reshape(-1), minlength=num_codes)
        if len(counts) > num_codes:
            raise ArgumentError(f"indices must be below num_codes = {num_codes}, got {len(counts) - 1}")
        return cls(counts)

    def __add__(self, other: "CodeUsage") -> "CodeUsage":
        """Returns the usage in both."""
        return CodeUsage(self.counts + other.counts)

    @property
    def num_used(self) -> int:
        """The number of codes that were used at all."""
        return int((self.counts > 0).sum())

    @property
    def perplexity(self) -> float:
        """The exponential of the entropy of the codes, from 1 to their number; not a number if none was used."""
        probabilities = self.counts.double() / self.counts.sum()
        return torch.special.entr(probabilities).sum().exp().item()
