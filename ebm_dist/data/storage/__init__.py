"""Storages of samples: shards, read sequentially, and datasets, read by index."""
