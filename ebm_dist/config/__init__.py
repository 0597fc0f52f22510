"""The config of a run: its sections, and how they are read, checked and written."""
