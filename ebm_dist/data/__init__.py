"""Reads samples into batches, with a cursor that can be saved.

Samples are in webdataset shards on a local or shared disk, or in a dataset of the user's own
(`storage/`). A built-in source writes its shards at the first use.
"""

from __future__ import annotations

from ebm_dist.data.config import DataConfig
from ebm_dist.data.sources.module import given
from ebm_dist.data.sources.prepare import prepare
from ebm_dist.data.split import describe, load_split
from ebm_dist.data.stream.stream import DataStream

__all__ = ["DataConfig", "DataStream", "describe", "given", "load_split", "prepare"]
