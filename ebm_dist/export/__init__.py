"""Exports trained energies as directories that need no Ray or DeepSpeed to load."""
