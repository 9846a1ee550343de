"""Gin at the boundary: files and bindings in, an `Experiment` and its configuration as text out.

The only package that imports gin. Config files use dynamic registration, so any class or function, the user's own too,
is configurable as it is.
"""

from popgen.config.loading import LoadedConfig, changes_since, differences, load, load_foreign, load_replicas

__all__ = ["LoadedConfig", "changes_since", "differences", "load", "load_foreign", "load_replicas"]
