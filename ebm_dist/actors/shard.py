"""A shard as a part of the graph, with the data stream that its chains may start from."""

from __future__ import annotations

import errno
import shutil
from typing import Any

from ebm_dist.buffer.codec import Codec
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.buffer.storage import bytes_to_map
from ebm_dist.cluster.shared_memory import NodeMemory, NotMapped
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import EventSpec
from ebm_dist.data import DataConfig, DataStream


class ShardHost(Shard):
    """`Shard`, built from config alone so that any process can construct it."""

    def __init__(
        self,
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
        shared: NodeMemory | None = None,
        life: int = 0,
        **chains: Any,
    ) -> None:
        """
        Args:
            shared: where the chains are mapped if there is room; None for ordinary memory.
            life: those of the process before are taken over if it was of the same.
            chains: of `Shard`.
        """
        stream = None
        if data is not None:
            # Another seed than the learner's stream: chains that start at the very batch they
            # will be contrasted with would follow it through every epoch.
            stream = DataStream(
                data, rank=index, world_size=num_shards, seed=derive_seed(seed, "start")
            )
        directory, why = None, ""
        if shared is not None:
            dtype = Codec.of(config.storage, spec).dtype
            needed = bytes_to_map(
                capacity, max_lease, spec.shape, dtype=dtype, num_grants=num_grants
            )
            try:
                directory = shared.claim(f"shard_{index:04d}-{life}", needed)
            except NotMapped as reason:
                why = str(reason)
        chains |= {"index": index, "capacity": capacity, "max_lease": max_lease, "seed": seed}
        chains |= {"data": stream, "num_grants": num_grants}
        try:
            super().__init__(config, spec, directory=directory, **chains)
        except OSError as error:
            # Of shards that start together each may have found the room that there is for one.
            if directory is None or error.errno != errno.ENOSPC:
                raise
            shutil.rmtree(directory, ignore_errors=True)
            why = f"{directory.parent} is full"
            super().__init__(config, spec, directory=None, **chains)
        if why:
            self._notes = (
                f"{why}: chains lie in the memory of their shard's process, go to workers by "
                "value, and are rolled back to the last checkpoint should it die",
            )
