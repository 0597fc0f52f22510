"""`flow.mode: async`: rounds run ahead of the updates, so that the learner does not wait for them.

`flow.max_lag` limits how far ahead. Negatives that are older are repaired, reweighted or dropped
before the learner consumes them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

from ebm_dist.cluster.stall import LATE_ROUNDS, NEGATIVES, SPARE_STEPS, Queue
from ebm_dist.controller.negatives.shard_choice import ShardChoice
from ebm_dist.controller.negatives.source import Consumed, NegativeSource, Taken
from ebm_dist.controller.negatives.step_budget import num_late
from ebm_dist.controller.rounds.round import Committed, Purpose


class AsyncNegatives(NegativeSource):
    """The negatives that are ready first; `flow.stale` treats those that are too old."""

    exact = False

    _being_learnt = 0
    """Leases of the update that the learner is computing."""

    @cached_property
    def _choice(self) -> ShardChoice:
        return ShardChoice(len(self._shards), self._leases_per_update)

    @cached_property
    def _max_ahead(self) -> int:
        # In one process a round runs when it is started: an early start only makes it older.
        updates_ahead = 1 + self._flow.max_lag if self._backend.concurrent else 1
        return self._leases_per_update * updates_ahead

    @cached_property
    def _room(self) -> int:
        """Most leases that the shards have chains for."""
        room = sum(capacity // self._num_chains for capacity in self._shards.capacities)
        # One less per shard, so that ready chains always leave room for a spare round.
        return room - len(self._shards) if self._has_floor else room

    def _take_update(self) -> Taken:
        self._being_learnt = 0
        taken = self._take_leases(self._leases_per_update)
        if self._backend.concurrent:
            self._being_learnt = self._leases_per_update
        return taken

    def replace(self, consumed: Consumed, lost: Sequence[int]) -> None:
        # Their slots are free already: a shard frees them when it hands the negatives over.
        self._num_taken -= len(lost)
        for index in lost:
            self._count("flow/lost", consumed.leases[index].num_chains)
        start = time.monotonic()
        with self.waits.waiting():
            taken = self._take_leases(len(lost))
        for index, (lease, ref) in zip(lost, taken):
            consumed.leases[index] = lease
            consumed.negatives[index] = (lease.num_chains, ref)
        self._extra()
        consumed.wait_s += time.monotonic() - start

    def _take_leases(self, wanted: int) -> Taken:
        """Negatives of `wanted` leases; the others of the update are already taken."""
        before = self._leases_per_update - wanted
        self.top_up(reserved=before)
        self._scheduler.releases.clear()
        taken: Taken = []
        while len(taken) < wanted:
            chosen: list[Committed] = []
            while (num := len(taken) + len(chosen)) < wanted:
                lease = self._next(wanted - num, reserved=before + num)
                if self._is_usable(lease):
                    chosen.append(lease)
                    self._in_hand += 1
                self.top_up(reserved=before + len(taken) + len(chosen))
            taken += self._take(chosen)
        budget, progress = self._budget, self._progress
        self._poll_until(
            lambda: not (self._has_floor and budget.missing(progress.updates, self._extra())),
            lambda: self._blocked(SPARE_STEPS),
            reserved=before + len(taken),
        )
        return taken

    def _next(self, left: int, reserved: int) -> Committed:
        """Wait for the next lease to consume, and remove it from the committed ones."""
        found: list[Committed] = []

        def look() -> bool:
            lease = self._candidate(left)
            if lease is not None:
                found.append(lease)
            return lease is not None

        def blocked() -> tuple[Queue, str]:
            return self._blocked(LATE_ROUNDS if self._scheduler.committed else NEGATIVES)

        self._poll_until(look, blocked, reserved=reserved)
        return self._scheduler.committed.pop(found[0].lease_id)

    def _candidate(self, left: int) -> Committed | None:
        """The next lease to consume, of the `left` that the update still takes; None to wait.

        Prefers one whose use makes no more others late than the step budget can repair; otherwise
        the oldest.
        """
        committed = self._scheduler.committed
        if not committed:
            return None
        first = next(iter(committed.values()))
        if math.isinf(self._budget.high) or self._flow.stale == "reweight":
            return first
        version = self._progress.version
        # A waiting round will have the weights of its start, at least those of today.
        under_way = Counter(
            version if round_.version < 0 else round_.version
            for round_ in self._scheduler.rounds()
            if round_.purpose != "spare"
        )
        versions = under_way + Counter(lease.version for lease in committed.values())
        affordable = self._credit() // self._late_cost
        oldest = min(committed.values(), key=lambda lease: lease.version)
        for lease in (first, oldest):
            rest = versions - Counter([lease.version])
            late = num_late(rest, version, self._flow.max_lag, left - 1, self._leases_per_update)
            if late <= affordable:
                return lease
        # The budget does not suffice, as after a fault: the oldest comes first, also in flight.
        return oldest if oldest.version <= min(under_way, default=version) else None

    @property
    def _repair_steps(self) -> int:
        return self._flow.repair_steps or max(1, self._num_steps // 4)

    @property
    def _late_cost(self) -> int:
        steps = self._repair_steps if self._flow.stale == "repair" else self._num_steps
        return steps * self._num_chains

    def _in_flight(self, *purposes: str) -> int:
        """Chain steps of the rounds in flight with one of these purposes."""
        chains = self._num_chains
        return sum(r.num_steps * chains for r in self._scheduler.rounds() if r.purpose in purposes)

    def _credit(self) -> float:
        extra = self._extra() + self._in_flight("repair", "spare")
        return self._budget.credit(self._progress.updates, extra)

    def _is_usable(self, lease: Committed) -> bool:
        """Whether the learner may consume `lease` now; if not, apply `flow.stale` to it."""
        lag = self._progress.version - lease.version
        assert lag >= 0, f"negatives of version {lease.version} at {self._progress.version}"
        if lag <= self._flow.max_lag or self._flow.stale == "reweight":
            return True
        if self._flow.stale == "drop":
            self._shards[lease.shard].release(lease.lease_id)
            self._count("flow/dropped", lease.num_chains)
            return False
        self._scheduler.start(
            self._new_lease(),
            lease.shard,
            self._repair_steps,
            purpose="repair",
            ready_id=lease.lease_id,
        )
        self._count("flow/repaired", lease.num_chains)
        return False

    def top_up(self, reserved: int = 0) -> None:
        """Start rounds while there is credit for them and a worker has room."""
        while self._scheduler.has_room:
            if self._spare_is_due():
                self._start("spare")
            elif self._may_start(reserved):
                self._start("negatives")
            else:
                return

    def _may_start(self, reserved: int) -> bool:
        """Whether a round that starts now will be consumed in time, after all earlier ones."""
        most = min(self._room, self._max_ahead - self._being_learnt)
        if self._backend.concurrent:
            most = min(most, 2 * max(len(self._scheduler.workers.members), self._leases_per_update))
        return self._num_negatives() + reserved < most

    @property
    def _has_floor(self) -> bool:
        return self._budget.low > self._budget.needed

    def _spare_is_due(self) -> bool:
        if not self._has_floor:
            return False
        under_way = self._extra() + self._in_flight("repair", "spare")
        return self._budget.missing(self._progress.updates, under_way)

    def _num_negatives(self) -> int:
        """Number of leases, in flight or ready, that will become negatives."""
        num = self._scheduler.outstanding + len(self._scheduler.committed)
        if self._has_floor:
            num -= sum(round_.purpose == "spare" for round_ in self._scheduler.rounds())
        return num

    def _start(self, purpose: Purpose) -> None:
        lease_id = self._new_lease()
        shard = self._choice.next(lease_id, self._scheduler.idle_node, self._shards.nodes)
        self._scheduler.start(lease_id, shard, self._num_steps, purpose=purpose)
