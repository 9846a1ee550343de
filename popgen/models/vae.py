"""The variational autoencoder, assembled from an encoder, a decoder, a prior and a posterior flow."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from popgen.distributions import Bernoulli, DiagonalNormal, GaussianMixture, StandardNormal
from popgen.errors import ArgumentError, check_integer, reason_of
from popgen.models.image_model import ImageModel, LogDensities
from popgen.models.model import check_equal, tried
from popgen.nn.flows import Bijection, PosteriorFlow
from popgen.nn.gated_dense import GatedDense
from popgen.nn.linear import Linear
from popgen.nn.priors import LOWEST_LOG_VAR, Prior

LOG_VAR_RANGE = (LOWEST_LOG_VAR, 2.0)


class GaussianEncoder(nn.Module):
    """Two gated dense layers, then the mean and log-variance of a diagonal Gaussian, clamped to [-6, 2].

    Args:
        input_dim: size of a flattened input.
        latent_dim: size of the latent space.
        hidden_dim: units in each hidden layer; the last one is also the context of a posterior flow.

    Example:
        >>> posterior, context = GaussianEncoder(784, 40, 300)(torch.zeros(3, 784))
        >>> posterior.mean.shape, context.shape
        (torch.Size([3, 40]), torch.Size([3, 300]))
    """

    def __init__(self, input_dim: int, latent_dim: int, hidden_dim: int = 300) -> None:
        super().__init__()
        self.input_dim = check_integer("GaussianEncoder.input_dim", input_dim, minimum=1)
        self.latent_dim = check_integer("GaussianEncoder.latent_dim", latent_dim, minimum=1)
        self.context_dim = check_integer("GaussianEncoder.hidden_dim", hidden_dim, minimum=1)
        self.hidden = nn.Sequential(GatedDense(input_dim, hidden_dim), GatedDense(hidden_dim, hidden_dim))
        self.mean_and_log_var = Linear(hidden_dim, 2 * latent_dim)

    def forward(self, x: Float[Tensor, "batch input"]) -> tuple[DiagonalNormal, Float[Tensor, "batch context"]]:
        """Returns the posterior of each input, and the last hidden layer as context."""
        context = self.hidden(x)
        mean, log_var = self.mean_and_log_var(context).chunk(2, dim=-1)
        return DiagonalNormal(mean, log_var.clamp(*LOG_VAR_RANGE)), context


class BernoulliDecoder(nn.Module):
    """Two gated dense layers, then the logits of a Bernoulli likelihood.

    Args:
        latent_dim: size of the latent space.
        output_dim: size of a flattened output.
        hidden_dim: units in each hidden layer.

    Example:
        >>> BernoulliDecoder(40, 784, 300)(torch.zeros(5, 3, 40)).logits.shape
        torch.Size([5, 3, 784])
    """

    likelihood = Bernoulli

    def __init__(self, latent_dim: int, output_dim: int, hidden_dim: int = 300) -> None:
        super().__init__()
        self.latent_dim = check_integer("BernoulliDecoder.latent_dim", latent_dim, minimum=1)
        self.output_dim = check_integer("BernoulliDecoder.output_dim", output_dim, minimum=1)
        check_integer("BernoulliDecoder.hidden_dim", hidden_dim, minimum=1)
        self.hidden = nn.Sequential(GatedDense(latent_dim, hidden_dim), GatedDense(hidden_dim, hidden_dim))
        self.logits = Linear(hidden_dim, output_dim)

    def forward(self, z: Float[Tensor, "*sample batch latent"]) -> Bernoulli:
        """Returns p(x|z)."""
        return Bernoulli(self.logits(self.hidden(z)))


class Encoded(NamedTuple):
    """Everything that depends on the images but not on the samples."""

    posterior: DiagonalNormal
    bijection: Bijection | None
    prior: StandardNormal | GaussianMixture


class VAE(ImageModel):
    """A latent-variable model p(x|z) p(z) with an amortised posterior q(z|x).

    The posterior is the encoder's diagonal Gaussian, moved by the flow if there is one:

        log q(z_K|x) = log N(z_0; μ(x), σ²(x)) - log |det ∂z_K/∂z_0|

    The pseudo-inputs of a VampPrior pass through the encoder alone: the prior is a mixture of its Gaussians, before the
    flow.

    Args:
        encoder: maps `(batch, input)` to `(DiagonalNormal, context)`; has `input_dim` and `latent_dim`. The posterior
            is of no other family, but for the flow.
        decoder: maps `(*sample, batch, latent)` to a likelihood with `log_density` and `mean`; has `latent_dim`.
        prior: a `popgen.nn.priors.Prior`.
        flow: a `popgen.nn.flows.PosteriorFlow`, or None.

    Raises:
        ArgumentError: if a part is missing, or the sizes of two parts do not fit.

    Example:
        >>> from popgen.nn.flows import HouseholderSylvesterFlow
        >>> from popgen.nn.vamp_prior import VampPrior
        >>> vae = VAE(
        ...     encoder=GaussianEncoder(784, 40, 300),
        ...     decoder=BernoulliDecoder(40, 784, 300),
        ...     prior=VampPrior(784, num_components=500),
        ...     flow=HouseholderSylvesterFlow(40, 300),
        ... )
        >>> densities = vae(torch.rand(3, 784).round(), noise=torch.randn(1, 3, 40))
        >>> densities.log_w.shape
        torch.Size([1, 3])
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Prior, flow: PosteriorFlow | None = None) -> None:
        super().__init__()
        for name, part in (("encoder", encoder), ("decoder", decoder), ("prior", prior), ("flow", flow)):
            if not isinstance(part, nn.Module) and not (name == "flow" and part is None):
                raise ArgumentError(f"VAE.{name} must be a torch.nn.Module, got {part!r}")
        for size in ("input_dim", "latent_dim"):
            if not isinstance(getattr(encoder, size, None), int):
                raise ArgumentError(
                    f"VAE.encoder must have an attribute {size}, an integer; {type(encoder).__name__} has not"
                )
        if not hasattr(prior, "pseudo_inputs"):
            raise ArgumentError(f"VAE.prior must be a popgen.nn.priors.Prior, got {prior!r}")
        self.encoder, self.decoder, self.prior, self.flow = encoder, decoder, prior, flow
        self._check_sizes()

    @property
    def input_dim(self) -> int:
        """The size of a flattened input."""
        return cast(int, self.encoder.input_dim)

    @property
    def latent_dim(self) -> int:
        """The size of the latent space."""
        return cast(int, self.encoder.latent_dim)

    @property
    def noise_dim(self) -> int:
        """The size of the standard normal noise that a sample takes."""
        return self.latent_dim

    def encode(self, x: Float[Tensor, "batch input"]) -> Encoded:
        """Returns posterior, flow and prior for a batch; the pseudo-inputs are encoded in one batch with `x`.

        Whatever the precision of the networks' products, what they hand to densities has the dtype of `x`.
        """
        pseudo_inputs = self.prior.pseudo_inputs()
        if pseudo_inputs is None:
            posterior, context = self.encoder(x)
            posterior = DiagonalNormal(posterior.mean.to(x.dtype), posterior.log_var.to(x.dtype))
            prior = self.prior()
        else:
            both, context = self.encoder(torch.cat([x, pseudo_inputs]))
            sizes = [len(x), len(pseudo_inputs)]
            means, log_vars = (tensor.to(x.dtype).split(sizes) for tensor in (both.mean, both.log_var))
            posterior, components = DiagonalNormal(means[0], log_vars[0]), DiagonalNormal(means[1], log_vars[1])
            prior = self.prior(components)
            context = None if context is None else context[: len(x)]  # an encoder without a flow may have none
        bijection = None if self.flow is None else self.flow(context)
        if bijection is not None and not hasattr(bijection, "forward_and_log_det"):
            raise ArgumentError(
                f"VAE.flow must return a popgen.nn.flows.Bijection for a context, and {type(self.flow).__name__} "
                f"returns a {type(bijection).__name__}"
            )
        return Encoded(posterior, bijection, prior)

    def decode(self, z: Float[Tensor, "*sample batch latent"]) -> Any:
        """Returns p(x|z), the decoder's likelihood; what densities drew in float32 is given to it in its own type."""
        return self.decoder(z.to(self.dtype))

    def log_densities(
        self, x: Float[Tensor, "batch input"], encoded: Encoded, noise: Float[Tensor, "samples batch latent"]
    ) -> LogDensities:
        """Returns the terms of the bounds at the samples that the noise makes."""
        z, log_q_z_given_x, log_det = _posterior_sample(encoded, noise)
        return LogDensities(
            log_p_x_given_z=self.decode(z).log_density(x),
            log_p_z=encoded.prior.log_density(z),
            log_q_z_given_x=log_q_z_given_x,
            log_det=log_det,
        )

    def path_log_densities(
        self,
        x: Float[Tensor, "batch input"],
        encoded: Encoded,
        noise: Float[Tensor, "samples batch latent"],
        path_weights: Float[Tensor, "samples batch"],
    ) -> LogDensities:
        """Returns the same terms as `log_densities`, with the gradients of path-derivative estimators.

        The parameters of q are held in log q(z|x), which then has a gradient through the sample alone:
        ∇_z log q(z|x) times that of z (Roeder et al. 2017, https://arxiv.org/abs/1703.09194). Where the encoder makes a
        VampPrior, that use of it belongs to the prior and keeps its gradient.

        Args:
            x: images.
            encoded: what `encode` returned for them.
            noise: standard normal.
            path_weights: by which all gradients through each sample are multiplied; those of the decoder and the prior
                at the sample are not.
        """
        z, log_q_z_given_x, log_det = _posterior_sample(encoded, noise)
        z = _WeightedGradient.apply(z, path_weights)
        along_path = ((z - z.detach()) * _posterior_score(encoded, noise)).sum(-1)  # 0, with the path's gradient
        return LogDensities(
            log_p_x_given_z=self.decode(z).log_density(x),
            log_p_z=encoded.prior.log_density(z),
            log_q_z_given_x=log_q_z_given_x.detach() + along_path,
            log_det=log_det.detach(),
        )

    def forward(
        self,
        x: Float[Tensor, "batch input"],
        noise: Float[Tensor, "samples batch latent"],
        path_weights: Float[Tensor, "samples batch"] | None = None,
    ) -> LogDensities:
        """Returns the terms of the bounds.

        Args:
            x: images, shape `(batch, input_dim)`.
            noise: standard normal, shape `(samples, batch, latent_dim)`.
            path_weights: None for ordinary gradients; else those of `path_log_densities`, and the same values.
        """
        encoded = self.encode(x)
        if path_weights is None:
            return self.log_densities(x, encoded, noise)
        return self.path_log_densities(x, encoded, noise, path_weights)

    def latent_code(self, x: Float[Tensor, "batch input"]) -> Float[Tensor, "batch latent"]:
        """Returns one latent point for each image: the posterior mean, moved by the flow."""
        encoded = self.encode(x)
        if encoded.bijection is None:
            return encoded.posterior.mean
        return encoded.bijection.forward_and_log_det(encoded.posterior.mean[None])[0][0]

    def prior_density(self) -> StandardNormal | GaussianMixture:
        """Returns p(z)."""
        pseudo_inputs = self.prior.pseudo_inputs()
        return self.prior() if pseudo_inputs is None else self.prior(self.encoder(pseudo_inputs)[0])

    def check_parts(self, examples: Tensor) -> None:
        """Checks on a few images that each part returns what it is to return, and that there is one bound.

        Raises:
            ArgumentError: as those of every image model; if the encoder returns no `DiagonalNormal`, the decoder no
                likelihood or the prior no density that can be evaluated and drawn from.
        """
        x, name = self._values(examples), type(self).__name__
        with tried(self, f"{name} cannot encode images of shape {tuple(x.shape)}"):
            self._check_encoder(x)
            self.encode(x)
        with tried(self, f"{name} cannot evaluate its prior"):
            self._check_prior()
        noise = x.new_full((2, len(x), self.latent_dim), 0.5)
        with tried(self, f"{name} cannot decode points of shape {tuple(noise.shape)}"):
            likelihood = self.decode(noise)
            for wanted in ("log_density", "mean"):
                if not hasattr(likelihood, wanted):
                    raise ArgumentError(
                        f"VAE.decoder must return a likelihood with log_density and mean, see "
                        f"popgen.distributions.Bernoulli; {type(self.decoder).__name__} returns a "
                        f"{type(likelihood).__name__} without {wanted}"
                    )
        super().check_parts(examples)

    def _check_encoder(self, x: Tensor) -> None:
        found, kind = self.encoder(x), type(self.encoder).__name__
        if not isinstance(found, tuple) or len(found) != 2 or type(found[0]) is not DiagonalNormal:
            kinds = ", ".join(type(one).__name__ for one in (found if isinstance(found, tuple) else [found]))
            raise ArgumentError(f"VAE.encoder must return (DiagonalNormal, context), and {kind} returns ({kinds})")
        for name in ("mean", "log_var"):
            shape = tuple(getattr(found[0], name).shape)
            if shape != (len(x), self.latent_dim):
                raise ArgumentError(
                    f"the {name} of VAE.encoder must have shape (batch, latent_dim), here {(len(x), self.latent_dim)}; "
                    f"that of {kind} has {shape}"
                )
        if self.flow is not None and not isinstance(found[1], Tensor):
            raise ArgumentError(f"VAE.flow needs a context, and the encoder {kind} returns {found[1]!r} as its context")

    def _check_prior(self) -> None:
        density, reference = self.prior_density(), next(self.parameters())
        noise, uniform = (reference.new_full(shape, 0.5) for shape in ((2, 3, self.latent_dim), (2, 3)))
        calls: tuple[tuple[str, Callable[[], Tensor], tuple[int, ...]], ...] = (
            ("log_density(z)", lambda: density.log_density(noise), (2, 3)),
            ("sample(noise, uniform)", lambda: density.sample(noise[0], uniform[0]), (3, self.latent_dim)),
        )
        for call, result_of, wanted in calls:
            wish = f"the density that {type(self.prior).__name__} returns must have a {call} of shape {wanted}"
            try:
                found = result_of()
            except (AttributeError, TypeError) as error:
                raise ArgumentError(f"{wish}, see popgen.distributions.GaussianMixture ({reason_of(error)})") from error
            if not isinstance(found, Tensor) or tuple(found.shape) != wanted:
                got = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
                raise ArgumentError(f"{wish}, got {got}")

    def _check_sizes(self) -> None:
        """Compares the sizes that the parts state, so that a misfit is named before any tensor is."""
        encoder, decoder, prior, flow = self.encoder, self.decoder, self.prior, self.flow
        pairs = (
            ("decoder.latent_dim", decoder, "encoder.latent_dim", self.latent_dim),
            ("decoder.output_dim", decoder, "encoder.input_dim", self.input_dim),
            ("prior.latent_dim", prior, "encoder.latent_dim", self.latent_dim),
            ("prior.input_dim", prior, "encoder.input_dim", self.input_dim),
            ("flow.latent_dim", flow, "encoder.latent_dim", self.latent_dim),
            ("flow.context_dim", flow, "encoder.context_dim", getattr(encoder, "context_dim", None)),
        )
        for name, part, reference, wanted in pairs:
            check_equal("VAE", name, getattr(part, name.split(".")[1], None), reference, wanted)


def _posterior_sample(encoded: Encoded, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns z, log q(z|x) and the log-determinant of the flow."""
    z, log_q_z_given_x = encoded.posterior.sample_and_log_density(noise)
    if encoded.bijection is None:
        return z, log_q_z_given_x, torch.zeros_like(log_q_z_given_x)
    moved, log_det = encoded.bijection.forward_and_log_det(z)
    if moved.shape != z.shape or log_det.shape != z.shape[:-1]:
        raise ArgumentError(
            f"{type(encoded.bijection).__name__}.forward_and_log_det must return points of shape {tuple(z.shape)} and "
            f"log-determinants of shape {tuple(z.shape[:-1])}, got {tuple(moved.shape)} and {tuple(log_det.shape)}"
        )
    return moved, log_q_z_given_x - log_det, log_det


@torch.no_grad()
def _posterior_score(encoded: Encoded, noise: Tensor) -> Tensor:
    """Returns ∇_z log q(z|x) at the sample that the noise makes, without a gradient of its own."""
    score = -noise * torch.exp(-0.5 * encoded.posterior.log_var)
    if encoded.bijection is None:
        return score
    return encoded.bijection.push_score(encoded.posterior.sample(noise), score)


class _WeightedGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a weight for each sample."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, weights: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0][..., None], None
