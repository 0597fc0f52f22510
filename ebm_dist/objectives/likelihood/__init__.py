"""Objectives that contrast data with chains of the model."""
