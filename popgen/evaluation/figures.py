"""The figure of an evaluation: how its bound converges, how log p(x) is spread over images, and where k̂ lies."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from popgen.evaluation.importance import reliable_pareto_shape
from popgen.evaluation.likelihood import bounds_by_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
    _histogram(axes, log_p_x, log_p_x.mean().item())
    axes.set(xlabel="log p(x), nats", ylabel="images", title=f"{len(log_p_x):,} images, mean {log_p_x.mean():.3f}")
    if shapes is not None:
        axes, limit = next(panels), reliable_pareto_shape(max(bounds))
        _histogram(axes, shapes, limit)
        title = f"below {limit:.2g} for {int((shapes < limit).sum()):,} of {len(shapes):,} images"
        axes.set(xlabel="Pareto k̂ of the weights", ylabel="images", title=title)
    return figure


def _histogram(axes: "Axes", values: Tensor, line: float) -> None:
    """Draws a histogram and a line, as far as these are finite, and not too large for the bins to be told apart."""
    known = values[values.isfinite()].double().tolist()
    if known:
        width = (max(known) - min(known) or 1.0) / BINS
        if width > 4.0 * math.ulp(max(map(abs, known))):
            axes.hist(known, bins=BINS)
    if math.isfinite(line):
        axes.axvline(line, color="black", linewidth=1.0)
