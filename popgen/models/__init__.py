"""Models: modules from `popgen.nn`, assembled. No optimisation code."""
