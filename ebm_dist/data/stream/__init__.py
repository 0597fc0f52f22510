"""The stream of a rank's batches, in a seeded order that can continue from a cursor."""
