"""Moves shards off draining nodes without the loss of a chain.

A successor starts on another node while the shard keeps working. Between two updates the shard
hands its chains over, its leases become void, and the successor replaces it. If the node ended
first, the chains would go back to the last checkpoint.
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
"""Longest time that a shard may take to remove its files after the move."""


@dataclass(slots=True)
class _Move:
    """The move of a shard whose successor has been requested."""

    old: ShardClient
    new: ShardClient
    started: Ref[ShardStatus]
    """Done when `new` has started."""
    since: float


class ShardMover:
    """Checks for shards on draining nodes, and moves them between two updates."""

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
            relocation: None if there are no other nodes.
            timeout: seconds within which a shard must answer.
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
        """Start successors of shards on draining nodes, and complete moves to those that are up.

        Raises:
            PartDied: a shard died before it had handed its chains over, and has to be replaced.
        """
        for index, move in list(self._moves.items()):
            if self._shards[index] is not move.old:  # it died and was replaced
                self._cancel(index)
            elif self._backend.wait([move.started], 0.0):
                self._complete(index, move)
        now = self._clock()
        if self._relocation is None or now - self._checked_at < DRAIN_CHECK_S:
            return
        self._checked_at = now
        draining = (
            self._relocation.draining() if any(shard.node for shard in self._shards) else set()
        )
        for index, shard in enumerate(self._shards):
            if shard.node not in draining or index in self._moves:
                continue
            if (successor := self._relocation.start_elsewhere(index)) is not None:
                started = successor.status()
                self._moves[index] = _Move(shard, successor, started, now)

    def _complete(self, index: int, move: _Move) -> None:
        detail = f"{move.old.name} leaves its node"
        try:
            answer(self._backend, move.new.handle, move.started, self._timeout, detail)
            # The chains go from actor to actor. The loop waits: later commits would be lost.
            origin, arrays = move.old.hand_over()
            taken = move.new.restore(arrays, origin)
            # One after the other, so that the shard that hangs is the one to be blamed.
            answer(self._backend, move.old.handle, origin, self._timeout, detail)
            answer(self._backend, move.new.handle, taken, self._timeout, detail)
        except PartDied:
            self._cancel(index)
            if not self._backend.alive(move.old.handle, 0.0):
                raise
            return  # the next check starts another successor
        del self._moves[index]
        # The result is ignored: nobody uses the old files.
        self._backend.wait([move.old.remove_files()], REMOVAL_S)
        self._scheduler.move_shard(index, move.new)
        seconds = self._clock() - move.since
        log.info(
            f"{move.old.name} has left its node, which is draining, with all its chains "
            f"({seconds:.1f} s)"
        )

    def _cancel(self, index: int) -> None:
        self._backend.kill(self._moves.pop(index).new.handle)
