"""Builds a shard in its actor, with the data stream from which its chains may start."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from ebm_dist.buffer.codec import Codec
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.buffer.storage import bytes_to_map
from ebm_dist.buffer.trace import TracePlan
from ebm_dist.cluster.shared_memory import NodeMemory, NotMapped
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import ContextField, EventSpec
from ebm_dist.data import DataConfig, DataStream


def open_shard(
    config: BufferConfig,
    data: DataConfig | None,
    spec: EventSpec,
    *,
    index: int,
    num_shards: int,
    capacity: int,
    max_lease: int,
    seed: int,
    num_grants: int = 0,
    trace: TracePlan | None = None,
    fields: tuple[ContextField, ...] = (),
    shared: NodeMemory | None = None,
    life: int = 0,
) -> Shard:
    """Build a `Shard` from its config.

    Args:
        shared: directory of mapped chains, used if it has room; None for ordinary memory.
        life: a process attaches to the mapped chains of an earlier one with the same value.
    """
    stream = start_stream(data, index, num_shards, seed) if data is not None else None

    def opened(directory: Path | None, notes: tuple[str, ...]) -> Shard:
        return Shard(
            config,
            spec,
            index=index,
            capacity=capacity,
            max_lease=max_lease,
            seed=seed,
            data=stream,
            directory=directory,
            num_grants=num_grants,
            trace=trace,
            fields=fields,
            notes=notes,
        )

    if shared is None:
        return opened(None, ())
    dtype = Codec.of(config.storage, spec).dtype
    needed = bytes_to_map(
        capacity, max_lease, spec.shape, dtype=dtype, num_grants=num_grants, fields=fields
    )
    try:
        directory = shared.claim(f"shard_{index:04d}-{life}", needed)
    except NotMapped as reason:
        return opened(None, (_unmapped(str(reason)),))
    try:
        return opened(directory, ())
    except OSError as error:
        # Several shards that start together may each have seen room for one.
        if error.errno != errno.ENOSPC:
            raise
        shutil.rmtree(directory, ignore_errors=True)
        return opened(None, (_unmapped(f"{directory.parent} is full"),))


def _unmapped(why: str) -> str:
    return (
        f"{why}: chains are in the memory of their shard's process, go to workers by value, and "
        "return to the last checkpoint if it dies"
    )


def start_stream(data: DataConfig, index: int, num_shards: int, seed: int) -> DataStream:
    """The stream of data from which chains of shard `index` start, with `buffer.init: data`."""
    # Not the seed of the learner's stream: chains would otherwise start at the batch with which
    # they are contrasted, in every epoch.
    return DataStream(data, rank=index, world_size=num_shards, seed=derive_seed(seed, "start"))
