"""Bounds and losses as pure functions of tensors: one value per example, no reduction over the batch."""

from popgen.losses.bounds import elbo, iwae

__all__ = ["elbo", "iwae"]
