"""Objectives that regress on scores, energies or flows."""
