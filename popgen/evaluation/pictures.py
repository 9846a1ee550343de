"""Pictures of what a VAE has learned, as grids of grey levels."""

import torch
from torch import Tensor

from popgen.datasets.images import as_values
from popgen.evaluation.shown import Picture
from popgen.models.vae import VAE
from popgen.summaries import image_grid

COLUMNS = 16  # of every grid, so that they line up below one another


@torch.no_grad()
def prior_samples(model: VAE, image_shape: tuple[int, int], num_samples: int, generator: torch.Generator) -> Picture:
    """Returns the mean images of draws from the whole prior, sixteen in a row.

    Args:
        model: the VAE.
        image_shape: height and width.
        num_samples: number of draws.
        generator: on the model's device.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> prior_samples(vae, (4, 4), num_samples=32, generator=torch.Generator()).shape
        torch.Size([14, 98])
    """
    device, dtype = generator.device, model.dtype
    noise = torch.randn(num_samples, model.latent_dim, generator=generator, device=device, dtype=dtype)
    uniform = torch.rand(num_samples, generator=generator, device=device, dtype=dtype)
    z = model.prior_density().sample(noise, uniform)
    return image_grid(model.decode(z).mean, image_shape, columns=COLUMNS)


def originals(images: Tensor, image_shape: tuple[int, int]) -> Picture:
    """Returns images as they are, sixteen in a row.

    Example: `all_pictures` calls it.
    """
    return image_grid(as_values(images), image_shape, columns=COLUMNS)


@torch.no_grad()
def reconstructions(model: VAE, images: Tensor, image_shape: tuple[int, int]) -> Picture:
    """Returns pairs of an image and the mean image of its latent code, eight pairs in a row.

    Example: `all_pictures` calls it.
    """
    x = as_values(images, model.dtype)
    pairs = torch.stack([x, model.decode(model.latent_code(x)).mean], dim=1).flatten(0, 1)
    return image_grid(pairs, image_shape, columns=COLUMNS)


@torch.no_grad()
def interpolations(model: VAE, images: Tensor, image_shape: tuple[int, int]) -> Picture | None:
    """Returns one row for each two consecutive images: mean images on the line between their latent codes.

    None if there is only one image.

    Example: `all_pictures` calls it.
    """
    if len(images) < 2:
        return None
    codes = model.latent_code(as_values(images, model.dtype))
    starts, ends = codes[0::2], codes[1::2]
    fractions = torch.linspace(0.0, 1.0, COLUMNS, device=codes.device, dtype=codes.dtype)[:, None]
    z = torch.stack([start + fractions * (end - start) for start, end in zip(starts, ends, strict=False)])
    return image_grid(model.decode(z).mean.flatten(0, 1), image_shape, columns=COLUMNS)


@torch.no_grad()
def pseudo_inputs(model: VAE, image_shape: tuple[int, int], count: int) -> Picture | None:
    """Returns pairs of a pseudo-input and the image that its posterior mean decodes to, or None without them.

    Example: `all_pictures` calls it.
    """
    inputs = model.prior.pseudo_inputs()
    if inputs is None:
        return None
    inputs = inputs[:count]
    pairs = torch.stack([inputs, model.decode(model.encoder(inputs)[0].mean).mean], dim=1).flatten(0, 1)
    return image_grid(pairs, image_shape, columns=COLUMNS)


def all_pictures(
    model: VAE, images: Tensor, image_shape: tuple[int, int], num_samples: int, generator: torch.Generator
) -> dict[str, Picture]:
    """Returns every picture that the model has, by name.

    Args:
        model: the VAE, on the device of the images.
        images: uint8 levels or values in [0, 1], shape `(count, size)`; the first ones are shown.
        image_shape: height and width.
        num_samples: prior samples, and at most as many images or pairs in the others.
        generator: of the prior samples, on the model's device.

    Example:
        >>> from popgen.models.vae import BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.vamp_prior import VampPrior
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), VampPrior(16, num_components=3))
        >>> pictures = all_pictures(vae, torch.rand(20, 16), (4, 4), num_samples=8, generator=torch.Generator())
        >>> list(pictures)
        ['originals', 'reconstructions', 'interpolations', 'prior_samples', 'pseudo_inputs']
    """
    some = images[:num_samples]
    pictures = {
        "originals": originals(some, image_shape),
        "reconstructions": reconstructions(model, some, image_shape),
        "interpolations": interpolations(model, some[:16], image_shape),
        "prior_samples": prior_samples(model, image_shape, num_samples, generator),
        "pseudo_inputs": pseudo_inputs(model, image_shape, num_samples),
    }
    return {name: picture for name, picture in pictures.items() if picture is not None}
