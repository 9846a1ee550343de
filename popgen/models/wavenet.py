"""WaveNet (van den Oord et al. 2016), an autoregressive density of the codes of a waveform.

WaveNet: A Generative Model for Raw Audio, https://arxiv.org/abs/1609.03499. How it draws codes is in
`popgen.models.wavenet_generation`.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from popgen.distributions.codes import CategoricalOutput, CodeDensity, LogisticMixtureOutput
from popgen.distributions.mu_law import NUM_CODES
from popgen.errors import ArgumentError, DataError, check_integer
from popgen.models.model import Model
from popgen.models.wavenet_generation import (
    SHARED_BATCH,
    START,
    WARM_UP_STEPS,
    Output,
    StepWeights,
    draw_codes,
    take_step,
)
from popgen.nn.causal_conv import CausalConv1d, PastInputs, no_past_inputs
from popgen.tensors import can_be_read

__all__ = [
    "SHARED_BATCH",
    "START",
    "WARM_UP_STEPS",
    "CategoricalOutput",
    "LogisticMixtureOutput",
    "StepWeights",
    "WaveNet",
]

Labels = Mapping[str, Int64[Tensor, " batch"]]


class WaveNet(Model):
    """An autoregressive density of the codes of a waveform, conditioned on labels and on local features if wanted.

        p(c | h, y) = Π_t p(c_t | c_1, …, c_{t-1}, h, y_t)                                  (eq. 1 to 3 of the paper)

    A stack of dilated causal convolutions describes each position by what comes before it; the dilations are 1, 2, 4, …
    and start again every `dilation_cycle` layers. Each layer is gated,

        z = tanh(W_f ∗ x + V_f h + U_f y) ⊙ σ(W_g ∗ x + V_g h + U_g y)

    and adds a product of z to its own input and another to a sum over all layers (figure 4), from which two layers more
    make the output. V h is a learned vector for each label, U y a product with the features at the position itself.

    Args:
        output: a `CategoricalOutput` or a `LogisticMixtureOutput`.
        hidden_dim: channels of the stack.
        skip_dim: channels of the sum over layers.
        num_layers: gated layers.
        dilation_cycle: layers after which the dilations start again; the largest is 2^(dilation_cycle - 1).
        kernel_size: taps of each convolution, at least 2.
        classes: the name of each label to the number of its values.
        local_dim: channels of the local features, 0 without them.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> model = WaveNet(CategoricalOutput(), 16, 16, num_layers=6, dilation_cycle=3, classes={"digit": 10})
        >>> model.receptive_field
        15
        >>> labels = {"digit": torch.tensor([3, 8])}
        >>> codes = model.generate(torch.rand(2, 40), labels)
        >>> model.log_density(codes, labels).shape
        torch.Size([2, 40])
    """

    def __init__(
        self,
        output: Output,
        hidden_dim: int = 64,
        skip_dim: int = 64,
        num_layers: int = 30,
        dilation_cycle: int = 10,
        kernel_size: int = 2,
        classes: Mapping[str, int] | None = None,
        local_dim: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(output, Output):
            raise ArgumentError(f"WaveNet.output must be a CategoricalOutput or LogisticMixtureOutput, got {output!r}")
        for name, size, minimum in (
            ("hidden_dim", hidden_dim, 1),
            ("skip_dim", skip_dim, 1),
            ("num_layers", num_layers, 1),
            ("dilation_cycle", dilation_cycle, 1),
            ("kernel_size", kernel_size, 2),
            ("local_dim", local_dim, 0),
            *((f"classes[{label!r}]", count, 1) for label, count in (classes or {}).items()),
        ):
            check_integer(f"WaveNet.{name}", size, minimum)
        # By name: a mapping's order means nothing, and a configuration that was saved comes back in another.
        self.output, self.classes, self.local_dim = output, dict(sorted((classes or {}).items())), local_dim
        self.embedding = nn.Embedding(NUM_CODES + 1, hidden_dim)
        self.layers = nn.ModuleList(
            _GatedLayer(hidden_dim, skip_dim, kernel_size, 2 ** (n % dilation_cycle), local_dim, n == num_layers - 1)
            for n in range(num_layers)
        )
        if self.classes:  # a row for each value of each label, names in order: its V h in all layers
            self.label_embedding = nn.Embedding(sum(self.classes.values()), num_layers * 2 * hidden_dim)
            nn.init.normal_(self.label_embedding.weight, std=0.1)
        last = nn.Linear(skip_dim, output.num_parameters)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(skip_dim, skip_dim), nn.ReLU(), last)
        with torch.no_grad():
            last.bias.copy_(output.initial_bias())

    @property
    def receptive_field(self) -> int:
        """How many of the codes before a position its density can depend on."""
        return 1 + sum(layer.conv.reach for layer in self._layers)

    def forward(
        self,
        codes: Int64[Tensor, "batch time"],
        labels: Labels | None = None,
        local: Float[Tensor, "batch local time"] | None = None,
    ) -> CodeDensity:
        """Returns the density of the code at each position, given those before it, of shape `(batch, time)`.

        Args:
            codes: from 0 to 255.
            labels: a value for each sequence, under each name in `classes`; others are not looked at.
            local: features of each position, if `local_dim` is not 0.

        Raises:
            ArgumentError: if names, shapes or values are not those. Values that cannot be looked at without waiting for
                a GPU are not, nor those of mapped or compiled functions: `check_values` does it once for a data set.
        """
        if codes.ndim != 2 or codes.shape[1] == 0:
            expected = "(batch, time) with a time of at least 1"
            raise ArgumentError(f"codes must have shape {expected}, got {tuple(codes.shape)}")
        batch, time = codes.shape
        self._check_labels(labels, batch)
        self._check_local(local, (batch, self.local_dim, time))
        if can_be_read(codes):
            self.check_values(codes, labels)
        x = self.embedding(F.pad(codes, (1, -1), value=START)).transpose(1, 2)
        conditions, skips = self._conditions(labels), None
        for n, layer in enumerate(self._layers):
            x, skip = layer(x, None if conditions is None else conditions[n], local)
            skips = skip if skips is None else skips + skip
        return self.output.density(self.head(cast(Tensor, skips).transpose(1, 2)))

    def log_density(
        self,
        codes: Int64[Tensor, "batch time"],
        labels: Labels | None = None,
        local: Float[Tensor, "batch local time"] | None = None,
    ) -> Float[Tensor, "batch time"]:
        """Returns log p(c_t | those before it), nats, of each code; arguments and errors are those of `forward`."""
        return self(codes, labels, local).log_density(codes)

    def check_values(self, codes: Int64[Tensor, "..."] | None = None, labels: Labels | None = None) -> None:
        """Checks that codes and labels are within their ranges; on a GPU this waits for it.

        Raises:
            ArgumentError: if one is not.
        """
        ranges = [(f"labels[{name!r}]", (labels or {}).get(name), count) for name, count in self.classes.items()]
        for name, values, count in [("codes", codes, NUM_CODES), *ranges]:
            if values is not None and values.numel() > 0:
                lowest, highest = (value.item() for value in values.aminmax())
                if lowest < 0 or highest >= count:
                    found = lowest if lowest < 0 else highest
                    raise ArgumentError(f"{name} must be at least 0 and at most {count - 1}, got {found}")

    def check_examples(self, examples: Any) -> None:
        """Checks that sequences are waveforms with the labels that the model is conditioned on.

        Raises:
            DataError: if they are not.
        """
        if examples.values.ndim != 1:
            raise DataError(f"a WaveNet takes waveforms, got steps of shape {tuple(examples.values.shape[1:])}")
        for name, count in self.classes.items():
            if name not in examples.labels:
                has = ", ".join(examples.labels) or "none"
                raise DataError(f"WaveNet.classes has {name!r}, but the sequences have the labels {has}")
            if int(examples.labels[name].max()) >= count:
                raise DataError(
                    f"WaveNet.classes[{name!r}] must be at least {int(examples.labels[name].max()) + 1} for these "
                    f"sequences, got {count}"
                )

    def initial_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PastInputs:
        """Returns the state before the first step, the past inputs of all layers; see `CausalConv1d.initial_state`."""
        weight, convolutions = self.embedding.weight, [layer.conv for layer in self._layers]
        dilations = [convolution.dilation[0] for convolution in convolutions]
        device, dtype = device or weight.device, dtype or weight.dtype
        return no_past_inputs(convolutions[0].kernel_size[0], dilations, weight.shape[1], batch_size, device, dtype)

    @torch.no_grad()
    def step_weights(self, labels: Labels | None = None) -> StepWeights:
        """Returns what `step` reads, for sequences of these labels, to be taken once for many steps.

        Raises:
            ArgumentError: if the labels' names, shapes or values do not fit.
        """
        given = labels or {}
        self._check_labels(labels, next((len(given[name]) for name in self.classes if name in given), 0))
        self.check_values(labels=labels)
        layers, conditions = self._layers, self._conditions(labels)
        hidden_dim = self.embedding.weight.shape[1]
        taps = torch.stack([layer.conv.weight.permute(2, 1, 0) for layer in layers])
        bias = torch.stack([cast(Tensor, layer.conv.bias) for layer in layers])[:, None]
        residuals = [layer.residual.weight[:, :, 0].T for layer in layers if layer.residual is not None]
        local = [layer.local.weight[:, :, 0].T for layer in layers if layer.local is not None]
        return StepWeights(
            embedding=self.embedding.weight.clone(),
            past=taps[:, :-1].flatten(1, 2),
            present=taps[:, -1].contiguous(),
            bias=bias if conditions is None else bias + conditions,
            local=torch.cat(local, 1) if local else None,
            residual=torch.cat([taps.new_empty(0, hidden_dim), *residuals]).view(-1, hidden_dim, hidden_dim),
            skip=torch.cat([layer.skip.weight[:, :, 0].T for layer in layers]),
            skip_bias=cast(Tensor, layers[-1].skip.bias).clone(),
            head=tuple(parameter.clone() for parameter in self.head.parameters()),
        )

    @torch.no_grad()
    def step(
        self,
        previous: Int64[Tensor, " batch"],
        state: PastInputs,
        labels: Labels | None = None,
        local: Float[Tensor, "batch local"] | None = None,
        weights: StepWeights | None = None,
    ) -> tuple[CodeDensity, PastInputs]:
        """Returns the density of the next code, and the state after it, without a gradient.

        Args:
            previous: the code before, `START` before the first.
            state: from `initial_state` or the step before. It is donated: its tensors are overwritten in place.
            labels: as those of `forward`; not looked at if the weights are given.
            local: features of this position, if `local_dim` is not 0.
            weights: of `step_weights(labels)`; without them, every step collects the weights anew.

        Raises:
            ArgumentError: if labels or features do not fit.

        Example:
            >>> model = WaveNet(CategoricalOutput(), 16, 16, num_layers=6, dilation_cycle=3)
            >>> codes, state, weights = torch.full((2,), START), model.initial_state(2), model.step_weights()
            >>> for uniform in torch.rand(40, 2):
            ...     density, state = model.step(codes, state, weights=weights)
            ...     codes = density.sample(uniform)
        """
        self._check_local(local, (len(previous), self.local_dim))
        weights = self.step_weights(labels) if weights is None else weights
        parameters, inputs = take_step(previous, state, weights, local)
        state.write(inputs)
        return self.output.density(parameters), state

    def generate(
        self,
        uniform: Float[Tensor, "batch time"],
        labels: Labels | None = None,
        local: Float[Tensor, "batch local all_time"] | None = None,
        primer: Int64[Tensor, "batch primer_time"] | None = None,
        compiled: bool = False,
    ) -> Int64[Tensor, "batch time"]:
        """Returns codes drawn one after another, each by inverting the cumulative distribution given those before it.

        They depend on the noise alone. On a GPU a step is recorded as a CUDA graph and replayed; nothing waits for it.

        Args:
            uniform: noise on [0, 1), a value for each code.
            labels: as those of `forward`.
            local: features of each position, those of the primer first.
            primer: codes that come before those to be drawn; they are not among what is returned.
            compiled: whether a step is compiled by torch.compile, which takes seconds the first time. Where that fails
                or the two do not agree, one line on standard error says so and the plain code is used.

        Raises:
            ArgumentError: if names, shapes or values do not fit.
        """
        if uniform.ndim != 2:
            raise ArgumentError(f"uniform must have shape (batch, time), got {tuple(uniform.shape)}")
        batch, time = uniform.shape
        if primer is not None and (primer.ndim != 2 or len(primer) != batch):
            raise ArgumentError(f"primer must have shape ({batch}, time), got {tuple(primer.shape)}")
        given = 0 if primer is None else primer.shape[1]
        self._check_labels(labels, batch)
        self._check_local(local, (batch, self.local_dim, given + time))
        self.check_values(primer)
        weights, state = self.step_weights(labels), self.initial_state(batch)
        return draw_codes(uniform, self.output, state, weights, local, primer, compiled)

    @property
    def _layers(self) -> "list[_GatedLayer]":
        return cast("list[_GatedLayer]", list(self.layers))

    def _conditions(self, labels: Labels | None) -> Float[Tensor, "layers batch double"] | None:
        """Returns V h of each layer, or None without labels."""
        if labels is None or not self.classes:
            return None
        rows, first = [], 0
        for name, count in self.classes.items():
            rows.append(self.label_embedding(labels[name] + first))
            first += count
        return sum(rows).unflatten(1, (len(self.layers), -1)).transpose(0, 1)  # type: ignore[union-attr]

    def _check_labels(self, labels: Labels | None, batch: int) -> None:
        if not set(self.classes) <= set(labels or {}):
            raise ArgumentError(f"labels must have the names {sorted(self.classes)}, got {sorted(labels or {})}")
        for name in self.classes:
            values = cast(Labels, labels)[name]
            if values.shape != (batch,):
                raise ArgumentError(f"labels[{name!r}] must have shape ({batch},), got {tuple(values.shape)}")

    def _check_local(self, local: Tensor | None, shape: tuple[int, ...]) -> None:
        expected, found = shape if self.local_dim else None, None if local is None else tuple(local.shape)
        if found != expected:
            raise ArgumentError(f"local must {f'have shape {expected}' if expected else 'be None'}, got {found}")


class _GatedLayer(nn.Module):
    """One layer (figure 4 of the paper)."""

    def __init__(self, hidden_dim: int, skip_dim: int, kernel_size: int, dilation: int, local_dim: int, last: bool):
        super().__init__()
        self.conv = CausalConv1d(hidden_dim, 2 * hidden_dim, kernel_size, dilation)
        self.local = nn.Conv1d(local_dim, 2 * hidden_dim, 1, bias=False) if local_dim > 0 else None
        self.skip = nn.Conv1d(hidden_dim, skip_dim, 1, bias=last)  # the sum has one
        # The convolution that reads it has a bias; after the last layer nothing would read it.
        self.residual = None if last else nn.Conv1d(hidden_dim, hidden_dim, 1, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch hidden time"],
        condition: Float[Tensor, "batch double"] | None,
        local: Float[Tensor, "batch local time"] | None,
    ) -> tuple[Float[Tensor, "batch hidden time"], Float[Tensor, "batch skip time"]]:
        """Returns the input of the next layer, and what is added to the sum over layers."""
        both = self.conv(x)
        if condition is not None:
            both = both + condition[:, :, None]
        if self.local is not None:
            both = both + self.local(cast(Tensor, local).to(both.dtype))
        filtered, gate = both.chunk(2, dim=1)
        z = torch.tanh(filtered) * torch.sigmoid(gate)
        return x if self.residual is None else x + self.residual(z), self.skip(z)
