"""Bounds and losses as pure functions of tensors: one value per example, no reduction over the batch."""

from popgen.losses.bounds import elbo, iwae
from popgen.losses.vector_quantisation import codebook_loss, commitment_loss

__all__ = ["codebook_loss", "commitment_loss", "elbo", "iwae"]
