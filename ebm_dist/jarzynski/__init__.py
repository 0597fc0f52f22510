"""Importance weights of persistent chains while training changes their energy."""
