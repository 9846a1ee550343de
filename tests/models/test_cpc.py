"""Contrastive predictive coding: the loss by loops, what it may see, and what it learns of sequences made for it."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from popgen.errors import ArgumentError, DataError
from popgen.models.cpc import CPC, CPCTerms
from popgen.nn.cpc import (
    CausalConvContext,
    Context,
    GRUContext,
    LinearPredictors,
    Predictors,
    RowEncoder,
    StridedConvEncoder,
    TransformerPredictors,
    negative_indices,
)

KINDS = ["batch", "sequence", "speaker"]
LENGTHS = [40, 29, 8, 4, 40]  # 18, 13, 2, 0 and 18 frames
WINDOW = 40


def make_model(
    negatives: str = "batch", num_negatives: int = 7, num_steps: int = 3, context: str = "gru", scale: float = 3.0
) -> CPC:
    """Returns a model in float64 of frames that see six steps, two apart, whose scores are far from equal."""
    encoder = StridedConvEncoder(6, kernel_sizes=(4, 2), strides=(2, 1))
    parts = {
        "gru": lambda: (GRUContext(6, 8), LinearPredictors(8, 6, num_steps)),
        "convolutions": lambda: (CausalConvContext(6, 8, 2, 3), TransformerPredictors(8, 6, num_steps, 2, 10)),
    }
    label = "speaker" if negatives == "speaker" else None
    model = CPC(encoder, *parts[context](), negatives, num_negatives, label).double()
    with torch.no_grad():
        for parameter in model.predictors.parameters():
            parameter.mul_(scale)
    return model


def make_batch(model: CPC, lengths: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Returns padded sequences, lengths, uniform noise and labels."""
    lengths = LENGTHS if lengths is None else lengths
    values = torch.randn(len(lengths), WINDOW, dtype=torch.float64)
    for row, length in enumerate(lengths):
        values[row, length:] = 0.0
    uniform = torch.rand(model.noise_shape(len(lengths)), dtype=torch.float64)
    return values, torch.tensor(lengths), uniform, {"speaker": torch.arange(len(lengths)) % 2}


@pytest.mark.parametrize("negatives", KINDS)
@pytest.mark.parametrize("context", ["gru", "convolutions"])
def test_terms_are_what_the_documentation_says(negatives: str, context: str) -> None:
    """One anchor and step after another, by loops over the negatives drawn for it."""
    model = make_model(negatives, context=context)
    values, lengths, uniform, labels = make_batch(model)
    terms = model(values, lengths, uniform, labels)
    frames, counts = model.encode(values), model.num_frames(lengths)
    predictions = model.predictors(model.context(frames))
    drawn = negative_indices(negatives, uniform, counts, frames.shape[1], 3, labels["speaker"])
    vectors, total, total_weight = frames.flatten(0, 1), 0.0, 0
    for i in range(len(values)):
        pairs = []
        for k in (1, 2, 3):
            losses, hits, guesses = [], [], []
            for t in range(int(counts[i]) - k):
                positive = i * frames.shape[1] + t + k
                chosen = drawn.indices[i, k - 1][drawn.exist[i, k - 1]].tolist()
                others = [j for j in chosen if j != positive]
                candidates = others if negatives == "sequence" else chosen
                if candidates:
                    score = [(predictions[i, k - 1, t] @ vectors[j]).item() for j in (positive, *candidates)]
                    losses.append(math.log(sum(math.exp(s - score[0]) for s in score)))
                    other_scores = [(predictions[i, k - 1, t] @ vectors[j]).item() for j in others]
                    hits.append(float(all(score[0] > s for s in other_scores)))
                    guesses.append(math.log(1 + len(candidates)))
            assert terms.step_weights[i, k - 1] == len(losses)
            assert terms.step_losses[i, k - 1].item() == pytest.approx(sum(losses) / max(1, len(losses)))
            assert terms.step_accuracies[i, k - 1].item() == pytest.approx(sum(hits) / max(1, len(hits)))
            assert terms.step_guesses[i, k - 1].item() == pytest.approx(sum(guesses) / max(1, len(guesses)))
            pairs += losses
        assert terms.weight[i] == len(pairs)
        assert terms.loss[i].item() == pytest.approx(sum(pairs) / max(1, len(pairs)))
        total, total_weight = total + sum(pairs), total_weight + len(pairs)
    assert total_weight > 30
    means = terms.means()
    assert means["loss"].item() == pytest.approx(total / total_weight)
    weights = terms.step_weights.double()
    steps = (terms.step_losses * weights).sum(0) / weights.sum(0)
    torch.testing.assert_close(torch.stack([means[f"loss_ahead_{k}"] for k in (1, 2, 3)]), steps)
    accuracies = (terms.step_accuracies * weights).sum(0) / weights.sum(0)
    torch.testing.assert_close(torch.stack([means[f"accuracy_ahead_{k}"] for k in (1, 2, 3)]), accuracies)
    assert accuracies.min() > 0.0 and accuracies.max() < 1.0


@pytest.mark.parametrize("negatives", KINDS)
def test_padding_never_matters(negatives: str) -> None:
    """Neither what stands beyond the lengths nor how much: values, gradients and representations stay as they are."""
    model = make_model(negatives)
    values, lengths, uniform, labels = make_batch(model)
    changed = values.clone()
    for row, length in enumerate(LENGTHS):
        changed[row, length:] = 50.0 * torch.randn(WINDOW - length)
    longer = torch.nn.functional.pad(values, (0, 9))
    results = []
    for x in (values, changed, longer):
        model.zero_grad()
        terms = model(x, lengths, uniform, labels)
        terms.means()["loss"].backward()
        contexts = model.represent(x, lengths)[:, : model.encode(values).shape[1]]
        results.append([*terms, contexts, *(parameter.grad.clone() for parameter in model.parameters())])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected)
    contexts = model.represent(values, lengths)
    for i, count in enumerate(model.num_frames(lengths).tolist()):
        assert (contexts[i, count:] == 0.0).all() and (contexts[i, :count] != 0.0).any(-1).all()


@pytest.mark.parametrize("context", ["gru", "convolutions"])
def test_contexts_see_no_future(context: str) -> None:
    """No gradient of a context reaches steps after the stretch of its frame."""
    model = make_model(context=context)
    values, lengths, _, _ = make_batch(model, [WINDOW])
    values.requires_grad_()
    contexts = model.represent(values, lengths)
    for t in range(contexts.shape[1]):
        (gradient,) = torch.autograd.grad(contexts[0, t].sum(), values, retain_graph=True)
        end = t * model.encoder.hop + model.encoder.receptive_field
        assert (gradient[0, end:] == 0.0).all()
        assert gradient[0, end - 1] != 0.0


def test_sequences_with_their_own_negatives_are_independent() -> None:
    """The terms of a sequence are the same whatever else is in the batch; with "batch" they are not."""
    for negatives, same in (("sequence", True), ("batch", False)):
        model = make_model(negatives)
        values, lengths, uniform, _ = make_batch(model)
        together = model(values, lengths, uniform)
        alone = [model(values[i : i + 1], lengths[i : i + 1], uniform[i : i + 1]) for i in range(5)]
        found = torch.cat([terms.loss for terms in alone])
        assert torch.allclose(found, together.loss) == same


def test_means_over_batches_are_exact() -> None:
    """The weighted mean over single sequences is that of the batch, though one has no pair."""
    model = make_model("sequence")
    values, lengths, uniform, _ = make_batch(model)
    terms = model(values, lengths, uniform)
    parts = [model(values[i : i + 1], lengths[i : i + 1], uniform[i : i + 1]) for i in range(5)]
    weight = sum(int(part.weight.sum()) for part in parts)
    total = sum(part.means()["loss"] * part.weight.sum() for part in parts)
    torch.testing.assert_close(total / weight, terms.means()["loss"])


@pytest.mark.parametrize("negatives", KINDS)
def test_sequences_too_short_have_no_weight(negatives: str) -> None:
    """A batch of nothing else has loss nought and gradients nought, nothing undefined."""
    model = make_model(negatives)
    values, lengths, uniform, labels = make_batch(model, [4, 6, 1])
    terms = model(values, lengths, uniform, labels)
    terms.means()["loss"].backward()
    for value in (terms.loss, terms.weight, terms.step_losses, terms.step_weights, terms.means()["loss"], *terms[2:]):
        assert (value == 0).all()
    assert all((parameter.grad == 0.0).all() for parameter in model.parameters())


def test_speakers_without_another_sequence_have_no_weight() -> None:
    """And the others learn of their own speaker's frames alone."""
    model = make_model("speaker")
    values, lengths, uniform, _ = make_batch(model, [40, 40, 40])
    labels = {"speaker": torch.tensor([3, 5, 3])}
    terms = model(values, lengths, uniform, labels)
    assert terms.weight.tolist() == [48, 0, 48]
    changed = values.clone()
    changed[1] = 0.5
    torch.testing.assert_close(model(changed, lengths, uniform, labels).loss, terms.loss)


def test_steps_beyond_the_window_have_no_weight() -> None:
    """More steps than frames do no harm."""
    model = make_model(num_steps=25)
    values, lengths, uniform, _ = make_batch(model)
    terms = model(values, lengths, uniform)
    assert terms.step_weights[0].tolist() == [max(0, 18 - k) for k in range(1, 26)]
    assert (terms.step_losses[:, 17:] == 0.0).all() and terms.means()["loss"].isfinite()
    bounds = terms.information_of_steps
    assert bounds[:17].isfinite().all() and bounds[17:].isnan().all(), "no data, no information"


@pytest.mark.parametrize("negatives", KINDS)
def test_identical_scores_cost_a_guess(negatives: str) -> None:
    """Without predictions the loss is the logarithm of the number of candidates, and accuracy that of guessing."""
    model = make_model(negatives, scale=0.0)
    values, lengths, uniform, labels = make_batch(model, [40, 40, 40, 40])
    terms = model(values, lengths, uniform, labels)
    torch.testing.assert_close(terms.loss_of_guessing, terms.means()["loss"])
    if negatives == "sequence":  # draws of the positive are left out
        assert (terms.loss < math.log(8)).all() and (terms.loss > math.log(7)).all()
    else:
        torch.testing.assert_close(terms.loss, torch.full((4,), math.log(8), dtype=torch.float64))
        assert model.num_candidates == 8
    assert all(1.0 / 8.0 <= terms.means()[f"accuracy_ahead_{k}"] < 0.2 for k in (1, 2, 3))


def test_draws_of_nothing_but_the_positive_are_a_guess() -> None:
    """One frame can be the positive, and all draws are that frame: a loss and an accuracy of guessing, or no pair."""
    for negatives, weight in (("batch", 1), ("sequence", 0)):
        model = make_model(negatives, num_steps=1)
        values, lengths, uniform, _ = make_batch(model, [8])  # two frames
        terms = model(values, lengths, uniform)
        assert terms.weight.tolist() == [weight]
        assert terms.step_losses.item() == pytest.approx(weight * math.log(8))
        assert terms.step_accuracies.item() == pytest.approx(weight / 8)


@pytest.mark.parametrize("negatives", KINDS)
def test_independent_terms_are_those_of_a_loop(negatives: str) -> None:
    """Each pair against one frame of each other sequence that has one; whatever negatives are trained against."""
    model = make_model(negatives)
    lengths = [40, 26, 8, 33]
    values, lengths, *_ = make_batch(model, lengths)
    uniform = torch.rand(4, 4, dtype=torch.float64)
    terms = model.independent_terms(values, lengths, uniform)
    frames, num_frames = model.encode(values), model.num_frames(lengths).tolist()
    predictions = model.predictors(model.context(frames))
    information = torch.zeros(3, dtype=torch.float64)
    for k in (1, 2, 3):
        counts = [max(0, count - k) for count in num_frames]
        each = []
        for own in range(4):
            chosen = [
                frames[other, k + int(uniform[own, other] * counts[other])]
                for other in range(4)
                if other != own and counts[other]
            ]
            pairs = [
                torch.stack([frames[own, t + k], *chosen]) @ predictions[own, k - 1, t] for t in range(counts[own])
            ]
            assert terms.step_weights[own, k - 1] == len(pairs)
            if pairs:
                each.append(sum(math.log(len(scores)) + scores.log_softmax(0)[0] for scores in pairs) / len(pairs))
        information[k - 1] = torch.stack(each).mean()
    torch.testing.assert_close(terms.information_of_steps, information)


def test_what_a_context_knows_of_its_own_past_is_no_information() -> None:
    """Of independent frames there is none to find; telling past frames from others beats "batch", and no bound.

    The contexts count the frames that were seen, and the predictions speak against those.
    """

    class Seen(Context):
        input_dim = context_dim = 1_024

        def forward(self, frames: Tensor) -> Tensor:
            return frames.cumsum(1)

    class Against(Predictors):
        context_dim, encoding_dim, num_steps = 1_024, 1_024, 1

        def forward(self, contexts: Tensor) -> Tensor:
            return -5.0 * (contexts[:, None] > 0).float()

    torch.manual_seed(0)
    model = CPC(RowEncoder(1_024, 1_024), Seen(), Against(), "batch", 63)
    model.encoder.forward = lambda values: values
    within, between = [], []
    for _ in range(40):
        values = torch.nn.functional.one_hot(torch.randint(1_024, (2, 28)), 1_024).float()
        lengths = torch.full((2,), 28)
        within.append(model(values, lengths, torch.rand(2, 63)).information_of_steps)
        between.append(model.independent_terms(values, lengths, torch.rand(2, 2)).information_of_steps)
    within, between = torch.cat(within), torch.cat(between)
    assert within.mean() > 3.0 * within.std() / math.sqrt(40) > 0.0
    assert between.mean() < 3.0 * between.std() / math.sqrt(40)


def make_chain(count: int, length: int = 12) -> Tensor:
    """Returns sequences of eight symbols in circular order from a random start, one-hot: the next one is certain."""
    places = (torch.randint(8, (count, 1)) + torch.arange(length)) % 8
    return torch.nn.functional.one_hot(places, 8).float()


def test_training_finds_the_information_in_a_circle() -> None:
    """The bound comes near log 8, which is all there is, from below; 32 candidates do not limit it.

    The steps ahead are all equally certain, and the context of a single frame tells them all.
    """
    torch.manual_seed(0)
    model = CPC(RowEncoder(8, 16), GRUContext(16, 16), LinearPredictors(16, 16, num_steps=2), "batch", 31)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    lengths = torch.full((32,), 12)

    @torch.no_grad()
    def bound() -> Tensor:
        terms = [model.independent_terms(make_chain(32), lengths, torch.rand(32, 32)) for _ in range(20)]
        return torch.stack([each.information_of_steps for each in terms]).mean(0)

    first = bound()
    for _ in range(150):
        optimizer.zero_grad()
        terms = model(make_chain(16), lengths[:16], torch.rand(model.noise_shape(16)))
        terms.means()["loss"].backward()
        optimizer.step()
    assert first.abs().max() < 1.0
    final = bound()
    assert (final < math.log(8)).all()
    assert (final > math.log(8) - 0.25).all()


def test_negatives_of_the_same_sequence_ignore_what_it_has_in_common() -> None:
    """Sequences that are constant in time teach nothing with "sequence", and nearly all with "batch"."""
    torch.manual_seed(0)
    losses = {}
    for negatives in ("sequence", "batch"):
        model = CPC(RowEncoder(8, 16), GRUContext(16, 16), LinearPredictors(16, 16, num_steps=1), negatives, 15)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            values = torch.randn(16, 1, 8).expand(16, 12, 8)
            terms = model(values, torch.full((16,), 12), torch.rand(16, 15))
            terms.means()["loss"].backward()
            optimizer.step()
        losses[negatives] = terms.means()["loss"].item()
    assert losses["sequence"] > math.log(13)  # some draws are the positive, so fewer than 16 candidates
    assert losses["batch"] < math.log(16) - 1.0


@pytest.mark.parametrize("negatives", KINDS)
def test_every_parameter_gets_a_gradient(negatives: str) -> None:
    """Finite, and not zero."""
    model = make_model(negatives)
    model(*make_batch(model)).means()["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0.0).any(), name


@pytest.mark.parametrize("negatives", KINDS)
@pytest.mark.parametrize("context", ["gru", "convolutions"])
def test_one_graph_is_compiled(as_a_user, negatives: str, context: str) -> None:
    """torch.compile finds nothing that it cannot trace or must wait for, with weights given from outside."""
    model = make_model(negatives, context=context)
    batch = make_batch(model)

    def call(weights: dict[str, Tensor], *arguments) -> Tensor:
        terms: CPCTerms = torch.func.functional_call(model, weights, arguments)
        return torch.cat([terms.loss, terms.step_losses.flatten(), terms.step_accuracies.flatten()])

    weights = {name: weight.detach() * 1.1 for name, weight in model.named_parameters()}
    compiled = torch.compile(call, dynamic=False, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(weights, *batch), call(weights, *batch))


def test_nothing_random_is_used_and_nothing_mutated() -> None:
    """The same noise gives the same terms."""
    model = make_model()
    batch = make_batch(model)
    before, state = [tensor.clone() for tensor in batch[:3]], torch.get_rng_state()
    first, second = model(*batch), model(*batch)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(before, batch, strict=False))


def test_losses_are_formed_in_float32_under_autocast() -> None:
    """Near those of full precision."""
    model = make_model(scale=1.0).float()
    values, lengths, uniform, _ = make_batch(model)
    exact = model(values.float(), lengths, uniform.float())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(values.float(), lengths, uniform.float())
    assert rounded.loss.dtype == torch.float32
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=0.0, atol=0.05)
    assert torch.equal(rounded.weight, exact.weight)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"negatives": "hard"}, "CPC.negatives must be one of batch, sequence, speaker, got 'hard'"),
        ({"num_negatives": 0}, "CPC.num_negatives must be an integer of at least 1, got 0"),
        ({"negatives": "speaker"}, "CPC.label must name a label .*, got None with 'speaker'"),
        ({"label": "speaker"}, "CPC.label must name a label .*, got 'speaker' with 'batch'"),
        ({"context": GRUContext(5, 8)}, "CPC: context.input_dim is 5, but encoder.encoding_dim is 6"),
        ({"predictors": LinearPredictors(7, 6, 1)}, "CPC: predictors.context_dim is 7, but context.context_dim is 8"),
        ({"predictors": LinearPredictors(8, 7, 1)}, "CPC: predictors.encoding_dim is 7, but encoder.encoding_dim is 6"),
    ],
)
def test_bad_arguments_are_named(as_a_user, arguments: dict, message: str) -> None:
    """The message names the argument and its value."""
    usual = {"encoder": RowEncoder(4, 6), "context": GRUContext(6, 8), "predictors": LinearPredictors(8, 6, 2)}
    with pytest.raises(ArgumentError, match=message):
        CPC(**{**usual, **arguments})


def test_bad_batches_are_refused(as_a_user) -> None:
    """Shapes that do not fit, windows without two frames, and missing labels."""
    model = make_model("speaker")
    values, lengths, uniform, labels = make_batch(model)
    with pytest.raises(ArgumentError, match=r"lengths must have shape \(5,\) and uniform \(5, 7\), got \(4,\) and"):
        model(values, lengths[:4], uniform, labels)
    with pytest.raises(ArgumentError, match=r"uniform \(5, 7\), got \(5,\) and \(5, 6\)"):
        model(values, lengths, uniform[:, :6], labels)
    with pytest.raises(ArgumentError, match=r"values must have shape \(batch, time\) .*, got \(5,\)"):
        model(values[:, 0], lengths, uniform, labels)
    for wrong in (values[0, 0], values[..., None]):
        with pytest.raises(ArgumentError, match=r"values must have shape \(batch, time\) .*, got \("):
            model(wrong, lengths, uniform, labels)
    for wrong, shape in ((lengths[0], r"\(\)"), (lengths[:, None], r"\(5, 1\)")):
        with pytest.raises(ArgumentError, match=rf"lengths must have shape \(5,\) .*, got {shape} and \(5, 7\)"):
            model(values, wrong, uniform, labels)
        with pytest.raises(ArgumentError, match=rf"lengths must have shape \(5,\), got {shape}"):
            model.represent(values, wrong)
    with pytest.raises(ArgumentError, match=r"lengths must have shape \(5,\), got \(1,\)"):
        model.represent(values, lengths[:1])
    with pytest.raises(ArgumentError, match=r"uniform \(5, 7\), got \(5,\) and \(7,\)"):
        model(values, lengths, uniform[0], labels)
    with pytest.raises(ArgumentError, match="values must have at least 8 steps, two frames, got 7"):
        model(values[:, :7], lengths.clamp_max(7), uniform, labels)
    with pytest.raises(ArgumentError, match="labels must have 'speaker', got none"):
        model(values, lengths, uniform)
    with pytest.raises(ArgumentError, match="labels must have 'speaker', got digit"):
        model(values, lengths, uniform, {"digit": lengths})


def test_data_that_does_not_fit_is_refused() -> None:
    """Before a run: steps of another shape, sequences too short for two frames, a missing label."""
    labels = {"digit": torch.tensor([1, 2])}
    good = SimpleNamespace(values=torch.zeros(20), lengths=torch.tensor([7, 13]), labels=labels)
    make_model().check_examples(good)
    short = SimpleNamespace(values=torch.zeros(14), lengths=torch.tensor([7, 7]), labels=labels)
    with pytest.raises(DataError, match="the longest sequence has 7 steps, but two frames take 8"):
        make_model().check_examples(short)
    none = SimpleNamespace(values=torch.zeros(0), lengths=torch.zeros(0, dtype=torch.int64), labels={})
    with pytest.raises(DataError, match="the longest sequence has 0 steps"):
        make_model().check_examples(none)
    rows = SimpleNamespace(values=torch.zeros(20, 28), lengths=torch.tensor([7, 13]), labels=labels)
    with pytest.raises(DataError, match=r"steps of the sequences have shape \(28,\), but the encoder takes \(\)"):
        make_model().check_examples(rows)
    with pytest.raises(DataError, match="no label 'speaker', only digit: set CPC.label"):
        make_model("speaker").check_examples(good)


def test_state_dict_round_trip() -> None:
    """A model that loads another's state has its losses."""
    model, loaded = make_model(), make_model()
    batch = make_batch(model)
    assert not torch.equal(loaded(*batch).loss, model(*batch).loss)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(*batch).loss, model(*batch).loss)
