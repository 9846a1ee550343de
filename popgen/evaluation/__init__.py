"""Evaluation: likelihood bounds over a data set, active units, and pictures of what a model has learned."""
