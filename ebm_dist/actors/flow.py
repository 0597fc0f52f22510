"""Which chains the learner consumes, and when rounds are started so that it never waits.

In `sync` mode an update's rounds are started with it, under its own weights. In `async` mode
rounds run ahead, as far as `flow.max_lag` gives credit, and what has aged past it is repaired,
reweighted or dropped before the learner sees it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ebm_dist.actors.cut import Progress
from ebm_dist.actors.graph import Graph, Schedule
from ebm_dist.actors.handles import PartDied, Ref
from ebm_dist.actors.pool import Committed, RoundPool
from ebm_dist.buffer.policy import FlowConfig
from ebm_dist.errors import RunFailed

POLL_S = 0.2


class RollBack(PartDied):
    """The run as a whole has to go back to its last checkpoint."""


@dataclass(slots=True)
class Consumed:
    """The negatives of one update."""

    leases: list[Committed]
    negatives: list[tuple[int, Ref]]
    version: int
    wait_s: float


class NegativeFlow:
    """Keeps rounds under way, and hands over the negatives of each update."""

    def __init__(
        self,
        graph: Graph,
        schedule: Schedule,
        flow: FlowConfig,
        pool: RoundPool,
        progress: Progress,
        count: Callable[[str, int], None],
    ) -> None:
        """
        Args:
            progress: the controller's own, read for step and version; lease ids are taken from it.
            count: adds to a counter by metric name.
        """
        self._backend = graph.backend
        self._shards = graph.shards
        self._schedule = schedule
        self._flow = flow
        self._pool = pool
        self._progress = progress
        self._count = count
        self._leases_per_update = schedule.num_negatives // schedule.num_chains
        # Inline rounds run where they are started: starting them early would only age them.
        updates_ahead = max(1, flow.max_lag) if graph.backend.concurrent else 1
        self._ahead = self._leases_per_update * updates_ahead
        if graph.backend.concurrent:
            enough = 2 * max(len(graph.workers), self._leases_per_update)
            self._ahead = min(self._ahead, enough)

    def take_negatives(self) -> Consumed:
        """Leases of one update, moved under its own weights (sync) or within max_lag (async)."""
        start = time.monotonic()
        if self._flow.mode == "sync":
            first = self._progress.lease_of(self._progress.step * self._leases_per_update)
            wanted = range(first, first + self._leases_per_update)
            self._progress.next_lease = wanted.stop
            self._pool.start_together(
                [(i, self._shard_of(i)) for i in wanted], self._schedule.num_steps
            )
            self._poll_until(lambda: all(i in self._pool.committed for i in wanted))
            chosen = [self._pool.committed.pop(i) for i in wanted]
            taken = self._take(chosen)
            if len(taken) < len(chosen):
                raise RollBack("a shard died with negatives of this update")
        else:
            self.top_up()
            taken: list[tuple[Committed, Ref]] = []
            while len(taken) < self._leases_per_update:
                chosen = []
                while len(taken) + len(chosen) < self._leases_per_update:
                    self._poll_until(lambda: bool(self._pool.committed))
                    oldest = self._pool.committed.pop(next(iter(self._pool.committed)))
                    if self._is_usable(oldest):
                        chosen.append(oldest)
                    self.top_up(reserved=len(taken) + len(chosen))
                taken += self._take(chosen)
        return Consumed(
            leases=[lease for lease, _ in taken],
            negatives=[(lease.num_chains, ref) for lease, ref in taken],
            version=self._progress.version,
            wait_s=time.monotonic() - start,
        )

    def _take(self, chosen: list[Committed]) -> list[tuple[Committed, Ref]]:
        """References of the negatives of `chosen`, without those whose shard has died.

        Only a small answer is read here. A learner is never given the reference of a shard that
        is gone: its peers would wait for it in a collective.
        """
        replies = [
            (lease, *self._shards[lease.shard].call("take", lease.lease_id, num_returns=2))
            for lease in chosen
        ]
        taken = []
        for lease, answer, negatives in replies:
            try:
                if self._backend.get(answer, self._flow.stall_timeout_s):
                    taken.append((lease, negatives))
            except PartDied as died:
                if not self._backend.alive(self._shards[lease.shard]):
                    self._pool.replace_shard(lease.shard, str(died))
        return taken

    def _is_usable(self, lease: Committed) -> bool:
        """Whether the learner may consume `lease` now; if not, do what flow.stale says."""
        lag = self._progress.version - lease.version
        assert lag >= 0, f"negatives of version {lease.version} at {self._progress.version}"
        if lag <= self._flow.max_lag or self._flow.stale == "reweight":
            return True
        if self._flow.stale == "drop":
            self._shards[lease.shard].call("release", lease.lease_id)
            self._count("flow/dropped", lease.num_chains)
            return False
        steps = self._flow.repair_steps or max(1, self._schedule.num_steps // 4)
        self._pool.start(self._new_lease(), lease.shard, steps, ready_id=lease.lease_id)
        self._count("flow/repaired", lease.num_chains)
        return False

    def top_up(self, reserved: int = 0) -> None:
        """Start rounds while there is credit for them and a worker to run them."""
        while (
            self._pool.outstanding + len(self._pool.committed) + reserved < self._ahead
            and self._pool.has_room
        ):
            lease_id = self._new_lease()
            self._pool.start(lease_id, self._shard_of(lease_id), self._schedule.num_steps)

    def _new_lease(self) -> int:
        lease_id = self._progress.next_lease
        self._progress.next_lease += 1
        return lease_id

    def _shard_of(self, lease_id: int) -> int:
        return lease_id % len(self._shards)

    def _poll_until(self, condition: Callable[[], bool]) -> None:
        last = time.monotonic()
        seen = (self._pool.mcmc_steps, self._pool.num_rejected, self._pool.restarts)
        while not condition():
            self._pool.poll(POLL_S)
            now = (self._pool.mcmc_steps, self._pool.num_rejected, self._pool.restarts)
            if now != seen:
                seen, last = now, time.monotonic()
            if time.monotonic() - last > self._flow.stall_timeout_s:
                raise RunFailed(
                    f"the learner waited {self._flow.stall_timeout_s:.0f} s for negatives "
                    f"(flow.stall_timeout_s) while {self._pool.outstanding} rounds were with the "
                    "workers; lower sampler.num_steps or workers.num_chains if they are only slow"
                )
