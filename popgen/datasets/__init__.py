"""Data held in memory: descriptions that load when a run starts, and batches drawn on the training device."""
