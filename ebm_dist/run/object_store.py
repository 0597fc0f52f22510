"""Estimates the shared memory that Ray's object store needs for a run."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from ebm_dist.buffer.codec import Codec
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.rows import ROW
from ebm_dist.config.sections import FlowConfig
from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.core.weights import WireName

FLOOR = 128 << 20
"""For metrics, images and Ray's own objects."""
WIRE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class StoreNeed:
    """Bytes in the object store, by purpose."""

    chains: int
    """Copies of the buffer, for a checkpoint and for a shard that moves to another node."""
    rounds: int
    """Leases and negatives in transit."""
    weights: int
    """Versions that running rounds use, and the learner's state in a checkpoint."""
    data: int = 0
    """Copies of data given from Python, one for each part that reads it."""

    @property
    def total(self) -> int:
        return FLOOR + self.chains + self.rounds + self.weights + self.data


def store_need(
    spec: EventSpec,
    buffer: BufferConfig,
    flow: FlowConfig,
    *,
    num_workers: int,
    num_negatives: int,
    num_weights: int,
    wire: WireName,
    needs_negatives: bool = True,
    data_bytes: int = 0,
) -> StoreNeed:
    """The largest size of the run's objects at any time.

    The shards' own chains do not count, since they lie outside Ray's object store.
    """
    event = math.prod(spec.shape)
    row = event * Codec.of(buffer.storage, spec).dtype.itemsize + ROW.itemsize
    # A round keeps its version of the weights: at most one per round in flight, or as lag allows.
    versions = min(flow.max_lag + 2, 2 * num_workers + 2)
    # A checkpoint holds the weights, two moments of the optimiser, and the moving average.
    weights = num_weights * (versions * WIRE_BYTES[wire] + 4 * 4)
    if not needs_negatives:
        return StoreNeed(0, 0, weights, data_bytes)
    chains = row * (buffer.capacity + -(-buffer.capacity // buffer.num_shards))
    rounds = 8 * (flow.max_lag + 2) * num_negatives * event * 4
    return StoreNeed(chains, rounds, weights, data_bytes)


def check_shared_memory(size: int, need: StoreNeed, shared: Path = Path("/dev/shm")) -> None:
    """Refuse a local run if its object store of `size` bytes exceeds the free shared memory.

    Raises:
        UserError: Ray would then keep objects on disk.
    """
    if not shared.is_dir() or (free := shutil.disk_usage(shared).free) >= size:
        return
    asked, what = "runtime.object_store_mb", "lower it"
    if size == need.total:
        asked, what = max(
            (need.chains, ("buffer.capacity", "lower buffer.capacity")),
            (need.rounds, ("flow.max_lag", "lower flow.max_lag or buffer.num_negatives")),
            (need.weights, ("energy", "lower flow.max_lag or take a smaller energy")),
            (need.data, ("data", "write the data as shards with ebm_dist.data.prepare")),
        )[1]
        what += f", or set runtime.object_store_mb={max(80, free >> 21)} and let Ray use disk"
    raise UserError(
        f"{asked}: Ray's objects may take {size >> 20} MiB of shared memory, {shared} has "
        f"{free >> 20} MiB free; enlarge it (docker: --shm-size), or {what}"
    )
