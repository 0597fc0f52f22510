"""What a run is told: every section, read, checked and written."""
