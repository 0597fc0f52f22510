"""Checkpoints: the state of a run on disk."""
