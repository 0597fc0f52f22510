"""Which chains the learner consumes: what both modes of `flow.mode` have in common.

Steps beyond those that the negatives take are kept within the band of `flow.min_steps_per_update`
and `flow.max_steps_per_update`.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ebm_dist.checkpoint.cut import Progress
from ebm_dist.cluster.backend import Backend, PartDied, Ref, T
from ebm_dist.cluster.stall import (
    CREDITS,
    FREE_CHAINS,
    WORKERS,
    Queue,
    Watchdog,
    answer,
)
from ebm_dist.config.sections import FlowConfig
from ebm_dist.controller.clients import ShardClient
from ebm_dist.controller.negatives.step_budget import StepBudget
from ebm_dist.controller.retry import obey
from ebm_dist.controller.rounds.round import Committed
from ebm_dist.controller.rounds.scheduler import RoundScheduler
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.utilisation import Utilisation
from ebm_dist.core.types import NegativeArrays

POLL_S = 0.2

Taken = list[tuple[Committed, Ref[NegativeArrays]]]
"""Leases that the learner is given, and references of their negatives."""


@dataclass(slots=True)
class Consumed:
    """The negatives of one update."""

    leases: list[Committed]
    negatives: list[tuple[int, Ref[NegativeArrays]]]
    version: int
    wait_s: float


class NegativeSource(ABC):
    """Keeps rounds under way, and hands over the negatives of each update."""

    exact: ClassVar[bool]
    """Whether an update's negatives follow from its number alone. No others can then take the place
    of what it loses: the run goes back as a whole, its chains included."""

    def __init__(
        self,
        backend: Backend,
        shards: Shards,
        flow: FlowConfig,
        scheduler: RoundScheduler,
        progress: Progress,
        count: Callable[[str, int], None],
        on_wait: Callable[[], None] = lambda: None,
        *,
        num_negatives: int,
        num_chains: int,
        num_steps: int,
    ) -> None:
        """
        Args:
            progress: the controller's own, read for step and version; lease ids are taken from it.
            count: adds to a counter by metric name.
            on_wait: called repeatedly while the learner waits.
            num_negatives: of an update.
            num_chains, num_steps: of a round.
        """
        self._backend = backend
        self._shards = shards
        self._num_chains = num_chains
        self._num_steps = num_steps
        self._flow = flow
        self._scheduler = scheduler
        self._progress = progress
        self._count = count
        self._on_wait = on_wait
        self._leases_per_update = num_negatives // num_chains
        self._round_steps = num_chains * num_steps
        needed = num_negatives * num_steps
        self._budget = StepBudget(
            low=flow.min_steps_per_update or needed,
            high=flow.max_steps_per_update or math.inf,
            needed=needed,
            round_steps=self._round_steps,
        )
        self._booked = 0
        self._num_taken = 0  # leases that learners were given
        self._in_hand = 0  # and those that the update under way has chosen
        self.waits = Utilisation(scheduler.workers.members)

    def take_negatives(self) -> Consumed:
        """The leases of one update.

        Raises:
            Stalled: nothing moved for flow.stall_timeout_s.
            RollBack: some are lost, and no others would do.
        """
        start = time.monotonic()
        self._in_hand = 0
        with self.waits.waiting():
            taken = self._take_update()
        self._extra()
        self._progress.updates += 1
        return Consumed(
            leases=[lease for lease, _ in taken],
            negatives=[(lease.num_chains, ref) for lease, ref in taken],
            version=self._progress.version,
            wait_s=time.monotonic() - start,
        )

    @abstractmethod
    def _take_update(self) -> Taken: ...

    @abstractmethod
    def replace(self, consumed: Consumed, lost: Sequence[int]) -> None:
        """Other negatives in place of those that were lost on their way to the learner.

        Raises:
            RollBack: no others would do.
        """

    @abstractmethod
    def top_up(self, reserved: int = 0) -> None:
        """Start rounds ahead of the updates that will consume them, where the mode has such.

        Args:
            reserved: leases that the update under way has already.
        """

    def _extra(self) -> int:
        """Chain steps committed that no negative needed: repairs, spare rounds, and the rounds of
        leases that were dropped or lost."""
        scheduler = self._scheduler
        in_repair = sum(round_.purpose == "repair" for round_ in scheduler.rounds())
        needed = self._num_taken + self._in_hand + len(scheduler.committed) + in_repair
        extra = scheduler.mcmc_steps - self._round_steps * needed
        # Added up, since the run may have been resumed from other counts.
        self._progress.extra_steps += extra - self._booked
        self._booked = extra
        return self._progress.extra_steps

    def _take(self, chosen: list[Committed]) -> Taken:
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
                    obey(self._scheduler.replace_shard(lease.shard, str(died)))
        self._num_taken += len(taken)
        self._in_hand = 0
        return taken

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
        scheduler = self._scheduler
        while not condition():
            scheduler.poll(POLL_S)
            self._on_wait()
            self.top_up(reserved)
            state = (
                scheduler.mcmc_steps,
                scheduler.num_refused,
                scheduler.restarts,
                scheduler.workers.members.num_serving,
            )
            watchdog.look(state, blocked, scheduler.replace_a_hung_shard)

    def _answer(self, shard: ShardClient, ref: Ref[T], what: str) -> T:
        timeout = self._flow.stall_timeout_s
        return answer(self._backend, shard.handle, ref, timeout, self._waited_for(what))

    def _blocked(self, queue: Queue) -> tuple[Queue, str]:
        """Which queue it is that keeps `queue` from being filled."""
        scheduler = self._scheduler
        if scheduler.workers.members.num_serving == 0:
            queue = WORKERS
        elif scheduler.outstanding == 0:
            queue = CREDITS
        elif all(round_.starved for round_ in scheduler.rounds()):
            queue = FREE_CHAINS
        return queue, self._waited_for("negatives")

    def _waited_for(self, what: str) -> str:
        scheduler = self._scheduler
        num_workers, num_ready = scheduler.workers.members.num_serving, len(scheduler.committed)
        return (
            f"update {self._progress.step}: the learner waits for {what}, with {num_workers} "
            f"workers, {scheduler.outstanding} rounds under way and {num_ready} ready"
        )
