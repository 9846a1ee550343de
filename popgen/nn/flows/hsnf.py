"""Householder Sylvester normalizing flows (van den Berg et al. 2018, https://arxiv.org/abs/1803.05649)."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from popgen.errors import check_integer
from popgen.nn.flows.flow import Bijection, PosteriorFlow, check_points, solve_residual_tanh
from popgen.nn.linear import Linear
from popgen.precision import at_least_float32, full_precision
from popgen.tensors import is_launch_bound

# Both diagonals stay within ±MAX_DIAGONAL, so that r_ii · r̃_ii ≥ -MAX_DIAGONAL² ≥ -1 + 1e-4 even where tanh rounds to
# ±1, and with tanh' ≤ 1 the determinant cannot vanish (theorem 2 of the paper asks for r_ii · r̃_ii > -1).
MAX_DIAGONAL = 0.9999

# On a GPU, up to how many samples of an example, and of which size, take `popgen.nn.flows.hsnf_kernels`: for more of
# them, as in an evaluation, matrices are formed once and serve all.
MAX_SAMPLES_OF_KERNELS, MAX_LATENT_OF_KERNELS = 16, 64

RowMap = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class HouseholderSylvesterBijection(Bijection):
    """K transformations z ← z + Q R tanh(R̃ Qᵀ z + b), one set for each example.

    Q is a product of H Householder reflections in compact form, Q = I - Vᵀ W with W = U⁻¹ V and U the upper triangle
    of V Vᵀ with half its diagonal (Joffrain et al. 2006, "Accumulating Householder transformations"): applying it to a
    vector takes two thin products, and no L × L orthogonal matrix is formed.

    Attributes:
        reflectors: V, unit vectors, shape `(flows, batch, reflections, latent)`.
        solved_reflectors: W, the same shape.
        upper: R above its diagonal, shape `(flows, batch, latent, latent)`.
        lower: R̃ᵀ below its diagonal, the same shape.
        upper_diagonal: r_ii, shape `(flows, batch, latent)`.
        lower_diagonal: r̃_ii, the same shape.
        bias: b, the same shape.
        parameters: what all of these were made of, shape `(flows, batch, size)`.
    """

    reflectors: Float[Tensor, "flows batch reflections latent"]
    solved_reflectors: Float[Tensor, "flows batch reflections latent"]
    upper: Float[Tensor, "flows batch latent latent"]
    lower: Float[Tensor, "flows batch latent latent"]
    upper_diagonal: Float[Tensor, "flows batch latent"]
    lower_diagonal: Float[Tensor, "flows batch latent"]
    bias: Float[Tensor, "flows batch latent"]
    parameters: Float[Tensor, "flows batch size"]

    def forward_and_log_det(
        self, z: Float[Tensor, "samples batch latent"]
    ) -> tuple[Float[Tensor, "samples batch latent"], Float[Tensor, "samples batch"]]:
        """Returns the transformed points and Σ_k Σ_i log(1 + tanh'(·)_i r_ii r̃_ii) (eq. 10 of the paper)."""
        check_points(z, self.reflectors.shape[1], self.reflectors.shape[-1])
        if self._takes_kernels(z):
            from popgen.nn.flows.hsnf_kernels import move  # here, since it needs Triton

            return move(at_least_float32(z), self.parameters.transpose(0, 1), self.reflectors.shape[2], MAX_DIAGONAL)
        points = at_least_float32(z).transpose(0, 1)  # rows of one example side by side: (batch, samples, latent)
        log_det = torch.zeros_like(points[..., 0])
        with full_precision(z.device):
            for (inward, outward), (_, _, _, _, r, r_tilde, bias) in self._maps_and_parameters():
                hidden = torch.tanh(inward(points) + bias)
                points = points + outward(hidden)
                log_det = log_det + torch.log1p((1.0 - hidden.square()) * (r * r_tilde)).sum(-1)
        return points.transpose(0, 1), log_det.T

    def inverse(self, z: Float[Tensor, "samples batch latent"]) -> Float[Tensor, "samples batch latent"]:
        """Returns the points that are mapped to `z`, by back-substitution.

        In the rotated frame u = Qᵀ z the map is triangular, so each coordinate, from the last to the first, solves one
        rising scalar equation. The inverse is as exact as the dtype and the slope (at least 2e-4) allow; use float64
        where it matters.
        """
        check_points(z, self.reflectors.shape[1], self.reflectors.shape[-1])
        points = at_least_float32(z).transpose(0, 1)
        with full_precision(z.device):
            for v, w, upper, lower, r, r_tilde, bias in reversed(self._parameters()):
                target = points - (points @ v.mT) @ w
                rotated = hidden = target[..., :0]  # of the coordinates from the i-th on
                for i in reversed(range(target.shape[-1])):
                    shift = (rotated * lower[..., None, i + 1 :, i]).sum(-1) + bias[..., i]
                    offset = (hidden * upper[..., None, i, i + 1 :]).sum(-1)
                    u = solve_residual_tanh(target[..., i] - offset, r[..., i], r_tilde[..., i], shift)
                    rotated = torch.cat([u[..., None], rotated], dim=-1)
                    hidden = torch.cat([torch.tanh(r_tilde[..., i] * u + shift)[..., None], hidden], dim=-1)
                points = rotated - (rotated @ w.mT) @ v  # Q u
        return points.transpose(0, 1)

    def push_score(
        self, z: Float[Tensor, "samples batch latent"], score: Float[Tensor, "samples batch latent"]
    ) -> Float[Tensor, "samples batch latent"]:
        """Returns the score at the transformed points; each transformation solves one triangular system.

        With u = Qᵀ z and h = tanh(·), the Jacobian is Q (I + R diag(h') R̃) Qᵀ, whose middle is upper triangular, and
        its log-determinant falls by 2 h_i h_i' r_ii r̃_ii / (1 + h_i' r_ii r̃_ii) along row i of R̃ Qᵀ.
        """
        check_points(z, self.reflectors.shape[1], self.reflectors.shape[-1])
        points, scores = (at_least_float32(tensor).transpose(0, 1) for tensor in (z, score))
        with torch.no_grad(), full_precision(z.device):
            for (inward, outward), (v, w, upper, lower, r, r_tilde, bias) in self._maps_and_parameters():
                hidden = torch.tanh(inward(points) + bias)
                points = points + outward(hidden)
                slope = 1.0 - hidden.square()
                per_row = -2.0 * hidden * slope * (r * r_tilde) / (1.0 + slope * (r * r_tilde))
                grown = scores - (scores @ v.mT) @ w - (per_row @ lower.mT + per_row * r_tilde)  # in the frame of u
                left, right = upper + torch.diag_embed(r[:, 0]), lower.mT + torch.diag_embed(r_tilde[:, 0])
                middle = (left[:, None] * slope[..., None, :]) @ right[:, None]
                middle.diagonal(dim1=-2, dim2=-1).add_(1.0)
                solved = torch.linalg.solve_triangular(middle.mT, grown[..., None], upper=False)[..., 0]
                scores = solved - (solved @ w.mT) @ v
        return scores.transpose(0, 1)

    def _maps_and_parameters(self) -> list[tuple[tuple[RowMap, RowMap], tuple[Tensor, ...]]]:
        """Returns R̃ Qᵀ and Q R of each transformation, as functions of rows, with its parameters.

        On a CPU operations cost, and each is two thin products beside that with the triangle. On a GPU launches cost,
        and each is a product with one matrix; those of all transformations are formed together.
        """
        maps = self._matrices() if is_launch_bound(self.upper) else self._thin_products()
        return list(zip(maps, self._parameters(), strict=True))

    def _thin_products(self) -> list[tuple[RowMap, RowMap]]:
        def maps(v: Tensor, w: Tensor, upper: Tensor, lower: Tensor, r: Tensor, r_tilde: Tensor, _: Tensor):
            def inward(points: Tensor) -> Tensor:
                rotated = points - (points @ v.mT) @ w
                return rotated @ lower + rotated * r_tilde

            def outward(hidden: Tensor) -> Tensor:
                residual = hidden @ upper.mT + hidden * r
                return residual - (residual @ w.mT) @ v

            return inward, outward

        return [maps(*parameters) for parameters in self._parameters()]

    def _matrices(self) -> list[tuple[RowMap, RowMap]]:
        inward = self.lower + torch.diag_embed(self.lower_diagonal)
        inward = inward - self.reflectors.mT @ (self.solved_reflectors @ inward)
        outward = self.upper + torch.diag_embed(self.upper_diagonal)
        outward = outward.mT - (self.solved_reflectors @ outward).mT @ self.reflectors

        def product_with(matrix: Tensor) -> RowMap:
            return lambda rows: rows @ matrix

        return [(product_with(one), product_with(other)) for one, other in zip(inward, outward, strict=True)]

    def _takes_kernels(self, z: Tensor) -> bool:
        return (
            is_launch_bound(z)
            and at_least_float32(z).dtype == self.parameters.dtype == torch.float32
            and len(z) <= MAX_SAMPLES_OF_KERNELS
            and z.shape[-1] <= MAX_LATENT_OF_KERNELS
            and _has_triton()
        )

    def _parameters(self) -> list[tuple[Tensor, ...]]:
        """Returns the parameters of one transformation after another; vectors as rows, `(batch, 1, latent)`."""
        rows = (self.upper_diagonal[:, :, None], self.lower_diagonal[:, :, None], self.bias[:, :, None])
        return list(zip(self.reflectors, self.solved_reflectors, self.upper, self.lower, *rows, strict=True))


@functools.cache
def _has_triton() -> bool:
    """Whether the compiler of the kernels is installed; PyTorch brings it where it supports it."""
    return importlib.util.find_spec("triton") is not None


class HouseholderSylvesterFlow(PosteriorFlow):
    """K Sylvester flows whose orthogonal matrices are products of H Householder reflections.

        z_k = z_{k-1} + Q_k R_k tanh(R̃_k Q_kᵀ z_{k-1} + b_k)        (eqs. 9 and 13 of the paper)

    All parameters are a linear function of the context. R and R̃ share one latent × latent square for each flow, R above
    the diagonal and R̃ᵀ below it, so nothing is generated and then masked away.

    Args:
        latent_dim: size of the latent space L.
        context_dim: size of the encoder's context.
        num_flows: number of transformations K.
        num_reflections: Householder reflections H in each.

    Raises:
        ArgumentError: if an argument is not a positive integer.

    Example:
        >>> flow = HouseholderSylvesterFlow(latent_dim=40, context_dim=300, num_flows=4, num_reflections=8)
        >>> bijection = flow(torch.randn(7, 300))
        >>> z, log_det = bijection.forward_and_log_det(torch.randn(5, 7, 40))
        >>> z.shape, log_det.shape
        (torch.Size([5, 7, 40]), torch.Size([5, 7]))
    """

    def __init__(self, latent_dim: int, context_dim: int, num_flows: int = 4, num_reflections: int = 8) -> None:
        super().__init__()
        self.latent_dim = check_integer("HouseholderSylvesterFlow.latent_dim", latent_dim, minimum=1)
        self.context_dim = check_integer("HouseholderSylvesterFlow.context_dim", context_dim, minimum=1)
        self.num_flows = check_integer("HouseholderSylvesterFlow.num_flows", num_flows, minimum=1)
        self.num_reflections = check_integer("HouseholderSylvesterFlow.num_reflections", num_reflections, minimum=1)
        # For each flow: the square, the reflectors, the diagonal of R̃ and the bias.
        self.sizes = [latent_dim * latent_dim, num_reflections * latent_dim, latent_dim, latent_dim]
        self.parameters_of_context = Linear(context_dim, num_flows * sum(self.sizes))

    def forward(self, context: Float[Tensor, "batch context"]) -> HouseholderSylvesterBijection:
        """Returns the bijections of a batch, from a context of shape `(batch, context_dim)`."""
        linear = self.parameters_of_context
        parameters = at_least_float32(linear(context).to(linear.weight.dtype))
        parameters = parameters.unflatten(-1, (self.num_flows, -1)).transpose(0, 1)
        square, reflectors, lower_diagonal, bias = parameters.split(self.sizes, dim=-1)
        square = square.unflatten(-1, (self.latent_dim, self.latent_dim))
        reflectors = F.normalize(reflectors.unflatten(-1, (self.num_reflections, self.latent_dim)), dim=-1)
        identity = torch.eye(self.num_reflections, dtype=square.dtype, device=square.device)
        with full_precision(context.device):
            triangle = torch.triu(reflectors @ reflectors.mT, diagonal=1) + 0.5 * identity
            inverse = torch.linalg.solve_triangular(triangle, identity.expand_as(triangle), upper=True)
            solved_reflectors = inverse @ reflectors
        return HouseholderSylvesterBijection(
            reflectors=reflectors,
            solved_reflectors=solved_reflectors,
            upper=torch.triu(square, diagonal=1),
            lower=torch.tril(square, diagonal=-1),
            upper_diagonal=MAX_DIAGONAL * torch.tanh(square.diagonal(dim1=-2, dim2=-1)),
            lower_diagonal=MAX_DIAGONAL * torch.tanh(lower_diagonal),
            bias=bias,
            parameters=parameters,
        )
