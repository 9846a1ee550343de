"""Laws of sequences: what a window, a whole sequence and a selection hold, by brute force; order and bad input."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from popgen.datasets.data import Batches, Data
from popgen.datasets.sequences import SequenceBatch, SequenceData, Sequences, WindowBatches, play
from popgen.errors import ArgumentError, DataError

LENGTHS = [7, 1, 12, 5, 30, 6]


def numbered(lengths: list[int] = LENGTHS, features: int | None = None, dtype=torch.float32) -> Sequences:
    """Returns sequences whose values tell what they are: step t of sequence i is 100 (i + 1) + t."""
    values = torch.cat([100 * (i + 1) + torch.arange(length) for i, length in enumerate(lengths)]).to(dtype)
    if features is not None:
        values = values[:, None] + 0.125 * torch.arange(features)
    count = torch.arange(len(lengths))
    names = tuple(f"{i}.wav" for i in range(len(lengths)))
    return Sequences(values, torch.tensor(lengths), {"speaker": count % 2, "digit": count}, names)


def rows(sequences: Sequences) -> list[torch.Tensor]:
    """Returns the sequences one by one."""
    return list(sequences.values.split(sequences.lengths.tolist()))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- whole sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [None, 3])
@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4, 5], [4], [1], [5, 1, 1, 0], [1, 1]])
def test_padded_sequences(features: int | None, indices: list[int]) -> None:
    sequences = numbered(features=features)
    batch = sequences.padded(torch.tensor(indices))
    expected = [rows(sequences)[index] for index in indices]
    assert torch.equal(batch.values, torch.nn.utils.rnn.pad_sequence(expected, batch_first=True))
    assert batch.lengths.tolist() == [LENGTHS[index] for index in indices]
    assert batch.labels["digit"].tolist() == indices
    assert batch.labels["speaker"].tolist() == [index % 2 for index in indices]
    assert batch.values.dtype == torch.float32 and batch.device.type == "cpu"


@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4, 5], [4], [5, 1, 1, 0], []])
@pytest.mark.parametrize("features", [None, 2])
def test_selection(features: int | None, indices: list[int]) -> None:
    sequences = numbered(features=features)
    chosen = sequences.select(torch.tensor(indices, dtype=torch.int64))
    assert len(chosen) == len(indices)
    assert chosen.lengths.tolist() == [LENGTHS[index] for index in indices]
    assert chosen.labels["digit"].tolist() == indices
    assert chosen.names == tuple(f"{index}.wav" for index in indices)
    assert chosen.values.shape[1:] == sequences.values.shape[1:]
    for found, index in zip(rows(chosen), indices, strict=True):
        assert torch.equal(found, rows(sequences)[index])


@pytest.mark.parametrize("chosen", [slice(2), slice(1, None, 2), slice(-2, None), slice(None), slice(3, 3)])
def test_slices_are_selections(chosen: slice) -> None:
    sequences = numbered()
    sliced, selected = sequences[chosen], sequences.select(torch.arange(6)[chosen])
    assert torch.equal(sliced.values, selected.values) and sliced.names == selected.names
    assert torch.equal(sliced.lengths, selected.lengths)


def test_nothing_selected_is_nothing_padded() -> None:
    batch = numbered(features=2).padded(torch.tensor([], dtype=torch.int64))
    assert batch.values.shape == (0, 0, 2) and batch.lengths.shape == (0,) and batch.labels["digit"].shape == (0,)


@pytest.mark.parametrize("dtype, scale", [(torch.int16, 32_768.0), (torch.uint8, 255.0)])
def test_integers_stay_integers_until_a_batch_is_made(dtype: torch.dtype, scale: float) -> None:
    info = torch.iinfo(dtype)
    stored = torch.tensor([info.min, info.max, 1, 0, 2], dtype=dtype)
    sequences = Sequences(stored, torch.tensor([3, 2])).to("cpu", torch.float64)
    assert sequences.values.dtype == dtype and sequences.select(torch.tensor([1])).values.dtype == dtype
    expected = torch.tensor([[info.min, info.max, 1], [0, 2, 0]], dtype=torch.float64) / scale
    batch = sequences.padded(torch.tensor([0, 1]))
    assert batch.values.dtype == torch.float64
    torch.testing.assert_close(batch.values, expected, rtol=0, atol=0)
    assert sequences[:1].padded(torch.tensor([0])).values.dtype == torch.float64
    assert Sequences(stored, torch.tensor([5])).padded(torch.tensor([0])).values.dtype == torch.float32


def test_floating_point_values_change_their_type() -> None:
    sequences = numbered()
    assert sequences.to("cpu", torch.float64).values.dtype == torch.float64
    assert sequences.to("cpu", torch.float64).padded(torch.tensor([0])).values.dtype == torch.float64
    assert sequences.to("cpu").values.dtype == torch.float32
    assert sequences.to("cpu").names == sequences.names


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [None, 3])
@pytest.mark.parametrize("window", [1, 5, 7, 40])
def test_a_window_is_a_stretch_of_its_sequence(window: int, features: int | None) -> None:
    sequences = numbered(features=features)
    batches, noise = WindowBatches(sequences, window, batch_size=6, seed=0), generator()
    for step in range(20):
        indices = batches.indices(step)
        batch = batches.gather(indices, noise)
        assert batch.values.shape == (6, window, *sequences.values.shape[1:])
        assert batch.labels["digit"].tolist() == indices.tolist()
        for index, values, length in zip(indices.tolist(), batch.values, batch.lengths.tolist(), strict=True):
            assert length == min(window, LENGTHS[index])
            first = int(values.flatten()[0]) - 100 * (index + 1)
            assert 0 <= first <= LENGTHS[index] - length
            assert torch.equal(values[:length], rows(sequences)[index][first : first + length])
            assert not values[length:].any()


def test_every_place_that_touches_is_equally_likely_and_is_moved_inside() -> None:
    """Of 12 places over nine steps four are at the beginning and four at the end."""
    sequences, window, draws = numbered([9, 3, 5]), 4, 6_000
    batches, noise = WindowBatches(sequences, window, batch_size=3, seed=0), generator(3)
    indices = torch.tensor([0, 1, 2]).repeat(draws)
    batch = batches.gather(indices, noise)
    starts = (batch.values[:, 0] - 100 * (indices + 1)).long()
    assert torch.equal(batch.starts, starts)
    for index, places in ((0, [4, 1, 1, 1, 1, 4]), (1, [6]), (2, [4, 4])):
        counts = starts[indices == index].bincount()
        assert len(counts) == len(places)
        expected = draws * torch.tensor(places) / sum(places)
        assert ((counts - expected) / expected.sqrt()).abs().max() < 4.5


# --- speeds ----------------------------------------------------------------------------------------------------------


def test_a_played_sequence_is_that_of_numpy() -> None:
    speeds, steps = torch.tensor([0.8, 1.0, 1.25, 1.7], dtype=torch.float64), torch.arange(12)
    lengths = torch.tensor([21, 9, 21, 16])
    values = torch.randn(4, 21, dtype=torch.float64, generator=generator()) * (torch.arange(21) < lengths[:, None])
    played = play(SequenceBatch(values, lengths, {}, torch.arange(4)), speeds, steps)
    for row, (speed, length) in enumerate(zip(speeds.tolist(), lengths.tolist(), strict=True)):
        positions = np.array([t * speed for t in range(12) if t * speed <= length - 1])
        expected = np.interp(positions, np.arange(length), values[row, :length].numpy())
        assert int(played.lengths[row]) == len(expected)
        np.testing.assert_allclose(played.values[row, : len(expected)].numpy(), expected, atol=1e-12)
        assert not played.values[row, len(expected) :].any()


@pytest.mark.parametrize("features", [None, 3])
def test_speeds_are_log_uniform_and_windows_stay_inside_their_sequence(features: int | None) -> None:
    """A line tells the speed by its slope and the start by its first value."""
    window, length, draws = 11, 40, 4_000
    line = torch.arange(length, dtype=torch.float64)
    values = line if features is None else line[:, None].expand(-1, features).contiguous()
    sequences = Sequences(values.repeat(2, *[1] * (values.ndim - 1)), torch.tensor([length, length]))
    batches = WindowBatches(sequences, window, batch_size=2, seed=0, max_speed=1.5)
    batch = batches.gather(torch.zeros(draws, dtype=torch.int64), generator(1))
    assert batch.values.shape == (draws, window, *values.shape[1:]) and bool((batch.lengths == window).all())
    seen = batch.values if features is None else batch.values[..., 0]
    slopes = (seen[:, -1] - seen[:, 0]) / (window - 1)
    torch.testing.assert_close(seen, seen[:, :1] + slopes[:, None] * torch.arange(window))
    assert seen.min() == 0.0 and seen.max() <= length - 1
    places = 0.5 + slopes.log() / math.log(1.5) / 2.0  # uniform on [0, 1)
    assert places.min() >= 0.0 and places.max() < 1.0
    deviations = (places.mul(10).long().bincount() - draws / 10) / (draws / 10 * 0.9) ** 0.5
    assert deviations.abs().max() < 4.5
    short = WindowBatches(numbered([7, 7]), window, batch_size=2, seed=0, max_speed=1.5).draw(0, generator())
    assert bool(((short.lengths >= 5) & (short.lengths <= 10)).all())


def test_a_speed_of_one_changes_nothing() -> None:
    plain, played = (
        WindowBatches(numbered(), 5, batch_size=4, seed=0, **keywords) for keywords in ({}, {"max_speed": 1.0})
    )
    assert torch.equal(plain.draw(0, generator()).values, played.draw(0, generator()).values)
    with pytest.raises(ArgumentError, match="max_speed must be at least 1, got 0.9"):
        WindowBatches(numbered(), 5, batch_size=4, seed=0, max_speed=0.9)


def test_windows_are_drawn_with_the_generator_alone() -> None:
    batches = WindowBatches(numbered([1_000] * 4), window=10, batch_size=4, seed=0)
    before = torch.get_rng_state()
    first, again, other = (batches.draw(1, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.values, again.values) and not torch.equal(first.values, other.values)
    assert torch.equal(before, torch.get_rng_state())


class Operations(TorchDispatchMode):
    """Records the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(str(function.overloadpacket))
        return function(*arguments, **(keywords or {}))


WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.repeat_interleave", "aten.masked_select"}


@pytest.mark.parametrize("max_speed", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_a_batch_waits_for_nothing(dtype: torch.dtype, max_speed: float) -> None:
    """No operation reads a value from the device, on which a recording would fail."""
    batches = WindowBatches(numbered(dtype=dtype), window=5, batch_size=4, seed=0, max_speed=max_speed)
    indices = batches.indices(0)
    with Operations() as operations:
        batches.gather(indices, generator())
    assert "aten.index_select" in operations.names and not operations.names & WAITING
    with Operations() as operations:
        batches.sequences.padded(indices)
    assert operations.names & WAITING, "the test sees an operation that waits"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("max_speed", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_a_recorded_batch_on_a_gpu(dtype: torch.dtype, max_speed: float) -> None:
    sequences = numbered([5_000, 20, 300] * 10, dtype=dtype).to("cuda")
    batches = WindowBatches(sequences, window=100, batch_size=30, seed=0, max_speed=max_speed)
    noise, indices = torch.Generator("cuda").manual_seed(1), batches.indices(0).clone()
    batches.gather(indices, noise)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(noise)
    with torch.cuda.graph(graph):
        recorded = batches.gather(indices, noise)
    plain = torch.Generator("cuda").manual_seed(1)
    batches.gather(indices, plain)
    seen = []
    for step in range(1, 4):
        indices.copy_(batches.indices(step))
        graph.replay()
        expected = batches.gather(indices, plain)
        assert torch.equal(recorded.values, expected.values) and torch.equal(recorded.lengths, expected.lengths)
        assert torch.equal(recorded.labels["digit"], indices)
        seen.append(recorded.values.clone())
    assert not torch.equal(seen[0], seen[1])
    previous = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        batches.gather(indices, plain)
    finally:
        torch.cuda.set_sync_debug_mode(previous)


# --- the order -------------------------------------------------------------------------------------------------------


def visited(batches: WindowBatches, steps: range) -> list[int]:
    return [index for step in steps for index in batches.draw(step, generator()).labels["digit"].tolist()]


def test_every_epoch_visits_each_sequence_once_in_a_new_order() -> None:
    batches = WindowBatches(numbered([3] * 24), window=2, batch_size=6, seed=0)
    epochs = [visited(batches, range(4 * epoch, 4 * epoch + 4)) for epoch in range(5)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    assert visited(WindowBatches(numbered([3] * 24), 2, 6, seed=1), range(4)) != epochs[0]


def test_an_incomplete_batch_is_left_out() -> None:
    batches = WindowBatches(numbered([3] * 10), window=2, batch_size=4, seed=0)
    epochs = [set(visited(batches, range(2 * epoch, 2 * epoch + 2))) for epoch in range(30)]
    assert all(len(epoch) == 8 for epoch in epochs) and set.union(*epochs) == set(range(10))


def test_order_is_a_function_of_seed_and_step_alone() -> None:
    walked = WindowBatches(numbered([2] * 30), window=2, batch_size=7, seed=5)
    expected = [walked.indices(step).clone() for step in range(40)]
    jumping = WindowBatches(numbered([2] * 30), window=9, batch_size=7, seed=5)
    for step in (39, 0, 17, 16, 4, 3, 39, 8):
        assert torch.equal(jumping.indices(step), expected[step])


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 7}, "batch_size must be at most the 6 training sequences, got 7"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"window": 2.5}, "window must be an integer of at least 1, got 2.5"),
    ],
)
def test_batches_refuse(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        WindowBatches(numbered(), **{"window": 3, "batch_size": 2, "seed": 0, **arguments})


# --- what does not fit together --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"values": torch.zeros(61, dtype=torch.int64)}, "values must be floating point, int16 or uint8, got .*int64"),
        ({"values": torch.tensor(1.0)}, r"values must have shape \(total, \.\.\.\), got \(\)"),
        ({"values": torch.zeros(60)}, "lengths must sum to the 60 values, got 61"),
        ({"lengths": torch.tensor([7, 0, 13, 5, 30, 6])}, "lengths must be at least 1, got 0"),
        ({"lengths": torch.tensor([7, -1, 14, 5, 30, 6])}, "lengths must be at least 1, got -1"),
        ({"lengths": torch.tensor(LENGTHS).int()}, "lengths must be int64 of shape .count,., got torch.int32"),
        ({"lengths": torch.tensor([LENGTHS])}, r"lengths must be int64 .* of \(1, 6\)"),
        ({"labels": {"digit": torch.zeros(5).long()}}, r"label 'digit' must be int64 of shape \(6,\), .* \(5,\)"),
        ({"labels": {"digit": torch.zeros(6)}}, "the label 'digit' must be int64 .*, got torch.float32"),
        ({"labels": {"digit": torch.arange(6) - 2}}, "the label 'digit' must be at least 0, got -2"),
        ({"values": torch.zeros(61, device="meta")}, "lengths and labels must be on the device of the values, meta"),
        ({"names": ("a", "b")}, "names must be one for each of the 6 sequences, got 2"),
        ({"dtype": torch.int32}, "dtype must be floating point, got torch.int32"),
    ],
)
def test_sequences_refuse(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(numbered(), **changes)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("position, name", [(0, "0.wav"), (7, "1.wav"), (8, "2.wav"), (60, "5.wav")])
@pytest.mark.parametrize("features", [None, 2])
def test_values_that_are_not_finite_are_found(wrong: float, position: int, name: str, features: int | None) -> None:
    sequences = numbered(features=features)
    values = sequences.values.clone()
    values.view(61, -1)[position, -1] = wrong
    with pytest.raises(DataError, match=f"values must be finite, which they are not in {name}"):
        dataclasses.replace(sequences, values=values)
    with pytest.raises(DataError, match=f"not in sequence {name[0]}"):
        dataclasses.replace(sequences, values=values, names=())


@pytest.mark.parametrize(
    "indices, message",
    [
        (torch.tensor([0, 6]), "indices must be at least 0 and below the 6 sequences, got 6"),
        (torch.tensor([2, -1]), "indices must be at least 0 and below the 6 sequences, got -1"),
        (torch.tensor([True] * 6), r"indices must be int64 of shape \(batch,\), got torch.bool"),
        (torch.tensor(2), r"indices must be int64 of shape \(batch,\), got torch.int64 of \(\)"),
    ],
)
def test_indices_that_are_none(indices: torch.Tensor, message: str) -> None:
    for method in (numbered().select, numbered().padded):
        with pytest.raises(ArgumentError, match=message):
            method(indices)


@pytest.mark.usefixtures("as_a_user")
def test_sequences_are_not_indexed() -> None:
    with pytest.raises(ArgumentError, match="sequences are sliced, or chosen by select.indices., got 3"):
        numbered()[3]


# --- splits ----------------------------------------------------------------------------------------------------------


CLASSES = {"speaker": ("a", "b"), "digit": tuple("012345")}


def make_data(**changes) -> SequenceData:
    fields = {"train": numbered(), "test": numbered()[:2], "validation": None, "window": 5, "classes": CLASSES}
    return SequenceData(**{**fields, "sample_rate": 8_000, **changes})


def test_data_keeps_its_protocol() -> None:
    data = make_data()
    assert isinstance(data, Data) and isinstance(data.batches(2, seed=0), Batches)
    assert data.split("test") is data.test and data.split("train") is data.train
    assert len(data.test[:1]) == 1
    batch = data.batches(2, seed=0).draw(0, generator())
    assert isinstance(batch, SequenceBatch) and batch.values.shape == (2, 5)


def test_facts() -> None:
    assert make_data().facts() == {
        "sample_rate": 8_000,
        "window": 5,
        "num_recordings": 8,
        "num_train_recordings": 6,
        "num_test_recordings": 2,
    }
    facts = make_data(sample_rate=None, validation=numbered()[:1]).facts()
    assert facts["num_validation_recordings"] == 1 and facts["num_recordings"] == 9 and "sample_rate" not in facts


@pytest.mark.parametrize("validation", [None, numbered()[2:]])
def test_data_moves_with_all_its_splits(validation: Sequences | None) -> None:
    moved = make_data(validation=validation).to("cpu", torch.float64)
    assert moved.train.values.dtype == moved.test.values.dtype == torch.float64
    assert moved.sample_rate == 8_000 and moved.classes == CLASSES
    if validation is None:
        assert moved.validation is None
    else:
        assert moved.split("validation").values.dtype == torch.float64


@pytest.mark.parametrize("name", ["validation", "window", "valid"])
def test_a_missing_split_is_named(name: str) -> None:
    with pytest.raises(DataError, match=f"the dataset has no {name} split"):
        make_data().split(name)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"window": 0}, ArgumentError, "window must be an integer of at least 1, got 0"),
        ({"sample_rate": 0}, ArgumentError, "sample_rate must be an integer of at least 1, got 0"),
        ({"test": numbered()[:0]}, DataError, "the test split must hold at least one sequence, got none"),
        ({"validation": numbered()[:0]}, DataError, "the validation split must hold at least one sequence"),
        ({"test": numbered(features=2)}, DataError, r"the steps of the test sequences .* \(\), got \(2,\)"),
        (
            {"classes": {"digit": tuple("012345")}},
            DataError,
            r"must have the labels of classes, \['digit'\], got \['dig",
        ),
        ({"classes": {**CLASSES, "digit": tuple("01234")}}, DataError, "'digit' of the train .* its 5 classes, got 5"),
    ],
)
def test_data_refuses(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make_data(**changes)
