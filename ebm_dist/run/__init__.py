"""Builds the parts of a run from a RunConfig, places and starts them."""
