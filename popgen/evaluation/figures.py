"""The figure of an evaluation: how its bound converges, how log p(x) is spread over images, and where k̂ lies."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from popgen.evaluation.importance import reliable_pareto_shape
from popgen.evaluation.likelihood import bounds_by_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 50


def evaluation_figure(columns: Mapping[str, Tensor]) -> "Figure":
    """Returns a figure of what an evaluation found of every image.

    Args:
        columns: `log_p_x`, what there is of `log_p_x_of_K_samples`, and with these `pareto_shape`, shape `(count,)`.

    Example:
        >>> import torch
        >>> columns = {name: torch.rand(20) for name in ("log_p_x", "log_p_x_of_50_samples", "pareto_shape")}
        >>> len(evaluation_figure(columns).axes)
        2
    """
    from matplotlib.figure import Figure  # slow to import, and training needs none

    bounds = bounds_by_size(columns)
    shapes = columns.get("pareto_shape")
    shapes = None if shapes is None or not shapes.isfinite().any() else shapes
    figure = Figure(figsize=(12.0, 3.6), layout="constrained")
    panels = iter(figure.subplots(1, 1 + (len(bounds) > 1) + (shapes is not None), squeeze=False)[0])
    if len(bounds) > 1:
        axes = next(panels)
        means = [bound.double().mean().item() for bound in bounds.values()]
        axes.plot(list(bounds), means, marker="o")
        axes.set(xscale="log", xlabel="samples", ylabel="nats", title=f"importance-weighted bound, {means[-1]:.3f}")
    axes, log_p_x = next(panels), columns["log_p_x"].double()
    axes.hist(log_p_x.tolist(), bins=BINS)
    axes.axvline(log_p_x.mean().item(), color="black", linewidth=1.0)
    axes.set(xlabel="log p(x), nats", ylabel="images", title=f"{len(log_p_x):,} images, mean {log_p_x.mean():.3f}")
    if shapes is not None:
        axes, limit = next(panels), reliable_pareto_shape(max(bounds))
        axes.hist(shapes[shapes.isfinite()].tolist(), bins=BINS)
        axes.axvline(limit, color="black", linewidth=1.0)
        title = f"below {limit:.2g} for {int((shapes < limit).sum()):,} of {len(shapes):,} images"
        axes.set(xlabel="Pareto k̂ of the weights", ylabel="images", title=title)
    return figure
