"""The README's code runs as it stands: the library examples, and each thing of one's own in a real run."""

import dataclasses
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
import torch

from popgen import config
from popgen.datasets.images import ImageData, prepare_images
from popgen.experiment import run
from popgen.training.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("as_a_user")  # the reader's own classes need no annotations

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
FILES = {match[1]: body for _, body in BLOCKS if (match := re.match(r"# (\w+\.(?:py|gin))\n", body))}


@dataclasses.dataclass(frozen=True)
class Noise:
    """Random grey images of MNIST's size."""

    def load(self) -> ImageData:
        images = torch.randint(0, 256, (400, 784), dtype=torch.uint8)
        return prepare_images(images, images[:64], (28, 28), "dynamic", binarisation_seed=0)


def test_library_examples():
    namespace: dict = {}
    blocks = [body for language, body in BLOCKS if language == "python" and not body.startswith("# my_")]
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["log_p_z"].shape == (5, 100)
    assert namespace["state"].step == 2
    assert namespace["losses"].shape == (100,) and namespace["contrast"].shape == (6, 10)
    assert namespace["usage"].num_used > 1 and namespace["changes"]["codes"].shape == (128, 64)
    torch.testing.assert_close(namespace["one"], namespace["whole"][:, :, -1])
    assert namespace["geco_state"].multiplier > 1.0, "the target of the example is missed"


@pytest.mark.parametrize("name", ["my_model", "my_data", "my_loss"])
def test_ones_own(name, tmp_path, monkeypatch):
    code = [line for line in FILES[f"{name}.py"].splitlines()[1:] if line.strip()]
    assert len(code) < 15, "a reader's own part takes under fifteen lines"
    for suffix in (".py", ".gin"):
        (tmp_path / f"{name}{suffix}").write_text(FILES[f"{name}{suffix}"])
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (1200, 28, 28), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    loaded = config.load([f"{name}.gin"])
    experiment = dataclasses.replace(loaded.experiment, num_steps=2)
    if name != "my_data":
        experiment = dataclasses.replace(experiment, dataset=Noise())
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        assert run(experiment, directory, loaded.configuration).step == 2


def test_commands_name_files_and_flags_that_exist():
    for path in re.findall(r"--gin_file=(\S+)", README) + re.findall(r"\]\(((?:configs|docs|popgen)/[^)]+)\)", README):
        assert (REPOSITORY / path).is_file(), path
    sources = "".join(path.read_text() for path in (REPOSITORY / "launch").glob("*.py"))
    others = {"logdir", "nproc_per_node"}  # of TensorBoard and torchrun
    for flag in set(re.findall(r"--([a-z_]+)[=`]", README)) - others:
        assert f'"{flag}"' in sources, flag


def test_training_commands_in_the_readme_name_valid_configurations(tmp_path):
    """Each with its own bindings; a lone binding is one of any configuration."""
    lines = re.sub(r"\\\n", " ", README).splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python -m launch.train")]
    assert len(commands) >= 7
    for command in commands:
        flags = [word.partition("=")[::2] for word in command[3:] if word.startswith("--")]
        files, bindings = ([value for name, value in flags if name == f"--gin_{kind}"] for kind in ("file", "bindings"))
        config.load(files, bindings)
    alone = re.findall(r"`--gin_bindings='([^']+)'`", README)
    assert alone
    config.load(["configs/vamp.gin"], alone)


def test_ci_runs_the_two_commands_of_the_readme():
    commands = [body.strip() for language, body in BLOCKS if language == "shell"][:2]
    ci = (REPOSITORY / ".ci" / "run").read_text()
    for command in commands:
        assert command in ci
    assert shutil.which("bash")
