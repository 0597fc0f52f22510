"""The list of the shards' current processes; no other object keeps one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from ebm_dist.cluster.backend import Backend, Handle
from ebm_dist.controller.clients import ShardClient


class Shards(Sequence[ShardClient]):
    """The shards of a run, by number. Index it before each call, since a shard may be replaced."""

    def __init__(self, backend: Backend, capacities: Sequence[int]) -> None:
        """
        Args:
            capacities: number of slots of each shard; empty for a run without chains.
        """
        self.capacities = capacities
        self._backend = backend
        self._shards: list[ShardClient] = []
        self._spawn: Callable[[int], ShardClient] | None = None
        self._early: dict[int, ShardClient] = {}
        """Successors that `replace` has started ahead, by shard."""

    def start(self, spawn: Callable[[int], ShardClient]) -> None:
        """Start all shards.

        Args:
            spawn: starts a process for the shard of that number, also for a replacement.
        """
        self._spawn = spawn
        for index in range(len(self.capacities)):
            self._shards.append(spawn(index))

    @overload
    def __getitem__(self, index: int) -> ShardClient: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardClient]: ...
    def __getitem__(self, index: int | slice) -> ShardClient | Sequence[ShardClient]:
        return self._shards[index]

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def handles(self) -> list[Handle]:
        return [shard.handle for shard in self._shards]

    @property
    def nodes(self) -> list[str | None]:
        """Id of the node that was chosen for each shard; None where Ray chose."""
        return [shard.handle.node for shard in self._shards]

    def start_again(self, dead: Handle) -> None:
        """Replace a shard that died before the run began."""
        self.replace(self.handles.index(dead))

    def replace(self, index: int) -> None:
        """End the process of a shard that is dead or hangs, and start its successor.

        Successors of other dead shards are started at the same time: a lost node may have held
        several, and each takes seconds to start.
        """
        assert self._spawn is not None
        # Kill first: the successor takes over the memory in which the chains are mapped.
        self._backend.kill(self._shards[index].handle)
        for other, shard in enumerate(self._shards):
            if other in (index, *self._early) or self._backend.alive(shard.handle, 0.0):
                continue
            self._early[other] = self._spawn(other)
        self._shards[index] = self._early.pop(index, None) or self._spawn(index)

    def move(self, index: int, successor: ShardClient) -> None:
        """Replace the shard by `successor`, which already holds its chains."""
        self._backend.kill(self._shards[index].handle)
        self._shards[index] = successor
