"""Shards and leases for the tests: chains whose numbers say who they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ebm_dist.buffer.policy import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.types import EventSpec, Lease, MovedChains

SPEC = EventSpec((3,), "real")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_shard(capacity: int = 24, max_lease: int = 4, **options: Any) -> Shard:
    config = {"capacity": capacity, "reinit_prob": 0.0, "lease_timeout_s": 10.0}
    config |= options.pop("config", {})
    options = {"index": 0, "seed": 5, "clock": Clock(), **options}
    return Shard(BufferConfig(**config), SPEC, capacity=capacity, max_lease=max_lease, **options)


def move(lease: Lease, version: int = 1, **changes: Any) -> MovedChains:
    """What a worker would return: every number of a chain is a function of its noise and slot."""
    position = np.asarray(lease.position) + 1.0
    fields: dict[str, Any] = {
        "lease_id": lease.lease_id,
        "shard": lease.shard,
        "shard_epoch": lease.shard_epoch,
        "slots": lease.slots,
        "generations": lease.generations,
        "chain_id": lease.chain_id,
        "position": position,
        "energy": position.sum(1),
        "log_weight": lease.log_weight,
        "version": version,
        "num_steps": 3,
    }
    return MovedChains(**(fields | changes))


def total(shard: Shard) -> int:
    counts = shard.counts()
    return int(counts["free"] + counts["leased"] + counts["ready"])


def chain_ids(shard: Shard) -> list[int]:
    return shard.identities().tolist()
