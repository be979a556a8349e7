"""Checkpoints of a run and exports of a model."""
