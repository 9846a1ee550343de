"""Tensors packed into messages that several processes add up, and what the sums say."""

from collections.abc import Sequence

import torch
from torch import Tensor


def packed(means: Sequence[Tensor], sums: Sequence[Tensor], weight: Tensor | float) -> list[Tensor]:
    """Returns the messages by which processes combine tensors: for each dtype a flat one that begins with the weight.

    Args:
        means: the same shapes in every process, of floating point.
        sums: the same shapes in every process.
        weight: of this process in the means.

    Example:
        >>> packed([torch.tensor([3.0, 4.0])], [torch.tensor(5.0)], weight=2.0)
        [tensor([2., 6., 8., 5.])]
    """
    results, messages = [*means, *sums], []
    for places in _of_one_dtype(results):
        tensors = [results[place].detach().reshape(-1) for place in places]
        message = torch.cat([tensors[0].new_ones(1), *tensors])
        if message.is_floating_point():  # integers are only summed
            message[: 1 + sum(results[place].numel() for place in places if place < len(means))].mul_(weight)
        messages.append(message)
    return messages


def unpacked(
    messages: Sequence[Tensor], means: Sequence[Tensor], sums: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the weighted means of some tensors over the processes, and the sums of others.

    Args:
        messages: what `packed` returned, after `Processes.all_reduce`; consumed.
        means: what `packed` was given, for the shapes.
        sums: the same.

    Example:
        >>> unpacked([torch.tensor([2.0, 6.0, 8.0, 5.0])], [torch.zeros(2)], [torch.tensor(0.0)])
        ([tensor([3., 4.])], [tensor(5.)])
    """
    results = [*means, *sums]
    for message, places in zip(messages, _of_one_dtype(results), strict=True):
        if message.is_floating_point():
            message[1 : 1 + sum(results[place].numel() for place in places if place < len(means))].div_(message[0])
        parts = message[1:].split([results[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            results[place] = part.view(results[place].shape)
    return results[: len(means)], results[len(means) :]


def _of_one_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Returns the places of the tensors of each dtype."""
    dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
    return [[place for place, tensor in enumerate(tensors) if tensor.dtype == dtype] for dtype in dtypes]
