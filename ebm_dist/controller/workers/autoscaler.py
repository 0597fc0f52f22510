"""Grows the worker pool while the learner waits for it, and shrinks it while workers are idle."""

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
"""Time that a decision averages over. A worker takes 4 to 10 s to start, mostly to import torch."""
DRAIN_CHECK_S = 2.0
"""Time between two checks for draining nodes; Ray reports them at least half a minute ahead."""

# The sizes at which the pool grows and shrinks differ by a factor of 2.5, so that no decision is
# undone by the next.
GROW_AT = 0.2
"""Smallest share of time for which the learner waits, if the pool is to grow."""
USEFUL_BELOW = 0.3
"""Largest idle share of the workers' time during these waits, if the pool is to grow."""
SHRINK_AT = 0.5
"""Smallest idle share of the workers' time, if the pool is to shrink."""
NO_WAIT = 0.05
"""A learner that waits for a smaller share of time counts as not waiting."""
SPARE = 1.33
"""Size after shrinking, as a multiple of the workers that were busy."""


@dataclass(frozen=True, slots=True)
class Elasticity:
    """Bounds of the size of the pool, and how to start workers."""

    low: int
    high: int
    initial: int
    start_worker: Callable[[int], WorkerClient | None]
    """Starts the worker of that number; None if Ray has no room for it."""
    draining: Callable[[], set[str]]
    """Ids of the nodes that Ray reports as draining."""


def wanted(size: int, load: Load, low: int, high: int) -> int:
    """The size, between low and high, that a pool of `size` workers should get after `load`.

    It grows if the learner waits while the workers are busy: by as many workers as would have ended
    the wait, at most to twice the size. It shrinks if workers are idle, to a third more than were
    busy.
    """
    size = min(max(size, low), high)
    if load.learner_wait >= GROW_AT and load.idle_in_wait <= USEFUL_BELOW:
        factor = min(2.0, 1.0 / max(1.0 - load.learner_wait, 0.5))
        return min(high, max(size + 1, math.ceil(size * factor - 1e-9)))
    # In sync mode all workers are idle while the learner computes, so only their idle time during
    # its waits counts.
    idle = load.idle_in_wait if load.learner_wait > NO_WAIT else load.worker_idle
    if idle >= SHRINK_AT:
        busy = size * (1.0 - idle)
        return max(low, min(size - 1, math.ceil(busy * SPARE - 1e-9)))
    return size


class Autoscaler:
    """Adapts the size of the pool to the measured waits, and moves workers off draining nodes."""

    def __init__(
        self,
        workers: WorkerPool,
        waits: Utilisation,
        elasticity: Elasticity,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers = workers
        self._waits = waits
        self._elastic = elasticity
        self._clock = clock
        self.size = elasticity.initial
        """Target number of workers."""
        self._num_extra = 0
        """1 while a worker on a draining node stays until another serves elsewhere, else 0."""
        self._before = waits.sums()
        self._checked_at = clock()

    def adjust(self) -> None:
        """Adjust the pool, at most once per DRAIN_CHECK_S. Never waits."""
        now = self._clock()
        if now - self._checked_at < DRAIN_CHECK_S:
            return
        self._checked_at = now
        self._leave_draining_nodes()
        self._decide(now)
        self._fill()

    def _leave_draining_nodes(self) -> None:
        members = [m for m in self._workers.members if m.state != "retiring" and m.node]
        members.sort(key=lambda member: member.state != "serving")
        self._num_extra = 0
        if not members or not (draining := self._elastic.draining()):
            return
        leaving = [member for member in members if member.node in draining]
        if all(member.node in draining for member in members if member.state == "serving"):
            # One keeps working until another serves elsewhere, or its node is gone.
            self._num_extra = len(leaving[:1])
            leaving = leaving[1:]
        for member in leaving:
            log.info(f"{member.worker.name} ends after its rounds: its node is draining")
            self._workers.retire(member)

    def _decide(self, now: float) -> None:
        low, high = self._elastic.low, self._elastic.high
        if low == high or now - self._before.time < WINDOW_S:
            return
        before, self._before = self._before, self._waits.sums()
        # Some workers start, or could not be placed: the measured load is not that of `size`.
        if len(self._workers.members) != self._workers.members.num_serving:
            return
        load = load_between(before, self._before)
        size = wanted(len(self._workers.members), load, low, high)
        if size > self.size and len(self._workers.members) < self.size:
            return  # there is no room even for the present target
        if size != self.size:
            log.info(
                f"{size} workers from now on, {self.size} before: the learner waits "
                f"{load.learner_wait:.0%} of the time, workers {load.worker_idle:.0%}"
            )
            self.size = size

    def _fill(self) -> None:
        workers = self._workers
        size = self.size + self._num_extra
        for _ in range(size - len(workers.members)):
            worker = self._elastic.start_worker(workers.next_index)
            if worker is None:
                return
            workers.join(worker)
        surplus = len(workers.members) - size
        if surplus > 0:
            # Members that still start go first, and newer ones before older ones.
            leaving = sorted(
                (member for member in workers.members if member.state != "retiring"),
                key=lambda member: (member.state == "starting", member.index),
                reverse=True,
            )
            for member in leaving[:surplus]:
                workers.retire(member)
