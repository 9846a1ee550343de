"""Gin text, read without running it, and the names in it."""

import difflib
from collections.abc import Sequence

from gin import config_parser

DYNAMIC_REGISTRATION = "from __gin__ import dynamic_registration"
MACRO = "gin.macro"


class TextDelegate(config_parser.ParserDelegate):
    """Leaves references and macros as the text they were, and remembers them.

    Example: `bindings_as_text` uses one.
    """

    def __init__(self) -> None:
        self.references: list[str] = []
        self.macros: list[str] = []

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> "_Text":
        """Returns a reference as text."""
        self.references.append(scoped_selector.rsplit("/", 1)[-1])
        return _Text(f"@{scoped_selector}{'()' if evaluate else ''}")

    def macro(self, name: str) -> "_Text":
        """Returns a macro as text."""
        self.macros.append(name)
        return _Text(f"%{name}")


class _Text(str):
    """A string whose representation is itself."""

    def __repr__(self) -> str:
        return str(self)


def bindings_as_text(text: str) -> dict[str, str]:
    """Returns the value of every binding by name, as text; imports and includes are passed over.

    Example:
        >>> bindings_as_text("a/Part.other = @Other()")
        {'a/Part.other': '@Other()'}
    """
    bindings = {}
    for statement in config_parser.ConfigParser(text, TextDelegate()):
        if isinstance(statement, config_parser.BindingStatement):
            name = ".".join(part for part in (statement.selector, statement.arg_name) if part)
            bindings["/".join(part for part in (statement.scope, name) if part)] = repr(statement.value)
    return bindings


def display(scope: str, selector: str, parameter: str) -> str:
    """Returns the short name of what is bound.

    Example:
        >>> display("", "popgen.experiment.Experiment", "seed")
        'Experiment.seed'
    """
    if selector == MACRO:
        return scope
    return f"{scope}/" * bool(scope) + f"{selector.rpartition('.')[2]}.{parameter}"


def close(name: str, candidates: Sequence[str]) -> str:
    """Returns which names an unknown one may have meant.

    Example:
        >>> close("sede", ["seed", "device"])
        'did you mean seed?'
    """
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    if found:
        return "did you mean " + " or ".join(by_lower[match] for match in found) + "?"
    return f"there are {', '.join(sorted(candidates)) or 'none'}"
