"""A run's state on the disk."""
