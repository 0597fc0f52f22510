"""The driver's side of a run: the update loop, checkpoints, recovery and observers."""
