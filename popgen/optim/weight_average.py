"""An exponential moving average of the parameters, which evaluation can use in their place."""

import torch
from torch import Tensor


def effective_decay(decay: float, step: int) -> float:
    """Returns the decay used at `step`: min(decay, (1 + step) / (10 + step)).

    The average starts at the first parameters; a smaller decay early on lets it forget them.

    Example:
        >>> effective_decay(0.999, step=0), effective_decay(0.999, step=1_000_000)
        (0.1, 0.999)
    """
    return min(decay, (1 + step) / (10 + step))


def update_weight_average(
    average: dict[str, Tensor], parameters: dict[str, Tensor], decay: float, step: int
) -> dict[str, Tensor]:
    """Returns average ← d · average + (1 - d) · parameters, with d = `effective_decay(decay, step)`.

    The storage of `average` is donated: it is updated in place and the caller uses only what is returned.

    Args:
        average: name to tensor.
        parameters: the same names and shapes.
        decay: between 0 and 1.
        step: number of updates made before.

    Example:
        >>> average = {"weight": torch.zeros(1)}
        >>> update_weight_average(average, {"weight": torch.ones(1)}, decay=0.999, step=0)
        {'weight': tensor([0.9000])}
    """
    names = list(average)
    with torch.no_grad():
        torch._foreach_lerp_(
            [average[name] for name in names],
            [parameters[name] for name in names],
            1.0 - effective_decay(decay, step),
        )
    return average
