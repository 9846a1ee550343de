"""The squared distances by which encoder and codebook of a VQ-VAE find each other; one value per example."""

from jaxtyping import Float
from torch import Tensor

from popgen.errors import ArgumentError


def commitment_loss(
    vectors: Float[Tensor, "batch *positions dim"], codes: Float[Tensor, "batch *positions dim"]
) -> Float[Tensor, " batch"]:
    """Returns |z - sg[e]|² of each example, summed over its positions; its gradient moves the encoder alone.

    The third term of eq. 3 of van den Oord et al. 2017 (https://arxiv.org/abs/1711.00937), without its weight; the
    paper takes the mean over positions. Its unit is that of squared vectors.

    Args:
        vectors: z, from the encoder.
        codes: e, the codes nearest to them.

    Raises:
        ArgumentError: if the shapes differ.

    Example:
        >>> import torch
        >>> commitment_loss(torch.zeros(3, 7, 7, 2), torch.ones(3, 7, 7, 2))
        tensor([98., 98., 98.])
    """
    return _squared_distance(vectors, codes.detach())


def codebook_loss(
    vectors: Float[Tensor, "batch *positions dim"], codes: Float[Tensor, "batch *positions dim"]
) -> Float[Tensor, " batch"]:
    """Returns |sg[z] - e|² of each example, summed over its positions; its gradient moves the codebook alone.

    The second term of eq. 3 of van den Oord et al. 2017 (https://arxiv.org/abs/1711.00937); the paper takes the mean
    over positions.

    Args:
        vectors: z, from the encoder.
        codes: e, the codes nearest to them.

    Raises:
        ArgumentError: if the shapes differ.

    Example:
        >>> import torch
        >>> codebook_loss(torch.zeros(3, 7, 7, 2), torch.ones(3, 7, 7, 2))
        tensor([98., 98., 98.])
    """
    return _squared_distance(vectors.detach(), codes)


def _squared_distance(vectors: Tensor, codes: Tensor) -> Tensor:
    if vectors.shape != codes.shape:
        raise ArgumentError(
            f"vectors and codes must have one shape, got {tuple(vectors.shape)} and {tuple(codes.shape)}"
        )
    return (vectors - codes).square().flatten(1).sum(1)
