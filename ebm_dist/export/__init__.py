"""Trained energies as directories that load anywhere."""
