"""A pool that grows while the learner waits for it and shrinks while it waits for the learner."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from ebm_dist.controller.clients import WorkerClient
from ebm_dist.controller.workers.membership import WorkerPool
from ebm_dist.controller.workers.utilisation import Load, Utilisation, load_between

log = logging.getLogger("ebm_dist.run")

WINDOW_S = 15.0
"""What a decision looks at. A worker takes 4 to 10 s to start, most of it the import of torch."""
LOOK_S = 2.0
"""Between two looks at the cluster: Ray announces the end of a node half a minute ahead or more."""

# Between the two ends lies a factor of 2.5 in the number of workers, so that the size that the
# one decision leads to is never one that the other would change.
GROW_AT = 0.2
USEFUL_BELOW = 0.3
SHRINK_AT = 0.5
WAITLESS = 0.05
SPARE = 1.33


@dataclass(frozen=True, slots=True)
class Elasticity:
    """How large the pool may be, and where workers come from."""

    low: int
    high: int
    start: int
    hire: Callable[[int], WorkerClient | None]
    """Starts the worker of that number; None where Ray has no room for one."""
    draining: Callable[[], set[str]]
    """Nodes whose end has been announced."""


def wanted(size: int, load: Load, low: int, high: int) -> int:
    """The size, within low and high, that a pool of `size` workers should have after `load`.

    It grows where the learner waits and the workers have rounds meanwhile: as many more as would
    have ended the waiting, at most twice as many. It shrinks where workers have nothing to do,
    to a third more than were busy.
    """
    size = min(max(size, low), high)
    if load.learner_wait >= GROW_AT and load.idle_in_wait <= USEFUL_BELOW:
        factor = min(2.0, 1.0 / max(1.0 - load.learner_wait, 0.5))
        return min(high, max(size + 1, math.ceil(size * factor - 1e-9)))
    # In sync mode workers are idle while the learner computes, however many there are; what counts
    # is whether they are while it waits.
    idle = load.idle_in_wait if load.learner_wait > WAITLESS else load.worker_idle
    if idle >= SHRINK_AT:
        busy = size * (1.0 - idle)
        return max(low, min(size - 1, math.ceil(busy * SPARE - 1e-9)))
    return size


class Autoscaler:
    """Keeps the pool at the size that the waits ask for, and off nodes that are about to leave."""

    def __init__(
        self,
        workers: WorkerPool,
        waits: Utilisation,
        elasticity: Elasticity,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._crew = workers
        self._waits = waits
        self._elastic = elasticity
        self._clock = clock
        self.size = elasticity.start
        """Workers there should be."""
        self._num_stay = 0
        """Workers beyond those: one that leaves its node once another serves elsewhere."""
        self._before = waits.sums()
        self._looked_at = clock()

    def tend(self) -> None:
        """Look after the pool, if it is time to; never waits for anything."""
        now = self._clock()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        self._leave_draining_nodes()
        self._decide(now)
        self._fill()

    def _leave_draining_nodes(self) -> None:
        seats = [seat for seat in self._crew.seats if seat.state != "retiring" and seat.node]
        seats.sort(key=lambda seat: seat.state != "serving")
        self._num_stay = 0
        if not seats or not (draining := self._elastic.draining()):
            return
        leaving = [seat for seat in seats if seat.node in draining]
        if all(seat.node in draining for seat in seats if seat.state == "serving"):
            # The last one works on until another serves elsewhere, or its node goes.
            self._num_stay = len(leaving[:1])
            leaving = leaving[1:]
        for seat in leaving:
            log.info(f"{seat.worker.name} ends with its round: its node is about to leave")
            self._crew.retire(seat)

    def _decide(self, now: float) -> None:
        low, high = self._elastic.low, self._elastic.high
        if low == high or now - self._before.time < WINDOW_S:
            return
        before, self._before = self._before, self._waits.sums()
        # Newcomers on the way, or none that could be placed: what was measured is not of `size`.
        if len(self._crew.seats) != self._crew.seats.num_serving:
            return
        load = load_between(before, self._before)
        size = wanted(len(self._crew.seats), load, low, high)
        if size > self.size and len(self._crew.seats) < self.size:
            return  # there is no room even for those that were wanted before
        if size != self.size:
            log.info(
                f"{size} workers from now on, {self.size} before: the learner waits "
                f"{load.learner_wait:.0%} of the time, workers {load.worker_idle:.0%}"
            )
            self.size = size

    def _fill(self) -> None:
        workers = self._crew
        size = self.size + self._num_stay
        for _ in range(size - len(workers.seats)):
            worker = self._elastic.hire(workers.next_index)
            if worker is None:
                return
            workers.join(worker)
        surplus = len(workers.seats) - size
        if surplus > 0:
            # The latest first; of them those that have not even begun.
            leaving = sorted(
                (seat for seat in workers.seats if seat.state != "retiring"),
                key=lambda seat: (seat.state == "starting", seat.index),
                reverse=True,
            )
            for seat in leaving[:surplus]:
                workers.retire(seat)
