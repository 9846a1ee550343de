"""Codebooks against brute force, the averages of appendix A.1 written out, and k-means."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from popgen.errors import ArgumentError
from popgen.nn import codebook as codebook_module
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

STATISTICS = ("counts", "sums", "weights")


def squared_distances(vectors: Tensor, codes: Tensor) -> Tensor:
    """Returns |z - e|² of every pair in float64, difference by difference."""
    return (vectors.double()[..., None, :] - codes.double()).square().sum(-1)


def assert_nearest(indices: Tensor, vectors: Tensor, codes: Tensor, rounding: float) -> None:
    """Checks indices wherever the nearest code is nearer than the second by more than rounding."""
    assert indices.dtype == torch.int64 and indices.shape == vectors.shape[:-1]
    distances = squared_distances(vectors, codes)
    two = distances.topk(2, largest=False).values
    clear = two[..., 1] - two[..., 0] > rounding
    assert clear.double().mean() > 0.99
    assert torch.equal(indices[clear], distances.argmin(-1)[clear])


def make_codebook(num_codes: int = 6, dim: int = 3, dtype: torch.dtype = torch.float64, updates: int = 3) -> Codebook:
    """Returns a codebook some updates after it was empty."""
    codebook = empty_codebook(torch.randn(num_codes, dim, dtype=dtype))
    for _ in range(updates):
        vectors = torch.randn(50, dim, dtype=dtype)
        codebook = update_codebook(codebook, vectors, nearest_codes(vectors, codebook.codes), decay=0.9)
    return codebook


def make_clusters(sizes: tuple[int, ...], dim: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Returns shuffled vectors in tight clusters far from each other, and the cluster of each."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    centres = 100.0 * torch.randn(len(sizes), dim, dtype=dtype)
    return centres[labels] + 0.1 * torch.randn(len(labels), dim, dtype=dtype), labels


def equal(one: Codebook, other: Codebook) -> bool:
    return all(map(torch.equal, one, other))


# --- nearest codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (500,), (0,), (2, 0, 3), (4, 5, 7), (1, 1, 1, 1)])
def test_nearest_codes_against_brute_force(shape: tuple[int, ...]) -> None:
    """For any leading shape, none and empty ones included."""
    vectors, codes = torch.randn(*shape, 8, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    indices = nearest_codes(vectors, codes)
    assert indices.dtype == torch.int64 and indices.shape == shape
    assert torch.equal(indices, squared_distances(vectors, codes).argmin(-1))


@pytest.mark.parametrize("offset, rounding", [(0.0, 1e-5), (1e3, 1e-4), (-1e3, 1e-4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nearest_codes_of_any_precision(dtype: torch.dtype, offset: float, rounding: float) -> None:
    """Float32 codes, near the origin and so far from it that products of uncentred vectors would be noise."""
    scale = 30.0 if offset and dtype == torch.bfloat16 else 1.0  # whose steps are 4 at 1000
    codes = offset + scale * torch.randn(40, 8)
    vectors = (offset + scale * torch.randn(3, 1000, 8, dtype=torch.float64)).to(dtype)
    assert_nearest(nearest_codes(vectors, codes), vectors, codes, rounding * scale**2)


def test_nearest_codes_in_double_precision_are_not_rounded_to_single() -> None:
    """Codes that differ in the tenth digit are told apart, and vectors are centred before they are rounded to codes."""
    codes = torch.tensor([[1.0], [1.0 + 2e-10]], dtype=torch.float64)
    vectors = torch.tensor([[1.0 - 1e-9], [1.0 + 0.9e-10], [1.0 + 1.1e-10], [1.0 + 1e-9]], dtype=torch.float64)
    assert nearest_codes(vectors, codes).tolist() == [0, 0, 1, 1]
    vectors = torch.tensor([[1e4 - 2e-4], [1e4 + 2e-4]], dtype=torch.float64)
    assert nearest_codes(vectors, torch.tensor([[9999.0], [10001.0]])).tolist() == [0, 1]


@pytest.mark.parametrize("spread", [1e1, 1e3, 1e5])
def test_the_distance_of_the_code_chosen_is_the_least_but_for_rounding(spread: float) -> None:
    """Two groups of codes far apart: float32 is off by 1e-6 of their squared spread at most, float64 not at all."""
    sides = torch.tensor([-1.0, 1.0]).repeat_interleave(100)[:, None]
    codes, vectors = torch.randn(200, 16), torch.randn(200, 16)
    codes, vectors = codes + spread * sides, vectors + spread * sides
    distances = squared_distances(vectors, codes)
    chosen = distances.gather(1, nearest_codes(vectors, codes)[:, None])[:, 0]
    assert (chosen - distances.min(1).values).max() < 1e-6 * distances.max()
    assert torch.equal(nearest_codes(vectors.double(), codes.double()), distances.argmin(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_far_out_cost_the_others_no_precision(dtype: torch.dtype) -> None:
    """A third of the codes, such as dead ones that have drifted, are a hundred thousand times as far as the others."""
    codes, vectors = torch.randn(60, 8).to(dtype), torch.randn(2000, 8).to(dtype)
    codes[::3] = 1e4 * codes[::3] + 1e5
    assert_nearest(nearest_codes(vectors, codes), vectors, codes, 1e-4)
    assert nearest_codes(codes[::3], codes).tolist() == list(range(0, 60, 3))


def test_nearest_codes_of_vectors_that_are_not_contiguous() -> None:
    """A map with its channels first, viewed with its channels last."""
    vectors, codes = torch.randn(3, 8, 5, 6).permute(0, 2, 3, 1), torch.randn(40, 8)
    assert torch.equal(nearest_codes(vectors, codes), nearest_codes(vectors.contiguous(), codes))
    assert_nearest(nearest_codes(vectors, codes), vectors, codes, 1e-5)


@pytest.mark.parametrize("pairs", [1, 39, 40, 41, 1000, 10_000])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    """More vectors than fit one chunk, with and without a rest; at worst a vector at a time."""
    vectors, codes = torch.randn(7, 23, 8), torch.randn(40, 8)
    monkeypatch.setattr(codebook_module, "PAIRS_IN_FLIGHT", {"cpu": pairs})
    assert_nearest(nearest_codes(vectors, codes), vectors, codes, 1e-5)


class Shapes(TorchDispatchMode):
    """Keeps the shape of every tensor that is formed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Size] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen += [leaf.shape for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result


def test_pairs_are_formed_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is larger than the vectors, though the pairs are sixteen times as many."""
    vectors, codes = torch.randn(1000, 2), torch.randn(32, 2)
    monkeypatch.setattr(codebook_module, "PAIRS_IN_FLIGHT", {"cpu": 256})
    with Shapes() as shapes:
        nearest_codes(vectors, codes)
    assert max(shape.numel() for shape in shapes.seen) == vectors.numel()
    assert max(shape.numel() for shape in shapes.seen if len(shape) == 2 and shape[1] == 32) == 256


def test_nearest_codes_obey_no_reduced_precision() -> None:
    """Under torch.autocast, whose own products would choose other codes, the answer has the same bits."""
    vectors, codes = torch.randn(2000, 8), torch.randn(40, 8)
    expected = nearest_codes(vectors, codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(vectors, codes), expected)
        rounded = (0.5 * codes.square().sum(1) - vectors @ codes.T).argmin(1)
        assert (vectors @ codes.T).dtype == torch.bfloat16
    assert not torch.equal(rounded, expected)


def test_single_code_is_nearest_to_everything() -> None:
    assert nearest_codes(torch.randn(3, 5, 2), torch.randn(1, 2)).tolist() == [[0] * 5] * 3


def test_either_of_two_equal_codes_is_nearest() -> None:
    """Which one does not matter; a third one that is farther must not be it."""
    codes = torch.randn(20, 4, dtype=torch.float64)
    vectors = torch.randn(300, 4, dtype=torch.float64)
    indices = nearest_codes(vectors, codes.repeat(3, 1))
    assert torch.equal(indices % 20, squared_distances(vectors, codes).argmin(-1))


def test_nearest_codes_form_no_graph() -> None:
    """Neither side's gradient goes through a choice; looking a vector up that is a code finds it."""
    codes = torch.randn(40, 8, requires_grad=True)
    indices = nearest_codes(codes.detach().requires_grad_(), codes)
    assert not indices.requires_grad and indices.tolist() == list(range(40))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (0, 5), (2, 4, 1)])
def test_vectors_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError) as error:
        nearest_codes(torch.zeros(shape), torch.zeros(7, 4))
    assert str(error.value) == (
        f"vectors must have 4 values on their last axis, as the codes have, got shape {tuple(shape)}"
    )


# --- moving averages -------------------------------------------------------------------------------------------------


def averages_by_hand(
    history: list[tuple[np.ndarray, np.ndarray]], first: Codebook, codes: Tensor, decay: float, smoothing: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns usage, sums and codes after a history of vectors and indices, from the first state and the latest codes.

    An average that starts at zero is divided by its weights' sum; one that was set keeps what they leave of it.
    """
    num_codes, dim = codes.shape
    start = [value.double().numpy() for value in first]
    usage, sums = np.zeros(num_codes), np.zeros((num_codes, dim))
    for k in range(num_codes):
        filled = start[3][k] * decay ** len(history)
        usage[k], sums[k] = decay ** len(history) * start[1][k], decay ** len(history) * start[2][k]
        for age, (vectors, indices) in enumerate(reversed(history)):
            weight = (1.0 - decay) * decay**age
            filled += weight
            for vector, index in zip(vectors, indices, strict=True):
                if index == k:
                    usage[k] += weight
                    sums[k] += weight * vector
        usage[k], sums[k] = usage[k] / filled, sums[k] / filled
    moved = codes.double().numpy().copy()
    for k in range(num_codes):
        if usage[k] > 0.0:
            moved[k] = sums[k] / ((usage[k] + smoothing) / (usage.sum() + num_codes * smoothing) * usage.sum())
    return usage, sums, moved


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("decay, smoothing", [(0.99, 1e-5), (0.5, 0.0), (0.9, 0.3), (0.0, 1e-5)])
@pytest.mark.parametrize("start", ["empty", "set", "mixed"])
def test_updates_follow_the_averages_of_the_appendix(
    start: str, decay: float, smoothing: float, dtype: torch.dtype, tolerance: float
) -> None:
    """From zero, from counts that were set from data, and where some were; a code far away is never used and stays."""
    codes = 0.3 * torch.randn(5, 3, dtype=dtype)
    codes[-1] = 100.0
    first = codebook = empty_codebook(codes)
    if start != "empty":
        chosen = torch.arange(5) < (5 if start == "set" else 2)
        counts = torch.where(chosen, torch.tensor([3.0, 20.0, 8.0, 1.0, 0.0], dtype=dtype), 0.0)
        first = codebook = Codebook(codes, counts, counts[:, None] * codes, chosen.to(dtype))
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for count in (30, 7, 1, 40):
        vectors = torch.randn(count, 3, dtype=dtype)
        indices = nearest_codes(vectors, codebook.codes)
        before, codebook = codebook, update_codebook(codebook, vectors, indices, decay, smoothing)
        history.append((vectors.double().numpy(), indices.numpy()))
        usage, sums, expected = averages_by_hand(history, first, before.codes, decay, smoothing)
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(codebook.usage.double(), torch.from_numpy(usage), **close)
        debiased = codebook.sums / codebook.weights[:, None]
        torch.testing.assert_close(debiased.double(), torch.from_numpy(sums), **close)
        torch.testing.assert_close(codebook.codes.double(), torch.from_numpy(expected), **close)
        assert torch.equal(codebook.codes[-1], codes[-1])
    assert codebook.codes.dtype == dtype
    assert (codebook.codes != codes).any(1).tolist() == [True] * 4 + [False]


def test_first_update_puts_codes_on_the_means() -> None:
    """The averages start at zero and are divided by the part that is filled: no code is drawn to the origin."""
    vectors, labels = make_clusters((5, 1, 30))
    means = torch.stack([vectors[labels == k].mean(0) for k in range(3)])
    codebook = update_codebook(empty_codebook(torch.zeros(3, 4, dtype=torch.float64)), vectors, labels, decay=0.999)
    torch.testing.assert_close(codebook.codes, means, rtol=1e-4, atol=0)
    exact = update_codebook(empty_codebook(torch.zeros_like(means)), vectors, labels, decay=0.999, smoothing=0.0)
    torch.testing.assert_close(exact.codes, means, rtol=1e-12, atol=0)
    torch.testing.assert_close(exact.usage, torch.tensor([5.0, 1.0, 30.0], dtype=torch.float64))
    torch.testing.assert_close(exact.weights, torch.full((3,), 0.001, dtype=torch.float64))


def test_averages_that_were_set_are_not_debiased() -> None:
    """Weight 1 means a full average: it moves by 1 - γ, and the weight stays 1 to the last bit."""
    codes = torch.tensor([[2.0], [-2.0]])
    codebook = Codebook(codes, torch.tensor([10.0, 10.0]), 10.0 * codes, torch.ones(2))
    vectors, indices = torch.full((20, 1), 4.0), torch.zeros(20, dtype=torch.int64)
    updated = update_codebook(codebook, vectors, indices, decay=0.9, smoothing=0.0)
    torch.testing.assert_close(updated.usage, torch.tensor([11.0, 9.0]))
    torch.testing.assert_close(updated.codes, torch.tensor([[(0.9 * 20.0 + 0.1 * 80.0) / 11.0], [-2.0]]))
    assert updated.weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
@pytest.mark.parametrize("start", ["empty", "updated", "revived", "clustered"])
def test_no_vectors_change_nothing(start: str, shape: tuple[int, ...]) -> None:
    """Not even by rounding or by smoothing codes that were set: neither codes nor averages, nor how full they are."""
    codebook = make_codebook(updates=0 if start == "empty" else 3, dtype=torch.float32)
    if start == "revived":
        codebook, _ = revive_dead_codes(codebook, torch.randn(9, 3), torch.rand(6), least_usage=1e9)
    elif start == "clustered":
        codebook = cluster(torch.randn(50, 3), 6, torch.rand(6))
    updated = update_codebook(codebook, torch.zeros(*shape, 3), torch.zeros(shape, dtype=torch.int64))
    assert equal(updated, codebook)


def test_update_takes_any_leading_shape() -> None:
    codebook, vectors = make_codebook(), torch.randn(4, 5, 6, 3, dtype=torch.float64)
    indices = nearest_codes(vectors, codebook.codes)
    flat = update_codebook(codebook, vectors.flatten(0, 2), indices.flatten())
    assert equal(update_codebook(codebook, vectors, indices), flat)


@pytest.mark.parametrize("vectors_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("codes_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_statistics_are_float32_at_least(codes_dtype: torch.dtype, vectors_dtype: torch.dtype) -> None:
    """Whatever the vectors' precision: 257 of them are counted, which bfloat16 cannot, and 0.99 is no 1."""
    statistics = torch.promote_types(codes_dtype, torch.float32)
    codebook = empty_codebook(torch.randn(4, 3, dtype=codes_dtype))
    vectors, indices = torch.randn(257, 3).to(vectors_dtype), torch.zeros(257, dtype=torch.int64)
    exact = Codebook(*(value.to(statistics) for value in codebook))
    for _ in range(3):
        codebook, _ = revive_dead_codes(update_codebook(codebook, vectors, indices), vectors[:0], torch.rand(4))
        exact = update_codebook(exact, vectors.to(statistics), indices)
    assert codebook.codes.dtype == codes_dtype
    for name in STATISTICS:
        assert getattr(codebook, name).dtype == statistics
        assert torch.equal(getattr(codebook, name), getattr(exact, name))
    torch.testing.assert_close(codebook.codes, exact.codes.to(codes_dtype))
    assert codebook.usage[0].item() == pytest.approx(257.0, rel=1e-5)


def test_nothing_that_is_given_changes() -> None:
    """Neither codebook nor vectors; what is returned shares no storage with them and wants no gradient."""
    codebook, uniform = make_codebook(), torch.rand(6)
    vectors = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    indices = nearest_codes(vectors, codebook.codes)
    inputs = (*codebook, vectors, indices, uniform)
    before = [value.clone() for value in inputs]
    updated = update_codebook(codebook, vectors, indices)
    revived, _ = revive_dead_codes(codebook, vectors, uniform, least_usage=1e9)
    clustered = cluster(vectors, num_codes=6, uniform=uniform)
    assert all(map(torch.equal, before, inputs))
    for result in (updated, revived, clustered):
        assert not {value.data_ptr() for value in result} & {value.data_ptr() for value in inputs}
        assert not any(value.requires_grad for value in result)
    assert len({value.data_ptr() for value in empty_codebook(codebook.codes)}) == 4


def test_usage_adds_up_to_the_vectors_of_an_update() -> None:
    """Exactly so from zero, and in the end from wherever clusters and revivals left it."""
    codebook = make_codebook(updates=0)
    assert codebook.usage.tolist() == [0.0] * 6
    for _ in range(3):
        vectors = torch.randn(50, 3, dtype=torch.float64)
        codebook = update_codebook(codebook, vectors, nearest_codes(vectors, codebook.codes), decay=0.9)
        assert codebook.usage.sum().item() == pytest.approx(50.0, rel=1e-12)
    for start in (cluster(torch.randn(900, 3, dtype=torch.float64), 6, torch.rand(6)), codebook):
        typical = float(start.usage.median() / start.usage.mean())
        codebook, num_revived = revive_dead_codes(start, vectors, torch.rand(6), least_usage=typical)
        assert num_revived > 0
        for _ in range(200):
            codebook = update_codebook(codebook, vectors, nearest_codes(vectors, codebook.codes), decay=0.9)
        assert codebook.usage.sum().item() == pytest.approx(50.0, rel=1e-7)


# --- revival ---------------------------------------------------------------------------------------------------------


def half_dead_codebook(dtype: torch.dtype = torch.float32) -> Codebook:
    """Returns four codes of which the second and the last were never used; ten vectors for each update."""
    codebook = empty_codebook(torch.tensor([[1.0, 0.0], [50.0, 0.0], [-1.0, 0.0], [0.0, 50.0]], dtype=dtype))
    vectors = torch.tensor([[1.0, 0.5]] * 6 + [[-1.0, 0.5]] * 4, dtype=dtype)
    for _ in range(2):
        codebook = update_codebook(codebook, vectors, nearest_codes(vectors, codebook.codes))
    return codebook


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dead_codes_move_onto_vectors(dtype: torch.dtype) -> None:
    """Exactly; count and sum are set together, their weight is full, and live codes are left alone."""
    codebook, vectors = half_dead_codebook(dtype), torch.randn(2, 4, 2).to(dtype)
    uniform = torch.tensor([0.0, 0.3, 0.0, 0.99])
    revived, num_revived = revive_dead_codes(codebook, vectors, uniform)
    dead, alive = [1, 3], [0, 2]
    assert num_revived.item() == 2 and num_revived.shape == ()
    assert torch.equal(revived.codes[dead], vectors.flatten(0, 1)[[2, 7]])
    assert torch.equal(revived.sums[dead], revived.counts[dead, None] * revived.codes[dead].to(revived.sums.dtype))
    torch.testing.assert_close(revived.counts[dead], torch.full_like(revived.counts[dead], 2.5))
    assert revived.weights[dead].tolist() == [1.0, 1.0]
    for found, before in zip(revived, codebook, strict=True):
        assert found.dtype == before.dtype and torch.equal(found[alive], before[alive])


@pytest.mark.parametrize("least_usage, expected", [(0.0, 0), (1e-30, 2), (1.56, 2), (1.64, 3), (2.36, 3), (2.44, 4)])
def test_codes_die_of_little_usage(least_usage: float, expected: int) -> None:
    """The average count against the mean one decides, here 6, 4 and 2.5, however little of the average is filled."""
    codebook = half_dead_codebook()
    revived, num_revived = revive_dead_codes(codebook, torch.ones(3, 2), torch.rand(4), least_usage)
    assert num_revived.item() == expected
    assert (revived.codes != codebook.codes).any(1).sum().item() == expected


def test_nothing_is_dead_before_the_first_update() -> None:
    """Or every code would be, and the codes as they were built would never be tried."""
    codebook = empty_codebook(torch.randn(4, 2))
    revived, num_revived = revive_dead_codes(codebook, torch.randn(10, 2), torch.rand(4), least_usage=1e9)
    assert num_revived.item() == 0 and equal(revived, codebook)


def test_no_vectors_revive_nothing() -> None:
    codebook = half_dead_codebook()
    revived, num_revived = revive_dead_codes(codebook, torch.zeros(3, 0, 2), torch.rand(4))
    assert num_revived.item() == 0 and equal(revived, codebook)


def test_every_vector_is_chosen_equally_often() -> None:
    """Of uniform noise on a grid, each of seven vectors gets a seventh, the first and the last included."""
    codebook = empty_codebook(torch.full((700, 1), -1.0))
    codebook = update_codebook(codebook, torch.zeros(700, 1), torch.arange(700))
    uniform = (torch.arange(700) + 0.5) / 700
    revived, num_revived = revive_dead_codes(codebook, torch.arange(7.0)[:, None], uniform, least_usage=2.0)
    assert num_revived.item() == 700
    assert revived.codes.flatten().long().bincount().tolist() == [100] * 7
    ends = torch.tensor([0.0, 1.0 - 2.0**-24]).repeat(350)
    revived, _ = revive_dead_codes(codebook, torch.arange(7.0)[:, None], ends, least_usage=2.0)
    assert revived.codes.flatten().tolist() == [0.0, 6.0] * 350


def test_revived_codes_survive_an_update_without_them() -> None:
    """They start with the mean count, and stay where they were put."""
    codebook, _ = revive_dead_codes(half_dead_codebook(), torch.full((1, 2), 9.0), torch.rand(4))
    vectors = torch.tensor([[1.0, 0.5]] * 6 + [[-1.0, 0.5]] * 4)
    codebook = update_codebook(codebook, vectors, nearest_codes(vectors, codebook.codes))
    torch.testing.assert_close(codebook.codes[[1, 3]], torch.full((2, 2), 9.0), rtol=1e-4, atol=0)
    _, num_revived = revive_dead_codes(codebook, vectors, torch.rand(4))
    assert num_revived.item() == 0


# --- k-means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_updates", [1, 4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-5)])
def test_cluster_finds_separate_clusters(dtype: torch.dtype, tolerance: float, num_updates: int) -> None:
    """Centres are their means, counts and sums those of one update, and the averages are full."""
    sizes = (1, 40, 7, 100, 16, 3)
    vectors, labels = make_clusters(sizes)
    vectors = vectors.to(dtype)
    codebook = cluster(vectors, num_codes=6, uniform=torch.rand(6), num_updates=num_updates)
    order = [int(nearest_codes(vectors[labels == k][:1], codebook.codes)) for k in range(6)]
    assert sorted(order) == list(range(6))
    means = torch.stack([vectors[labels == k].double().mean(0) for k in range(6)])
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(codebook.codes[order].double(), means, **close)
    counts = torch.tensor(sizes, dtype=torch.float64) / num_updates
    torch.testing.assert_close(codebook.counts[order].double(), counts, **close)
    torch.testing.assert_close(codebook.sums, codebook.counts[:, None] * codebook.codes, **close)
    assert codebook.weights.tolist() == [1.0] * 6
    assert {value.dtype for value in codebook} == {torch.promote_types(dtype, torch.float32)}


def test_centres_start_in_proportion_to_squared_distance() -> None:
    """The first is any vector; the second at distances 0, 1 and 3 from it has odds 0 : 1 : 9."""
    vectors = torch.tensor([[0.0], [1.0], [3.0]])

    def seeds(*uniform: float) -> list[float]:
        return cluster(vectors, len(uniform), torch.tensor(uniform), num_iterations=0).codes.flatten().tolist()

    assert [seeds(u) for u in (0.0, 0.32, 0.34, 0.65, 0.67, 0.9999)] == [[0.0], [0.0], [1.0], [1.0], [3.0], [3.0]]
    assert [seeds(0.1, u)[1] for u in (0.0, 0.09, 0.11, 0.9999)] == [1.0, 1.0, 3.0, 3.0]
    assert [seeds(0.1, 0.5, u)[2] for u in (0.0, 0.5, 0.9999)] == [1.0, 1.0, 1.0]


def test_centres_without_iterations_are_those_drawn() -> None:
    """Counts and sums are those of the vectors nearest to each, for one of two batches."""
    vectors = torch.tensor([[0.0], [1.0], [3.0], [4.0], [4.5]])
    codebook = cluster(vectors, 2, torch.tensor([0.1, 0.5]), num_updates=2, num_iterations=0)
    assert codebook.codes.tolist() == [[0.0], [4.0]]
    assert codebook.counts.tolist() == [1.0, 1.5] and codebook.sums.tolist() == [[0.5], [5.75]]


def test_cluster_only_improves_on_its_start() -> None:
    """The squared distance to the nearest centre falls, or stays, with every iteration."""
    vectors, uniform = torch.randn(400, 3, dtype=torch.float64), torch.rand(12)
    errors = [
        squared_distances(vectors, cluster(vectors, 12, uniform, num_iterations=n).codes).amin(1).sum().item()
        for n in range(11)
    ]
    assert all(after <= before * (1.0 + 1e-12) for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.95 * errors[0]
    default = cluster(vectors, 12, uniform).codes
    assert squared_distances(vectors, default).amin(1).sum().item() == pytest.approx(errors[10], rel=1e-12)


def test_cluster_is_decided_by_its_noise() -> None:
    """The global random state is neither used nor moved."""
    vectors, uniform = torch.randn(200, 3), torch.rand(8)
    state = torch.get_rng_state()
    first, second = cluster(vectors, 8, uniform), cluster(vectors, 8, uniform.clone())
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first, second)
    assert not torch.equal(first.codes, cluster(vectors, 8, 1.0 - uniform).codes)


@pytest.mark.parametrize("num_codes", [1, 3, 5])
def test_identical_vectors_have_one_centre(num_codes: int) -> None:
    """There is no second cluster: the codes all lie there, and one of them has every vector."""
    codebook = cluster(torch.full((5, 2), 3.0), num_codes, torch.rand(num_codes))
    assert torch.equal(codebook.codes, torch.full((num_codes, 2), 3.0))
    assert codebook.counts.sum().item() == 5.0
    torch.testing.assert_close(codebook.sums, codebook.counts[:, None] * codebook.codes)


def test_as_many_codes_as_vectors_take_each() -> None:
    vectors = torch.randn(9, 2)
    codebook = cluster(vectors, 9, torch.rand(9))
    assert torch.equal(codebook.codes.sort(0).values, vectors.sort(0).values)
    assert codebook.counts.tolist() == [1.0] * 9


def test_codebook_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^num_codes must be at most the 4 vectors that there are, got 5$"):
        cluster(torch.randn(4, 2), 5, torch.rand(5))
    with pytest.raises(ArgumentError, match=r"^num_codes must be an integer of at least 1, got 0$"):
        cluster(torch.randn(4, 2), 0, torch.rand(0))


def test_updates_go_on_from_clusters() -> None:
    """More of the same data, a quarter at a time as was said, moves neither centres nor counts."""
    sizes = (8, 40, 16, 100)
    vectors, _ = make_clusters(sizes)
    start = codebook = cluster(vectors.repeat(4, 1), 4, torch.rand(4), num_updates=4)
    for _ in range(20):
        codebook = update_codebook(codebook, vectors, nearest_codes(vectors, codebook.codes), decay=0.9)
    torch.testing.assert_close(codebook.codes, start.codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codebook.usage, start.usage)
    assert sorted(codebook.usage.round().tolist()) == sorted(sizes)


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[30], [1] * 30, [0, 7, 23], [29, 1]])
def test_usage_does_not_depend_on_batches(cuts: list[int]) -> None:
    """Any split of some indices adds up to the same counts and the same perplexity."""
    indices = torch.randint(0, 5, (30, 2, 3))
    whole = CodeUsage.of(indices, num_codes=8)
    first, *others = (CodeUsage.of(part, num_codes=8) for part in indices.split(cuts))
    for other in others:
        first = first + other
    assert torch.equal(first.counts, whole.counts)
    assert whole.counts.tolist() == [int((indices == k).sum()) for k in range(8)]
    assert (first.num_used, first.perplexity) == (5, whole.perplexity)


@pytest.mark.parametrize(
    "counts", [[3, 3, 3, 3], [7], [0, 0, 9], [1, 0, 1, 0], [1, 2, 3, 4, 0], [10**12, 1], [1] * 1000]
)
def test_perplexity_is_the_exponential_of_the_entropy(counts: list[int]) -> None:
    """K if all K codes are used alike, 1 if one is alone; unused codes do not count."""
    usage = CodeUsage(torch.tensor(counts))
    probabilities = [count / sum(counts) for count in counts if count]
    entropy = -sum(p * math.log(p) for p in probabilities)
    assert usage.perplexity == pytest.approx(math.exp(entropy), rel=1e-12)
    assert usage.num_used == len(probabilities)
    if len(set(counts) - {0}) == 1:
        assert usage.perplexity == pytest.approx(len(probabilities), rel=1e-12)


def test_no_usage_has_no_perplexity() -> None:
    """It is not a number, and an empty batch adds nothing."""
    none = CodeUsage.of(torch.zeros(3, 0, dtype=torch.int64), num_codes=4)
    assert none.counts.tolist() == [0] * 4 and none.num_used == 0 and math.isnan(none.perplexity)
    some = CodeUsage.of(torch.tensor(3), num_codes=4)
    assert (some + none).perplexity == some.perplexity == 1.0


# --- parts of a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_of_a_batch_keep_the_codebook_of_the_whole(num_parts: int) -> None:
    """Sums over the parts are those over the whole; a dead code goes to the same vector, whichever part it is in."""
    before = empty_codebook(torch.tensor([[1.0], [50.0], [-1.0], [-50.0]], dtype=torch.float64))
    vectors, uniform = torch.randn(40, 1, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    indices = nearest_codes(vectors, before.codes)
    size = len(vectors) // num_parts
    parts = list(enumerate(zip(vectors.split(size), indices.split(size), strict=True)))
    seen = sum(assigned_sums(part, chosen, 4, torch.float64) for _, (part, chosen) in parts)
    drawn = [drawn_vectors(part, uniform * num_parts - place) for place, (part, _) in parts]
    updated = update_from_sums(before, seen)
    alone = update_codebook(before, vectors, indices)
    torch.testing.assert_close(tuple(updated), tuple(alone), rtol=1e-12, atol=1e-12)
    revived, num_revived = revive_from_drawn(updated, sum(drawn))
    expected, expected_num = revive_dead_codes(updated, vectors, uniform)
    assert equal(revived, expected) and num_revived == expected_num == 2
    assert all((part[:, 0] == 1).sum() < 4 for part in drawn) or num_parts == 1, "no part draws for all"
