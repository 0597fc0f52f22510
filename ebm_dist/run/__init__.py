"""Builds a running graph of parts from a RunConfig."""
