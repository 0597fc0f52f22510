"""RunConfig to a running graph."""
