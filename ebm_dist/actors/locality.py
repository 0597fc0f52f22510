"""Whose chains a free worker moves: those of a shard on its own node, unless others fall behind."""

from __future__ import annotations

from collections.abc import Sequence

SLACK = 8
"""Rounds that a shard may fall behind the one that had most before a worker elsewhere steals from
it. Unequal use ages chains unequally; a round stolen costs one copy over the network each way."""


class ShardChoice:
    """Deals rounds out to the shards evenly, and each to a worker beside it where that can be."""

    def __init__(self, num_shards: int) -> None:
        self._num_rounds = [0] * num_shards

    def next(self, node: str | None, nodes: Sequence[str | None]) -> int:
        """The shard of the next round.

        Args:
            node: of the worker that is free.
            nodes: of each shard.
        """
        rounds = self._num_rounds
        behind = min(range(len(rounds)), key=rounds.__getitem__)
        near = [i for i, at in enumerate(nodes) if at is not None and at == node]
        chosen = min(near, key=rounds.__getitem__, default=behind)
        if rounds[chosen] - rounds[behind] >= SLACK:
            chosen = behind
        rounds[chosen] += 1
        return chosen
