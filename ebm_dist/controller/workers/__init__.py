"""The worker pool: its members, their load, and its size."""
