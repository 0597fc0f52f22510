"""The disk: what is written appears whole, what is read is bounded and never runs."""
