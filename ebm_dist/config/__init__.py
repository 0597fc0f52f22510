"""The config of a run: reads, checks and writes all of its sections."""
