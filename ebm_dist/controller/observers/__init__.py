"""What watches a run without taking part: metrics, evaluation, the audit, chain health."""
