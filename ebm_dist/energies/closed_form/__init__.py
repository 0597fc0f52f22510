"""Energies whose law is known: the ground truth of tests and toys."""
