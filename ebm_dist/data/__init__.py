"""Samples -> batches, with a cursor that can be saved.

Samples lie in webdataset shards on a local or shared disk, into which built-in sources write theirs
at the first use, or in a dataset of the user's own (`storage/`).
"""

from __future__ import annotations

from ebm_dist.data.config import DataConfig
from ebm_dist.data.sources.module import given
from ebm_dist.data.sources.prepare import prepare
from ebm_dist.data.split import check, describe, load_split
from ebm_dist.data.stream.stream import DataStream

__all__ = ["DataConfig", "DataStream", "check", "describe", "given", "load_split", "prepare"]
