"""What every model of images offers: a bound on log p(x), in parts."""

import abc
import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from popgen.errors import ArgumentError, DataError
from popgen.models.model import Model, tried


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

    Subclasses define `input_dim`, `noise_dim` and `forward`, which is enough to train and evaluate them. Where much of
    the work depends on the images alone, `encode` and `log_densities` do it once for all samples of an image. What the
    `decoder`, if there is one, names as its `likelihood` says which images have a density.

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

    def encode(self, x: Float[Tensor, "batch input"]) -> Any:
        """Returns what `log_densities` needs that depends on the images alone; nothing, unless defined."""
        return None

    def log_densities(
        self, x: Float[Tensor, "batch input"], encoded: Any, noise: Float[Tensor, "samples batch noise"]
    ) -> Any:
        """Returns the terms of `forward`, for images that are encoded already; those of a whole pass, unless defined.

        Args:
            x: images.
            encoded: what `encode` returned for them.
            noise: standard normal.
        """
        return self(x, noise)

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
        likelihood = getattr(getattr(self, "decoder", None), "likelihood", None)
        if likelihood is not None:
            likelihood.check_support(examples)

    def check_parts(self, examples: Tensor) -> None:
        """Checks on a few images that the terms of the bound can be formed, and that each image has its own.

        Raises:
            ArgumentError: if they cannot, those of an image depend on the images beside it, or `forward` and
                `log_densities` have different ones.
        """
        name, x = type(self).__name__, self._values(examples)
        num_samples = 2 if self.noise_dim else 1  # where the posterior is a point, there is one sample
        shape = (num_samples, len(x), self.noise_dim)
        noise = torch.linspace(-1.0, 1.0, math.prod(shape)).to(x).view(shape)
        with tried(self, f"{name} cannot form its bound of images of shape {tuple(x.shape)}"):
            terms, fewer = self(x, noise), self(x[:2], noise[:, :2])
            evaluated = self.log_densities(x, self.encode(x), noise)
        for term in LogDensities._fields:
            found = getattr(terms, term, None)
            if not isinstance(found, Tensor) or found.shape != shape[:2]:
                got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
                raise ArgumentError(f"{name} must return {term} of shape (samples, batch), here {shape[:2]}, got {got}")
            if not are_close(getattr(fewer, term), found[:, :2]):
                raise ArgumentError(
                    f"{term} of an image depends on the images beside it, as under batch normalisation: the bound on "
                    "its log p(x) would too"
                )
            if not are_close(getattr(evaluated, term), found):
                raise ArgumentError(
                    f"{term} of {name}.forward, which is trained, and of {name}.log_densities, of which importance "
                    "weights are made, are different: a subclass that changes it must override log_densities"
                )

    def _values(self, examples: Tensor) -> Tensor:
        """Returns a few images as values in the type of the weights."""
        return examples[:3].to(self.dtype) / (255.0 if examples.dtype == torch.uint8 else 1.0)


def are_close(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors are the same up to the rounding of some hundred sums.

    Example:
        >>> are_close(torch.tensor(500.0), torch.tensor(500.001)), are_close(torch.tensor(0.0), torch.tensor(0.1))
        (True, False)
    """
    rounding = torch.finfo(one.dtype).eps
    return torch.allclose(one, other, rtol=100 * rounding, atol=1_000 * rounding, equal_nan=True)
