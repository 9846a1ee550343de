"""Config files and bindings, parsed into gin; under dynamic registration gin itself takes only one kind of name.

Gin resolves names through a file's imports alone; for bindings on the command line we want short names
(`Experiment.seed = 3`) as well as parts the files never mention (`Experiment.optimizer = @torch.optim.SGD`). So what a
binding refers to is first registered under the files' own imports, and the bindings are then parsed plainly, where gin
matches partial names.
"""

import contextlib
import difflib
import importlib
import os
import pathlib
import tokenize
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gin
from gin import config_parser
from gin.config import ParseContext, ParsedBindingKey

from popgen.config.errors import parameters_of, translated
from popgen.config.text import DYNAMIC_REGISTRATION, MACRO, TextDelegate, close, display
from popgen.errors import ConfigError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

gin.add_config_file_search_path(str(REPOSITORY))
# Gin would also look inside Python packages, where it takes any folder called configs for one and fails.
gin.config._FILE_READERS[:] = [(open, os.path.isfile)]


def parse_files(gin_files: Sequence[str | os.PathLike]) -> None:
    """Parses config files into gin, in their order.

    Raises:
        ConfigError: if one is missing, includes itself or does not parse.

    Example: `load` calls it.
    """
    for gin_file in [os.fspath(gin_file) for gin_file in gin_files]:
        path = _find(gin_file)
        with translated(f"cannot parse {gin_file}"):
            _check_includes(path, including=())
            gin.parse_config_file(str(path))


def _find(gin_file: str) -> pathlib.Path:
    """Returns the path of a config file, looked for in the working directory and then in the repository root."""
    for path in (pathlib.Path(gin_file), REPOSITORY / gin_file):
        if path.is_file():
            return path
    known = sorted(f"configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.gin"))
    close = difflib.get_close_matches(gin_file, known, n=3) or known
    places = " or ".join(dict.fromkeys((os.getcwd(), str(REPOSITORY))))
    raise ConfigError(f"there is no config file {gin_file!r} in {places}; did you mean {', '.join(close)}?")


def _check_includes(path: pathlib.Path, including: tuple[pathlib.Path, ...]) -> None:
    """Checks that everything a file includes is there and does not include it in turn."""
    if path in including:
        raise ConfigError(f"{path} includes itself, by way of {', '.join(map(str, including))}")
    with path.open() as file:
        statements = list(config_parser.ConfigParser(file, TextDelegate()))
    for statement in statements:
        if isinstance(statement, config_parser.IncludeStatement):
            _check_includes(_find(statement.filename), (*including, path))


class BindingKey(NamedTuple):
    """The complete name of what a binding binds, by which gin keeps its value."""

    scope: str
    selector: str
    parameter: str


def apply_bindings(bindings: Sequence[str]) -> dict[BindingKey, str]:
    """Parses bindings in order, over what has been parsed, and returns the text of each by the key that it binds.

    Raises:
        ConfigError: if one does not parse, or names what there is not.

    Example: `load` calls it.
    """
    overridden = {}
    parsed = [(binding, *_parse_binding(binding)) for binding in bindings]
    for binding, _, delegate in parsed:  # before all else: what a later one refers to has its short name in all
        for reference in delegate.references:
            _register(reference, binding)
    for binding, statements, delegate in parsed:
        for macro in delegate.macros:
            _check_macro(macro, binding)
        for statement in statements:
            if not isinstance(statement, config_parser.BindingStatement):
                raise ConfigError(
                    f"a binding must bind a value, got {binding!r}; imports and includes belong in a file"
                )
            key = _binding_key(statement, binding)
            overridden[key] = binding
        with translated(f"cannot parse the binding {binding!r}"):
            gin.parse_config(binding)
    return overridden


def _parse_binding(binding: str) -> tuple[list[Any], TextDelegate]:
    """Returns the statements of a binding, and what remembers the names that they refer to."""
    delegate = TextDelegate()
    try:
        return list(config_parser.ConfigParser(binding, delegate)), delegate
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        raise ConfigError(
            f"cannot parse the binding {binding!r}; it should look like Experiment.seed = 3, with numbers, text in "
            "quotes, and classes as @module.Class()"
        ) from error


def _binding_key(statement: config_parser.BindingStatement, binding: str) -> BindingKey:
    """Returns the complete name of what a binding binds, checked with the closest valid names at hand."""
    if not statement.arg_name:
        name = "/".join(part for part in (statement.scope, statement.selector) if part)
        _check_macro(name, binding)
        return BindingKey(name, MACRO, "value")
    _register(statement.selector, binding)
    parameters = parameters_of(statement.selector)
    if parameters and statement.arg_name not in parameters and "kwargs" not in parameters:
        right = close(statement.arg_name, parameters)
        raise ConfigError(f"{statement.selector} has no parameter {statement.arg_name!r} in {binding!r}; {right}")
    with translated(f"cannot parse the binding {binding!r}"):
        parsed = ParsedBindingKey.parse((statement.scope, statement.selector, statement.arg_name))
    return BindingKey(parsed.scope, parsed.complete_selector, parsed.arg_name)


def _register(selector: str, binding: str) -> None:
    """Makes a selector known to gin: by a name already registered, the files' imports, or its own full module path."""
    if _complete(selector):
        return
    context = ParseContext()
    for statement in _import_statements():
        context.process_import(statement)
    module, _, name = selector.rpartition(".")
    with contextlib.suppress(NameError, AttributeError):
        context.get_configurable(selector)
        return
    if not _is_importable(module):
        names = sorted({configurable.name for configurable in gin.config._INVERSE_REGISTRY.values()})
        raise ConfigError(
            f"nothing in this configuration is called {selector!r} in {binding!r}; {close(selector, names)}; "
            "parts that the config file does not mention are named with their module, as in @torch.optim.SGD"
        )
    context.process_import(config_parser.ImportStatement(module, False, None, None))
    try:
        context.get_configurable(selector)
    except AttributeError:
        public = [other for other in dir(importlib.import_module(module)) if not other.startswith("_")]
        raise ConfigError(f"{module} has no {name!r}, named in {binding!r}; {close(name, public)}") from None


def _complete(selector: str) -> list[str]:
    """Returns the registered names that a partial one matches."""
    return gin.config._REGISTRY.matching_selectors(selector)


def _import_statements() -> Iterator[config_parser.ImportStatement]:
    """Yields the imports of all files, dynamic registration first and each once."""
    unique = {statement.format(): statement for statement in gin.config._IMPORTS}
    yield from sorted(
        unique.values(), key=lambda statement: (statement.format() != DYNAMIC_REGISTRATION, statement.module)
    )


def _is_importable(module: str) -> bool:
    """Returns whether there is such a module; one that is there and fails is an error."""
    try:
        return bool(module) and importlib.import_module(module) is not None
    except Exception as error:  # the module may be anyone's
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return False
        raise ConfigError(f"cannot import {module}: {type(error).__name__}: {error}".splitlines()[0]) from error


def _check_macro(name: str, binding: str) -> None:
    if name.startswith("gin.") or (name, MACRO) in gin.config._CONFIG:
        return
    parts = {selector for _, selector in gin.config._CONFIG if selector != MACRO}
    owners = sorted(display("", selector, name) for selector in parts if name in parameters_of(selector))
    if owners:
        raise ConfigError(f"{name!r} in {binding!r} needs the part that it is of: {' or '.join(owners)}")
    macros = [scope for scope, selector in gin.config._CONFIG if selector == MACRO]
    raise ConfigError(f"no macro is called {name!r} in {binding!r}; {close(name, macros)}")
