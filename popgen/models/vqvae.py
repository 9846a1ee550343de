"""The VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937), and the same with an autoregressive prior over its codes.

The posterior of a VQ-VAE is a point, the one map of codes that the encoder chooses. So log q(z|x) is zero, and

    log p(x) ≥ log p(x|z(x)) + log p(z(x))

is the evidence lower bound, in nats and comparable with that of any other model of the same images. Under the uniform
prior that a VQ-VAE trains with, log p(z) is -positions · log K; a learned prior makes the bound worth comparing.
"""

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from popgen.distributions import Bernoulli
from popgen.errors import ArgumentError, check_choice, check_integer
from popgen.losses import codebook_loss, commitment_loss
from popgen.models.image_model import ImageModel, LogDensities
from popgen.models.model import check_equal
from popgen.nn.vqvae import Quantiser

DOWNSAMPLING = 4  # of the encoder, in each direction
INITIAL_IMAGES, INITIAL_BATCHES = 2_000, 20  # whose vectors a codebook starts from


class ResidualBlock(nn.Module):
    """x + a 1 × 1 convolution of a 3 × 3 convolution, each after a ReLU (section 4.1 of the paper).

    Args:
        channels: of input and output.
        hidden_channels: between the two convolutions.

    Example:
        >>> ResidualBlock(64, 32)(torch.zeros(3, 64, 7, 7)).shape
        torch.Size([3, 64, 7, 7])
    """

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, hidden_channels, kernel_size=3, padding=1)
        self.narrow = nn.Conv2d(hidden_channels, channels, kernel_size=1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Returns the sum of the input and the residual."""
        return x + self.narrow(F.relu(self.wide(F.relu(x))))


class ConvolutionalEncoder(nn.Module):
    """Two convolutions of stride 2, residual blocks, and a 1 × 1 convolution to a map of vectors.

    Args:
        code_dim: size of a vector.
        image_shape: height and width, multiples of 4.
        hidden_dim: channels; half as many after the first convolution.
        num_blocks: residual blocks.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> ConvolutionalEncoder(code_dim=64)(torch.zeros(3, 784)).shape
        torch.Size([3, 7, 7, 64])
    """

    def __init__(
        self, code_dim: int, image_shape: tuple[int, int] = (28, 28), hidden_dim: int = 64, num_blocks: int = 2
    ) -> None:
        super().__init__()
        self.code_dim = check_integer("ConvolutionalEncoder.code_dim", code_dim, minimum=1)
        self.image_shape = _check_shape("ConvolutionalEncoder.image_shape", image_shape)
        check_integer("ConvolutionalEncoder.hidden_dim", hidden_dim, minimum=2)
        check_integer("ConvolutionalEncoder.num_blocks", num_blocks, minimum=0)
        self.input_dim = image_shape[0] * image_shape[1]
        self.map_shape = (image_shape[0] // DOWNSAMPLING, image_shape[1] // DOWNSAMPLING)
        self.layers = nn.Sequential(
            nn.Conv2d(1, hidden_dim // 2, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_dim // 2, hidden_dim, kernel_size=4, stride=2, padding=1),
            *(ResidualBlock(hidden_dim, hidden_dim // 2) for _ in range(num_blocks)),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, code_dim, kernel_size=1),
        )

    def forward(self, x: Float[Tensor, "batch input"]) -> Float[Tensor, "batch height width dim"]:
        """Returns one vector for each position."""
        return self.layers(x.unflatten(1, (1, *self.image_shape))).movedim(1, -1)


class ConvolutionalDecoder(nn.Module):
    """A 3 × 3 convolution, residual blocks, and two transposed convolutions of stride 2 to the logits of an image.

    Args:
        code_dim: size of a vector.
        image_shape: height and width, multiples of 4.
        hidden_dim: channels; half as many before the last convolution.
        num_blocks: residual blocks.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> ConvolutionalDecoder(code_dim=64)(torch.zeros(3, 7, 7, 64)).logits.shape
        torch.Size([3, 784])
    """

    likelihood = Bernoulli

    def __init__(
        self, code_dim: int, image_shape: tuple[int, int] = (28, 28), hidden_dim: int = 64, num_blocks: int = 2
    ) -> None:
        super().__init__()
        self.code_dim = check_integer("ConvolutionalDecoder.code_dim", code_dim, minimum=1)
        _check_shape("ConvolutionalDecoder.image_shape", image_shape)
        check_integer("ConvolutionalDecoder.hidden_dim", hidden_dim, minimum=2)
        check_integer("ConvolutionalDecoder.num_blocks", num_blocks, minimum=0)
        self.output_dim = image_shape[0] * image_shape[1]
        self.layers = nn.Sequential(
            nn.Conv2d(code_dim, hidden_dim, kernel_size=3, padding=1),
            *(ResidualBlock(hidden_dim, hidden_dim // 2) for _ in range(num_blocks)),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden_dim, hidden_dim // 2, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden_dim // 2, 1, kernel_size=4, stride=2, padding=1),
        )

    def forward(self, z: Float[Tensor, "batch height width dim"]) -> Bernoulli:
        """Returns p(x|z)."""
        return Bernoulli(self.layers(z.movedim(-1, 1)).flatten(1))


class VQVAETerms(NamedTuple):
    """The terms of the bound, of one sample, and what training needs beside them.

    Attributes:
        log_p_x_given_z: nats, shape `(1, batch)`.
        log_p_z: under the uniform prior, the same shape.
        log_q_z_given_x: zero, the same shape.
        log_det: zero, the same shape.
        commitment_loss: shape `(batch,)`.
        codebook_loss: shape `(batch,)`; zero where the codebook is not learned by gradient.
        indices: of the codes, shape `(batch, height, width)`.
        observed: what the quantiser's next state is made of, if it was asked for; see `Quantiser.observe`.
    """

    log_p_x_given_z: Float[Tensor, "1 batch"]
    log_p_z: Float[Tensor, "1 batch"]
    log_q_z_given_x: Float[Tensor, "1 batch"]
    log_det: Float[Tensor, "1 batch"]
    commitment_loss: Float[Tensor, " batch"]
    codebook_loss: Float[Tensor, " batch"]
    indices: Int64[Tensor, "batch ..."]
    observed: dict[str, Tensor]


class VQVAE(ImageModel):
    """An autoencoder whose latent variables are maps of codes.

    Args:
        encoder: maps `(batch, input)` to `(batch, height, width, dim)`; has `input_dim`, `code_dim` and `map_shape`.
        quantiser: a `popgen.nn.vqvae.Quantiser`.
        decoder: maps `(batch, height, width, dim)` to a likelihood with `log_density` and `mean`; has `code_dim`.
        initialisation: "kmeans" starts the codebook at the centres of what the encoder makes of the first training
            images; "random" leaves it as it was built.

    Raises:
        ArgumentError: if a part is missing, or the sizes of two parts do not fit.

    Example:
        >>> from popgen.nn.vqvae import MovingAverageQuantiser
        >>> parts = ConvolutionalEncoder(64), MovingAverageQuantiser(128, 64), ConvolutionalDecoder(64)
        >>> terms = VQVAE(*parts)(torch.rand(3, 784).round())
        >>> terms.log_p_x_given_z.shape, terms.indices.shape
        (torch.Size([1, 3]), torch.Size([3, 7, 7]))
    """

    def __init__(
        self, encoder: nn.Module, quantiser: Quantiser, decoder: nn.Module, initialisation: str = "kmeans"
    ) -> None:
        super().__init__()
        for name, part, kind, described in (
            ("encoder", encoder, nn.Module, "torch.nn.Module"),
            ("quantiser", quantiser, Quantiser, "popgen.nn.vqvae.Quantiser"),
            ("decoder", decoder, nn.Module, "torch.nn.Module"),
        ):
            if not isinstance(part, kind):
                raise ArgumentError(f"VQVAE.{name} must be a {described}, got {part!r}")
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            size = getattr(part, "code_dim", None)
            check_equal("VQVAE", f"{name}.code_dim", size, "quantiser.code_dim", quantiser.code_dim)
        sizes = getattr(encoder, "input_dim", None), getattr(decoder, "output_dim", None)
        check_equal("VQVAE", "encoder.input_dim", sizes[0], "decoder.output_dim", sizes[1])
        self.encoder, self.quantiser, self.decoder = encoder, quantiser, decoder
        self.initialisation = check_choice("VQVAE.initialisation", initialisation, ("kmeans", "random"))

    @property
    def input_dim(self) -> int:
        """The size of a flattened image."""
        return cast(int, self.encoder.input_dim)

    @property
    def noise_dim(self) -> int:
        """Nought: the posterior is a point."""
        return 0

    @property
    def map_shape(self) -> tuple[int, int]:
        """Height and width of the map of codes."""
        return cast(tuple[int, int], self.encoder.map_shape)

    def encode(self, x: Float[Tensor, "batch input"]) -> Int64[Tensor, "batch height width ..."]:
        """Returns the indices of the codes of each image."""
        return self.quantiser(self.encoder(x).to(x.dtype)).indices

    def decode(self, indices: Int64[Tensor, "batch height width ..."]) -> Any:
        """Returns p(x|z) of maps of codes."""
        return self.decoder(self.quantiser.look_up(indices))

    def forward(
        self, x: Float[Tensor, "batch input"], noise: Tensor | None = None, uniform: Tensor | None = None
    ) -> VQVAETerms:
        """Returns the terms of the bound under a uniform prior, and those of the loss.

        Args:
            x: images, shape `(batch, input_dim)`.
            noise: not used; the posterior is a point.
            uniform: noise in [0, 1), shape `(num_codebooks, num_codes)`; if given, what the codebook learns from
                is formed.
        """
        quantiser = self.quantiser
        vectors = self.encoder(x).to(x.dtype)
        quantised = quantiser(vectors)
        log_p_x_given_z = self.decoder(quantised.values).log_density(x)[None]
        zeros = torch.zeros_like(log_p_x_given_z)
        by_gradient = any(True for _ in quantiser.parameters())
        observed = {} if uniform is None else quantiser.observe(vectors, quantised.indices, uniform)
        return VQVAETerms(
            log_p_x_given_z=log_p_x_given_z,
            log_p_z=zeros - math.prod(quantised.indices.shape[1:]) * math.log(quantiser.num_codes),
            log_q_z_given_x=zeros,
            log_det=zeros,
            commitment_loss=commitment_loss(vectors, quantised.codes),
            codebook_loss=codebook_loss(vectors, quantised.codes) if by_gradient else zeros[0],
            indices=quantised.indices,
            observed=observed,
        )

    @torch.no_grad()
    def initialise_from_data(self, images: Shaped[Tensor, "count input"], generator: torch.Generator) -> None:
        """Starts the codebook at the k-means centres of the vectors of some random images, in place.

        Args:
            images: shape `(count, input_dim)`; uint8 grey levels, which are binarised first as in training, or floating
                point, which is used as it is.
            generator: on the device of `images`.

        Raises:
            ArgumentError: if the codebook is larger than the data.
        """
        if self.initialisation != "kmeans":
            return
        chosen = torch.randperm(len(images), generator=generator, device=images.device)[:INITIAL_IMAGES]
        x = images[chosen]
        if x.dtype == torch.uint8:
            x = torch.rand(x.shape, generator=generator, device=x.device) < x / 255.0
        x = x.to(self.dtype)
        batches = x.split(INITIAL_IMAGES // INITIAL_BATCHES)
        vectors = torch.cat([self.encoder(batch) for batch in batches]).flatten(0, -2)
        num_codes = self.quantiser.num_codes
        if len(vectors) < num_codes:
            raise ArgumentError(
                f"VQVAE.quantiser: num_codes must be at most the {len(vectors):,} vectors that {len(x):,} training "
                f"images give, got {num_codes}: take fewer codes, or VQVAE.initialisation = 'random'"
            )
        uniform = torch.rand(self.quantiser.num_codebooks, num_codes, generator=generator, device=x.device)
        self.quantiser.initialise(vectors, uniform, len(batches))


class VQVAEWithPrior(ImageModel):
    """A VQ-VAE that stays as it is, and a prior over its maps of codes, which is trained.

    `popgen.training.objectives.NegativeELBO` trains the prior: of its terms, log p(z) alone has a gradient.

    Args:
        autoencoder: the VQ-VAE; it is frozen. `Experiment.pretrained` gives it its weights.
        prior: has `log_density(indices)` and `sample(uniform)`, and may state `num_codes` and `map_shape`.

    Raises:
        ArgumentError: if the sizes of the two do not fit.

    Example:
        >>> from popgen.nn.pixelcnn import GatedPixelCNN
        >>> from popgen.nn.vqvae import MovingAverageQuantiser
        >>> vqvae = VQVAE(ConvolutionalEncoder(64), MovingAverageQuantiser(128, 64), ConvolutionalDecoder(64))
        >>> model = VQVAEWithPrior(vqvae, GatedPixelCNN(num_codes=128, map_shape=(7, 7), hidden_dim=16, num_layers=2))
        >>> model(torch.rand(3, 784).round(), noise=torch.empty(1, 3, 0)).log_p_z.shape
        torch.Size([1, 3])
        >>> model.sample(torch.rand(2, 7, 7)).shape
        torch.Size([2, 784])
    """

    def __init__(self, autoencoder: VQVAE, prior: nn.Module) -> None:
        super().__init__()
        if not isinstance(autoencoder, VQVAE):
            raise ArgumentError(f"VQVAEWithPrior.autoencoder must be a VQVAE, got {autoencoder!r}")
        if not callable(getattr(prior, "log_density", None)) or not callable(getattr(prior, "sample", None)):
            raise ArgumentError(f"VQVAEWithPrior.prior must have log_density and sample, got {prior!r}")
        if autoencoder.quantiser.num_codebooks != 1:
            raise ArgumentError(
                "VQVAEWithPrior.autoencoder must have one codebook, for a prior over maps of single codes; its "
                f"quantiser has {autoencoder.quantiser.num_codebooks}"
            )
        pairs = (("num_codes", autoencoder.quantiser.num_codes), ("map_shape", tuple(autoencoder.map_shape)))
        for name, wanted in pairs:
            check_equal("VQVAEWithPrior", f"prior.{name}", getattr(prior, name, None), f"autoencoder's {name}", wanted)
        self.autoencoder, self.prior = autoencoder.requires_grad_(False), prior

    @property
    def input_dim(self) -> int:
        """The size of a flattened image."""
        return self.autoencoder.input_dim

    @property
    def noise_dim(self) -> int:
        """Nought: the posterior is a point."""
        return 0

    @property
    def decoder(self) -> nn.Module:  # type: ignore[override]
        """The autoencoder's decoder."""
        return self.autoencoder.decoder

    def forward(self, x: Float[Tensor, "batch input"], noise: Tensor | None = None) -> LogDensities:
        """Returns the terms of the bound.

        Args:
            x: images, shape `(batch, input_dim)`.
            noise: not used; the posterior is a point.
        """
        indices = self.autoencoder.encode(x)
        log_p_x_given_z = self.autoencoder.decode(indices).log_density(x)[None]
        zeros = torch.zeros_like(log_p_x_given_z)
        log_p_z = cast(Any, self.prior).log_density(indices).to(x.dtype)[None]
        return LogDensities(log_p_x_given_z, log_p_z, log_q_z_given_x=zeros, log_det=zeros)

    @torch.no_grad()
    def sample(self, uniform: Float[Tensor, "batch height width"]) -> Float[Tensor, "batch input"]:
        """Returns the mean images of maps of codes that the prior draws with some uniform noise."""
        return self.autoencoder.decode(cast(Any, self.prior).sample(uniform)).mean


def _check_shape(name: str, shape: Any) -> tuple[int, int]:
    sides = tuple(shape) if isinstance(shape, tuple | list) else ()
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 or side % DOWNSAMPLING for side in sides):
        raise ArgumentError(f"{name} must be a height and a width, multiples of {DOWNSAMPLING}, got {shape!r}")
    return sides[0], sides[1]
