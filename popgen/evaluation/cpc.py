"""How contrastive predictive coding is evaluated: its loss, its accuracy, and the bound on mutual information.

What its features are good for, `launch.probe` says.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from popgen.datasets.sequences import SequenceData, Sequences
from popgen.errors import DataError, check_integer
from popgen.evaluation.evaluator import EvaluationSettings, Evaluator, Results
from popgen.evaluation.progress import Progress
from popgen.evaluation.shown import Shown
from popgen.evaluation.statistics import standard_error_of_ratio
from popgen.models.cpc import CPC, CPCTerms
from popgen.precision import matrix_products
from popgen.streams import make_generator


@torch.no_grad()
def contrastive_terms(
    model: CPC,
    sequences: Sequences,
    num_draws: int,
    batch_size: int,
    seed: int,
    progress: Progress | None = None,
    independent: bool = False,
) -> CPCTerms:
    """Returns the losses of whole sequences, `num_draws` of each: those of the first draw, then of the second, ...

    Sequences are each other's negatives, and neighbours in a split are often alike, so who shares a batch is drawn too.
    Those too short for two frames have no pair, and no weight.

    Args:
        model: on the device of the sequences.
        sequences: at least one.
        num_draws: of the negatives.
        batch_size: sequences that are scored together; a loss is to be compared only with losses of one batch size.
        seed: of the draws.
        progress: called with the losses of sequences that are finished, means over draws.
        independent: whether the negatives are those of `CPC.independent_terms`, not the ones that the model trains
            against.

    Raises:
        ArgumentError: if an argument is outside its domain.
        DataError: if no sequence has a pair, unless the negatives are to be independent.

    Example:
        >>> from popgen.nn.cpc import GRUContext, LinearPredictors, RowEncoder
        >>> model = CPC(RowEncoder(28, 16), GRUContext(16, 8), LinearPredictors(8, 16, num_steps=2))
        >>> rows = Sequences(torch.rand(4 * 28, 28), torch.full((4,), 28))
        >>> contrastive_terms(model, rows, num_draws=3, batch_size=2, seed=0).weight  # 27 + 26 pairs
        tensor([53, 53, 53, 53, 53, 53, 53, 53, 53, 53, 53, 53])
    """
    check_integer("num_draws", num_draws, minimum=1)
    check_integer("batch_size", batch_size, minimum=1)
    device = sequences.lengths.device
    order = torch.randperm(len(sequences), generator=make_generator("cpu", seed, "evaluation", "batches"))
    purpose = "independent negatives" if independent else "negatives"
    generator = make_generator(device, seed, "evaluation", purpose)
    two_frames = model.encoder.receptive_field + model.encoder.hop  # which the model asks of a window
    found: list[list[CPCTerms]] = [[] for _ in range(num_draws)]
    for indices in order.split(batch_size):
        batch = sequences.padded(indices, at_least=two_frames)
        size = len(batch.values)
        shape = (size, size) if independent else model.noise_shape(size)
        for terms in found:
            uniform = torch.rand(shape, generator=generator, device=device, dtype=batch.values.dtype)
            if independent:
                terms.append(model.independent_terms(batch.values, batch.lengths, uniform))
            else:
                terms.append(model(batch.values, batch.lengths, uniform, batch.labels))
        if progress is not None:
            progress(torch.stack([terms[-1].loss for terms in found]).mean(0))
    places = order.argsort().to(device)
    draws = [[torch.cat(parts)[places] for parts in zip(*terms, strict=True)] for terms in found]
    together = CPCTerms(*(torch.cat(parts) for parts in zip(*draws, strict=True)))
    if int(together.weight.sum()) == 0 and not independent:
        raise DataError(
            f"none of the {len(sequences)} sequences has a frame with another ahead and negatives beside it: use "
            "longer sequences, or more of them, in larger batches"
        )
    return together


@dataclasses.dataclass(frozen=True)
class CPCEvaluator(Evaluator):
    """Evaluates a CPC: the loss, the accuracy of picking the positive, and the bound on mutual information.

    Args:
        batch_size: recordings that are each other's negatives; that of training makes the losses compare.
        bound_batch_size: recordings of which each gives one negative to the others for the bound on mutual information,
            which cannot exceed the logarithm of it.

    Raises:
        ArgumentError: if one is not an integer, or below 1, or 2 for the bound.

    Example:
        >>> CPCEvaluator(batch_size=16).headline
        ('loss', 'accuracy')
    """

    batch_size: int = 16
    bound_batch_size: int = 64

    model_type: ClassVar[type] = CPC
    default_num_samples: ClassVar[int] = 10
    num_shown: ClassVar[int] = 8
    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    progress_text: ClassVar[str] = "loss {:.3f} nats"

    def __post_init__(self) -> None:
        check_integer("CPCEvaluator.batch_size", self.batch_size, minimum=1)
        check_integer("CPCEvaluator.bound_batch_size", self.bound_batch_size, minimum=2)

    def check_num_samples(self, name: str, num_samples: int) -> None:
        """Any positive number will do: so often are negatives drawn."""
        check_integer(name, num_samples, minimum=1)

    def validate(self, model: CPC, examples: Sequences, seed: int) -> Results:
        """Returns the loss and the accuracy, over all pairs and for each number of frames ahead, from one draw."""
        return _numbers(contrastive_terms(model, examples, 1, self.batch_size, seed).means())

    def evaluate(self, model: CPC, data: SequenceData, examples: Sequences, settings: EvaluationSettings) -> Results:
        """Returns the means over draws, the standard error over recordings, and bounds if there are several recordings.

        `mutual_information_ahead_k` is log N - L_k, nats, against negatives that are independent of the context
        (`CPC.independent_terms`), and cannot exceed `mutual_information_limit`.
        """
        draws = settings.num_samples
        with matrix_products(settings.precision, examples.lengths.device):
            terms = contrastive_terms(model, examples, draws, self.batch_size, settings.seed, settings.progress)
        results = _numbers(terms.means())
        totals = [values.unflatten(0, (draws, -1)).sum(0) for values in (terms.loss * terms.weight, terms.weight)]
        results["loss_standard_error"] = standard_error_of_ratio(*totals)
        results["loss_of_guessing"] = terms.loss_of_guessing.item()
        if len(examples) > 1:
            with matrix_products(settings.precision, examples.lengths.device):
                terms = contrastive_terms(
                    model, examples, draws, self.bound_batch_size, settings.seed, independent=True
                )
            bounds = terms.information_of_steps.tolist()
            results |= {f"mutual_information_ahead_{k}": bound for k, bound in enumerate(bounds, start=1)}
            results["mutual_information_limit"] = math.log(min(self.bound_batch_size, len(examples)))
        return results

    def describe(self, record: Mapping[str, Any]) -> str:
        """Returns a line for the means and a line for each number of frames ahead."""
        lines = [
            f"loss {record['loss']:.3f} ± {record['loss_standard_error']:.3f} nats, "
            f"{record['loss_of_guessing']:.3f} by guessing; accuracy {record['accuracy']:.3f} "
            f"({record['num_samples']} draws, {record['num_examples']} whole sequences)"
        ]
        bounded = "mutual_information_limit" in record
        lines.append("frames ahead    loss  accuracy" + ("  mutual information at least" if bounded else ""))
        k = 1
        while f"loss_ahead_{k}" in record:
            line = f"{k:12d}  {record[f'loss_ahead_{k}']:6.3f}  {record[f'accuracy_ahead_{k}']:8.3f}"
            if bounded:
                line += f"  {record[f'mutual_information_ahead_{k}']:.3f} of at most "
                line += f"{record['mutual_information_limit']:.3f} nats"
            lines.append(line)
            k += 1
        return "\n".join(lines)

    def show(self, model: CPC, data: SequenceData, num_samples: int, generator: torch.Generator) -> dict[str, Shown]:
        """Returns nothing: a CPC draws no samples."""
        return {}


def _numbers(means: Mapping[str, Tensor]) -> Results:
    return {name: mean.item() for name, mean in means.items()}
