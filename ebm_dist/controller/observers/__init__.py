"""Observers of a run: metrics, evaluation, the audit, chain health, the user's callbacks."""
