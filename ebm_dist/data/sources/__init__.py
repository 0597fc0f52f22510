"""Sources of data sets, and their conversion into shards."""
