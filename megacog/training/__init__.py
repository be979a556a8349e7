"""Training: engines, the loop, the schedule, and the start of a run."""
