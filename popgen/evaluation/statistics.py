"""How far means of an evaluation can be off: not a number where that cannot be known, which a record has as `null`."""

import math

from jaxtyping import Num
from torch import Tensor


def standard_error(values: Tensor) -> float:
    """Returns the standard error of a mean; not a number for a single value.

    Example:
        >>> import torch
        >>> standard_error(torch.tensor([1.0, 3.0]))
        1.0
    """
    return values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def standard_error_of_ratio(totals: Num[Tensor, " count"], weights: Num[Tensor, " count"]) -> float:
    """Returns the standard error of sum(totals) / sum(weights), to first order; not a number for a single example.

    That is the error of a mean over all the parts of examples that have different numbers of them, such as the samples
    of recordings, where the examples are what is drawn independently.

    Args:
        totals: the sum over the parts of each example.
        weights: the number of parts of each example.

    Example:
        >>> import torch
        >>> values = torch.tensor([1.0, 3.0])
        >>> standard_error_of_ratio(values, torch.ones(2)), standard_error_of_ratio(5 * values, torch.full((2,), 5.0))
        (1.0, 1.0)
    """
    if len(totals) < 2:
        return math.nan
    totals, weights = totals.double(), weights.double()
    residuals = totals - totals.sum() / weights.sum() * weights
    count = len(residuals)
    return math.sqrt(count / (count - 1) * residuals.square().sum().item()) / weights.sum().item()
