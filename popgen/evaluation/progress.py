"""What an evaluation shows while it lasts."""

from collections.abc import Callable

from torch import Tensor
from tqdm import tqdm

from popgen.errors import StoppedError

Progress = Callable[[Tensor], None]  # told of examples that have been finished since the last call, a number for each


def show_mean(bar: tqdm, text: str, stop: Callable[[], bool]) -> Progress:
    """Returns a function that moves a bar on by some examples and shows the mean of all so far.

    Args:
        bar: of the examples.
        text: has one field to format, the mean.
        stop: whether to stop, asked at every call.

    Raises:
        StoppedError: by that function, if it is to stop.

    Example: `evaluate` calls it.
    """
    total = 0.0

    def show(values: Tensor) -> None:
        nonlocal total
        if stop():
            raise StoppedError("stopped during the evaluation; the same command goes on with it")
        if not bar.disable:
            total += values.sum().item()
            bar.update(len(values))
            bar.set_postfix_str(text.format(total / bar.n))

    return show
