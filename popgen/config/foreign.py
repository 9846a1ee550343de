"""What may be built of a configuration that came with a run: parts of popgen and torch, of the checkpoint's size.

A configuration names classes, and building it calls them with arguments of its choice. That of somebody else's run is
therefore held to kinds of classes that only compute: it cannot name one that runs commands or writes files.
"""

import contextlib
import dataclasses
import os
import pathlib
import stat
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import gin
import torch
from gin import config_parser
from gin.config import ParseContext
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from popgen.config.text import DYNAMIC_REGISTRATION, TextDelegate, display
from popgen.datasets.data import Dataset
from popgen.datasets.stroke_digits import StrokeDigits
from popgen.distributions.codes import CategoricalOutput, LogisticMixtureOutput
from popgen.errors import ConfigError, RunDirectoryError
from popgen.evaluation.evaluator import Evaluator
from popgen.experiment import Experiment
from popgen.optim.geco import GECO
from popgen.training.objective import Objective

MODULES = ("popgen", "torch.nn", "torch.optim")
# Where a class must be defined, and what it must be.
KINDS: dict[str, tuple[type, ...]] = {
    "popgen.": (Experiment, nn.Module, Objective, Evaluator, GECO, CategoricalOutput, LogisticMixtureOutput),
    "popgen.datasets.": (Dataset,),
    "popgen.optim.schedules": (object,),
    "torch.nn.modules.": (nn.Module,),
    "torch.optim.": (torch.optim.Optimizer,),
}
TRUST = "if you trust whoever wrote this run, add --trust_config"
MAX_BYTES = 64 * 1024  # of a configuration; the longest of ours has four thousand
MAX_VALUES = 100_000  # that a configuration may come to, its macros put in
SPARE_ELEMENTS = 2**24  # that building may take beside what the checkpoint holds
SPARE_OPERATIONS = 10_000


def read_text(path: pathlib.Path) -> str:
    """Returns the text of a configuration.

    Raises:
        ConfigError: if it cannot be read, is too long to be one, or is not text.

    Example: `load_foreign` calls it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path} is longer than {MAX_BYTES:,} bytes and is no saved configuration; {TRUST}")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error


def check_files(directory: pathlib.Path) -> None:
    """Checks that a run directory holds files and folders alone: what is written to a link lands somewhere else.

    Raises:
        RunDirectoryError: naming what is something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pathlib.Path(folder, "config.gin").symlink_to("/etc/hostname")
        ...     check_files(pathlib.Path(folder))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        popgen.errors.RunDirectoryError: ...config.gin is a link or a device, ...
    """
    for folder, folders, files in os.walk(directory):
        for path in (pathlib.Path(folder, name) for name in (*folders, *files)):
            with contextlib.suppress(FileNotFoundError):  # a run that is training writes and renames
                mode = path.lstat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise RunDirectoryError(f"{path} is a link or a device, and training writes none; {TRUST}")


def check_text(text: str) -> None:
    """Checks all that a text imports and names, each import before it is made and each name as gin will resolve it.

    Raises:
        ConfigError: naming what is not allowed.

    Example:
        >>> check_text("from __gin__ import dynamic_registration\\nimport os")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        popgen.errors.ConfigError: the configuration imports os, which is not part of popgen, ...
    """
    context, delegate = ParseContext(), TextDelegate()
    for number, statement in enumerate(config_parser.ConfigParser(text, delegate)):
        names = [*delegate.references]
        delegate.references.clear()
        if isinstance(statement, config_parser.ImportStatement):
            # Without dynamic registration names would be those that gin happens to know.
            if number > 0 or statement.format() != DYNAMIC_REGISTRATION:
                check_import(statement.module)
            context.process_import(statement)
        elif isinstance(statement, config_parser.IncludeStatement):
            included = repr(statement.filename)
            raise ConfigError(f"the configuration includes {included}, and a saved one includes nothing; {TRUST}")
        elif isinstance(statement, config_parser.BlockDeclaration) or statement.arg_name:
            names.append(statement.selector)
        if not context._dynamic_registration:
            raise ConfigError(f"the configuration does not begin with {DYNAMIC_REGISTRATION!r}; {TRUST}")
        for name in names:
            check_part(name, context._resolve_selector(name)[1])


def check_import(module: str) -> None:
    """Checks that a configuration imports parts of popgen, torch.nn or torch.optim alone, before anything does.

    Raises:
        ConfigError: if it imports something else.

    Example:
        >>> check_import("torch.optim")
        >>> check_import("own_parts")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        popgen.errors.ConfigError: the configuration imports own_parts, which is not part of popgen, ...
    """
    if not any(module == allowed or module.startswith(f"{allowed}.") for allowed in MODULES):
        raise ConfigError(
            f"the configuration imports {module}, which is not part of popgen, torch.nn or torch.optim; {TRUST}"
        )


def check_part(name: str, path: Sequence[object]) -> None:
    """Checks what a name in a configuration stands for, by where that is defined and what it is.

    Args:
        name: as the configuration has it.
        path: what its components stand for, one after another; all but the last are modules.

    Raises:
        ConfigError: if it is not a class of a kind that may be built.

    Example:
        >>> check_part("torch.optim.Adam", [torch, torch.optim, torch.optim.Adam])
        >>> check_part("torch.os.makedirs", [torch, os, os.makedirs])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        popgen.errors.ConfigError: the configuration names torch.os.makedirs, which is none of the models, ...
    """
    *modules, part = path
    if not all(isinstance(module, ModuleType) for module in modules) or not _is_allowed(part):
        raise ConfigError(
            f"the configuration names {name}, which is none of the models, objectives, evaluators, datasets and "
            f"schedules of popgen, the modules of torch.nn and the optimizers of torch.optim; {TRUST}"
        )


def _is_allowed(part: object) -> bool:
    """Whether something is a class of a module that may be built, under its own name there."""
    if not isinstance(part, type):
        return False
    found: object = vars(sys.modules[part.__module__]).get(part.__name__)
    if found is not part:
        return False
    return any(
        # Of datasets nothing is asked but a method, so they need not descend from `Dataset`.
        f"{part.__module__}.".startswith(place) and (kind in part.mro() or (kind is Dataset and hasattr(part, "load")))
        for place, kinds in KINDS.items()
        for kind in kinds
    )


def check_number_of_values(most: float = MAX_VALUES) -> None:
    """Checks that a configuration does not come to many more values than it has lines, by macros of macros.

    Args:
        most: values that there may be.

    Raises:
        ConfigError: if there are more, or something is made of itself.

    Example: `load` and `load_foreign` call it, once gin has parsed the text.
    """
    known: dict[tuple[str, tuple[str, ...]], int | None] = {}

    def count(value: Any, scope: tuple[str, ...]) -> int:
        if isinstance(value, Mapping):
            return 1 + sum(count(item, scope) for pair in value.items() for item in pair)
        if isinstance(value, list | tuple):
            return 1 + sum(count(item, scope) for item in value)
        if not isinstance(value, gin.config.ConfigurableReference):
            return 1
        return count_bound(value.configurable.selector, tuple(value.scopes) or scope)

    def count_bound(selector: str, scope: tuple[str, ...]) -> int:
        if (selector, scope) not in known:
            known[selector, scope] = None
            bound = gin.config._get_bindings(selector, list(scope)) if scope else gin.config._CONFIG.get(("", selector))
            known[selector, scope] = 1 + sum(count(value, scope) for value in (bound or {}).values())
        total = known[selector, scope]
        if total is None:
            raise ConfigError(f"the configuration makes {display('/'.join(scope), selector, 'value')} of itself")
        if total > most:
            raise ConfigError(f"the configuration comes to more than {most:,} values; {TRUST}")
        return total

    for scope, selector in list(gin.config._CONFIG):
        count_bound(selector, tuple(scope.split("/")) if scope else ())


class SizeLimit(TorchDispatchMode):
    """While it is entered, tensors have shapes and no memory, and too many of them are an error.

    Args:
        checkpoint: of the model that is being built, see `popgen.training.state.state_to_tensors`.

    Raises:
        ConfigError: by what is built, if it is much larger than what the checkpoint holds.

    Example:
        >>> with SizeLimit({"parameters": {"weight": torch.ones(2, 2)}, "buffers": {}}):
        ...     nn.Linear(10**6, 10**6)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        popgen.errors.ConfigError: the configuration builds more than its checkpoint holds: over 16,777,280 numbers, ...
    """

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        super().__init__()
        tensors = [*checkpoint["parameters"].values(), *checkpoint["buffers"].values()]
        self.held = sum(tensor.numel() for tensor in tensors)
        self.elements = SPARE_ELEMENTS + 16 * self.held
        self.operations = SPARE_OPERATIONS + 1_000 * len(tensors)
        self.left = [self.elements, self.operations]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(argument.name == "device" for argument in function._schema.arguments):
            kwargs["device"] = torch.device("meta")
        result = function(*args, **kwargs)
        self.left[1] -= 1
        if not (function.is_view or function._schema.is_mutable):
            self.left[0] -= sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        if min(self.left) < 0:
            raise ConfigError(
                f"the configuration builds more than its checkpoint holds: over {self.elements:,} numbers, or "
                f"{self.operations:,} operations on them, where the model has {self.held:,}; {TRUST}"
            )
        return result


def reading_only(experiment: Experiment) -> Experiment:
    """Returns an experiment whose dataset writes nothing where a configuration told it to.

    Example: `load_foreign` calls it.
    """
    return dataclasses.replace(experiment, dataset=reading_only_of(experiment.dataset))


def reading_only_of(dataset: Any) -> Any:
    """Returns a dataset that writes nothing into its `data_dir`, where it has one of its own.

    Example:
        >>> from popgen.datasets.binary_mnist import BinaryMNIST
        >>> reading_only_of(BinaryMNIST(data_dir="/elsewhere")).download
        False
    """
    if getattr(dataset, "data_dir", None) is None:
        return dataset
    if isinstance(dataset, StrokeDigits):  # its files are a cache, and are the same in the default place
        return dataclasses.replace(dataset, data_dir=None)
    return dataclasses.replace(dataset, download=False) if hasattr(dataset, "download") else dataset
