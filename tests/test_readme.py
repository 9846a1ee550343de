"""What README and docs show runs as it stands: library examples, commands, and what is of one's own in a real run."""

import configparser
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import re
import shlex
from types import FunctionType

import numpy as np
import pytest
import torch

import popgen.datasets
import popgen.evaluation
import popgen.models
import popgen.nn
import popgen.optim
import popgen.training
from popgen import config
from popgen.datasets.data import Dataset
from popgen.datasets.images import ImageData, prepare_images
from popgen.evaluation.evaluator import Evaluator
from popgen.experiment import run
from popgen.models.model import Model
from popgen.nn.cpc import Context, FrameEncoder, Predictors
from popgen.nn.flows import PosteriorFlow
from popgen.nn.priors import Prior
from popgen.nn.vqvae import Quantiser
from popgen.training.objective import Objective
from popgen.training.records import evaluation_records, read_record
from popgen.training.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("as_a_user")  # the reader's own classes need no annotations

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text()
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}
BLOCKS = {name: re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.M | re.S) for name, page in PAGES.items()}
FILES = {
    match[1]: body
    for blocks in BLOCKS.values()
    for _, body in blocks
    if (match := re.match(r"# (\w+\.(?:py|gin))\n", body))
}
COMMANDS = [
    shlex.split(line, comments=True)
    for page in PAGES.values()
    for line in re.sub(r"\\\n", " ", page).splitlines()
    if line.startswith(("python -m ", "torchrun "))
]


@dataclasses.dataclass(frozen=True)
class Noise:
    """Random grey images of MNIST's size."""

    def load(self) -> ImageData:
        images = torch.randint(0, 256, (400, 784), dtype=torch.uint8)
        return prepare_images(images, images[:64], (28, 28), "dynamic", binarisation_seed=0)


def trained_run(gin_files: list[str], folder: pathlib.Path, **changes) -> RunDirectory:
    """Trains an experiment of some config files on noise for a few steps."""
    loaded = config.load(gin_files)
    directory = RunDirectory(folder)
    with directory.locked():
        run(dataclasses.replace(loaded.experiment, **changes), directory, loaded.configuration)
    return directory


def test_library_examples(tmp_path, monkeypatch):
    """Where they open a run, there is one."""
    trained_run(["configs/vamp_hsnf.gin"], tmp_path / "experiments" / "vamp_hsnf", num_steps=1, dataset=Noise())
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for name, blocks in BLOCKS.items():
        for body in [body for language, body in blocks if language == "python" and not body.startswith("# my_")]:
            exec(compile(body, name, "exec"), namespace)
    assert namespace["log_p_z"].shape == (5, 100)
    assert namespace["state"].step == 2
    assert namespace["codes"].shape == (10, 40) and not namespace["codes"].requires_grad
    assert namespace["losses"].shape == (100,) and namespace["contrast"].shape == (6, 10)
    assert namespace["usage"].num_used > 1 and namespace["changes"]["codes"].shape == (128, 64)
    torch.testing.assert_close(namespace["one"], namespace["whole"][:, :, -1])
    assert namespace["geco_state"].multiplier > 1.0, "the target of the example is missed"


@pytest.mark.parametrize(("name", "lines"), [("my_model", 15), ("my_data", 15), ("my_loss", 15), ("my_hierarchy", 25)])
def test_ones_own(name, lines, tmp_path, monkeypatch):
    code = [line for line in FILES[f"{name}.py"].splitlines()[1:] if line.strip()]
    assert len(code) < lines, "what is of a reader's own is short"
    for suffix in (".py", ".gin"):
        (tmp_path / f"{name}{suffix}").write_text(FILES[f"{name}{suffix}"])
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (1200, 28, 28), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    changes = {} if name == "my_data" else {"dataset": Noise()}
    directory = trained_run([f"{name}.gin"], tmp_path / "run", num_steps=2, final_num_samples=20, **changes)
    assert directory.load_checkpoint("latest")["step"] == 2
    assert read_record(*evaluation_records(directory.path))["log_p_x_of_20_samples"] < 0.0


def module_and_flags(command: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Returns the module that a command runs, and its flags with their values."""
    module = command.index("-m") + 1
    return command[module], [word[2:].partition("=")[::2] for word in command[module + 1 :] if word.startswith("--")]


def test_links_lead_somewhere():
    for name, page in PAGES.items():
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page):
            assert (REPOSITORY / name).parent.joinpath(link).exists(), f"{name}: {link}"
    listed = {f"docs/{link}" for link in re.findall(r"\]\(([a-z_]+\.md)\)", PAGES["docs/README.md"])}
    assert {name for name in PAGES if name.startswith("docs/")} - {"docs/README.md"} <= listed


def test_commands_name_modules_files_and_flags_that_exist():
    shared = (REPOSITORY / "launch" / "command.py").read_text()
    for command in COMMANDS:
        module, flags = module_and_flags(command)
        source = REPOSITORY / f"{module.replace('.', '/')}.py"
        text = source.read_text() + (shared if module.startswith("launch.") else "")
        for flag, value in flags:
            assert f'"{flag}"' in text or f'"--{flag.replace("_", "-")}"' in text or f'"--{flag}"' in text, command
            if flag == "gin_file" and value.startswith("configs/"):
                assert (REPOSITORY / value).is_file(), command


def test_training_commands_name_valid_configurations():
    """Each with its own bindings; a lone binding in the README is one of any configuration."""
    trained = 0
    for command in COMMANDS:
        module, flags = module_and_flags(command)
        files, bindings = ([value for name, value in flags if name == f"gin_{kind}"] for kind in ("file", "bindings"))
        if module == "launch.train" and all(file.startswith("configs/") for file in files):
            config.load(files, bindings)
            trained += 1
    assert trained >= 20
    alone = re.findall(r"`--gin_bindings='([^']+)'`", PAGES["README.md"])
    assert alone
    config.load(["configs/vamp.gin"], alone)


def test_ci_runs_the_two_commands_of_the_readme():
    commands = [body.strip() for language, body in BLOCKS["README.md"] if language == "shell"][:2]
    ci = (REPOSITORY / ".ci" / "run").read_text()
    for command in commands:
        assert command in ci


BASES = (Model, Objective, Evaluator, Prior, PosteriorFlow, Quantiser, FrameEncoder, Context, Predictors)


def test_the_page_of_parts_has_all_and_no_others():
    """Every class that can be bound, by its base, and every schedule and dataset; each name on the page exists."""
    classes = [
        found
        for package in (popgen.models, popgen.nn, popgen.training, popgen.evaluation, popgen.optim, popgen.datasets)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        for found in vars(importlib.import_module(module.name)).values()
        if inspect.isclass(found) and found.__module__ == module.name and not found.__name__.startswith("_")
    ]
    parts = {
        f"{found.__module__}.{found.__name__}"
        for found in classes
        if not inspect.isabstract(found)
        and (
            issubclass(found, BASES)
            or (dataclasses.is_dataclass(found) and found.__module__ == "popgen.optim.schedules")
            or (found.__module__.startswith("popgen.datasets.") and isinstance(vars(found).get("load"), FunctionType))
        )
        and found is not Dataset
    }
    listed = set(re.findall(r"`(popgen(?:\.\w+)*\.[A-Z]\w+)`", PAGES["docs/parts.md"]))
    assert len(parts) > 35 and parts <= listed, parts - listed
    for path in listed:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    for module in re.findall(r"^\| `(popgen[\w.]+)`", PAGES["docs/parts.md"], flags=re.M):
        parent, _, name = module.rpartition(".")
        assert hasattr(importlib.import_module(parent), name) or importlib.import_module(module), module
    for config_name in re.findall(r"`(\w+\.gin)`", PAGES["docs/parts.md"]):
        assert (REPOSITORY / "configs" / config_name).is_file(), config_name


def test_the_picture_of_the_layers_has_every_module():
    contract = configparser.ConfigParser()
    contract.read(REPOSITORY / "setup.cfg")
    modules = re.findall(r"\w+", contract["importlinter:contract:layers"]["layers"].replace("popgen.", ""))
    picture = re.search(r"^```\n(launch .*?)^```", PAGES["docs/extending.md"], flags=re.M | re.S)[1]
    assert set(modules) <= set(re.findall(r"\w+", picture)), set(modules) - set(re.findall(r"\w+", picture))
