"""Where datasets come from, and how they are made into shards."""
