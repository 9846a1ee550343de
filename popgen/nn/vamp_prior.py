"""The variational mixture of posteriors prior (Tomczak and Welling 2018, https://arxiv.org/abs/1705.07120)."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from popgen.distributions import DiagonalNormal, GaussianMixture
from popgen.errors import ArgumentError, check_choice, check_integer
from popgen.nn.priors import Prior

INITIALISATIONS = ("uniform", "data")
DATA_MARGIN = 0.02  # grey levels are kept this far from 0 and 1, where the logit would be infinite


class VampPrior(Prior):
    """A mixture of the encoder's own posteriors at learned pseudo-inputs.

        p(z) = 1/K Σ_k q(z | u_k)                                              (eq. 9 of the paper)

    Where a flow follows the encoder, these are the encoder's Gaussians, before the flow. The pseudo-inputs u_k are the
    sigmoid of a free parameter, so they stay within (0, 1) as grey levels do and keep a gradient everywhere. The prior
    holds no encoder: see `popgen.nn.priors` for how the two meet.

    Args:
        input_dim: size of a flattened input.
        num_components: number of pseudo-inputs K.
        initialisation: "uniform", every pixel uniform on (0, 1); or "data", random training images, set by
            `initialise_from_data` when the run has loaded them.

    Raises:
        ArgumentError: if an argument is outside its domain.

    Example:
        >>> prior = VampPrior(input_dim=784, num_components=500)
        >>> encoder = lambda u: DiagonalNormal(mean=u[:, :40], log_var=u[:, 40:80])  # yours goes here
        >>> density = prior(encoder(prior.pseudo_inputs()))
        >>> density.log_density(torch.randn(3, 40)).shape
        torch.Size([3])
    """

    def __init__(self, input_dim: int, num_components: int = 500, initialisation: str = "uniform") -> None:
        super().__init__()
        self.input_dim = check_integer("VampPrior.input_dim", input_dim, minimum=1)
        check_integer("VampPrior.num_components", num_components, minimum=1)
        self.initialisation = check_choice("VampPrior.initialisation", initialisation, INITIALISATIONS)
        self.logits = nn.Parameter(torch.logit(torch.rand(num_components, input_dim), eps=1e-4))

    def pseudo_inputs(self) -> Float[Tensor, "components input"]:
        """Returns the pseudo-inputs u, values in (0, 1)."""
        return torch.sigmoid(self.logits)

    def forward(self, encoded: DiagonalNormal | None = None) -> GaussianMixture:
        """Returns the mixture of the posteriors at the pseudo-inputs.

        Args:
            encoded: the encoder's posteriors at `pseudo_inputs()`, shapes `(components, latent)`.

        Raises:
            ArgumentError: if they are missing, or not one for each pseudo-input.
        """
        if encoded is None or len(encoded.mean) != len(self.logits):
            got = "None" if encoded is None else f"{len(encoded.mean)} of them"
            raise ArgumentError(f"encoded must be the posteriors at the {len(self.logits)} pseudo-inputs, got {got}")
        return GaussianMixture(encoded.mean, encoded.log_var)

    @torch.no_grad()
    def initialise_from_data(self, images: Shaped[Tensor, "count input"], generator: torch.Generator) -> None:
        """Sets the pseudo-inputs to distinct random images if `initialisation` is "data"; else does nothing.

        Args:
            images: grey levels, shape `(count, input_dim)`; uint8, or floating point in [0, 1].
            generator: chooses the images; on the device of `images`.

        Raises:
            ArgumentError: if the images are too few or have another size, or values outside [0, 1].
        """
        if self.initialisation != "data":
            return
        num_components, input_dim = self.logits.shape
        if len(images) < num_components or images.shape[1] != input_dim:
            raise ArgumentError(
                f"images must be at least {num_components} of {input_dim} values to initialise as many "
                f"pseudo-inputs, got shape {tuple(images.shape)}"
            )
        if images.dtype == torch.uint8 and images.max() > 1:
            images = images.to(self.logits.dtype) / 255.0
        lowest, highest = images.min().item(), images.max().item()
        if not (images.is_floating_point() and lowest >= 0.0 and highest <= 1.0):
            raise ArgumentError(
                f"images must be uint8 grey levels up to 255, or floating point in [0, 1], got {images.dtype} from "
                f"{lowest:.4g} to {highest:.4g}"
            )
        chosen = torch.randperm(len(images), generator=generator, device=images.device)[:num_components]
        grey = images[chosen].clamp(DATA_MARGIN, 1.0 - DATA_MARGIN)
        self.logits.copy_(torch.logit(grey))
