"""File access: atomic writes, and reads that are bounded in size and never execute content."""
