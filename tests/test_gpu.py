"""The GPU path against the plain one on the CPU; skipped where there is no GPU."""

import copy

import pytest
import torch

from popgen.distributions.codes import CategoricalOutput, LogisticMixtureOutput
from popgen.evaluation.likelihood import estimate_log_likelihood, evaluate_elbo, image_noise
from popgen.models.cpc import CPC
from popgen.models.vae import VAE, BernoulliDecoder, GaussianEncoder
from popgen.models.wavenet import WaveNet
from popgen.nn.cpc import CausalConvContext, GRUContext, LinearPredictors, StridedConvEncoder, TransformerPredictors
from popgen.nn.flows import HouseholderSylvesterFlow
from popgen.nn.priors import StandardNormalPrior
from popgen.nn.vamp_prior import VampPrior
from popgen.precision import matrix_products

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MODELS = {
    "vae": lambda: VAE(GaussianEncoder(784, 40), BernoulliDecoder(40, 784), StandardNormalPrior()),
    "vamp": lambda: VAE(GaussianEncoder(784, 40), BernoulliDecoder(40, 784), VampPrior(784, 500)),
    "vamp_hsnf": lambda: VAE(
        GaussianEncoder(784, 40), BernoulliDecoder(40, 784), VampPrior(784, 500), HouseholderSylvesterFlow(40, 300)
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision, mean, largest", [("fp32", 1e-3, 1e-2), ("tf32", 0.1, 1.0), ("bf16", 0.5, 5.0)])
def test_terms_and_gradients_equal_those_of_the_cpu(name: str, precision: str, mean: float, largest: float):
    """At full precision to 1e-3 nats on average and 1e-2 nats for any image."""
    on_cpu = MODELS[name]()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x, noise = torch.rand(100, 784).round(), torch.randn(3, 100, 40)
    expected = on_cpu(x, noise)
    with matrix_products(precision, torch.device("cuda")):
        found = on_gpu(x.cuda(), noise.cuda())
    for one, other in zip(found, expected, strict=True):
        difference = (one.cpu() - other).detach()
        assert difference.mean().abs() < mean and difference.abs().max() < largest
    if precision == "fp32":
        gradients = [
            torch.autograd.grad(terms.log_w.mean(), list(model.parameters()))
            for terms, model in ((found, on_gpu), (expected, on_cpu))
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_does_not_depend_on_how_it_is_cut_up(name: str):
    vae, images = MODELS[name]().cuda(), (255 * torch.rand(30, 784).round()).to(torch.uint8).cuda()
    whole = estimate_log_likelihood(vae, images, 2_500)
    part = estimate_log_likelihood(vae, images[:7], 2_500)
    torch.testing.assert_close(part, whole[:7], rtol=0, atol=1e-2)
    assert evaluate_elbo(vae, images)["elbo"].is_cuda
    noise = image_noise(range(3), 50, 40, block=0, seed=0, device="cuda")
    assert noise.is_cuda and noise.std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("output", [CategoricalOutput, LogisticMixtureOutput])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_wavenet_scores_and_draws_as_on_the_cpu(output, compiled: bool):
    """The same densities; in float64 the same codes from the same noise, step by step and as recorded."""
    on_cpu = WaveNet(output(), 16, 32, num_layers=6, dilation_cycle=3, classes={"digit": 10}).double()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    codes, labels = torch.randint(256, (3, 200)), {"digit": torch.tensor([3, 1, 4])}
    on_device = {name: label.cuda() for name, label in labels.items()}
    expected = on_cpu(codes, labels).log_density(codes)
    found = on_gpu(codes.cuda(), on_device).log_density(codes.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)
    uniform = torch.rand(3, 200, dtype=torch.float64)
    drawn = on_gpu.generate(uniform.cuda(), on_device, compiled=compiled)
    assert torch.equal(drawn.cpu(), on_cpu.generate(uniform, labels))


@pytest.mark.parametrize("negatives", ["batch", "sequence", "speaker"])
@pytest.mark.parametrize("parts", ["gru", "convolutions"])
def test_the_terms_of_a_cpc_are_those_of_the_cpu(negatives: str, parts: str):
    context, predictors = {
        "gru": lambda: (GRUContext(16, 8), LinearPredictors(8, 16, num_steps=4)),
        "convolutions": lambda: (CausalConvContext(16, 8), TransformerPredictors(8, 16, num_steps=4)),
    }[parts]()
    label = "speaker" if negatives == "speaker" else None
    encoder = StridedConvEncoder(16, kernel_sizes=(10, 8), strides=(5, 4))
    on_cpu = CPC(encoder, context, predictors, negatives, 32, label).double()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    values, lengths = torch.randn(6, 900, dtype=torch.float64), torch.tensor([900, 900, 700, 300, 60, 20])
    labels, uniform = {"speaker": torch.tensor([0, 0, 1, 1, 0, 1])}, torch.rand(6, 32, dtype=torch.float64)
    expected = on_cpu(values, lengths, uniform, labels)
    found = on_gpu(values.cuda(), lengths.cuda(), uniform.cuda(), {"speaker": labels["speaker"].cuda()})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-6, atol=1e-6)
