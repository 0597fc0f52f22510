"""Placement of parts on nodes, with threads and fractions of GPUs."""
