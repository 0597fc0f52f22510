"""Who holds the chains of each shard at the moment: the one owner of that list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from ebm_dist.cluster.backend import Backend, Handle
from ebm_dist.controller.clients import ShardClient


class Shards(Sequence[ShardClient]):
    """The shards of a run, by number. Ask here before each call: one may have been replaced."""

    def __init__(self, backend: Backend, capacities: Sequence[int]) -> None:
        """
        Args:
            capacities: slots of each; none for a run without chains.
        """
        self.capacities = capacities
        self._backend = backend
        self._shards: list[ShardClient] = []
        self._spawn: Callable[[int], ShardClient] | None = None
        self._early: dict[int, ShardClient] = {}
        """Successors that were started with that of another shard, and have nothing to do yet."""

    def start(self, spawn: Callable[[int], ShardClient]) -> None:
        """Start them all.

        Args:
            spawn: starts a process for the shard of that number, the first time and later on.
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

    def start_again(self, dead: Handle) -> None:
        """Another process for a shard that died before the run began."""
        self.replace(self.handles.index(dead))

    def replace(self, index: int) -> None:
        """End the process of a shard that is dead, or taken for it, and start its successor.

        A lost node takes more than one with it, and each takes seconds to start: the successors of
        the others that are dead are started with this one's.
        """
        assert self._spawn is not None
        # First: its successor takes over the memory that the chains are mapped in.
        self._backend.kill(self._shards[index].handle)
        for other, shard in enumerate(self._shards):
            if other in (index, *self._early) or self._backend.alive(shard.handle, 0.0):
                continue
            self._early[other] = self._spawn(other)
        self._shards[index] = self._early.pop(index, None) or self._spawn(index)

    def move(self, index: int, successor: ShardClient) -> None:
        """Go on with `successor`, which has been given the chains."""
        self._backend.kill(self._shards[index].handle)
        self._shards[index] = successor
