"""The μ-law against its formula, and codes there and back."""

import math

import pytest
import torch

from popgen.distributions import mu_law_decode, mu_law_encode

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def companded(x: float) -> float:
    return math.copysign(math.log(1.0 + 255.0 * abs(x)) / math.log(256.0), x)


def test_codes_are_the_nearest_after_companding() -> None:
    """Brute force over all codes, for values of every size."""
    x = torch.cat([torch.linspace(-1.0, 1.0, 401), torch.logspace(-6, 0, 200), -torch.logspace(-6, 0, 200)]).double()
    for value, code in zip(x.tolist(), mu_law_encode(x).tolist(), strict=True):
        distances = [abs(companded(value) - (2.0 * c / 255.0 - 1.0)) for c in range(256)]
        assert distances[code] <= min(distances) + 1e-12


def test_decoding_is_the_formula() -> None:
    """sign(f) ((1 + μ)^|f| - 1) / μ, for all codes."""
    for code, value in enumerate(mu_law_decode(torch.arange(256), torch.float64).tolist()):
        f = 2.0 * code / 255.0 - 1.0
        assert value == pytest.approx(math.copysign((256.0 ** abs(f) - 1.0) / 255.0, f), rel=1e-12)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_codes_survive_the_round_trip(dtype: torch.dtype) -> None:
    codes = torch.arange(256)
    waveform = mu_law_decode(codes, dtype)
    assert waveform.dtype == dtype and torch.equal(mu_law_encode(waveform), codes)


def test_codes_of_waveforms() -> None:
    """They rise with the waveform, span 0 to 255, keep the shape, and values beyond the ends count as the ends."""
    x = torch.linspace(-1.0, 1.0, 100_001)
    codes = mu_law_encode(x)
    assert codes.dtype == torch.int64 and codes.unique().tolist() == list(range(256))
    assert (codes.diff() >= 0).all()
    assert mu_law_encode(torch.tensor([[-1.5, 1.0001], [0.0, -0.0]])).tolist() == [[0, 255], [128, 128]]
    assert mu_law_encode(torch.zeros(2, 0)).shape == (2, 0)


def test_quiet_values_are_finer() -> None:
    """Half a step is 2.2 per cent of the value, or of 1/255 where it is less, and the largest errors come near it."""
    x = torch.logspace(-4, 0, 10_000, dtype=torch.float64)
    error = (mu_law_decode(mu_law_encode(x), torch.float64) - x).abs() / (x + 1.0 / 255.0)
    assert 0.021 < error.max() < 0.0220
    assert (error.view(10, -1).amax(1)[3:] > 0.018).all()
