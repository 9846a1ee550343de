"""Objectives of models of sequences."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from popgen.datasets.sequences import SequenceBatch
from popgen.distributions.mu_law import mu_law_encode
from popgen.errors import ArgumentError
from popgen.models.wavenet import WaveNet
from popgen.training.objectives import Objective, Result, Settings, Tensors


@dataclasses.dataclass(frozen=True)
class NegativeLogLikelihood(Objective):
    """Minimises -log p of the mu-law codes of waveforms, a mean over all samples of a batch, nats per sample.

    Padding is left out. Metrics: `loss`, and `bits_per_sample`, which is the same in bits.

    Example:
        >>> from popgen.distributions.codes import CategoricalOutput
        >>> model = WaveNet(CategoricalOutput(), 8, 8, num_layers=3, dilation_cycle=3)
        >>> batch = SequenceBatch(torch.zeros(2, 50), torch.tensor([50, 20]), {})
        >>> loss, metrics, _ = NegativeLogLikelihood()(model, batch, None, {}, {})
        >>> sorted(metrics)
        ['bits_per_sample', 'loss']
    """

    def check_model(self, model: Any) -> None:
        """A WaveNet it must be.

        Raises:
            ArgumentError: if it is another kind of model.
        """
        if not isinstance(model, WaveNet):
            raise ArgumentError(f"NegativeLogLikelihood trains a WaveNet, got {type(model).__name__}")

    def blank_batch(self, model: WaveNet, batch_size: int) -> SequenceBatch:
        """Returns silence of the length of the receptive field."""
        lengths = torch.full((batch_size,), model.receptive_field)
        labels = {name: torch.zeros(batch_size, dtype=torch.int64) for name in model.classes}
        return SequenceBatch(torch.zeros(batch_size, model.receptive_field), lengths, labels)

    def draw_noise(self, model: Any, batch: SequenceBatch, generator: torch.Generator) -> None:
        """Returns nothing: the likelihood is exact."""

    def __call__(
        self, forward: Callable[..., Any], batch: SequenceBatch, noise: None, settings: Settings, state: Tensors
    ) -> Result:
        """Returns the loss and the metrics of a batch; nothing else changes."""
        codes = mu_law_encode(batch.values)
        log_p = forward(codes, batch.labels).log_density(codes)
        loss = -mean_of_real(log_p, batch.lengths)
        return loss, {"loss": loss.detach(), "bits_per_sample": loss.detach() / math.log(2.0)}, {}


def mean_of_real(values: Tensor, lengths: Tensor) -> Tensor:
    """Returns the mean over what is no padding.

    Args:
        values: shape `(batch, time)`.
        lengths: how many of each are real, shape `(batch,)`.

    Example:
        >>> mean_of_real(torch.tensor([[1.0, 2.0], [6.0, 99.0]]), torch.tensor([2, 1]))
        tensor(3.)
    """
    real = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
    return torch.where(real, values, 0.0).sum() / lengths.sum()
