"""Moves shards and learner ranks off draining nodes."""
