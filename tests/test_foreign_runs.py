"""Runs that somebody else wrote: what they could do to whoever evaluates them, tried, each refused in one line."""

import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

from launch import command
from popgen import config
from popgen.config.foreign import check_part, reading_only_of
from popgen.datasets.audio import WavFolder
from popgen.datasets.binary_mnist import BinaryMNIST
from popgen.datasets.mnist_rows import MNISTRows
from popgen.datasets.spoken_digits import SpokenDigits
from popgen.datasets.stroke_digits import StrokeDigits
from popgen.errors import CheckpointError, ConfigError, PopgenError, RunDirectoryError
from popgen.experiment import Experiment
from popgen.training import checkpoints
from popgen.training.run_directory import RunDirectory
from popgen.training.state import initial_state, state_to_tensors
from tests.commands import run_module

pytestmark = pytest.mark.usefixtures("as_a_user")

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted(f"configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.gin"))
SMALL = ["LATENT_DIM = 2", "HIDDEN_DIM = 4", "Experiment.device = 'cpu'"]
HEAD = "from __gin__ import dynamic_registration\nimport torch.nn\nimport torch.optim\nfrom popgen import experiment\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small run as training would write it; tests copy it."""
    loaded = config.load(["configs/vae.gin"], SMALL)
    directory = RunDirectory(tmp_path_factory.mktemp("written") / "run")
    with directory.locked():
        state = initial_state(loaded.experiment.model, torch.optim.Adam, seed=0)
        for name in ("best", "latest"):
            directory.save_checkpoint(name, state_to_tensors(state))
    directory.config_path.write_text(loaded.configuration.given)
    return directory.path


@pytest.fixture
def run(written: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A copy of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def evaluated(run: pathlib.Path, trust: bool = False) -> Experiment:
    """Returns what `launch.evaluate`, `sample` and `probe` build of a run."""
    return command.existing_run(str(run), "best", trust)[1]


def refusal(run: pathlib.Path, kind: type[PopgenError] = ConfigError) -> str:
    """Returns the one line with which a run is refused."""
    with pytest.raises(kind) as caught:
        evaluated(run)
    line = command.printable(str(caught.value))
    assert "\n" not in line and len(line) < 3_000
    return line


# --- what is allowed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_configs_save_is_built_as_it_was(name: str, tmp_path: pathlib.Path) -> None:
    loaded = config.load([name])
    (tmp_path / "config.gin").write_text(loaded.configuration.given)
    tensors = state_to_tensors(initial_state(loaded.experiment.model, torch.optim.SGD, seed=0))
    again = config.load_foreign(tmp_path / "config.gin", tensors)
    assert again.configuration == loaded.configuration and again.orphans == loaded.orphans
    pairs = zip(loaded.experiment.model.parameters(), again.experiment.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    "bindings",
    [
        ["Experiment.objective = @popgen.training.importance_objectives.NegativeIWAE()"],
        ["Experiment.learning_rate = @popgen.optim.schedules.CosineAnnealing()", "CosineAnnealing.num_steps = 9"],
        ["Experiment.dataset = @popgen.datasets.stroke_digits.StrokeDigits()"],
        ["Experiment.optimizer = @torch.optim.SGD", "SGD.lr = 0.5", "SGD.momentum = 0.9"],
        ["VAE.flow = @popgen.nn.flows.planar.PlanarFlow()", "PlanarFlow.latent_dim = 2", "PlanarFlow.num_flows = 1"],
    ],
)
def test_what_users_ordinarily_bind_is_built(bindings: list[str], run: pathlib.Path) -> None:
    bindings = [*bindings, "PlanarFlow.context_dim = 4"] if "PlanarFlow" in bindings[0] else bindings
    loaded = config.load(["configs/vae.gin"], [*SMALL, *bindings])
    (run / "config.gin").write_text(loaded.configuration.given)
    assert repr(evaluated(run)) == repr(loaded.experiment)


def test_the_user_s_own_training_names_what_it_likes(tmp_path: pathlib.Path) -> None:
    text = (
        HEAD
        + 'include "configs/vae.gin"\nimport popgen.models.vae\nexperiment.Experiment.seed = @torch.os.cpu_count()\n'
    )
    (tmp_path / "own.gin").write_text(text)
    assert config.load([tmp_path / "own.gin"]).experiment.seed == os.cpu_count()


# --- code ------------------------------------------------------------------------------------------------------------

CALLS = {
    "a function by way of torch": "SEED = @torch.os.makedirs()",
    "its argument alone": "torch.os.makedirs.name = 'trace'",
    "in a block": "torch.os.makedirs:\n    name = 'trace'",
    "in a list": "experiment.Experiment.pretrained = {'a': [1, (2, @torch.os.makedirs())]}",
    "as a key": "experiment.Experiment.pretrained = {@torch.os.makedirs(): 'a'}",
    "not called": "experiment.Experiment.optimizer = @torch.os.makedirs",
    "in a macro": "MACRO = @torch.os.makedirs()\nSEED = %MACRO",
    "in a scope": "SEED = @a/b/torch.os.makedirs()\na/torch.os.makedirs.name = 'trace'",
    "by an alias": "import torch.optim.adam as popgen\nSEED = @popgen.torch.os.makedirs()",
    "of popgen's imports": "import popgen.datasets.binary_mnist as b\nSEED = @b.os.makedirs()",
    "of builtins": "SEED = @experiment.__builtins__.exec()",
    "of a loader": "SEED = @experiment.__loader__.exec_module()",
    "of globals": "SEED = @experiment.run.__globals__.clear()",
    "a constructor": "experiment.Experiment.__init__.seed = 3",
    "pickles": "MODEL = @torch.load()\ntorch.load.f = 'trace'\ntorch.load.weights_only = False",
    "packages of the hub": "MODEL = @torch.hub.load()",
    "a scripted file": "MODEL = @torch.jit.load()",
    "a compiler": "SEED = @torch.utils.collect_env.run()",
    "a function of torch.nn": "SEED = @torch.nn.init.uniform_()",
    "a utility of torch.nn": "SEED = @torch.nn.utils.clip_grad_norm_()",
    "a method of a module": "SEED = @torch.nn.Module.apply()",
    "a method of an optimizer": "torch.optim.Optimizer.load_state_dict.state_dict = {}",
    "a wrapper of processes": "MODEL = @torch.nn.parallel.DistributedDataParallel()",
    "a module of torch.optim": ("import torch.optim.swa_utils\nMODEL = @torch.optim.swa_utils.AveragedModel()"),
    "TensorBoard's files": "from popgen import summaries\nSEED = @summaries.Writer()",
    "a run directory": "from popgen.training import run_directory as r\nSEED = @r.RunDirectory()",
    "a directory to clear": "from popgen.training import run_directory as r\nSEED = @r.RunDirectory.clear()",
    "a checkpoint to write": "from popgen.training import checkpoints\nSEED = @checkpoints.save()",
    "a table": "from popgen.evaluation import image_table as t\nSEED = @t.ImageTable()",
    "a record": "from popgen.training import records\nSEED = @records.EvaluationFiles()",
    "a configuration": "import popgen.config\nSEED = @popgen.config.load()",
    "a run": "SEED = @experiment.run()",
    "a download": "from popgen.datasets import spoken_digits\nSEED = @spoken_digits._download()",
    "a module's import": "from popgen.datasets import spoken_digits as d\nSEED = @d.shutil.rmtree()",
    "a reader": "from popgen.datasets import binary_mnist\nSEED = @binary_mnist.read_mnist_images()",
    "gin's singleton": "SEED = @a/gin.singleton()\na/gin.singleton.constructor = @experiment.Experiment",
    "gin's constant": "SEED = @gin.constant()",
    "gin's macro": "a/gin.macro.value = 3",
}


@pytest.mark.parametrize("attack", CALLS)
def test_nothing_is_called_but_what_describes_an_experiment(
    attack: str, run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("it was called")

    for module, name in ((os, "makedirs"), (shutil, "rmtree"), (subprocess, "getoutput"), (torch, "load")):
        if module is not torch:
            monkeypatch.setattr(module, name, called)
    hostile = (
        CALLS[attack].replace("SEED", "experiment.Experiment.seed").replace("MODEL", "experiment.Experiment.model")
    )
    (run / "config.gin").write_text(HEAD + (run / "config.gin").read_text().partition("\n")[2] + hostile + "\n")
    line = refusal(run)
    assert ("none of the models" in line and "--trust_config" in line) or "Couldn't resolve selector" in line, line
    assert not pathlib.Path("trace").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "import evil",
        "from evil import part",
        "import evil as popgen",
        "from popgen_evil import x",
        "import os",
        "import torch",
    ],
)
def test_nothing_is_imported_but_popgen_and_torch(
    statement: str, run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("evil", "popgen_evil"):
        (tmp_path / f"{name}.py").write_text("open('trace', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = (run / "config.gin").read_text()
    first, rest = text.split("\n", 1)
    (run / "config.gin").write_text(f"{first}\n{statement}\n{rest}")
    assert f"imports {statement.split()[1]}" in refusal(run) and "--trust_config" in refusal(run)
    (run / "config.gin").write_text(f"{statement}\n{text}")  # before anything else
    refusal(run)
    assert not (tmp_path / "trace").exists() and "evil" not in sys.modules


def test_where_a_class_says_it_is_from_is_not_believed() -> None:
    class Disguised(torch.nn.Module):
        pass

    for module in ("popgen.models.vae", "torch.nn.modules.linear"):
        Disguised.__module__ = module
        for name in ("Disguised", "VAE", "Linear"):
            Disguised.__name__ = name
            with pytest.raises(ConfigError, match="none of the models"):
                check_part("vae.VAE", [sys.modules[module], Disguised])


def test_an_error_s_text_imports_nothing(
    run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error is searched for names to suggest, and a configuration can write what it is searched for."""
    (tmp_path / "evil.py").write_text("open('trace', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = (
        "torch.nn.Conv1d.in_channels = 1\ntorch.nn.Conv1d.out_channels = 1\ntorch.nn.Conv1d.kernel_size = 1\n"
        "torch.nn.Conv1d.padding_mode = \"module 'evil' from x has no attribute y\"\n"
        "experiment.Experiment.model = @torch.nn.Conv1d()\n"
    )
    (run / "config.gin").write_text(HEAD + text)
    assert "padding_mode" in refusal(run)
    assert not (tmp_path / "trace").exists() and "evil" not in sys.modules


def test_a_flag_trusts_it(run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trusted_parts.py").write_text("from popgen.models.vae import VAE\nclass Own(VAE):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = (run / "config.gin").read_text().replace("vae.VAE", "trusted_parts.Own")
    (run / "config.gin").write_text(text.replace("import torch.optim", "import torch.optim\nimport trusted_parts"))
    assert "imports trusted_parts" in refusal(run)
    assert type(evaluated(run, trust=True).model).__name__ == "Own"


@pytest.mark.parametrize("name", ["evaluate", "sample", "probe"])
def test_the_commands_refuse_in_one_line(name: str, run: pathlib.Path) -> None:
    with (run / "config.gin").open("a") as file:
        file.write("experiment.Experiment.seed = @torch.os.makedirs()\ntorch.os.makedirs.name = 'trace'\n")
    extra = {"sample": ["--out=a.png"], "probe": ["--target=a", "--checkpoint=best"]}.get(name, [])
    done = run_module(f"launch.{name}", [f"--run_dir={run}", *extra])
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "torch.os.makedirs" in done.stderr and "--trust_config" in done.stderr
    assert not pathlib.Path("trace").exists()


# --- text ------------------------------------------------------------------------------------------------------------


def laughs(depth: int) -> str:
    """Returns macros, of which each is the next one four times over."""
    return "\n".join(f"M{i} = [%M{i + 1}, %M{i + 1}, %M{i + 1}, %M{i + 1}]" for i in range(depth)) + f"\nM{depth} = 1\n"


TEXTS = {
    "another file": (HEAD + 'include "configs/vae.gin"', "includes 'configs/vae.gin'"),
    "a secret file": (HEAD + 'include "/etc/passwd"', "includes '/etc/passwd'"),
    "itself": (HEAD + 'include "run/config.gin"', "includes"),
    "no registration": ("Experiment.seed = 3", "does not begin with"),
    "late registration": ("import torch.optim\n" + HEAD, "does not begin with"),
    "another feature": ("from __gin__ import other", "other"),
    "nothing": ("", "nothing to run"),
    "registration alone": (HEAD, "nothing to run"),
    "a macro of itself": (HEAD + "A = %A\nexperiment.Experiment.seed = %A", "of itself"),
    "macros of one another": (HEAD + "A = %B\nB = [%A]\nexperiment.Experiment.seed = %A", "of itself"),
    "a part of itself": (HEAD + "experiment.Experiment.model = @experiment.Experiment()", "of itself"),
    "macros of macros": (HEAD + laughs(30) + "experiment.Experiment.pretrained = %M0", "more than 100,000 values"),
    "macros as keys": (HEAD + laughs(7) + "experiment.Experiment.pretrained = {%M0: 1, (%M0, %M0): 2}", "values"),
    "deep lists": (HEAD + f"experiment.Experiment.seed = {'[' * 9_000}{']' * 9_000}", "recursion"),
    "deep tuples": (HEAD + f"experiment.Experiment.seed = {'(' * 20_000}", "cannot parse"),
    "long": (HEAD + "# " + "x" * 70_000, "longer than 65,536 bytes"),
    "many digits": (HEAD + f"experiment.Experiment.seed = {'9' * 5_000}", "cannot parse"),
    "a large seed": (HEAD + f"experiment.Experiment.seed = {'9' * 4_000}", "cannot build"),
    "no text": (b"\xff\xfe\0".decode("latin1"), "cannot"),
    "an unknown module": (HEAD + "from popgen import nothing_there", "nothing_there"),
    "an unknown name": (HEAD + "experiment.Experimint.seed = 3", "Experimint"),
    "an unhashable key": (HEAD + "experiment.Experiment.pretrained = {[1]: 2}", "cannot parse"),
    "required": (HEAD + "experiment.Experiment.seed = %gin.REQUIRED", "not subsequently overridden"),
    "an unknown macro": (HEAD + "experiment.Experiment.seed = %NOTHING", "NOTHING"),
    "escapes": (HEAD + "experiment.Experiment.\x1b[31m = 3", "cannot parse"),
    "half a line": (HEAD + "experiment.Experiment.seed =", "cannot parse"),
    "half a string": (HEAD + "experiment.Experiment.device = '''a", "cannot parse"),
    "an odd indent": (HEAD + "  a = 1\n b = 2", "cannot parse"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_odd_texts_are_refused_soon(name: str, run: pathlib.Path) -> None:
    text, wanted = TEXTS[name]
    (run / "config.gin").write_text(text)
    started = time.perf_counter()
    assert wanted in refusal(run)
    assert time.perf_counter() - started < 10.0


def test_a_text_that_is_not_unicode(run: pathlib.Path) -> None:
    (run / "config.gin").write_bytes(b"# \xff\n" + (run / "config.gin").read_bytes())
    assert "cannot read the configuration" in refusal(run)


def test_a_hostile_text_is_compared_without_being_run(run: pathlib.Path) -> None:
    for text, _ in TEXTS.values():
        try:
            config.differences(text, "Experiment.seed = 3")
        except ConfigError as error:
            assert "\n" not in str(error)


# --- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {
    "a terabyte": ("HIDDEN_DIM = 4", "HIDDEN_DIM = 1_000_000_000_000"),
    "more than numbers go": ("HIDDEN_DIM = 4", f"HIDDEN_DIM = {10**30}"),
    "what a machine could have": ("HIDDEN_DIM = 4", "HIDDEN_DIM = 100_000"),
    "components": (
        "vae.VAE.prior = @priors.StandardNormalPrior()",
        "vae.VAE.prior = @popgen.nn.vamp_prior.VampPrior()\npopgen.nn.vamp_prior.VampPrior.input_dim = 784\n"
        "popgen.nn.vamp_prior.VampPrior.num_components = 1_000_000_000_000",
    ),
    "parts without end": (
        "vae.VAE.flow = None",
        "vae.VAE.flow = @popgen.nn.flows.planar.PlanarFlow()\npopgen.nn.flows.planar.PlanarFlow.latent_dim = 2\n"
        "popgen.nn.flows.planar.PlanarFlow.context_dim = 4\n"
        "popgen.nn.flows.planar.PlanarFlow.num_flows = 1_000_000_000",
    ),
    "where it is not compared": (
        "vae.VAE.flow = None",
        "vae.VAE.flow = @torch.nn.Linear()\ntorch.nn.Linear.in_features = 100_000\n"
        "torch.nn.Linear.out_features = 100_000\ntorch.nn.Linear.device = 'cpu'",
    ),
    "dilations without end": (
        "vae.VAE.flow = None",
        "vae.VAE.flow = @popgen.nn.cpc.CausalConvContext()\npopgen.nn.cpc.CausalConvContext.input_dim = 1\n"
        "popgen.nn.cpc.CausalConvContext.context_dim = 1\n"
        "popgen.nn.cpc.CausalConvContext.num_layers = 1_000_000_000",
    ),
    "layers without end": (
        "vae.VAE.flow = None",
        "vae.VAE.flow = @popgen.nn.pixelcnn.GatedPixelCNN()\npopgen.nn.pixelcnn.GatedPixelCNN.num_codes = 2\n"
        "popgen.nn.pixelcnn.GatedPixelCNN.map_shape = (1, 1)\npopgen.nn.pixelcnn.GatedPixelCNN.hidden_dim = 1\n"
        "popgen.nn.pixelcnn.GatedPixelCNN.num_layers = 1_000_000_000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_no_more_is_built_than_the_checkpoint_holds(name: str, run: pathlib.Path) -> None:
    old, new = SIZES[name]
    text = (run / "config.gin").read_text()
    assert old in text, text
    modules = ("popgen.nn.vamp_prior", "popgen.nn.flows.planar", "popgen.nn.pixelcnn", "popgen.nn.cpc", "torch.nn")
    imports = "".join(f"import {module}\n" for module in modules)
    text = text.replace(old, new).replace("import torch.optim\n", f"import torch.optim\n{imports}")
    (run / "config.gin").write_text(text)
    line = refusal(run)
    wanted = (
        "cannot build the experiment" if name == "more than numbers go" else "builds more than its checkpoint holds"
    )
    assert wanted in line, line


# --- what is read and written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [BinaryMNIST, MNISTRows, SpokenDigits])
def test_nothing_is_downloaded_to_where_a_configuration_says(dataset: type) -> None:
    assert reading_only_of(dataset(data_dir="/elsewhere")) == dataset(data_dir="/elsewhere", download=False)
    assert reading_only_of(dataset()) == dataset()  # to the place that the user chose


def test_nothing_is_cached_where_a_configuration_says() -> None:
    assert reading_only_of(StrokeDigits(data_dir="/elsewhere", seed=3)) == StrokeDigits(seed=3)
    assert reading_only_of(WavFolder("/elsewhere")) == WavFolder("/elsewhere")  # writes nothing


def test_a_run_s_own_data_dir_only_reads(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with (run / "config.gin").open("a") as file:
        file.write(f"binary_mnist.BinaryMNIST.data_dir = '{tmp_path}/new'\n")
    experiment = evaluated(run)
    with pytest.raises(PopgenError, match="downloading is off"):
        experiment.dataset.load()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["/etc", "../../x", "\\x00"])
def test_pretrained_runs_are_not_looked_for(place: str, run: pathlib.Path) -> None:
    """Their weights are in the checkpoint; only training reads them, and then tensors alone."""
    with (run / "config.gin").open("a") as file:
        file.write(f"experiment.Experiment.pretrained = {{'encoder': '{place}'}}\n")
    assert list(evaluated(run).pretrained) == ["encoder"]


@pytest.mark.parametrize(
    "name", ["evaluation_step00000000_raw_5x5.json", "checkpoints/best.ckpt", "checkpoints", "config.gin"]
)
def test_links_are_refused(name: str, run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What an evaluation writes to a link would land where the link points."""
    elsewhere = tmp_path / "elsewhere"
    if (run / name).exists():
        shutil.move(run / name, elsewhere)
    else:
        elsewhere.write_text("the user's own")
    (run / name).symlink_to(elsewhere)
    assert f"{name} is a link or a device" in refusal(run, RunDirectoryError)


def test_pipes_are_refused(run: pathlib.Path) -> None:
    os.mkfifo(run / "evaluation_step00000000_raw_5x5_images.csv")
    assert "is a link or a device" in refusal(run, RunDirectoryError)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "best/../../x", "9" * 5_000, "", "\0", "latest.ckpt"])
def test_names_of_checkpoints_name_no_paths(name: str, run: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint must be best, latest, previous or a step"):
        command.existing_run(str(run), name, trust_config=False)


def test_messages_cannot_steer_a_terminal() -> None:
    assert command.printable("a\x1b[2Jb\r\n\u202ec\ud800é") == "a\\x1b[2Jb\\r\\n\\u202ec\\ud800é"


# --- checkpoints -----------------------------------------------------------------------------------------------------


def sealed(archive: bytes) -> bytes:
    """Returns an archive with the header that popgen writes: an attacker can form a digest too."""
    header = {"format": checkpoints.FORMAT, "version": 1, "sha256": hashlib.sha256(archive).hexdigest()}
    comment = json.dumps(header).encode()
    return archive[:-2] + struct.pack("<H", len(comment)) + comment


def saved(contents: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def entries(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


class Payload:
    """Pickled, it is a call."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, ("trace",)


def itself() -> dict[str, Any]:
    contents: dict[str, Any] = {"step": 1}
    contents["again"] = [contents, contents]
    return contents


def shared(depth: int) -> list:
    return [shared(depth - 1)] * 2 if depth else [1]


def larger_storage() -> bytes:
    """Returns an archive whose pickle says that a storage of 8 bytes has 16,384."""
    parts = entries(saved({"w": torch.arange(2.0)}))
    (name,) = (name for name in parts if name.endswith("data.pkl"))
    pickled = parts[name]
    at = pickled.index(b"K\x02", pickled.index(b"X\x03\0\0\0cpu"))
    return zipped({**parts, name: pickled[:at] + b"M\0\x10" + pickled[at + 2 :]})


def overlapping() -> bytes:
    """Returns an archive in which many entries are the same bytes of the file."""
    archive = zipped({"archive/data.pkl": saved({})[:10], "archive/data/0": bytes(100_000)})
    end = archive.rindex(b"PK\5\6")
    directory = archive[int.from_bytes(archive[end + 16 : end + 20], "little") : end]
    last = directory[directory.rindex(b"PK\1\2") :]
    many = directory + b"".join(last[:-1] + bytes([65 + i]) for i in range(50))
    return (
        archive[: end - len(directory)]
        + many
        + archive[end : end + 8]
        + struct.pack("<HHI", 52, 52, len(many))
        + archive[end + 16 :]
    )


SPARSE = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (10**9,), check_invariants=True)
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "code": lambda: saved({"step": Payload()}),
    "a module": lambda: saved({"step": torch.nn.Linear(1, 1)}),
    "a pickle alone": lambda: zipped({"archive/data.pkl": pickle.dumps(Payload()), "archive/version": b"3"}),
    "a scripted module": lambda: zipped({f"archive/{name}": b"3" for name in ("constants.pkl", "data.pkl", "version")}),
    "a list": lambda: saved([1, 2]),
    "a tensor": lambda: saved(torch.ones(2)),
    "nothing": lambda: saved(None),
    "an empty archive": lambda: zipped({}),
    "another archive": lambda: zipped({"a": b"b"}),
    "a bomb": lambda: zipped({"archive/data.pkl": bytes(10**7), "archive/version": b"3"}, zipfile.ZIP_DEFLATED),
    "an archive that overlaps": overlapping,
    "another format before it": lambda: pickle.dumps(torch.ones(2)) + saved({}),
    "a shape of a terabyte": lambda: saved({"step": 1, "parameters": {"a": torch.ones(1).expand(10**12)}}),
    "a shape without memory": lambda: saved({"parameters": {"a": torch.empty(10**12, device="meta")}}),
    "a storage larger than it is": larger_storage,
    "sparse": lambda: saved({"parameters": {"a": SPARSE}}),
    "what holds itself": lambda: saved(itself()),
    "what holds one thing many times": lambda: saved({"a": shared(30)}),
    "depth": lambda: saved({"a": json.loads("[" * 60 + "]" * 60)}),
    "a large number": lambda: saved({"step": 10**5_000}),
    "a complex number": lambda: saved({"step": 1j}),
    "a tuple as key": lambda: saved({(1, 2): 3}),
    "a type": lambda: saved({"step": torch.float32}),
}  # fmt: skip

PACKED = ("an empty archive", "a bomb", "an archive that overlaps", "another format before it")
REFUSALS = {"what holds itself": "holds no training state"} | dict.fromkeys(PACKED, "is not as torch writes it")


@pytest.mark.parametrize("name", ARCHIVES)
def test_no_checkpoint_is_more_than_its_bytes(name: str, run: pathlib.Path) -> None:
    (run / "checkpoints" / "best.ckpt").write_bytes(sealed(ARCHIVES[name]()))
    started = time.perf_counter()
    line = refusal(run, CheckpointError)
    assert REFUSALS.get(name, "holds more than tensors, numbers and strings") in line
    assert "best.ckpt" in line and time.perf_counter() - started < 5.0
    assert not pathlib.Path("trace").exists()


def test_the_attacks_on_checkpoints_would_work(run: pathlib.Path) -> None:
    """They are refused for what they are, and not because their file is broken."""
    (run / "checkpoints" / "best.ckpt").write_bytes(sealed(saved({**RunDirectory(run).load_checkpoint("best")})))
    evaluated(run)
    torch.load(io.BytesIO(ARCHIVES["code"]()), weights_only=False)
    assert pathlib.Path("trace").exists()


FIELDS: dict[str, list[Any]] = {
    "step": ["3", -1, 2.5, None, True, torch.ones(1)],
    "parameters": [[], None, {"a": 1}, {"a": "b"}, {3: torch.ones(1)}],
    "buffers": [[], None, {"a": [torch.ones(1)]}],
    "auxiliary": [[], None, {"a": 1.0}],
    "optimizer": [None, {}, {"state": []}, *({"state": {}, "param_groups": groups} for groups in ({}, [{}], [3]))],
    "optimizer_name": [3, None],
    "optimizer_defaults": [[], None],
    "weight_average": [[], {"a": 3}],
    "generators": [None, {"a": torch.ones(3)}, {"a": 1}],
    "best_loss": ["low", None, torch.ones(1)],
    "best_step": ["3", -1, None],
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_another_kind_are_named(name: str, run: pathlib.Path) -> None:
    path, good = run / "checkpoints" / "best.ckpt", RunDirectory(run).load_checkpoint("best")
    for value in FIELDS[name]:
        checkpoints.save(path, {**good, name: value})
        assert f"its {name!r} must be" in refusal(run, CheckpointError), value
    checkpoints.save(path, {key: value for key, value in good.items() if key != name})
    if name in checkpoints.LATER_FIELDS:
        evaluated(run)
    else:
        assert f"it has no {name!r}" in refusal(run, CheckpointError)


def test_a_checkpoint_of_another_model_is_one_line(run: pathlib.Path, written: pathlib.Path) -> None:
    path, good = run / "checkpoints" / "best.ckpt", RunDirectory(run).load_checkpoint("best")
    checkpoints.save(path, {**good, "parameters": {}, "buffers": {}})
    assert evaluated(run)  # small enough to build; the comparison is `model_of_checkpoint`'s
    assert isinstance(RunDirectory(written).load_checkpoint("best"), dict)
