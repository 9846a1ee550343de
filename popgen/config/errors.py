"""What gin raises, in one line, with the closest valid names."""

import contextlib
import inspect
import re
import sys
import tokenize
from collections.abc import Iterator

import gin

from popgen.config.text import MACRO, close
from popgen.errors import ConfigError, PopgenError

MAX_LENGTH = 2_000  # of what gin says
# What gin adds to Python's own words on an argument that is missing.
MISSING = (
    r"\n\s*No values supplied by Gin or caller .*\n\s*Gin had values bound for: .*\n\s*Caller supplied values for: .*"
)


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turns what gin raises into a `ConfigError` of one line, and gives the project's own errors back as they were.

    Exceptions that cross gin come as proxies without arguments, the original in `__context__`.

    Args:
        doing: what failed, if something does.

    Example:
        >>> with translated("cannot count"):
        ...     int("one")
        Traceback (most recent call last):
            ...
        popgen.errors.ConfigError: cannot count: invalid literal for int() with base 10: 'one'
    """
    try:
        yield
    except Exception as error:
        original: BaseException = error
        while original.__context__ is not None and isinstance(original, type(original.__context__)):
            original = original.__context__
        if isinstance(original, PopgenError):
            raise original from None
        raise ConfigError(f"{doing}: {_shortened(_one_line(error, original))}{_suggestion(original)}") from error


def _one_line(error: BaseException, original: BaseException) -> str:
    """Returns gin's message in one line: what is wrong, then where in the file or in which part."""
    if isinstance(error, SyntaxError):
        where = f" in {error.filename}" if error.filename else ""
        text = f"{error.msg}{where}, line {error.lineno}: {(error.text or '').strip()}"
    elif isinstance(error, tokenize.TokenError):
        text = f"a bracket or a quote is not closed ({error.args[0]}, line {error.args[1][0]})"
    else:
        problem = str(original).partition(" in config string:")[0]  # gin appends the whole configuration
        problem = problem or type(original).__name__
        text = problem if error is original else problem + str(error).removeprefix(str(original))
    text = re.sub(MISSING, "", text)
    text = re.sub(r"\n\s*In call to configurable '(\w+)' \(.*?\)(?=\n|$)", _bound_values, _shortened(text))
    lines = [line.strip() for line in text.splitlines() if line.strip().strip("^")]
    return " ".join(lines)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH // 2]} … {text[-MAX_LENGTH // 2 :]}"


def _bound_values(match: re.Match[str]) -> str:
    """Returns the part that an error arose in, with the values that were bound there."""
    values = [
        f"{parameter} = {value!r}"
        for (_, selector), parameters in gin.config._CONFIG.items()
        if selector.rpartition(".")[2] == match[1]
        for parameter, value in parameters.items()
    ]
    return f" (in {match[1]}, bound: {', '.join(values) or 'nothing'})"


def _suggestion(error: BaseException) -> str:
    """Returns the closest valid names for an unknown one, as far as gin's message tells which it was."""
    text = str(error)
    if match := re.search(r"Configurable '([\w./]+)' doesn't have a parameter named '(\w+)'", text):
        return f"; {close(match[2], parameters_of(match[1].rpartition('.')[2]))}"
    match = re.search(r"module '([\w.]+)' from .* has no attribute (\w+)", text)
    if match and match[1] in sys.modules:  # a configuration could write such a text, and so import what it likes
        names = [name for name in dir(sys.modules[match[1]]) if not name.startswith("_")]
        return f"; {close(match[2], names)}"
    if match := re.search(r"'(\w+)' was not provided by an import", text):
        return "; import its module at the top of the file, and name it with that, as in torch.optim.SGD"
    if match := re.search(r"No bindings specified for '([\w/]+)/gin.macro'", text):
        macros = [scope for scope, selector in gin.config._CONFIG if selector == MACRO]
        return f"; {close(match[1], macros)}"
    return ""


def parameters_of(selector: str) -> list[str]:
    """Returns the names of the parameters of what a selector stands for; empty if it stands for several things, which
    gin reports when it parses the binding.

    Example: `translated` suggests one of them.
    """
    complete = gin.config._REGISTRY.matching_selectors(selector)
    return list(inspect.signature(gin.config._REGISTRY[complete[0]].wrapped).parameters) if len(complete) == 1 else []
