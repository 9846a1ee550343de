"""The commands: python -m launch.train, launch.evaluate, launch.sample, launch.probe, launch.sweep."""
