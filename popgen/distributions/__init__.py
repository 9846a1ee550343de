"""Log densities and draws, as frozen dataclasses of tensors.

Every distribution has two pure methods: `log_density(value)`, summed over the event axis (the last one), and
`sample(noise)`, which takes its noise as an argument. Nothing here draws random numbers.
"""

from popgen.distributions.bernoulli import Bernoulli
from popgen.distributions.mixture import GaussianMixture
from popgen.distributions.normal import DiagonalNormal, StandardNormal

__all__ = ["Bernoulli", "DiagonalNormal", "GaussianMixture", "StandardNormal"]
