"""What a run is told: every section, read, checked and written."""

from __future__ import annotations

from ebm_dist.config.run_config import RunConfig, dump, load, schema

__all__ = ["RunConfig", "dump", "load", "schema"]
