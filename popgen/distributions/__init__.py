"""Log densities and draws, as frozen dataclasses of tensors.

Every distribution has two pure methods: `log_density(value)`, summed over the event axis (the last one; codes have
none), and `sample(noise)`, which takes its noise as an argument. Nothing here draws random numbers.
"""

from popgen.distributions.bernoulli import Bernoulli
from popgen.distributions.codes import CategoricalCodes, DiscretisedLogisticMixture
from popgen.distributions.mixture import GaussianMixture
from popgen.distributions.mu_law import mu_law_decode, mu_law_encode
from popgen.distributions.normal import DiagonalNormal, StandardNormal

__all__ = [
    "Bernoulli",
    "CategoricalCodes",
    "DiagonalNormal",
    "DiscretisedLogisticMixture",
    "GaussianMixture",
    "StandardNormal",
    "mu_law_decode",
    "mu_law_encode",
]
