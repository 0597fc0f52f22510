"""Tar shards and their manifest: reading and writing single records."""
