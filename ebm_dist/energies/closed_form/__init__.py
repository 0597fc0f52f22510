"""Energies with a known law: the ground truth of tests and toy problems."""
