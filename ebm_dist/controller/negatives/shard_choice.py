"""Chooses the shard whose chains a round moves.

If an update takes equally many leases from each shard, all shards get equally many rounds, on
workers of their own node if possible. Otherwise the shard of each round is drawn at random. With a
fixed rotation the shards would come to hold different modes of the data (`benchmarks/LOG.md`);
random draws keep them alike, as draws from one buffer do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SLACK = 8
"""Rounds by which a shard on a worker's node may be ahead of the least used one, before the worker
moves chains of the latter. Unequal use lets chains age unequally; a round on another node costs one
copy over the network each way."""


def shards_of_update(first_lease: int, num_rounds: int, num_shards: int) -> list[int]:
    """The shards of an update's rounds in `sync` mode, a function of the lease ids alone.

    All shards occur equally often; the remainder goes to different shards drawn at random.
    """
    order = _generator(first_lease).permutation(num_shards)
    return [int(order[i % num_shards]) for i in range(num_rounds)]


class ShardChoice:
    """The shard of each round in `async` mode."""

    def __init__(self, num_shards: int, leases_per_update: int) -> None:
        self._num_rounds = [0] * num_shards
        # A run without chains has no shards; `next` is then never called.
        self._at_random = num_shards > 0 and leases_per_update % num_shards != 0

    def next(self, lease_id: int, node: str | None, nodes: Sequence[str | None]) -> int:
        """The shard of the round `lease_id`.

        Args:
            node: node of the free worker.
            nodes: node of each shard.
        """
        rounds = self._num_rounds
        if self._at_random:
            return int(_generator(lease_id).integers(len(rounds)))
        behind = min(range(len(rounds)), key=rounds.__getitem__)
        chosen = behind
        if node is not None:
            near = [i for i, at in enumerate(nodes) if at == node]
            chosen = min(near, key=rounds.__getitem__, default=behind)
            if rounds[chosen] - rounds[behind] >= SLACK:
                chosen = behind
        rounds[chosen] += 1
        return chosen


def _generator(lease_id: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=lease_id))
