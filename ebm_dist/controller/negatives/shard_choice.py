"""Whose chains a round moves.

Where an update takes equally many leases from each shard, rounds are dealt out evenly, each to a
worker beside its shard where that can be. Where it cannot, for want of leases, the shards must not
take turns: what one shard's chains have just pushed up is where the next one's go, and the shards
come to hold different modes, each of them a part of the data (`benchmarks/LOG.md`). A shard drawn
at random for each round keeps them alike, as draws from one buffer do, wherever its worker is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SLACK = 8
"""Rounds that a shard may fall behind the one that had most before a worker elsewhere steals from
it. Unequal use ages chains unequally; a round stolen costs one copy over the network each way."""


def shards_of_update(first_lease: int, num_rounds: int, num_shards: int) -> list[int]:
    """The shards of an update's rounds in `sync` mode: a function of their numbers alone.

    All shards equally often, as far as that goes, and the rest of them at random.
    """
    order = _generator(first_lease).permutation(num_shards)
    return [int(order[i % num_shards]) for i in range(num_rounds)]


class ShardChoice:
    """The shard of each round in `async` mode."""

    def __init__(self, num_shards: int, leases_per_update: int) -> None:
        self._num_rounds = [0] * num_shards
        # A run without chains has no shards, and never asks for one.
        self._at_random = num_shards > 0 and leases_per_update % num_shards != 0

    def next(self, lease_id: int, node: str | None, nodes: Sequence[str | None]) -> int:
        """The shard of the round `lease_id`.

        Args:
            node: of the worker that is free.
            nodes: of each shard.
        """
        rounds = self._num_rounds
        if self._at_random:
            return int(_generator(lease_id).integers(len(rounds)))
        behind = min(range(len(rounds)), key=rounds.__getitem__)
        near = [i for i, at in enumerate(nodes) if at is not None and at == node]
        chosen = min(near, key=rounds.__getitem__, default=behind)
        if rounds[chosen] - rounds[behind] >= SLACK:
            chosen = behind
        rounds[chosen] += 1
        return chosen


def _generator(lease_id: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=lease_id))
