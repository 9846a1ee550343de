"""Pure state transitions that accompany an optimizer: annealing schedules and weight averages."""
