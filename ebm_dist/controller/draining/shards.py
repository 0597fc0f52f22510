"""Shards leave a node whose end has been announced, with their chains as they are at that moment.

A successor starts on another node while the shard works on. Between two updates the shard hands
over what it holds, from where on its leases are void, and the successor takes its place: no chain
is lost, and none goes back to a checkpoint as it would if the node took them along.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from ebm_dist.buffer.answers import ShardStatus
from ebm_dist.cluster.backend import Backend, PartDied, Ref
from ebm_dist.cluster.stall import answer
from ebm_dist.controller.clients import ShardClient
from ebm_dist.controller.parts import Relocation
from ebm_dist.controller.rounds.scheduler import RoundScheduler
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.autoscaler import DRAIN_CHECK_S

log = logging.getLogger("ebm_dist.run")

REMOVAL_S = 5.0
"""How long a shard that has handed over may take to remove its files."""


@dataclass(slots=True)
class _Move:
    old: ShardClient
    new: ShardClient
    started: Ref[ShardStatus]
    since: float


class ShardMover:
    """Looks for shards that have to leave, and moves them between two updates."""

    def __init__(
        self,
        backend: Backend,
        shards: Shards,
        relocation: Relocation | None,
        scheduler: RoundScheduler,
        *,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            relocation: None where there is nowhere else to go.
            timeout: seconds within which a shard answers.
        """
        self._backend = backend
        self._shards = shards
        self._relocation = relocation
        self._scheduler = scheduler
        self._timeout = timeout
        self._clock = clock
        self._moves: dict[int, _Move] = {}
        self._checked_at = clock()

    def between_updates(self) -> None:
        """Start the moves that have become necessary, and make those whose successor is up.

        Raises:
            PartDied: a shard died before it had handed over; it is replaced like any other.
        """
        for index, move in list(self._moves.items()):
            if self._shards[index] is not move.old:  # it died meanwhile, and was replaced
                self._give_up(index)
            elif self._backend.wait([move.started], 0.0):
                self._make(index, move)
        now = self._clock()
        if self._relocation is None or now - self._checked_at < DRAIN_CHECK_S:
            return
        self._checked_at = now
        gone = self._relocation.draining() if any(shard.node for shard in self._shards) else set()
        for index, shard in enumerate(self._shards):
            if shard.node not in gone or index in self._moves:
                continue
            if (successor := self._relocation.start_elsewhere(index)) is not None:
                started = successor.status()
                self._moves[index] = _Move(shard, successor, started, now)

    def _make(self, index: int, move: _Move) -> None:
        detail = f"{move.old.name} leaves its node"
        try:
            answer(self._backend, move.new.handle, move.started, self._timeout, detail)
            # From actor to actor. The loop stands still: what moved meanwhile would be lost.
            origin, arrays = move.old.hand_over()
            taken = move.new.restore(arrays, origin)
            # In turn, since either may hang, and the other would be blamed for it.
            answer(self._backend, move.old.handle, origin, self._timeout, detail)
            answer(self._backend, move.new.handle, taken, self._timeout, detail)
        except PartDied:
            self._give_up(index)
            if not self._backend.alive(move.old.handle, 0.0):
                raise
            return  # its successor is looked for again
        del self._moves[index]
        # Nothing depends on it: nobody takes over what was handed over.
        self._backend.wait([move.old.remove_files()], REMOVAL_S)
        self._scheduler.move_shard(index, move.new)
        seconds = self._clock() - move.since
        log.info(
            f"{move.old.name} has left its node, which is about to leave, with all its chains "
            f"({seconds:.1f} s)"
        )

    def _give_up(self, index: int) -> None:
        self._backend.kill(self._moves.pop(index).new.handle)
