"""What every model of images offers: a bound on log p(x), in parts."""

import abc
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from popgen.errors import DataError
from popgen.models.model import Model


class LogDensities(NamedTuple):
    """The terms of every bound, nats, each of shape `(samples, batch)`."""

    log_p_x_given_z: Float[Tensor, "samples batch"]
    log_p_z: Float[Tensor, "samples batch"]
    log_q_z_given_x: Float[Tensor, "samples batch"]
    log_det: Float[Tensor, "samples batch"]

    @property
    def log_w(self) -> Float[Tensor, "samples batch"]:
        """The log importance weights, log p(x|z) + log p(z) - log q(z|x)."""
        return self.log_p_x_given_z + self.log_p_z - self.log_q_z_given_x


class ImageModel(Model):
    """A latent-variable model of images, whose evidence lower bound is formed from the terms that `forward` returns.

    Example: `popgen.models.vae.VAE` is one.
    """

    decoder: nn.Module

    @property
    @abc.abstractmethod
    def input_dim(self) -> int:
        """The size of a flattened image."""

    @property
    @abc.abstractmethod
    def noise_dim(self) -> int:
        """The size of the standard normal noise that a sample takes; 0 where the posterior is a point."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, in which images are given."""
        return next(self.parameters()).dtype

    @abc.abstractmethod
    def forward(self, x: Float[Tensor, "batch input"], noise: Float[Tensor, "samples batch noise"]) -> Any:
        """Returns the terms of the bounds: a `LogDensities`, or what has the same attributes and more.

        Args:
            x: images, shape `(batch, input_dim)`.
            noise: standard normal, shape `(samples, batch, noise_dim)`.
        """

    def check_examples(self, examples: Tensor) -> None:
        """Checks that images fit the encoder and the likelihood.

        Raises:
            DataError: if their size differs from the encoder's, or their values are outside the likelihood's support.
        """
        if examples.ndim != 2 or examples.shape[1] != self.input_dim:
            raise DataError(
                f"the images have shape {tuple(examples.shape)}, but the encoder takes (count, {self.input_dim}): set "
                "its input_dim to the flattened size of an image"
            )
        likelihood = getattr(self.decoder, "likelihood", None)
        if likelihood is not None:
            likelihood.check_support(examples)
