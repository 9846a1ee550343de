"""An `Experiment` built from a configuration, and the configuration as text."""

import dataclasses
import functools
import inspect
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gin
import torch

from popgen.config import foreign
from popgen.config.bindings import BindingKey, apply_bindings, parse_files
from popgen.config.errors import translated
from popgen.config.text import MACRO, bindings_as_text, display
from popgen.errors import ConfigError
from popgen.experiment import Configuration, Experiment
from popgen.streams import stream_seed
from popgen.training.run_directory import RunDirectory


class LoadedConfig(NamedTuple):
    """What a configuration describes.

    Attributes:
        experiment: the experiment, built.
        configuration: its text.
        orphans: bindings of the files that an override left without effect, by name.
    """

    experiment: Experiment
    configuration: Configuration
    orphans: list[str]


def load(gin_files: Sequence[str | os.PathLike], bindings: Sequence[str] = ()) -> LoadedConfig:
    """Returns the experiment that gin files and bindings describe; later files and bindings override earlier ones.

    Files, and what they include, are looked for in the working directory and then in the repository root.

    Args:
        gin_files: at least one path.
        bindings: such as `"Experiment.num_steps = 1000"`.

    Raises:
        ConfigError: if a file is missing, something does not parse or build, or nothing uses a binding of `bindings`.
        ArgumentError: if a value is outside its domain.

    Example:
        >>> loaded = load(["configs/vae.gin"], ["Experiment.num_steps = 1000", "Adam.lr = 1e-3"])
        >>> loaded.experiment.num_steps
        1000
    """
    gin.clear_config()
    parse_files(gin_files)
    overridden = apply_bindings(bindings)
    foreign.check_number_of_values(most=math.inf)
    return _load(overridden)


def load_foreign(gin_file: pathlib.Path, checkpoint: Mapping[str, Any]) -> LoadedConfig:
    """Returns the experiment that the configuration of somebody else's run describes, or refuses it.

    Nothing is imported, called or built but what `popgen.config.foreign` allows, at the size of the checkpoint.

    Args:
        gin_file: that training wrote.
        checkpoint: of the same run.

    Raises:
        ConfigError: as `load`, and naming what is not allowed.
        ArgumentError: if a value is outside its domain.

    Example: `existing_run` calls it.
    """
    gin.clear_config()
    text = foreign.read_text(gin_file)
    with translated(f"cannot parse {gin_file}"):
        foreign.check_text(text)
        gin.parse_config(text)
        foreign.check_number_of_values()
    loaded = _load({}, foreign.SizeLimit(checkpoint))
    return loaded._replace(experiment=foreign.reading_only(loaded.experiment))


def _load(overridden: dict[BindingKey, str], limit: foreign.SizeLimit | None = None) -> LoadedConfig:
    """Returns what gin has parsed, built; under a limit first without memory."""
    with translated("the configuration is not complete"):
        gin.finalize()
    given = gin.config_str() + "\n"
    _order_as_in_signatures()
    if limit is not None:
        with limit:
            _build()
    experiment = _build()
    with translated("cannot build the experiment"):
        experiment.optimizer(list(experiment.model.parameters()))  # to try it
    unused = _unused_bindings()
    optimizer = _bound_optimizer()
    if optimizer is not None:
        experiment = dataclasses.replace(experiment, optimizer=_free_of_gin(optimizer))
        if experiment.learning_rate is not None and "lr" in gin.config._CONFIG.get(optimizer.config_key, {}):
            scope, selector = optimizer.config_key
            unused.add(BindingKey(scope, selector, "lr"))  # which the schedule replaces
    _check_overrides_used(overridden, unused)
    orphans = sorted({display(*key) for key in unused if key not in overridden})
    configuration = Configuration(given, gin.operative_config_str() + "\n", _settings(unused))
    return LoadedConfig(experiment, configuration, orphans)


def load_replicas(
    gin_files: Sequence[str | os.PathLike], bindings: Sequence[str], experiment: Experiment
) -> list[LoadedConfig]:
    """Returns the configuration of each replica of an experiment: the same, alone, under a seed of its own.

    Args:
        gin_files: as in `load`.
        bindings: as in `load`.
        experiment: what these describe.

    Example:
        >>> bindings = ["Experiment.num_replicas = 3", "Experiment.seed = 10"]
        >>> loaded = load(["configs/vae.gin"], bindings)
        >>> replicas = load_replicas(["configs/vae.gin"], bindings, loaded.experiment)
        >>> [(replica.experiment.seed, replica.experiment.num_replicas) for replica in replicas]
        [(10, 1), (11, 1), (12, 1)]
    """
    seeds = range(experiment.seed, experiment.seed + experiment.num_replicas)
    own = [[f"Experiment.seed = {seed}", "Experiment.num_replicas = 1"] for seed in seeds]
    return [load(gin_files, [*bindings, *one]) for one in own]


def differences(old: str, new: str) -> list[str]:
    """Returns the bindings in which two configuration texts differ, as `name: old -> new`; neither text is run.

    Example:
        >>> differences("Experiment.seed = 0", "Experiment.seed = 3")
        ['Experiment.seed: 0 -> 3']
    """
    with translated("cannot compare the configurations"):
        before, after = (bindings_as_text(text) for text in (old, new))
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return [f"{name}: {before.get(name, '(not set)')} -> {after.get(name, '(not set)')}" for name in names]


def changes_since(directory: RunDirectory, given: str) -> list[str]:
    """Returns how a configuration differs from that of the run in a directory; nothing where none has begun.

    Raises:
        ConfigError: if what the directory holds as its configuration cannot be read.

    Example:
        >>> changes_since(RunDirectory(pathlib.Path("nowhere")), "Experiment.seed = 3")
        []
    """
    if not directory.has_checkpoint():
        return []
    if not directory.config_path.is_file():
        return [f"its {directory.config_path.name} is missing, so that nobody knows which"]
    try:
        before = directory.config_path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {directory.config_path}: {error}") from error
    return differences(before, given)


def _build() -> Experiment:
    """Returns the experiment, its model built from the seed."""
    seed = _bound_to_experiment().get("seed", 0)
    with torch.random.fork_rng(devices=[]), translated("cannot build the experiment"):
        if isinstance(seed, gin.config.ConfigurableReference):  # a macro
            seed = seed.scoped_configurable_fn()
        torch.manual_seed(stream_seed(seed, "model"))
        return gin.get_configurable(Experiment)()


def _bound_to_experiment() -> dict[str, Any]:
    """Returns what is bound to the parameters of the experiment.

    Raises:
        ConfigError: if there is nothing, in any scope.
    """
    selectors = [selector for _, selector in gin.config._CONFIG if selector.endswith("experiment.Experiment")]
    if not selectors:
        raise ConfigError("the configuration binds nothing of popgen.experiment.Experiment, so there is nothing to run")
    return gin.config._CONFIG.get(("", selectors[0]), {})


def _bound_optimizer() -> gin.config.ConfigurableReference | None:
    """Returns what is bound as the optimizer, or None if it is nothing that gin would call."""
    value = _bound_to_experiment().get("optimizer")
    while isinstance(value, gin.config.ConfigurableReference) and value.configurable.selector == MACRO:
        value = gin.config._CONFIG[value.config_key]["value"]
    return value if isinstance(value, gin.config.ConfigurableReference) and not value.evaluate else None


def _free_of_gin(reference: gin.config.ConfigurableReference) -> Callable[..., Any]:
    """Returns what a reference calls, with what is bound to it now: gin would look it up at every call."""
    scope, selector = reference.config_key
    with gin.config_scope(scope or None):
        return functools.partial(reference.configurable.wrapped, **gin.get_bindings(selector))


def _order_as_in_signatures() -> None:
    """Puts the bindings of each part in the order of its parameters.

    Gin builds the arguments of a part in the order in which they were bound, and the parts draw their first weights one
    after another: the same configuration in another order of lines must give the same weights.
    """
    for (_, selector), parameters in gin.config._CONFIG.items():
        order = list(inspect.signature(gin.config._REGISTRY[selector].wrapped).parameters)
        ordered = sorted(parameters.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
        parameters.clear()
        parameters.update(ordered)


def _unused_bindings() -> set[BindingKey]:
    """Returns the bindings that nothing used: what was bound, less what was operative in the same or an inner scope."""
    operative = gin.config._OPERATIVE_CONFIG

    def is_used(scope: str, selector: str, parameter: str) -> bool:
        return any(
            used_selector == selector
            and parameter in parameters
            and (used_scope == scope or not scope or used_scope.startswith(f"{scope}/"))
            for (used_scope, used_selector), parameters in operative.items()
        )

    bound = (
        BindingKey(scope, selector, parameter)
        for (scope, selector), parameters in gin.config._CONFIG.items()
        for parameter in parameters
    )
    return {key for key in bound if not is_used(*key)}


def _check_overrides_used(overridden: dict[BindingKey, str], unused: set[BindingKey]) -> None:
    wasted = [binding for key, binding in overridden.items() if key in unused]
    if wasted:
        used = sorted({selector.rpartition(".")[2] for _, selector in gin.config._OPERATIVE_CONFIG} - {"macro"})
        raise ConfigError(f"nothing uses the binding {wasted[0]!r}; this configuration is made of {', '.join(used)}")


def _settings(unused: set[BindingKey]) -> dict[str, bool | int | float | str]:
    """Returns what the configuration binds and uses, by short name; parts are given by theirs, None and lists as text.

    Dictionaries are left out: they say the same in any order.
    """
    settings: dict[str, bool | int | float | str] = {}
    for (scope, selector), parameters in gin.config._CONFIG.items():
        for parameter, value in parameters.items():
            if isinstance(value, gin.config.ConfigurableReference):
                if value.configurable.selector == MACRO:
                    continue  # the macro has a row of its own
                value = value.configurable.name
            if value is None or isinstance(value, list | tuple):
                value = repr(value)
            if isinstance(value, bool | int | float | str) and BindingKey(scope, selector, parameter) not in unused:
                settings[display(scope, selector, parameter)] = value
    return settings
