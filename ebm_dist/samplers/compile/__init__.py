"""Blocks of steps as one compiled function, and what is rewritten for it."""
