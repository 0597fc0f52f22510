"""The driver's side of a run: the update loop and what keeps it going."""
