"""An exponential moving average of the parameters, which evaluation can use in their place."""

import torch
from torch import Tensor

from popgen.tensors import can_be_read


def effective_decay(decay: float, step: int) -> float:
    """Returns the decay used at `step`: min(decay, (1 + step) / (10 + step)).

    The average starts at the first parameters; a smaller decay early on lets it forget them. This is the warm-up that
    TensorFlow's `ExponentialMovingAverage` documents for `num_updates`
    (https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage).

    Example:
        >>> effective_decay(0.999, step=0), effective_decay(0.999, step=1_000_000)
        (0.1, 0.999)
    """
    return min(decay, (1 + step) / (10 + step))


def update_weight_average(
    average: dict[str, Tensor], parameters: dict[str, Tensor], weight: float | Tensor
) -> dict[str, Tensor]:
    """Returns average ← average + weight · (parameters - average), where the weight is one less the decay.

    The storage of `average` is donated: it is updated in place and the caller uses only what is returned.

    Args:
        average: name to tensor.
        parameters: the same names and shapes.
        weight: between 0 and 1; a scalar tensor stays on its device.

    Example:
        >>> average = {"weight": torch.zeros(1)}
        >>> update_weight_average(average, {"weight": torch.ones(1)}, weight=1.0 - effective_decay(0.999, step=0))
        {'weight': tensor([0.9000])}
    """
    averages, targets = list(average.values()), [parameters[name] for name in average]
    with torch.no_grad():
        if isinstance(weight, Tensor) and not can_be_read(weight):  # no fused kernel takes it from the device
            differences = torch._foreach_sub(targets, averages)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(averages, differences)
        else:
            torch._foreach_lerp_(averages, targets, float(weight))
    return average
