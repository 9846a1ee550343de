"""Configuration: short names, overrides, orphans, saving and restoring, and one clear line for every mistake."""

import dataclasses
import math
import pathlib
import textwrap

import pytest
import torch

from popgen import config
from popgen.datasets.images import ImageData, prepare_images
from popgen.datasets.sequences import SequenceData, Sequences
from popgen.datasets.stroke_digits import StrokeDigits
from popgen.errors import ArgumentError, ConfigError, PopgenError
from popgen.experiment import run
from popgen.models.cpc import CPC
from popgen.models.image_model import ImageModel
from popgen.nn.vamp_prior import VampPrior
from popgen.training.run_directory import RunDirectory
from popgen.training.state import initial_state, state_to_tensors

pytestmark = pytest.mark.usefixtures("as_a_user")

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted(f"configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.gin"))
VAE = ["configs/vae.gin"]
# What a config replaces of the one that it includes.
REPLACED = {
    "configs/geco.gin": ["NegativeELBO.beta", "SigmoidAnnealing.rate"],
    "configs/vqvae_prior.gin": ["VQVAELoss.commitment"],
    **{f"configs/{name}_best.gin": ["Adam.lr", "NegativeELBO.beta"] for name in ("vae", "vamp", "vamp_hsnf")},
    "configs/vamp_hsnf_tuned.gin": ["Adam.lr", "NegativeELBO.beta", "SigmoidAnnealing.rate"],
}


@pytest.fixture
def gin_file(tmp_path):
    """Writes a gin file with dynamic registration and the VAE's module imported; returns its path."""

    def write(text: str, name: str = "own.gin") -> pathlib.Path:
        head = "from __gin__ import dynamic_registration\nfrom popgen.models import vae\n"
        path = tmp_path / name
        path.write_text(head + textwrap.dedent(text))
        return path

    return write


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_and_leaves_nothing_unused_but_what_it_replaces(name):
    loaded = config.load([name])
    assert loaded.orphans == REPLACED.get(name, [])
    sizes = {"cpc_mnist": 64, "cpc_speech": 24, "wavenet_quickstart": 4, "wavenet_speech": 8}
    assert loaded.experiment.batch_size == sizes.get(pathlib.Path(name).stem, 100)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_says_what_a_reader_looks_for(name):
    text = (REPOSITORY / name).read_text()
    assert "# Command:   python -m launch.train --gin_file=" + name in text
    assert all(f"\n# {entry}: " in text for entry in ("Evaluate", "Expected", "Takes")) and "# Paper" in text
    macros = [line for line in text.splitlines() if line.split(" = ")[0].isupper()]
    assert len(macros) <= 5
    assert text.count("\ninclude ") <= 2


def test_included_configs_include_nothing_themselves():
    for name in CONFIGS:
        for line in (REPOSITORY / name).read_text().splitlines():
            if line.startswith("include "):
                assert "\ninclude " not in (REPOSITORY / line.split('"')[1]).read_text()


def test_headline_settings():
    experiment = config.load(["configs/vamp_hsnf.gin"]).experiment
    model = experiment.model
    assert (experiment.num_steps, experiment.batch_size) == (1_000_000, 100)
    assert (model.input_dim, model.latent_dim, model.encoder.context_dim) == (784, 40, 300)
    assert model.prior.logits.shape == (500, 784)
    assert (model.flow.num_flows, model.flow.num_reflections) == (4, 8)
    for step in (0, 1, 10_000, 1_000_000):
        expected = 2 * (torch.sigmoid(torch.tensor(1e-4 * step, dtype=torch.float64)) - 0.5)
        assert experiment.objective.beta(step) == pytest.approx(expected.item(), abs=1e-12)
    optimizer = experiment.optimizer(model.parameters())
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.param_groups[0]["lr"] == 2e-4


@pytest.mark.parametrize("name", ["vae", "vamp", "vamp_hsnf"])
def test_a_best_config_trains_the_same_model_otherwise(name):
    plain, best = (config.load([f"configs/{config_name}.gin"]).experiment for config_name in (name, f"{name}_best"))
    assert str(best.model) == str(plain.model)
    shapes = [{name: p.shape for name, p in e.model.named_parameters()} for e in (plain, best)]
    assert shapes[0] == shapes[1]
    assert best.learning_rate(0) == 1e-3 and best.learning_rate(best.num_steps) == 0.0
    assert best.objective.num_samples == best.evaluator.selection_samples == 5
    assert best.objective.beta == plain.objective.beta
    assert best.selection_split == "validation" and best.dataset.validation_size == 5_000
    if name != "vae":
        assert (plain.model.prior.initialisation, best.model.prior.initialisation) == ("uniform", "data")


def test_quickstart_is_the_headline_model_annealed_over_the_whole_run():
    short, long = (config.load([f"configs/{name}.gin"]).experiment for name in ("quickstart", "vamp_hsnf"))
    assert isinstance(short.dataset, StrokeDigits)
    shapes = [{name: p.shape for name, p in e.model.named_parameters()} for e in (short, long)]
    assert shapes[0] == shapes[1]
    half, end = (short.objective.beta(step) for step in (short.num_steps // 2, short.num_steps))
    assert half < 0.8 and 0.95 < end < 1.0


def test_short_names_and_parts_that_the_file_does_not_mention():
    bindings = ["Experiment.seed = 3", "Experiment.optimizer = @torch.optim.SGD", "SGD.lr = 0.5"]
    loaded = config.load(VAE, bindings)
    optimizer = loaded.experiment.optimizer(loaded.experiment.model.parameters())
    assert loaded.experiment.seed == 3
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["lr"] == 0.5
    assert loaded.orphans == ["Adam.fused", "Adam.lr"]


def test_a_short_name_may_come_before_the_binding_that_names_the_part_in_full():
    bindings = ["SGD.lr = 0.5", "Experiment.optimizer = @torch.optim.SGD"]
    loaded = [config.load(VAE, order) for order in (bindings, bindings[::-1])]
    assert loaded[0].configuration == loaded[1].configuration and loaded[0].configuration.settings["SGD.lr"] == 0.5


def test_what_is_loaded_later_changes_nothing():
    """The optimizer's options are those of its own configuration, whatever gin has parsed since."""
    loaded = [
        config.load(VAE, ["Adam.lr = 1e-2"]),
        config.load(VAE, ["Adam.lr = 1e-3", "Adam.betas = (0.5, 0.6)"]),
        config.load(VAE, ["Experiment.optimizer = @torch.optim.SGD", "SGD.lr = 0.5"]),
        config.load(VAE, ["Experiment.optimizer = @fine/torch.optim.Adam", "fine/Adam.eps = 1e-3"]),
    ]
    found = [one.experiment.optimizer(one.experiment.model.parameters()) for one in loaded]
    assert [optimizer.defaults["lr"] for optimizer in found] == [1e-2, 1e-3, 0.5, 2e-4]
    assert [optimizer.defaults.get("eps") for optimizer in found] == [1e-8, 1e-8, None, 1e-3]
    assert found[0].defaults["betas"] == (0.9, 0.999) and found[1].defaults["betas"] == (0.5, 0.6)
    adam = torch.optim.Adam
    assert [type(optimizer) for optimizer in found] == [adam, adam, torch.optim.SGD, adam]


def test_a_rate_that_a_schedule_replaces_is_not_used():
    best = ["configs/vae_best.gin"]
    with pytest.raises(ConfigError, match=r"nothing uses the binding 'Adam\.lr = 123\.0'"):
        config.load(best, ["Adam.lr = 123.0"])
    assert "Adam.lr" in config.load(best).orphans


def test_a_part_named_by_its_module_alone():
    bindings = ["VAE.prior = @popgen.nn.vamp_prior.VampPrior()", "VampPrior.input_dim = %INPUT_DIM"]
    assert isinstance(config.load(VAE, bindings).experiment.model.prior, VampPrior)


def test_macros_reach_every_part():
    model = config.load(VAE, ["LATENT_DIM = 7"]).experiment.model
    assert (model.encoder.latent_dim, model.decoder.latent_dim) == (7, 7)


def test_later_bindings_and_files_win(gin_file):
    own = gin_file("from popgen import experiment\nexperiment.Experiment.num_steps = 11\n")
    assert config.load([*VAE, own]).experiment.num_steps == 11
    assert (
        config.load([*VAE, own], ["Experiment.num_steps = 12", "Experiment.num_steps = 13"]).experiment.num_steps == 13
    )


def test_a_class_of_ones_own_by_import(gin_file, tmp_path, monkeypatch):
    (tmp_path / "own_decoders.py").write_text(
        "from popgen.models.vae import BernoulliDecoder\nclass OwnDecoder(BernoulliDecoder):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = gin_file(
        """
        import own_decoders
        include "configs/vae.gin"
        vae.VAE.decoder = @own_decoders.OwnDecoder()
        own_decoders.OwnDecoder.latent_dim = %LATENT_DIM
        own_decoders.OwnDecoder.output_dim = %INPUT_DIM
        """
    )
    loaded = config.load([own])
    assert type(loaded.experiment.model.decoder).__name__ == "OwnDecoder"
    assert loaded.orphans == [f"BernoulliDecoder.{name}" for name in ("hidden_dim", "latent_dim", "output_dim")]


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_text_describes_the_same_experiment(name, tmp_path):
    loaded = config.load([name], ["Experiment.num_steps = 5", "Experiment.seed = 2"])
    saved = tmp_path / "config.gin"
    saved.write_text(loaded.configuration.given)
    again = config.load([saved])
    assert again.configuration == loaded.configuration
    assert config.differences(again.configuration.given, loaded.configuration.given) == []
    for first, second in zip(loaded.experiment.model.parameters(), again.experiment.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_the_seed_alone_decides_the_first_weights():
    torch.manual_seed(1)
    first = config.load(VAE, ["Experiment.seed = 5"]).experiment.model
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = config.load(VAE, ["Experiment.seed = 5"]).experiment.model
    other = config.load(VAE, ["Experiment.seed = 6"]).experiment.model
    weights = [model.decoder.logits.weight for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "building a model must not touch the global random state"


def test_settings_are_what_was_bound_and_used():
    bindings = ["Experiment.optimizer = @torch.optim.SGD", "SGD.lr = 0.5", "Experiment.max_gradient_norm = None"]
    settings = config.load(VAE, bindings).configuration.settings
    assert settings["Experiment.max_gradient_norm"] == "None"
    assert settings["SGD.lr"] == 0.5 and settings["LATENT_DIM"] == 40 and settings["VAE.encoder"] == "GaussianEncoder"
    assert "Adam.lr" not in settings and "SGD.momentum" not in settings


def test_a_configuration_on_disk_that_is_no_text_is_named(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    write_best_checkpoint(directory.path, config.load(VAE).experiment.model)
    directory.save_checkpoint("latest", directory.load_checkpoint("best"))
    directory.config_path.write_bytes(b"Experiment.seed = 3 \xff")
    with pytest.raises(ConfigError, match="cannot read the configuration .*config.gin: 'utf-8' codec can't decode"):
        config.changes_since(directory, "Experiment.seed = 3")


def test_differences_name_each_binding():
    old, new = (
        config.load(VAE, bindings).configuration.given
        for bindings in (["Experiment.seed = 1"], ["Experiment.num_steps = 9", "VAE.flow = None"])
    )
    assert config.differences(old, new) == [
        "experiment.Experiment.num_steps: 1000000 -> 9",
        "experiment.Experiment.seed: 1 -> 0",
    ]


def test_no_gin_frame_survives_the_build():
    experiment = config.load(["configs/vamp_hsnf.gin"]).experiment
    for part in (experiment.model, experiment.model.flow, experiment.objective, experiment.objective.beta):
        assert type(part).__module__.startswith("popgen.")
        assert "gin" not in type(part).__call__.__module__


BAD_BINDINGS = {
    "Experimnt.num_steps = 3": (ConfigError, "'Experimnt'", "did you mean Experiment?"),
    "Experiment.num_step = 3": (ConfigError, "'num_step'", "did you mean num_steps or num_replicas?"),
    'Experiment.num_steps = "nine"': (ArgumentError, "Experiment.num_steps", "integer of at least 1, got 'nine'"),
    "Experiment.num_steps = nine": (ConfigError, "Experiment.num_steps = nine", "text in quotes"),
    "Experiment.num_steps = 1e4": (ArgumentError, "Experiment.num_steps", "got 10000.0"),
    "Experiment.num_steps = 0": (ArgumentError, "Experiment.num_steps", "at least 1"),
    "LATENT_DMI = 3": (ConfigError, "'LATENT_DMI'", "LATENT_DIM"),
    "GaussianEncoder.latent_dim = %LATNT": (ConfigError, "'LATNT'", "LATENT_DIM"),
    "OwnFlow.num_flows = 3": (ConfigError, "'OwnFlow'", "named with their module"),
    "popgen.nn.vamp_prior.VampPrior.num_components = 3": (ConfigError, "nothing uses", "made of Adam"),
    "scope/Experiment.seed = 3": (ConfigError, "nothing uses", "scope/Experiment.seed"),
    "Experiment.optimizer = @torch.optim.SGDD": (ConfigError, "'SGDD'", "did you mean SGD"),
    "Experiment.optimizer = @nowhere.SGD": (ConfigError, "'nowhere.SGD'", "@torch.optim.SGD"),
    "Experiment.model = @vae.VAE": (
        ArgumentError,
        "Experiment.model",
        "a Model (see popgen.models.model), such as @popgen.models.vae.VAE()",
    ),
    "Experiment.dataset = 3": (ArgumentError, "Experiment.dataset", "load() method"),
    "Experiment.selection_split = 'train'": (ArgumentError, "Experiment.selection_split", "test, validation"),
    "Experiment.device = 'cudaa'": (ArgumentError, "Experiment.device", "'cudaa'"),
    "VAE.encoder = 3": (ArgumentError, "VAE.encoder", "torch.nn.Module"),
    "GaussianEncoder.latent_dim = 20": (ArgumentError, "decoder.latent_dim is 40", "encoder.latent_dim is 20"),
    "LATENT_DIM = 'x'": (ArgumentError, "latent_dim", "integer of at least 1, got 'x'"),
    "Adam.lr = 'fast'": (ConfigError, "Adam", "lr = 'fast'"),
    "Adam.lr = -1.0": (ConfigError, "Adam", "Invalid learning rate: -1.0"),
    "NegativeELBO.beta = 0.5": (ArgumentError, "NegativeELBO.beta", "a schedule"),
    "BinaryMNIST.protocol = 'dynamical'": (ArgumentError, "BinaryMNIST.protocol", "dynamic, fixed, threshold"),
    "VAE.flow = (1,": (ConfigError, "cannot parse the binding 'VAE.flow = (1,'", "it should look like"),
    "import os": (ConfigError, "import os", "belong in a file"),
    "num_steps = 30": (ConfigError, "'num_steps = 30'", "the part that it is of: Experiment.num_steps"),
    "Experiment.model = @vae.GaussianEncoder()": (ArgumentError, "got GaussianEncoder"),
    "VAE.prior = @popgen.nn.vamp_prior.VampPrior()": (ConfigError, "'input_dim' (in VampPrior, bound: nothing)"),
}


@pytest.mark.parametrize("binding", BAD_BINDINGS)
def test_a_bad_binding_is_one_line_that_names_it_and_what_would_be_right(binding):
    kind, *wanted = BAD_BINDINGS[binding]
    with pytest.raises(kind) as caught:
        config.load(VAE, [binding])
    message = str(caught.value)
    assert "\n" not in message
    for part in wanted:
        assert part in message


BAD_FILES = {
    'include "configs/vaee.gin"': ("configs/vaee.gin", "configs/vae.gin"),
    'include "configs/vae.gin"\nvae.VAEE.flow = None': ("VAEE", "did you mean VAE?"),
    'include "configs/vae.gin"\nvae.VAE.flaw = None': ("'flaw'", "did you mean flow?"),
    'include "configs/vae.gin"\nvae.VAE.flow = %FLOW': ("'FLOW", "LATENT_DIM"),
    'include "configs/vae.gin"\nfoo.VAE.flow = None': ("'foo'", "import its module"),
    'import torch.optim\ninclude "configs/vae.gin"\nSGD.lr = 0.1': ("'SGD'", "as in torch.optim.SGD"),
    'include "configs/vae.gin"\nvae.VAE.flow =': ("Unable to parse value", "line 4"),
    'include "configs/vae.gin"\nvae.VAE.flow = (1,\n': ("cannot parse", "a bracket or a quote is not closed"),
    'include "configs/vae.gin"\nimport not_a_module': ("not_a_module", "line 4"),
    "vae.VAE.flow = None": ("popgen.experiment.Experiment", "nothing to run"),
    'include "configs/vae.gin"\nvae.VAE.decoder = %gin.REQUIRED': ("VAE.decoder", "not subsequently overridden"),
    "from popgen import experiment\nexperiment.Experiment.num_steps = 3": ("'model'", "'dataset'"),
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it_and_what_would_be_right(text, gin_file):
    with pytest.raises(ConfigError) as caught:
        config.load([gin_file(text)])
    message = str(caught.value)
    assert "\n" not in message
    for part in BAD_FILES[text]:
        assert part in message


def test_a_missing_file_and_files_that_include_one_another(gin_file, tmp_path):
    with pytest.raises(ConfigError, match="no config file 'configs/vamp_hsn.gin'.*configs/vamp_hsnf.gin"):
        config.load(["configs/vamp_hsn.gin"])
    first = gin_file(f'include "{tmp_path}/second.gin"', "first.gin")
    gin_file(f'include "{tmp_path}/first.gin"', "second.gin")
    with pytest.raises(ConfigError, match="includes itself"):
        config.load([first])


@pytest.mark.parametrize("text", ["A = %B\nB = %A\n", "A = [%A]\n"])
def test_macros_of_one_another_are_named(gin_file, text):
    path = gin_file(f'include "configs/vae.gin"\n{text}\nLATENT_DIM = %A\n', "cyclic.gin")
    with pytest.raises(ConfigError, match="the configuration makes A of itself"):
        config.load([path])


def test_configs_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load(["configs/vamp.gin"]).experiment.batch_size == 100


def test_a_short_name_that_two_parts_share_is_reported_as_such(gin_file, tmp_path, monkeypatch):
    (tmp_path / "namesakes.py").write_text(
        "from popgen.nn.priors import StandardNormalPrior as Base\nclass StandardNormalPrior(Base):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = gin_file('import namesakes\ninclude "configs/vae.gin"\nvae.VAE.prior = @namesakes.StandardNormalPrior()\n')
    with pytest.raises(ConfigError, match=r"(?i)ambiguous selector 'StandardNormalPrior'"):
        config.load([own], ["StandardNormalPrior.size = 3"])


def test_a_module_whose_own_import_fails_is_named_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_dependency.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="^cannot import broken_dependency: .*No module named 'not_installed_any"):
        config.load(["configs/vae.gin"], ["Experiment.learning_rate = @broken_dependency.rate"])


def test_an_error_without_a_text_is_named(gin_file, tmp_path, monkeypatch):
    (tmp_path / "asserting_parts.py").write_text(
        "class Asserting:\n    def __init__(self, size):\n        assert size == 4\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = gin_file(
        'import asserting_parts\ninclude "configs/vae.gin"\nvae.VAE.flow = @asserting_parts.Asserting()\n'
        "asserting_parts.Asserting.size = 3\n"
    )
    with pytest.raises(ConfigError, match=r"the experiment: AssertionError \(in Asserting, bound: size = 3"):
        config.load([own])


def test_an_error_in_ones_own_class_is_reported_with_its_values(gin_file, tmp_path, monkeypatch):
    (tmp_path / "failing_parts.py").write_text(
        "class Failing:\n    def __init__(self, size):\n        raise KeyError('no such size')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = gin_file(
        'import failing_parts\ninclude "configs/vae.gin"\nvae.VAE.flow = @failing_parts.Failing()\n'
        "failing_parts.Failing.size = 3\n"
    )
    with pytest.raises(PopgenError, match=r"no such size.*in Failing, bound: size = 3"):
        config.load([own])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_takes_two_steps(name, tmp_path):
    bindings = []
    if "CODES_RUN = " in (REPOSITORY / name).read_text():
        write_best_checkpoint(tmp_path / "codes", config.load(["configs/vqvae.gin"]).experiment.model)
        bindings = [f"CODES_RUN = '{tmp_path}/codes'"]
    if "BEST_RUN = " in (REPOSITORY / name).read_text():
        write_best_checkpoint(tmp_path / "best", config.load(["configs/vamp_hsnf_best.gin"]).experiment.model)
        bindings = [f"BEST_RUN = '{tmp_path}/best'"]
    loaded = config.load([name], bindings)
    model = loaded.experiment.model
    num_samples = min(3, loaded.experiment.evaluator.default_num_samples)
    experiment = dataclasses.replace(
        loaded.experiment,
        dataset=noise_for(model),
        selection_split="test",  # the noise has no other
        num_steps=2,
        batch_size=min(8, loaded.experiment.batch_size),
        eval_every=1,
        final_num_samples=num_samples,
        final_num_examples=9,
    )
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        state = run(experiment, directory, loaded.configuration)
    assert state.step == 2 and math.isfinite(state.best_loss)
    assert len(list(directory.path.glob("evaluation_*.json"))) == 1


def noise_for(model):
    if isinstance(model, ImageModel):
        return Noise()
    if isinstance(model, CPC):
        return SequenceNoise({"speaker": 6}, steps=900, features=model.encoder.value_shape)
    return SequenceNoise(model.classes)


def write_best_checkpoint(path, model):
    directory = RunDirectory(path)
    with directory.locked():
        directory.save_checkpoint("best", state_to_tensors(initial_state(model, torch.optim.Adam, seed=0)))


@dataclasses.dataclass(frozen=True)
class Noise:
    """Random grey images of MNIST's size."""

    def load(self) -> ImageData:
        images = torch.randint(0, 256, (600, 784), dtype=torch.uint8)
        return prepare_images(images, images[:64], (28, 28), "dynamic", binarisation_seed=0)


@dataclasses.dataclass(frozen=True)
class SequenceNoise:
    """Random waveforms, or rows of features, with labels of these classes."""

    classes: dict
    steps: int = 300
    features: tuple[int, ...] = ()

    def load(self) -> SequenceData:
        labels = {name: torch.arange(12) % count for name, count in self.classes.items()}
        values = torch.rand(12 * self.steps, *self.features) - 0.5
        split = Sequences(values, torch.full((12,), self.steps), labels)
        names = {name: tuple(map(str, range(count))) for name, count in self.classes.items()}
        return SequenceData(split, split, None, window=self.steps - 100, classes=names, sample_rate=8_000)
