"""Where samples lie: in shards that are read from front to end, or in a dataset read by index."""
