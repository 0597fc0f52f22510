"""A shard as a part of the graph, with the data stream that its chains may start from."""

from __future__ import annotations

from typing import Any

from ebm_dist.buffer.policy import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.data import DataConfig, DataStream
from ebm_dist.seeds import derive_seed
from ebm_dist.types import EventSpec


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
        **storage: Any,
    ) -> None:
        stream = None
        if data is not None:
            # Another seed than the learner's stream: chains that start at the very batch they
            # will be contrasted with would follow it through every epoch.
            stream = DataStream(
                data, rank=index, world_size=num_shards, seed=derive_seed(seed, "start")
            )
        super().__init__(
            config,
            spec,
            index=index,
            capacity=capacity,
            max_lease=max_lease,
            seed=seed,
            data=stream,
            **storage,
        )
