"""Modules that drop into other people's code: layers, priors, posterior flows, quantisers, parts of CPC."""
