"""The rules of the house that a test can hold: layers, the Gin boundary, examples for what is public."""

import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import popgen

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(popgen.__path__, "popgen."))


def test_imports_point_downward_and_only_config_imports_gin():
    command = [pathlib.Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_has_an_example(name):
    module = importlib.import_module(name)
    missing = [
        member
        for member, value in vars(module).items()
        if not member.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == name
        and not is_contract(value)
        and not re.search(r">>>|Example: `\w+`", inspect.getdoc(value) or "")  # its own, or another's that uses it
    ]
    assert not missing


def is_contract(value: type) -> bool:
    """Whether a class is made to be subclassed, raised, returned or matched, and so is shown by others' examples."""
    if not inspect.isclass(value):
        return False
    return (
        inspect.isabstract(value)
        or issubclass(value, Exception | tuple)
        or getattr(value, "_is_protocol", False)
        or value.__name__.endswith("Bijection")
    )


@pytest.mark.parametrize("path", sorted((REPOSITORY / "popgen").rglob("*.py")), ids=lambda path: path.name)
def test_files_can_be_read_at_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 450
