"""Sweeps: what points there are, the processes that train them, and how they compare."""
