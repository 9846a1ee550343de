"""Objectives of models of sequences."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from popgen.datasets.sequences import SequenceBatch
from popgen.distributed import Processes
from popgen.distributions.mu_law import mu_law_encode
from popgen.models.cpc import CPC, Part
from popgen.models.wavenet import WaveNet
from popgen.training.objective import LossOutput, Objective, Settings, Tensors


@dataclasses.dataclass(frozen=True)
class NegativeLogLikelihood(Objective):
    """Minimises -log p of the mu-law codes of waveforms, a mean over all samples of a batch, nats per sample.

    Padding is left out, and the first sample of a window that begins inside its recording: what it follows is not
    there, and the code that stands before a recording would stand for it.

    Metrics: `loss`, and `bits_per_sample`, which is the same in bits.

    Example:
        >>> from popgen.distributions.codes import CategoricalOutput
        >>> model = WaveNet(CategoricalOutput(), 8, 8, num_layers=3, dilation_cycle=3)
        >>> batch = SequenceBatch(torch.zeros(2, 50), torch.tensor([50, 20]), {}, torch.zeros(2, dtype=torch.int64))
        >>> loss, metrics, _ = NegativeLogLikelihood()(model, batch, None, {}, {})
        >>> sorted(metrics)
        ['bits_per_sample', 'loss']
    """

    model_type: ClassVar[type] = WaveNet

    def blank_batch(self, model: WaveNet, batch_size: int) -> SequenceBatch:
        """Returns silence of the length of the receptive field."""
        lengths = torch.full((batch_size,), model.receptive_field)
        labels = {name: torch.zeros(batch_size, dtype=torch.int64) for name in model.classes}
        starts = torch.zeros(batch_size, dtype=torch.int64)
        return SequenceBatch(torch.zeros(batch_size, model.receptive_field), lengths, labels, starts)

    def draw_noise(self, model: Any, batch: SequenceBatch, generator: torch.Generator) -> None:
        """Returns nothing: the likelihood is exact."""

    def part_of_noise(self, noise: None, processes: Processes) -> None:
        """Returns nothing."""

    def weight(self, batch: SequenceBatch) -> Tensor:
        """Returns the number of samples over which the mean is taken."""
        return batch.predictable.sum()

    def __call__(
        self, forward: Callable[..., Any], batch: SequenceBatch, noise: None, settings: Settings, state: Tensors
    ) -> LossOutput:
        """Returns the loss and the metrics of a batch; nothing else changes."""
        codes = mu_law_encode(batch.values)
        log_p = forward(codes, batch.labels).log_density(codes)
        predictable = batch.predictable
        loss = -torch.where(predictable, log_p, 0.0).sum() / predictable.sum().clamp_min(1)
        return LossOutput(loss, {"loss": loss.detach(), "bits_per_sample": loss.detach() / math.log(2.0)})


@dataclasses.dataclass(frozen=True)
class ContrastiveLoss(Objective):
    """Minimises the loss of contrastive predictive coding, a mean over all pairs of a batch and all steps ahead, nats.

    Eq. 4 of van den Oord et al. 2018 (https://arxiv.org/abs/1807.03748). What it asks, and of which negatives, is the
    model's: see `popgen.models.cpc`. Of several processes each encodes a part of the batch and is sent the frames of
    the others, among which its negatives are.

    Metrics: `loss`, `accuracy` (of picking the positive), and both for each number k of frames ahead, `loss_ahead_k`
    and `accuracy_ahead_k`.

    Example:
        >>> from popgen.nn.cpc import GRUContext, LinearPredictors, RowEncoder
        >>> model = CPC(RowEncoder(28, 16), GRUContext(16, 8), LinearPredictors(8, 16, num_steps=2))
        >>> batch = SequenceBatch(torch.rand(3, 28, 28), torch.full((3,), 28), {}, torch.zeros(3, dtype=torch.int64))
        >>> objective = ContrastiveLoss()
        >>> loss, metrics, _ = objective(model, batch, objective.draw_noise(model, batch, torch.Generator()), {}, {})
        >>> sorted(metrics)
        ['accuracy', 'accuracy_ahead_1', 'accuracy_ahead_2', 'loss', 'loss_ahead_1', 'loss_ahead_2']
    """

    model_type: ClassVar[type] = CPC
    exchanges_in_loss: ClassVar[bool] = True

    def blank_batch(self, model: CPC, batch_size: int) -> SequenceBatch:
        """Returns silence that is just long enough for every step ahead."""
        encoder = model.encoder
        window = encoder.receptive_field + encoder.hop * model.num_steps
        labels = {} if model.label is None else {model.label: torch.zeros(batch_size, dtype=torch.int64)}
        values = torch.zeros(batch_size, window, *encoder.value_shape)
        starts = torch.zeros(batch_size, dtype=torch.int64)
        return SequenceBatch(values, torch.full((batch_size,), window), labels, starts)

    def draw_noise(self, model: CPC, batch: SequenceBatch, generator: torch.Generator) -> Tensor:
        """Returns uniform noise that chooses the negatives, shape `(batch, negatives)`."""
        shape = model.noise_shape(len(batch.values))
        return torch.rand(shape, generator=generator, device=batch.device, dtype=batch.values.dtype)

    def part_of_batch(self, batch: SequenceBatch, processes: Processes) -> "SharedSequences":
        """Returns the whole batch, with the lengths and labels of all, and who shares it."""
        return SharedSequences(batch, processes)

    def part_of_noise(self, noise: Tensor, processes: Processes) -> Tensor:
        """Returns all of the noise: it chooses among the frames of the whole batch."""
        return noise

    def __call__(
        self,
        forward: Callable[..., Any],
        batch: "SequenceBatch | SharedSequences",
        noise: Tensor,
        settings: Settings,
        state: Tensors,
    ) -> LossOutput:
        """Returns the loss and the metrics of a batch; nothing else changes."""
        if isinstance(batch, SharedSequences):
            means = batch.means(forward, noise)
        else:
            means = forward(batch.values, batch.lengths, noise, batch.labels).means()
        return LossOutput(means["loss"], {name: mean.detach() for name, mean in means.items()})


class SharedSequences(NamedTuple):
    """A batch of which each of several processes encodes a part.

    Attributes:
        batch: the whole of it.
        processes: that share it.

    Example: `ContrastiveLoss` makes one.
    """

    batch: SequenceBatch
    processes: Processes

    def means(self, forward: Callable[..., Any], noise: Tensor) -> dict[str, Tensor]:
        """Returns what, averaged over the processes, are the means over all pairs of the batch."""
        own = self.processes.part(self.batch.values)
        part = Part(self.processes.rank * len(own), self.processes.all_gather)
        terms = forward(own, self.batch.lengths, noise, self.batch.labels, part)
        means = terms.means(self.processes.all_gather(terms.step_weights))
        return {name: self.processes.size * mean for name, mean in means.items()}
