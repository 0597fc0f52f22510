"""Which chains the learner consumes, and when rounds are started so that it never waits.

In `sync` mode an update's rounds are started with it, under its own weights. In `async` mode
rounds run ahead, as far as `flow.max_lag` gives credit, and what has aged past it is repaired,
reweighted or dropped before the learner sees it. Steps beyond those that the negatives take are
kept within the band of `flow.min_steps_per_update` and `flow.max_steps_per_update`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ebm_dist.checkpoint.cut import Progress
from ebm_dist.cluster.backend import Backend, PartDied, Ref, T
from ebm_dist.cluster.stall import (
    CREDITS,
    FREE_CHAINS,
    LATE_ROUNDS,
    NEGATIVES,
    SPARE_STEPS,
    WORKERS,
    Queue,
    Watchdog,
    answer,
)
from ebm_dist.config.sections import FlowConfig
from ebm_dist.controller.clients import ShardClient
from ebm_dist.controller.negatives.shard_choice import ShardChoice, shards_of_update
from ebm_dist.controller.negatives.step_budget import StepBand, num_late
from ebm_dist.controller.retry import GoBack, RollBack, obey
from ebm_dist.controller.rounds.round import Committed, Purpose
from ebm_dist.controller.rounds.scheduler import RoundPool
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.utilisation import LearnerWaits
from ebm_dist.core.types import NegativeArrays

POLL_S = 0.2


@dataclass(slots=True)
class Consumed:
    """The negatives of one update."""

    leases: list[Committed]
    negatives: list[tuple[int, Ref[NegativeArrays]]]
    version: int
    wait_s: float


class NegativeFlow:
    """Keeps rounds under way, and hands over the negatives of each update."""

    def __init__(
        self,
        backend: Backend,
        shards: Shards,
        flow: FlowConfig,
        pool: RoundPool,
        progress: Progress,
        count: Callable[[str, int], None],
        tend: Callable[[], None] = lambda: None,
        *,
        num_negatives: int,
        num_chains: int,
        num_steps: int,
    ) -> None:
        """
        Args:
            progress: the controller's own, read for step and version; lease ids are taken from it.
            count: adds to a counter by metric name.
            tend: is called while the learner waits.
            num_negatives: of an update.
            num_chains, num_steps: of a round.
        """
        self._backend = backend
        self._shards = shards
        self._num_chains = num_chains
        self._num_steps = num_steps
        self._flow = flow
        self._pool = pool
        self._progress = progress
        self._count = count
        self._tend = tend
        self._leases_per_update = num_negatives // num_chains
        self._round_steps = num_chains * num_steps
        needed = num_negatives * num_steps
        self._band = StepBand(
            low=flow.min_steps_per_update or needed,
            high=flow.max_steps_per_update or math.inf,
            needed=needed,
            round_steps=self._round_steps,
        )
        self._choice = ShardChoice(len(shards), self._leases_per_update)
        self._booked = 0
        self._num_taken = 0  # leases that learners were given
        self._in_hand = 0  # and those that the update under way has chosen
        self.waits = LearnerWaits(pool.crew.seats)
        # Inline rounds run where they are started: starting them early would only age them.
        updates_ahead = 1 + flow.max_lag if backend.concurrent else 1
        self._max_ahead = self._leases_per_update * updates_ahead
        self._being_learnt = 0  # leases that the learner is at
        self._room = sum(capacity // num_chains for capacity in shards.capacities)
        if self._band.low > needed:
            self._room -= len(shards)  # or ready chains could fill them, and none be spare

    def take_negatives(self) -> Consumed:
        """Leases of one update, moved under its own weights (sync) or within max_lag (async).

        Raises:
            Stalled: nothing moved for flow.stall_timeout_s.
        """
        start = time.monotonic()
        self._in_hand = self._being_learnt = 0
        with self.waits.waiting():
            taken = (
                self._take_sync()
                if self._flow.mode == "sync"
                else self._take_async(self._leases_per_update)
            )
        self._extra()
        self._progress.updates += 1
        if self._backend.concurrent:
            self._being_learnt = self._leases_per_update
        return Consumed(
            leases=[lease for lease, _ in taken],
            negatives=[(lease.num_chains, ref) for lease, ref in taken],
            version=self._progress.version,
            wait_s=time.monotonic() - start,
        )

    def replace(self, consumed: Consumed, lost: Sequence[int]) -> None:
        """Other negatives in place of those that were lost on their way to the learner.

        The slots of those are free by now: a shard lets go of what it hands over.

        Raises:
            RollBack: in sync mode, where no others would do.
        """
        if self._flow.mode == "sync":
            lost_with = "negatives of this update were lost with the node that held them"
            raise RollBack(GoBack(lost_with))
        self._num_taken -= len(lost)
        for index in lost:
            self._count("flow/lost", consumed.leases[index].num_chains)
        start = time.monotonic()
        with self.waits.waiting():
            taken = self._take_async(len(lost))
        for index, (lease, ref) in zip(lost, taken):
            consumed.leases[index] = lease
            consumed.negatives[index] = (lease.num_chains, ref)
        self._extra()
        consumed.wait_s += time.monotonic() - start

    def _take_sync(self) -> list[tuple[Committed, Ref[NegativeArrays]]]:
        step = self._progress.step
        # Numbered by the update alone: whoever repeats it draws the same.
        per_update = self._leases_per_update + self._band.max_spare_rounds
        first = self._progress.lease_of(step * per_update)
        wanted = range(first, first + self._leases_per_update)
        spare = range(wanted.stop, wanted.stop + self._band.spare_rounds(step))
        self._progress.next_lease = spare.stop
        leases = range(first, spare.stop)
        shards = shards_of_update(first, len(leases), len(self._shards))
        self._pool.start_together([*zip(leases, shards)], self._num_steps, spare=spare)
        pool = self._pool
        self._poll_until(
            lambda: pool.outstanding == 0 and all(i in pool.committed for i in wanted),
            lambda: self._blocked(NEGATIVES),
        )
        while pool.releases:  # or the next update might draw before these chains are free
            self._answer(*pool.releases.pop(), "chains")
        chosen = [pool.committed.pop(i) for i in wanted]
        taken = self._take(chosen)
        if len(taken) < len(chosen):
            raise RollBack(GoBack("a shard died with negatives of this update"))
        return taken

    def _take_async(self, wanted: int) -> list[tuple[Committed, Ref[NegativeArrays]]]:
        """Negatives of `wanted` leases; the others of the update have been taken already."""
        before = self._leases_per_update - wanted
        self.top_up(reserved=before)
        self._pool.releases.clear()
        taken: list[tuple[Committed, Ref[NegativeArrays]]] = []
        while len(taken) < wanted:
            chosen: list[Committed] = []
            while (num := len(taken) + len(chosen)) < wanted:
                lease = self._next(wanted - num, reserved=before + num)
                if self._is_usable(lease):
                    chosen.append(lease)
                    self._in_hand += 1
                self.top_up(reserved=before + len(taken) + len(chosen))
            taken += self._take(chosen)
        band, progress = self._band, self._progress
        self._poll_until(
            lambda: not (self._has_floor and band.missing(progress.updates, self._extra())),
            lambda: self._blocked(SPARE_STEPS),
            reserved=before + len(taken),
        )
        return taken

    def _next(self, left: int, reserved: int) -> Committed:
        """The committed lease to consume, of those that can be had now or, where the band leaves
        no steps for what would come too late by it, of those that are late already."""
        found: list[Committed] = []

        def look() -> bool:
            lease = self._candidate(left)
            if lease is not None:
                found.append(lease)
            return lease is not None

        def blocked() -> tuple[Queue, str]:
            return self._blocked(LATE_ROUNDS if self._pool.committed else NEGATIVES)

        self._poll_until(look, blocked, reserved=reserved)
        return self._pool.committed.pop(found[0].lease_id)

    def _candidate(self, left: int) -> Committed | None:
        committed = self._pool.committed
        if not committed:
            return None
        first = next(iter(committed.values()))
        if math.isinf(self._band.high) or self._flow.stale == "reweight":
            return first
        version = self._progress.version
        # A round that nobody has begun will have the weights of when somebody does.
        under_way = Counter(
            version if round_.version < 0 else round_.version
            for round_ in self._pool.rounds()
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
        # Nothing better can be done than the oldest; a fault has cost more than there was.
        return oldest if oldest.version <= min(under_way, default=version) else None

    @property
    def _repair_steps(self) -> int:
        return self._flow.repair_steps or max(1, self._num_steps // 4)

    @property
    def _late_cost(self) -> int:
        steps = self._repair_steps if self._flow.stale == "repair" else self._num_steps
        return steps * self._num_chains

    def _extra(self) -> int:
        """Chain steps committed that no negative needed: repairs, spare rounds, and the rounds of
        leases that were dropped or lost."""
        pool = self._pool
        in_repair = sum(round_.purpose == "repair" for round_ in pool.rounds())
        needed = self._num_taken + self._in_hand + len(pool.committed) + in_repair
        extra = pool.mcmc_steps - self._round_steps * needed
        # Added up, since the run may have been resumed from other counts.
        self._progress.extra_steps += extra - self._booked
        self._booked = extra
        return self._progress.extra_steps

    def _in_flight(self, *purposes: str) -> int:
        """Chain steps of the rounds that are under way for these purposes."""
        chains = self._num_chains
        return sum(r.num_steps * chains for r in self._pool.rounds() if r.purpose in purposes)

    def _credit(self) -> float:
        extra = self._extra() + self._in_flight("repair", "spare")
        return self._band.credit(self._progress.updates, extra)

    def _take(self, chosen: list[Committed]) -> list[tuple[Committed, Ref[NegativeArrays]]]:
        """References of the negatives of `chosen`, without those whose shard has died.

        Only a small answer is read here. A learner is never given the reference of a shard that
        is gone: its peers would wait for it in a collective.
        """
        replies = [(lease, *self._shards[lease.shard].take(lease.lease_id)) for lease in chosen]
        taken = []
        for lease, there, negatives in replies:
            try:
                if self._answer(self._shards[lease.shard], there, "negatives"):
                    taken.append((lease, negatives))
            except PartDied as died:
                if not self._backend.alive(self._shards[lease.shard].handle):
                    obey(self._pool.replace_shard(lease.shard, str(died)))
        self._num_taken += len(taken)
        self._in_hand = 0
        return taken

    def _is_usable(self, lease: Committed) -> bool:
        """Whether the learner may consume `lease` now; if not, do what flow.stale says."""
        lag = self._progress.version - lease.version
        assert lag >= 0, f"negatives of version {lease.version} at {self._progress.version}"
        if lag <= self._flow.max_lag or self._flow.stale == "reweight":
            return True
        if self._flow.stale == "drop":
            self._shards[lease.shard].release(lease.lease_id)
            self._count("flow/dropped", lease.num_chains)
            return False
        self._pool.start(
            self._new_lease(),
            lease.shard,
            self._repair_steps,
            purpose="repair",
            ready_id=lease.lease_id,
        )
        self._count("flow/repaired", lease.num_chains)
        return False

    def top_up(self, reserved: int = 0) -> None:
        """Start rounds while there is credit for them and a worker to run them.

        Args:
            reserved: leases that the update under way has already.
        """
        while self._pool.has_room:
            if self._spare_is_due():
                self._start("spare")
            elif self._may_start(reserved):
                self._start("negatives")
            else:
                return

    def _may_start(self, reserved: int) -> bool:
        """Whether a round that begins now is consumed in time, after all that are before it."""
        most = min(self._room, self._max_ahead - self._being_learnt)
        if self._backend.concurrent:
            most = min(most, 2 * max(len(self._pool.crew.seats), self._leases_per_update))
        return self._num_negatives() + reserved < most

    @property
    def _has_floor(self) -> bool:
        return self._band.low > self._band.needed

    def _spare_is_due(self) -> bool:
        if not self._has_floor:
            return False
        under_way = self._extra() + self._in_flight("repair", "spare")
        return self._band.missing(self._progress.updates, under_way)

    def _num_negatives(self) -> int:
        """Leases under way or ready that are meant for the learner."""
        num = self._pool.outstanding + len(self._pool.committed)
        if self._has_floor:
            num -= sum(round_.purpose == "spare" for round_ in self._pool.rounds())
        return num

    def _start(self, purpose: Purpose) -> None:
        nodes = [shard.node for shard in self._shards]
        lease_id = self._new_lease()
        shard = self._choice.next(lease_id, self._pool.idle_node, nodes)
        self._pool.start(lease_id, shard, self._num_steps, purpose=purpose)

    def _new_lease(self) -> int:
        lease_id = self._progress.next_lease
        self._progress.next_lease += 1
        return lease_id

    # --- waiting ------------------------------------------------------------------------------

    def _poll_until(
        self,
        condition: Callable[[], bool],
        blocked: Callable[[], tuple[Queue, str]],
        *,
        reserved: int = 0,
    ) -> None:
        watchdog = Watchdog(self._flow.stall_timeout_s)
        pool = self._pool
        while not condition():
            pool.poll(POLL_S)
            self._tend()
            if self._flow.mode == "async":
                self.top_up(reserved)
            state = (pool.mcmc_steps, pool.num_refused, pool.restarts, pool.crew.seats.num_serving)
            watchdog.look(state, blocked, pool.replace_a_hung_shard)

    def _answer(self, shard: ShardClient, ref: Ref[T], what: str) -> T:
        timeout = self._flow.stall_timeout_s
        return answer(self._backend, shard.handle, ref, timeout, self._waited_for(what))

    def _blocked(self, queue: Queue) -> tuple[Queue, str]:
        """Which queue it is that keeps `queue` from being filled."""
        pool = self._pool
        if pool.crew.seats.num_serving == 0:
            queue = WORKERS
        elif pool.outstanding == 0:
            queue = CREDITS
        elif all(round_.starved for round_ in pool.rounds()):
            queue = FREE_CHAINS
        return queue, self._waited_for("negatives")

    def _waited_for(self, what: str) -> str:
        pool = self._pool
        return (
            f"update {self._progress.step}: the learner waits for {what}, with "
            f"{pool.crew.seats.num_serving} workers, {pool.outstanding} rounds under way and "
            f"{len(pool.committed)} ready"
        )
