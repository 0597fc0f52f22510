"""The config of a run: reads, checks and writes all of its sections."""

from __future__ import annotations

from ebm_dist.config.run_config import RunConfig, dump, load, schema

__all__ = ["RunConfig", "dump", "load", "schema"]
