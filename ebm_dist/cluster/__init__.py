"""Processes and calls between them: in this process, or on Ray."""
