"""Training: the state of a run, the step that advances it, the loop, and checkpoints."""
