"""Imports of published checkpoints of other programs."""
