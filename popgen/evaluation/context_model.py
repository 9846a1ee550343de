"""Baselines of a model of codes: their frequencies, and their frequencies after the codes before them."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from popgen.distributions.mu_law import NUM_CODES
from popgen.errors import ArgumentError, check_integer

SMOOTHING = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # that are tried
MAX_COUNTS = 2**27  # a GiB of int64
SILENCE = 128  # the mu-law code of 0


def count_contexts(
    seen: Sequence[Int64[Tensor, "_"]], order: int, num_codes: int = NUM_CODES, start: int = SILENCE
) -> Int64[Tensor, "contexts codes"]:
    """Returns how often each code follows each context of `order` codes.

    Args:
        seen: the sequences.
        order: how many codes a context has; 0 gives the frequencies alone.
        num_codes: K.
        start: the code that stands before the first.

    Raises:
        ArgumentError: if there are too many contexts to count.

    Example:
        >>> count_contexts([torch.tensor([1, 0, 1])], order=1, num_codes=2, start=0)
        tensor([[0, 2],
                [1, 0]])
    """
    check_integer("order", order, minimum=0)
    if num_codes ** (order + 1) > MAX_COUNTS:
        largest = int(math.log(MAX_COUNTS, num_codes)) - 1
        raise ArgumentError(f"order must be at most {largest} with {num_codes} codes, got {order}")
    places = torch.cat([_with_context(sequence, order, num_codes, start) for sequence in seen])
    return torch.bincount(places, minlength=num_codes ** (order + 1)).view(-1, num_codes)


def context_model_log_density(
    codes: Int64[Tensor, " time"], counts: Int64[Tensor, "contexts codes"], smoothing: float, start: int = SILENCE
) -> Float[Tensor, " time"]:
    """Returns log p of each code of a sequence given those before it, nats, float64.

        p(c | context) = (n(context, c) + α) / (n(context) + α K)

    Args:
        codes: the sequence.
        counts: n, from `count_contexts`.
        smoothing: α, added to every count.
        start: as in `count_contexts`.

    Example:
        >>> codes = torch.tensor([1, 0, 1])
        >>> counts = count_contexts([codes], order=1, num_codes=2, start=0)
        >>> context_model_log_density(codes, counts, smoothing=1.0, start=0).exp()
        tensor([0.7500, 0.6667, 0.7500], dtype=torch.float64)
    """
    num_contexts, num_codes = counts.shape
    order = round(math.log(num_contexts, num_codes)) if num_contexts > 1 else 0
    places = _with_context(codes, order, num_codes, start)
    found = counts.flatten()[places].double() + smoothing
    following = counts[places // num_codes].sum(1).double() + smoothing * num_codes
    return found.log() - following.log()


def choose_smoothing(
    codes: Sequence[Int64[Tensor, "_"]], order: int, num_codes: int = NUM_CODES, start: int = SILENCE
) -> float:
    """Returns the one of `SMOOTHING` that scores every tenth sequence best when the others are counted.

    One sequence alone is both counted and scored.

    Example:
        >>> choose_smoothing([torch.arange(100) % 2] * 20, order=1, num_codes=2, start=0)
        0.003
    """
    others = [sequence for i, sequence in enumerate(codes) if i % 10] or codes
    counts = count_contexts(others, order, num_codes, start)
    held_out = torch.cat(list(codes[::10]))  # one sequence: what stands at the seams hardly matters

    def score(smoothing: float) -> float:
        return context_model_log_density(held_out, counts, smoothing, start).sum().item()

    return max(SMOOTHING, key=score)


def _with_context(codes: Tensor, order: int, num_codes: int, start: int) -> Tensor:
    """Returns one integer for each code and those before it."""
    codes = codes.cpu()
    padded = torch.cat([codes.new_full((order,), start), codes])
    places = torch.zeros_like(codes)
    for shift in range(order + 1):
        places = places * num_codes + padded[shift : shift + len(codes)]
    return places
