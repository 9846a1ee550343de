"""How a WaveNet is evaluated: bits per sample on whole recordings beside two baselines, and what it sounds like."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from popgen.datasets.sequences import SequenceData, Sequences
from popgen.distributions.mu_law import mu_law_decode, mu_law_encode
from popgen.errors import ArgumentError, check_number
from popgen.evaluation.context_model import choose_smoothing, context_model_log_density, count_contexts
from popgen.evaluation.evaluator import EvaluationSettings, Evaluator, Results
from popgen.evaluation.progress import Progress
from popgen.evaluation.shown import Shown, Sound
from popgen.evaluation.spectrogram import spectrogram
from popgen.evaluation.statistics import standard_error_of_ratio
from popgen.models.wavenet import WaveNet
from popgen.precision import matrix_products

SAMPLES_AT_ONCE = 32_768  # of all recordings that pass through the network together, or of one that is longer
CONTEXT_ORDERS = {"unigram_bits": 0, "context_model_bits": 2}


@torch.no_grad()
def log_densities(model: WaveNet, sequences: Sequences, progress: Progress | None = None) -> Tensor:
    """Returns log p of each recording, whole, nats, shape `(count,)`, float64, in memory that no length exceeds.

    Args:
        model: on the device of the recordings.
        sequences: waveforms.
        progress: called with the bits per sample of the recordings that have been finished since the last call.

    Example:
        >>> from popgen.distributions.codes import CategoricalOutput
        >>> model = WaveNet(CategoricalOutput(), 8, 8, num_layers=3, dilation_cycle=3)
        >>> log_densities(model, Sequences(torch.zeros(50), torch.tensor([20, 30]))).shape
        torch.Size([2])
    """
    found = torch.empty(len(sequences), dtype=torch.float64, device=sequences.lengths.device)
    order = sequences.lengths.argsort(descending=True)  # those of a batch are about as long as its first, the longest
    first = 0
    while first < len(order):
        count = max(1, SAMPLES_AT_ONCE // int(sequences.lengths[order[first]]))
        chosen = order[first : first + count]
        batch = sequences.padded(chosen)
        codes = mu_law_encode(batch.values)
        log_p = _in_pieces(model, codes, batch.labels).double()
        found[chosen] = torch.where(batch.real, log_p, 0.0).sum(1)
        if progress is not None:
            progress(-found[chosen] / batch.lengths / math.log(2.0))
        first += count
    return found


def _in_pieces(model: WaveNet, codes: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """Returns log p of each code; pieces of a long recording are preceded by all that they depend on."""
    size = max(1, SAMPLES_AT_ONCE // len(codes))
    pieces = []
    for first in range(0, codes.shape[1], size):
        before = min(first, model.receptive_field)
        piece = codes[:, first - before : first + size]
        pieces.append(model(piece, labels).log_density(piece)[:, before:])
    return torch.cat(pieces, dim=1)


@dataclasses.dataclass(frozen=True)
class WaveNetEvaluator(Evaluator):
    """Evaluates a WaveNet: bits per sample over whole recordings, beside two baselines on the same codes, and sounds.

    The baselines are the frequencies of the codes in the training recordings, and an order-2 context model with
    additive smoothing that is chosen on training recordings.

    Args:
        seconds: of each sound that is drawn.

    Example:
        >>> WaveNetEvaluator(seconds=0.5).headline
        ('bits_per_sample',)
    """

    seconds: float = 0.5

    model_type: ClassVar[type] = WaveNet
    default_num_samples: ClassVar[int] = 1
    num_shown: ClassVar[int] = 8
    headline: ClassVar[tuple[str, ...]] = ("bits_per_sample",)
    progress_text: ClassVar[str] = "{:.3f} bits per sample"

    def __post_init__(self) -> None:
        check_number("WaveNetEvaluator.seconds", self.seconds, minimum=0.01)

    def check_num_samples(self, name: str, num_samples: int) -> None:
        """One is all there is to do: the likelihood is exact.

        Raises:
            ArgumentError: if it is another number.
        """
        if num_samples != 1:
            raise ArgumentError(f"{name} must be 1 for a WaveNet, got {num_samples}: its likelihood is exact")

    def validate(self, model: WaveNet, examples: Sequences, seed: int) -> Results:
        """Returns the loss, nats per sample, and the same in bits, over whole recordings."""
        loss = -(log_densities(model, examples).sum() / examples.lengths.sum()).item()
        return {"loss": loss, "bits_per_sample": loss / math.log(2.0)}

    def evaluate(
        self, model: WaveNet, data: SequenceData, examples: Sequences, settings: EvaluationSettings
    ) -> Results:
        """Returns bits per sample, with the standard error over recordings, and those of the baselines."""
        with matrix_products(settings.precision, examples.lengths.device):
            log_p = log_densities(model, examples, settings.progress)
        bits = -log_p / math.log(2.0)
        total = examples.lengths.sum()
        mean, error = (bits.sum() / total).item(), standard_error_of_ratio(bits, examples.lengths)
        seen, scored = _codes(data.train), _codes(examples)
        baselines: Results = {}
        for name, order in CONTEXT_ORDERS.items():
            smoothing = choose_smoothing(seen, order)
            counts = count_contexts(seen, order)
            nats = -sum(context_model_log_density(codes, counts, smoothing).sum().item() for codes in scored)
            baselines |= {name: nats / total.item() / math.log(2.0), f"{name}_smoothing": smoothing}
        return {"bits_per_sample": mean, "bits_per_sample_standard_error": error, **baselines}

    def describe(self, record: Mapping[str, Any]) -> str:
        """Returns a line for the model and for each baseline."""
        return (
            f"bits per sample          {record['bits_per_sample']:7.3f} ± "
            f"{record['bits_per_sample_standard_error']:.3f} ({record['num_examples']} whole recordings)\n"
            f"frequencies of the codes {record['unigram_bits']:7.3f}\n"
            f"order-2 context model    {record['context_model_bits']:7.3f} "
            f"(smoothing {record['context_model_bits_smoothing']:g})"
        )

    def show(
        self, model: WaveNet, data: SequenceData, num_samples: int, generator: torch.Generator
    ) -> dict[str, Shown]:
        """Returns sounds, their labels going round through all classes, and spectrograms of these and of recordings."""
        rate, device = data.sample_rate, generator.device
        if rate is None:
            raise ArgumentError("a WaveNet's sounds need data with a sample_rate")
        each = torch.arange(num_samples, device=device)
        labels = {name: each % len(names) for name, names in data.classes.items() if name in model.classes}
        uniform = torch.rand(num_samples, round(self.seconds * rate), generator=generator, device=device)
        waveforms = mu_law_decode(model.generate(uniform, labels))
        spread = torch.linspace(0, len(data.test) - 1, min(num_samples, len(data.test)), device=device).long()
        recordings = data.test.padded(spread).values
        shown: dict[str, Shown] = {
            "samples": torch.cat([spectrogram(waveform) for waveform in waveforms], dim=1),
            "recordings": torch.cat([spectrogram(waveform) for waveform in recordings], dim=1),
        }
        for index, waveform in enumerate(waveforms):
            names = [data.classes[name][label[index]] for name, label in labels.items()]
            shown["_".join([f"sample_{index}", *names])] = Sound(waveform.float(), rate)
        return shown


def _codes(sequences: Sequences) -> list[Tensor]:
    """Returns the mu-law codes of each recording."""
    codes = mu_law_encode(sequences.as_values(sequences.values)).cpu()
    return list(codes.split(sequences.lengths.tolist()))
