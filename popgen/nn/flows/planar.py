"""Planar flows (Rezende and Mohamed 2015, https://arxiv.org/abs/1505.05770)."""

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from popgen.errors import check_integer
from popgen.nn.flows.flow import Bijection, PosteriorFlow, check_points, solve_residual_tanh
from popgen.nn.linear import Linear
from popgen.precision import at_least_float32

MIN_SLOPE = 1e-4  # wᵀ u is kept at or above -1 + MIN_SLOPE, so that the determinant cannot vanish


@dataclasses.dataclass(frozen=True)
class PlanarBijection(Bijection):
    """K transformations z ← z + u tanh(wᵀ z + b), one set for each example.

    Attributes:
        direction: u, shape `(flows, batch, latent)`, with wᵀ u > -1.
        normal: w, the same shape.
        bias: b, shape `(flows, batch)`.
    """

    direction: Float[Tensor, "flows batch latent"]
    normal: Float[Tensor, "flows batch latent"]
    bias: Float[Tensor, "flows batch"]

    def forward_and_log_det(
        self, z: Float[Tensor, "samples batch latent"]
    ) -> tuple[Float[Tensor, "samples batch latent"], Float[Tensor, "samples batch"]]:
        """Returns the transformed points and Σ_k log(1 + tanh'(·) wᵀ u) (eqs. 10 to 12 of the paper)."""
        check_points(z, self.direction.shape[1], self.direction.shape[-1])
        log_det = torch.zeros_like(z[..., 0])
        for direction, normal, bias, slope in self._transformations():
            hidden = torch.tanh((z * normal).sum(-1) + bias)
            z = z + direction * hidden[..., None]
            log_det = log_det + torch.log1p((1.0 - hidden.square()) * slope)
        return z, log_det

    def inverse(self, z: Float[Tensor, "samples batch latent"]) -> Float[Tensor, "samples batch latent"]:
        """Returns the points that are mapped to `z`: wᵀ z solves a rising scalar equation, and the rest follows."""
        check_points(z, self.direction.shape[1], self.direction.shape[-1])
        for direction, normal, bias, slope in reversed(self._transformations()):
            along = solve_residual_tanh((z * normal).sum(-1), slope, torch.ones_like(slope), bias)
            z = z - direction * torch.tanh(along + bias)[..., None]
        return z

    def push_score(
        self, z: Float[Tensor, "samples batch latent"], score: Float[Tensor, "samples batch latent"]
    ) -> Float[Tensor, "samples batch latent"]:
        """Returns the score at the transformed points; (I + w h' uᵀ)⁻¹ is known (Sherman and Morrison)."""
        check_points(z, self.direction.shape[1], self.direction.shape[-1])
        with torch.no_grad():
            for direction, normal, bias, slope in self._transformations():
                hidden = torch.tanh((z * normal).sum(-1) + bias)
                z = z + direction * hidden[..., None]
                rise = 1.0 - hidden.square()
                determinant = 1.0 + rise * slope
                grown = score + (2.0 * hidden * rise * slope / determinant)[..., None] * normal
                score = grown - normal * (rise * (direction * grown).sum(-1) / determinant)[..., None]
        return score

    def _transformations(self):
        """Returns u, w, b and wᵀ u of one transformation after another."""
        # Where |u| |w| is large, the rounded sum alone can fall below the bound that the flow guarantees.
        slope = (self.normal * self.direction).sum(-1).clamp_min(-1.0 + MIN_SLOPE)
        return list(zip(self.direction, self.normal, self.bias, slope, strict=True))


class PlanarFlow(PosteriorFlow):
    """K planar flows whose parameters are a linear function of the context.

    Args:
        latent_dim: size of the latent space.
        context_dim: size of the encoder's context.
        num_flows: number of transformations K.

    Raises:
        ArgumentError: if an argument is not a positive integer.

    Example:
        >>> flow = PlanarFlow(latent_dim=40, context_dim=300, num_flows=4)
        >>> z, log_det = flow(torch.randn(7, 300)).forward_and_log_det(torch.randn(5, 7, 40))
        >>> log_det.shape
        torch.Size([5, 7])
    """

    def __init__(self, latent_dim: int, context_dim: int, num_flows: int = 4) -> None:
        super().__init__()
        self.latent_dim = check_integer("PlanarFlow.latent_dim", latent_dim, minimum=1)
        self.context_dim = check_integer("PlanarFlow.context_dim", context_dim, minimum=1)
        self.num_flows = check_integer("PlanarFlow.num_flows", num_flows, minimum=1)
        self.parameters_of_context = Linear(context_dim, num_flows * (2 * latent_dim + 1))

    def forward(self, context: Float[Tensor, "batch context"]) -> PlanarBijection:
        """Returns the bijections of a batch, from a context of shape `(batch, context_dim)`."""
        parameters = self.parameters_of_context(context)
        parameters = at_least_float32(parameters.to(self.parameters_of_context.weight.dtype))
        parameters = parameters.unflatten(-1, (self.num_flows, -1)).transpose(0, 1)
        direction, normal, bias = parameters.split([self.latent_dim, self.latent_dim, 1], dim=-1)
        # Appendix A.1: moving u along w brings wᵀ u to softplus(wᵀ u) - 1 + MIN_SLOPE, which is above -1.
        product = (normal * direction).sum(-1, keepdim=True)
        shift = F.softplus(product) - 1.0 + MIN_SLOPE - product
        squared_norm = normal.square().sum(-1, keepdim=True).clamp_min(torch.finfo(normal.dtype).tiny)
        return PlanarBijection(direction + shift * normal / squared_norm, normal, bias.squeeze(-1))
