"""The training loop: steps, and what happens every so many of them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from popgen.distributed import ALONE, Processes
from popgen.errors import DivergedError
from popgen.training.objective import Metrics
from popgen.training.state import TrainState

ASKING_SECONDS = 0.5  # between two times at which processes ask each other whether to stop

Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
DrawBatch = Callable[[int, torch.Generator], Any]
MeanMetrics = Callable[[Sequence[Metrics], int, int], dict[str, float]]


def mean_metrics(recent: Sequence[Metrics], step: int, max_skipped_steps: int) -> dict[str, float]:
    """Returns the mean of each metric over the steps that were taken, read from the device once.

    Raises:
        DivergedError: as `check_not_diverged`.

    Example:
        >>> row = {"loss": torch.tensor(3.0), "skipped_steps": torch.tensor(0.0), "skipped_in_a_row": torch.tensor(0.0)}
        >>> mean_metrics([row], step=1, max_skipped_steps=0)
        {'loss': 3.0, 'skipped_steps': 0.0}
    """
    names = list(recent[0])
    table = torch.stack([metrics[name] for metrics in recent for name in names]).double().cpu().view(len(recent), -1)
    columns = dict(zip(names, table.unbind(1), strict=True))
    check_not_diverged(columns, step, max_skipped_steps)
    in_a_row, skipped = columns.pop("skipped_in_a_row"), columns.pop("skipped_steps")
    taken = in_a_row == 0
    means = {name: column[taken].mean().item() for name, column in columns.items()} if taken.any() else {}
    return {**means, "skipped_steps": skipped[-1].item()}


def check_not_diverged(columns: Mapping[str, Tensor], step: int, max_skipped_steps: int) -> None:
    """Checks that no more steps in a row were skipped than may be.

    Args:
        columns: each metric of the last steps.
        step: the last of them.
        max_skipped_steps: how many may be.

    Raises:
        DivergedError: naming the first step at which there were more, and what was not finite or too large there.

    Example: `mean_metrics` calls it.
    """
    in_a_row = columns["skipped_in_a_row"]
    for row in (in_a_row > max_skipped_steps).nonzero().flatten().tolist()[:1]:
        wrong = next((name for name in ("loss", "gradient_norm") if not math.isfinite(columns[name][row])), None)
        what = "gradient norm became too large," if wrong is None else f"{wrong.replace('_', ' ')} became"
        value, number = columns[wrong or "gradient_norm"][row].item(), int(in_a_row[row])
        last = step - len(in_a_row) + row + 1
        raise DivergedError(
            f"the {what} {value:.6g} at step {last}"
            + (f", and {number} steps in a row were skipped" if number > 1 else "")
            + "; nothing was saved after the last checkpoint. A lower learning rate or Experiment.max_gradient_norm "
            "may help",
            step=last - number + 1,
        )


class Hooks(NamedTuple):
    """What the loop calls, and how often. Each is also called after the last step.

    Attributes:
        log_every: steps between calls of `log(step, means)`, with the mean of every metric over the steps taken since
            the last call, `skipped_steps` in all and `steps_per_second`.
        eval_every: steps between calls of `evaluate(state) -> state`.
        checkpoint_every: steps between calls of `checkpoint(state)`.
        save: called with the state after every evaluation, when all else is done, and when the loop is stopped.
        stop: whether to stop before the next step.
        max_skipped_steps: how many steps in a row may be skipped.
        quiet: whether no progress is shown, not even on a terminal.
        mean: forms the means; see `mean_metrics`.

    Example: `train` shows one.
    """

    log_every: int
    log: Callable[[int, dict[str, float]], None]
    eval_every: int
    evaluate: Callable[[TrainState], TrainState]
    checkpoint_every: int
    checkpoint: Callable[[TrainState], None]
    save: Callable[[TrainState], None] = lambda state: None
    stop: Callable[[], bool] = lambda: False
    max_skipped_steps: int = 0
    quiet: bool = False
    mean: MeanMetrics = mean_metrics


class StopTogether:
    """Says whether any process has been asked to stop: the same in all of them, which call it equally often.

    One alone is asked at every call. Several tell each other about every `ASKING_SECONDS`: how many calls that is
    follows from the time that those before took in the slowest of them, and at most doubles.

    Args:
        asked: whether this process has been asked to, which stays so.
        processes: of which it is one.

    Example:
        >>> stop = StopTogether(lambda: True)
        >>> stop()
        True
    """

    def __init__(self, asked: Callable[[], bool], processes: Processes = ALONE) -> None:
        self.asked, self.processes = asked, processes
        self._stopping, self._every, self._left, self._since = False, 1, 0, time.monotonic()

    def __call__(self) -> bool:
        """Returns whether to stop.

        Raises:
            ProcessesError: if a process has ended.
        """
        if self.processes.size == 1:
            return self.asked()
        if self._left == 0 and not self._stopping:
            now = time.monotonic()
            slowest = self.processes.all_reduce_max(math.inf if self.asked() else now - self._since)
            self._stopping, self._since = math.isinf(slowest), now
            at_that_rate = int(ASKING_SECONDS * self._every / max(slowest, 1e-9))
            self._every = self._left = max(1, min(at_that_rate, 2 * self._every))
        self._left -= 1
        return self._stopping


def train(
    state: TrainState,
    train_step: Step,
    draw_batch: DrawBatch,
    num_steps: int,
    hooks: Hooks,
) -> TrainState:
    """Returns the state after `num_steps` steps in all, counting those already taken, or where it was stopped.

    Args:
        state: where to start; it is consumed.
        train_step: see `popgen.training.step`.
        draw_batch: returns what `train_step` is given: the batch of a step, drawn with a generator.
        num_steps: the step to stop at.
        hooks: logging, evaluation and checkpoints.

    Raises:
        DivergedError: if too many steps in a row were skipped, seen when metrics are next read.

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
    clock, timed_from, saved = time.perf_counter(), state.step, state.step
    disable = True if hooks.quiet else None
    with tqdm(total=num_steps, initial=state.step, unit="step", disable=disable, dynamic_ncols=True) as bar:
        while state.step < num_steps and not hooks.stop():
            batch = draw_batch(state.step, state.generators["binarisation"])
            state, metrics = train_step(state, batch)
            if state.recent and state.recent[-1].keys() != metrics.keys():
                state.recent.clear()  # they are of another objective, before it was changed
            state.recent.append(metrics)
            bar.update()

            last = state.step == num_steps
            evaluating = last or state.step % hooks.eval_every == 0
            checkpointing = last or state.step % hooks.checkpoint_every == 0
            if evaluating or checkpointing or state.step % hooks.log_every == 0:
                means = hooks.mean(state.recent, state.step, hooks.max_skipped_steps)
                means["steps_per_second"] = (state.step - timed_from) / (time.perf_counter() - clock)
                shown = (
                    f"ELBO {means['elbo']:.2f} nats" if "elbo" in means else f"loss {means.get('loss', math.nan):.3f}"
                )
                bar.set_postfix_str(shown)
                hooks.log(state.step, means)
                state.recent.clear()
                if evaluating:
                    state = hooks.evaluate(state)
                if checkpointing:
                    hooks.checkpoint(state)
                if evaluating:
                    hooks.save(state)
                    saved = state.step
                clock, timed_from = time.perf_counter(), state.step
    if state.step > saved:
        if state.recent:
            hooks.mean(state.recent, state.step, hooks.max_skipped_steps)  # a run that has gone wrong is not saved
        hooks.save(state)
    return state
