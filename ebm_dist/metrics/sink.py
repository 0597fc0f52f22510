"""Where metrics end up: the append-safe JSONL file, and W&B."""

from __future__ import annotations

from ebm_dist.metrics.config import TrackingConfig as TrackingConfig
