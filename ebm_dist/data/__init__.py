"""Webdataset shards -> batches, with a cursor that can be saved.

Every source is read in one way: as shards on a local or shared disk. Built-in sources write theirs
into a cache at the first use.
"""

from __future__ import annotations

from ebm_dist.data.config import DataConfig
from ebm_dist.data.sources.prepare import prepare
from ebm_dist.data.split import check, describe, load_split
from ebm_dist.data.stream.stream import DataStream

__all__ = ["DataConfig", "DataStream", "check", "describe", "load_split", "prepare"]
