"""Evaluation: likelihood bounds over a data set, active units, probes, and pictures of what a model has learned."""
