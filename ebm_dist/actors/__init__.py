"""The parts of a running graph and the boundary to Ray."""
