"""Bounds and losses as pure functions of tensors: one value per example, no reduction over the batch."""

from popgen.losses.bounds import doubly_reparameterised_weights, elbo, iwae
from popgen.losses.contrastive import contrastive_accuracy, info_nce, mutual_information_bound
from popgen.losses.ge2e import ge2e_loss
from popgen.losses.vector_quantisation import codebook_loss, commitment_loss

__all__ = [
    "codebook_loss",
    "commitment_loss",
    "contrastive_accuracy",
    "doubly_reparameterised_weights",
    "elbo",
    "ge2e_loss",
    "info_nce",
    "iwae",
    "mutual_information_bound",
]
