"""Pure state transitions that accompany an optimizer: annealing schedules, weight averages and GECO."""
