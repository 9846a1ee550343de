"""The training loop: steps, and what happens every so many of them."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from popgen.errors import TrainingError
from popgen.training.objectives import Metrics
from popgen.training.state import TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
DrawBatch = Callable[[int, torch.Generator], Any]


class Hooks(NamedTuple):
    """What the loop calls, and how often. Each is also called after the last step.

    Attributes:
        log_every: steps between calls of `log(step, means)`, with the mean of every metric since the last call and
            `steps_per_second`.
        eval_every: steps between calls of `evaluate(state) -> state`.
        checkpoint_every: steps between calls of `checkpoint(state)`.
    """

    log_every: int
    log: Callable[[int, dict[str, float]], None]
    eval_every: int
    evaluate: Callable[[TrainState], TrainState]
    checkpoint_every: int
    checkpoint: Callable[[TrainState], None]


def train(
    state: TrainState,
    train_step: Step,
    draw_batch: DrawBatch,
    num_steps: int,
    hooks: Hooks,
) -> TrainState:
    """Returns the state after `num_steps` steps in all, counting those already taken.

    Args:
        state: where to start; it is consumed.
        train_step: see `popgen.training.step`.
        draw_batch: returns what `train_step` is given: the batch of a step, drawn with a generator.
        num_steps: the step to stop at.
        hooks: logging, evaluation and checkpoints.

    Raises:
        TrainingError: if the loss or the gradient is no longer finite, seen when metrics are next read.

    Example:
        >>> from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
        >>> from popgen.nn.priors import StandardNormalPrior
        >>> from popgen.training.objectives import NegativeELBO
        >>> from popgen.training.state import initial_state
        >>> from popgen.training.step import make_train_step
        >>> vae = VAE(GaussianEncoder(16, 2, 8), BernoulliDecoder(2, 16, 8), StandardNormalPrior())
        >>> show = lambda step, means: print(step, sorted(means)[:3])
        >>> hooks = Hooks(2, show, 4, lambda state: state, 4, lambda state: None)
        >>> draw_batch = lambda step, generator: torch.zeros(5, 16)
        >>> state = initial_state(vae, torch.optim.Adam, seed=0)
        >>> train(state, make_train_step(vae, NegativeELBO()), draw_batch, num_steps=4, hooks=hooks).step
        2 ['beta', 'elbo', 'gradient_norm']
        4 ['beta', 'elbo', 'gradient_norm']
        4
    """
    recent: list[Metrics] = []
    clock = time.perf_counter()
    first = state.step
    with tqdm(total=num_steps, initial=first, unit="step", disable=None, dynamic_ncols=True) as bar:
        while state.step < num_steps:
            batch = draw_batch(state.step, state.generators["binarisation"])
            state, metrics = train_step(state, batch)
            recent.append(metrics)
            bar.update()

            last = state.step == num_steps
            evaluating = last or state.step % hooks.eval_every == 0
            checkpointing = last or state.step % hooks.checkpoint_every == 0
            if evaluating or checkpointing or state.step % hooks.log_every == 0:
                means = _mean_metrics(recent, state.step)
                means["steps_per_second"] = len(recent) / (time.perf_counter() - clock)
                shown = f"ELBO {means['elbo']:.2f} nats" if "elbo" in means else f"loss {means['loss']:.3f}"
                bar.set_postfix_str(shown)
                hooks.log(state.step, means)
                recent = []
                if evaluating:
                    state = hooks.evaluate(state)
                if checkpointing:
                    hooks.checkpoint(state)
                clock = time.perf_counter()
    return state


def _mean_metrics(recent: Sequence[Metrics], step: int) -> dict[str, float]:
    """Returns the mean of each metric, read from the device once."""
    names = list(recent[0])
    table = torch.stack([torch.stack([metrics[name] for name in names]) for metrics in recent])
    means = dict(zip(names, table.double().mean(0).tolist(), strict=True))
    watched = [name for name in ("loss", "gradient_norm") if name in names]
    values = table[:, [names.index(name) for name in watched]]
    wrong = (~torch.isfinite(values)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise TrainingError(
            f"the {watched[column].replace('_', ' ')} became {values[row, column].item()} at step "
            f"{step - len(recent) + row + 1}; nothing was saved after the last checkpoint. A lower learning rate or "
            "Experiment.max_gradient_norm may help"
        )
    return means
