"""Batches of a split in a seeded order, for a rank, from a cursor."""
