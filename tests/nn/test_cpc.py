"""The parts of contrastive predictive coding: what frames and contexts see, and what is predicted."""

import math

import pytest
import torch
from torch import Tensor, nn

from popgen.errors import ArgumentError
from popgen.nn.cpc import (
    CausalConvContext,
    Context,
    FrameEncoder,
    GRUContext,
    LinearPredictors,
    Predictors,
    RowEncoder,
    StridedConvEncoder,
    TransformerPredictors,
)

ENCODERS = {
    "strided": lambda: StridedConvEncoder(6, kernel_sizes=(5, 4, 3), strides=(3, 2, 1)),
    "uneven": lambda: StridedConvEncoder(6, kernel_sizes=(3, 2), strides=(4, 3)),
    "channels": lambda: StridedConvEncoder(6, kernel_sizes=(4,), strides=(2,), in_channels=3),
    "rows": lambda: RowEncoder(in_features=5, hidden_dim=6),
}
CONTEXTS = {
    "gru": lambda: GRUContext(6, 8),
    "convolutions": lambda: CausalConvContext(6, 8, num_layers=2, kernel_size=3),
}
PREDICTORS = {
    "linear": lambda: LinearPredictors(8, 6, num_steps=3),
    "transformer": lambda: TransformerPredictors(8, 6, num_steps=3, num_heads=2, hidden_dim=10),
}


def make_values(encoder: FrameEncoder, batch: int = 3, time: int = 47) -> Tensor:
    """Returns sequences in float64 that fit an encoder."""
    return torch.randn(batch, time, *encoder.value_shape, dtype=torch.float64)


def reach(function: nn.Module, x: Tensor) -> Tensor:
    """Returns which steps of the input (second axis) each step of the output (first) depends on, by its gradient."""
    x = x[:1].clone().requires_grad_()
    y = function(x)
    if y.ndim == 4:
        y = y.sum(1)
    weights = torch.randn(y.shape[-1], dtype=y.dtype)
    rows = [torch.autograd.grad((y[0, i] * weights).sum(), x, retain_graph=True)[0][0] for i in range(y.shape[1])]
    return torch.stack(rows).flatten(2).ne(0.0).any(-1) if x.ndim == 3 else torch.stack(rows).ne(0.0)


def test_layers_of_the_convolutional_context_add_to_what_they_are_given() -> None:
    """Without outputs of theirs, the context of a frame is the first map of that frame alone."""
    context, frames = CausalConvContext(6, 8, num_layers=3).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    for output in context.outputs:
        output.weight.data.zero_()
        output.bias.data.zero_()
    assert torch.equal(context(frames), context.first(frames))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_frame_sees_its_own_stretch_and_no_more(name: str) -> None:
    """From i · hop, for receptive_field steps, by the gradient: nothing passes through a normalisation."""
    torch.manual_seed(1)
    encoder = ENCODERS[name]().double()
    seen = reach(encoder, make_values(encoder))
    starts, steps = encoder.hop * torch.arange(len(seen))[:, None], torch.arange(47)
    allowed = (steps >= starts) & (steps < starts + encoder.receptive_field)
    assert not (seen & ~allowed).any()
    first = seen.nonzero()[:, 1].min()
    assert first == 0 and seen[-1, (len(seen) - 1) * encoder.hop + encoder.receptive_field - 1]


@pytest.mark.parametrize("name", ENCODERS)
def test_sequences_do_not_see_each_other(name: str) -> None:
    """One at a time they give what they give together, in training too."""
    encoder = ENCODERS[name]().double().train()
    values = make_values(encoder)
    torch.testing.assert_close(torch.cat([encoder(one[None]) for one in values]), encoder(values))


@pytest.mark.parametrize("name", ENCODERS)
def test_num_frames_counts_what_fits(name: str) -> None:
    """As many frames as a sequence of that length gives, and none if it is shorter than one."""
    encoder = ENCODERS[name]().double()
    for length in range(1, 40):
        counted = encoder.num_frames(torch.tensor([length])).item()
        found = encoder(make_values(encoder, time=length)).shape[1]
        assert counted == (found if length >= encoder.receptive_field else 0)
        assert found >= 1


@pytest.mark.parametrize("name", ENCODERS)
def test_frames_that_count_do_not_depend_on_padding(name: str) -> None:
    """Whatever stands there, and however much of it."""
    encoder = ENCODERS[name]().double()
    values, length = make_values(encoder), 31
    changed = values.clone()
    changed[:, length:] = 100.0
    frames = int(encoder.num_frames(torch.tensor([length])))
    assert torch.equal(encoder(values)[:, :frames], encoder(changed)[:, :frames])
    torch.testing.assert_close(encoder(values[:, :length]), encoder(values)[:, :frames])


def test_strided_convolutions_are_what_the_documentation_says() -> None:
    """One frame by loops: convolution, normalisation over channels, ReLU."""
    encoder = ENCODERS["strided"]().double()
    values = make_values(encoder, batch=1)
    x = values[0][:, None]
    for layer, norm in zip(encoder.layers, encoder.norms, strict=True):
        size, stride = layer.kernel_size[0], layer.stride[0]
        rows = []
        for start in range(0, len(x) - size + 1, stride):
            y = torch.einsum("oik,ki->o", layer.weight, x[start : start + size])
            y = (y - y.mean()) / (y.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
            rows.append(y.clamp_min(0.0))
        x = torch.stack(rows)
    torch.testing.assert_close(encoder(values)[0], x)


@pytest.mark.parametrize("part", [*CONTEXTS.values(), *PREDICTORS.values()])
def test_contexts_and_predictions_see_no_future(part) -> None:
    """No gradient from later frames; and all of the present, with as much of the past as they claim."""
    part = part().double()
    width = part.input_dim if isinstance(part, Context) else part.context_dim
    seen = reach(part, torch.randn(1, 9, width, dtype=torch.float64))
    past = torch.ones(9, 9).tril().bool()
    if isinstance(part, Context) and part.receptive_field is not None:
        assert part.receptive_field == 7
        past &= torch.ones(9, 9).triu(1 - part.receptive_field).bool()
    if isinstance(part, LinearPredictors):
        past = torch.eye(9).bool()
    assert torch.equal(seen, past)


def test_gru_is_that_of_torch() -> None:
    """With the same weights under the same names; also under autocast, at full precision."""
    context, reference = GRUContext(6, 8).double(), nn.GRU(6, 8, batch_first=True).double()
    context.load_state_dict(reference.state_dict())
    frames = torch.randn(3, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(context(frames), reference(frames)[0])
    context, frames = context.float(), frames.float()
    exact = context(frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(context(frames), exact)
        assert context(frames.bfloat16()).dtype == torch.float32


def test_linear_predictors_are_one_matrix_for_each_step() -> None:
    """W_k c_t, and W_k are the rows of one weight."""
    predictors = LinearPredictors(8, 6, num_steps=3).double()
    contexts = torch.randn(2, 5, 8, dtype=torch.float64)
    found = predictors(contexts)
    matrices = predictors.layer.weight.view(3, 6, 8)
    for k in range(3):
        torch.testing.assert_close(found[:, k], contexts @ matrices[k].T)


def test_transformer_attends_as_the_documentation_says() -> None:
    """One block, one frame after another, by loops over heads."""
    block = TransformerPredictors(8, 6, 1, num_heads=2, hidden_dim=10).double().blocks[0]
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    query, key, value = block.projection(block.norm(x[0])).view(5, 3, 2, 4).unbind(1)
    rows = []
    for i in range(5):
        parts = []
        for head, slope in enumerate((2.0**-4, 2.0**-8)):
            scores = [query[i, head] @ key[j, head] / math.sqrt(4) - slope * (i - j) for j in range(i + 1)]
            weights = torch.stack(scores).softmax(0)
            parts.append(sum(w * value[j, head] for j, w in enumerate(weights)))
        rows.append(x[0, i] + block.output(torch.cat(parts)))
    y = torch.stack(rows)
    torch.testing.assert_close(block(x)[0], y + block.dense(block.dense_norm(y)))


@pytest.mark.parametrize("part", [*ENCODERS.values(), *CONTEXTS.values(), *PREDICTORS.values()])
def test_every_parameter_gets_a_gradient(part) -> None:
    """Finite, and not zero."""
    part = part().double()
    if isinstance(part, FrameEncoder):
        x = make_values(part)
    else:
        width = part.input_dim if isinstance(part, Context) else part.context_dim
        x = torch.randn(3, 9, width, dtype=torch.float64)
    y = part(x)
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0.0).any(), name


@pytest.mark.parametrize("part", [*ENCODERS.values(), *CONTEXTS.values(), *PREDICTORS.values()])
def test_one_graph_is_compiled(as_a_user, part) -> None:
    """torch.compile finds nothing that it cannot trace, weights given from outside included."""
    part = part().double()
    if isinstance(part, FrameEncoder):
        x = make_values(part)
    else:
        width = part.input_dim if isinstance(part, Context) else part.context_dim
        x = torch.randn(3, 9, width, dtype=torch.float64)

    def call(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(part, weights, (x,))

    weights = {name: weight.detach() + 0.1 for name, weight in part.named_parameters()}
    expected = call(weights, x)
    assert not torch.allclose(expected, part(x))
    compiled = torch.compile(call, dynamic=False, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(weights, x), expected)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: StridedConvEncoder(0, (3,), (1,)), "StridedConvEncoder.hidden_dim must be an integer of at least 1"),
        (lambda: StridedConvEncoder(4, (3, 3), (1,)), r"must be equally many, got \(3, 3\) and \(1,\)"),
        (lambda: StridedConvEncoder(4, (), ()), r"must be equally many, got \(\) and \(\)"),
        (lambda: StridedConvEncoder(4, (0,), (1,)), "StridedConvEncoder.kernel_sizes must be an integer of at least 1"),
        (lambda: StridedConvEncoder(4, (3,), (0,)), "StridedConvEncoder.strides must be an integer of at least 1"),
        (lambda: StridedConvEncoder(4, (3,), (1,), 0), "StridedConvEncoder.in_channels must be an integer of at least"),
        (lambda: RowEncoder(0, 4), "RowEncoder.in_features must be an integer of at least 1, got 0"),
        (lambda: RowEncoder(4, 0), "RowEncoder.hidden_dim must be an integer of at least 1, got 0"),
        (lambda: GRUContext(0, 4), "GRUContext.input_dim must be an integer of at least 1, got 0"),
        (lambda: GRUContext(4, 0), "GRUContext.context_dim must be an integer of at least 1, got 0"),
        (lambda: CausalConvContext(4, 4, num_layers=0), "CausalConvContext.num_layers must be an integer of at least"),
        (lambda: CausalConvContext(4, 4, kernel_size=0), "CausalConvContext.kernel_size must be an integer of at"),
        (lambda: CausalConvContext(4, 4, dilation_growth=0), "CausalConvContext.dilation_growth must be an integer"),
        (lambda: LinearPredictors(4, 4, 0), "LinearPredictors.num_steps must be an integer of at least 1, got 0"),
        (lambda: TransformerPredictors(4, 4, 0), "TransformerPredictors.num_steps must be an integer of at least 1"),
        (lambda: TransformerPredictors(4, 4, 1, 3), "TransformerPredictors.num_heads must divide context_dim, got 3"),
    ],
)
def test_bad_arguments_are_named(as_a_user, build, message: str) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ArgumentError, match=message):
        build()


def test_wrong_values_are_refused(as_a_user) -> None:
    """The message says what shape they must have."""
    for encoder, shape, expected in [
        (ENCODERS["strided"](), (3, 40, 1), r"\(batch, time\)"),
        (ENCODERS["strided"](), (40,), r"\(batch, time\)"),
        (ENCODERS["strided"](), (3, 0), r"\(batch, time\)"),
        (ENCODERS["channels"](), (3, 40), r"\(batch, time, 3\)"),
        (ENCODERS["rows"](), (3, 40, 4), r"\(batch, time, 5\)"),
    ]:
        with pytest.raises(ArgumentError, match=f"values must have shape {expected} with a time of at least 1, got"):
            encoder(torch.zeros(shape))


def test_parts_are_of_their_kinds() -> None:
    """What a model asks for."""
    assert all(isinstance(build(), FrameEncoder) for build in ENCODERS.values())
    assert all(isinstance(build(), Context) for build in CONTEXTS.values())
    assert all(isinstance(build(), Predictors) for build in PREDICTORS.values())


def test_convolutional_contexts_are_what_the_documentation_says() -> None:
    """One frame by loops: the causal convolution, a normalisation over channels, ReLU, and a linear map added."""
    context = CausalConvContext(6, 8, num_layers=2, kernel_size=3, dilation_growth=2).double()
    frames = torch.randn(1, 9, 6, dtype=torch.float64)
    x, layers = context.first(frames[0]), zip(context.convolutions, context.norms, context.outputs, strict=True)
    for n, (convolution, norm, output) in enumerate(layers):
        padded = torch.cat([x.new_zeros(2 * 2**n, 8), x])
        taps = [padded[j * 2**n :][:9] @ convolution.weight[:, :, j].T for j in range(3)]
        x = x + output(norm(sum(taps) + convolution.bias).clamp_min(0.0))
    torch.testing.assert_close(context(frames)[0], x)


def test_rows_are_encoded_as_the_documentation_says() -> None:
    """Two dense layers, each followed by a normalisation of the frame and a ReLU."""
    encoder, x = RowEncoder(in_features=5, hidden_dim=6).double(), torch.randn(2, 7, 5, dtype=torch.float64)
    dense = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    norms = [module for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    expected = x
    for linear, norm in zip(dense, norms, strict=True):
        expected = norm(linear(expected)).clamp_min(0.0)
    assert len(dense) == 2
    torch.testing.assert_close(encoder(x), expected)
