"""Posterior flows: modules that turn a context into an invertible map of the latent space."""

from popgen.nn.flows.flow import Bijection, PosteriorFlow
from popgen.nn.flows.hsnf import HouseholderSylvesterFlow
from popgen.nn.flows.planar import PlanarFlow

__all__ = ["Bijection", "HouseholderSylvesterFlow", "PlanarFlow", "PosteriorFlow"]
