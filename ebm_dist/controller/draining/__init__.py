"""Leaving nodes whose end has been announced."""
