"""Metrics of a run: their names, the hub that writes them, W&B, and the terminal view."""
