"""Chooses the chains that the learner consumes: the common part of both values of `flow.mode`.

A source keeps the MCMC steps per update between `flow.min_steps_per_update` and
`flow.max_steps_per_update`.
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
"""Longest time that one poll of the scheduler waits."""

Taken = list[tuple[Committed, Ref[NegativeArrays]]]
"""Leases that the learner consumes, each with the reference of its negatives."""


@dataclass(slots=True)
class Consumed:
    """The negatives of one update."""

    leases: list[Committed]
    negatives: list[tuple[int, Ref[NegativeArrays]]]
    """(number of chains, reference) of each lease."""
    version: int
    """Version of the learner's weights."""
    wait_s: float
    """Time that the learner waited for them."""


class NegativeSource(ABC):
    """Keeps rounds in flight, and returns the negatives of each update."""

    exact: ClassVar[bool]
    """Whether an update's negatives depend on its number alone. Lost ones then have no replacement,
    and the whole run goes back, with its chains."""

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
            progress: shared with the controller; step and version are read, lease ids taken.
            count: adds to a counter, by metric name.
            on_wait: called repeatedly while the learner waits.
            num_negatives: negatives per update.
            num_chains, num_steps: chains per round, and steps of each.
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
        self._recorded = 0  # extra steps of this process that `progress` includes
        self._num_taken = 0  # leases that learners have consumed
        self._in_hand = 0  # further leases that the present update has chosen
        self.waits = Utilisation(scheduler.workers.members)

    def take_negatives(self) -> Consumed:
        """The negatives of one update.

        Raises:
            Stalled: nothing changed for flow.stall_timeout_s.
            RollBack: some are lost and have no replacement.
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
        """Replace the negatives of the indices `lost`, which were lost on their way to the learner.

        Raises:
            RollBack: they have no replacement.
        """

    @abstractmethod
    def top_up(self, reserved: int = 0) -> None:
        """Start rounds for later updates, if the mode runs ahead.

        Args:
            reserved: number of leases that the present update already has.
        """

    def _extra(self) -> int:
        """Committed chain steps that no negative needed: of repairs, spare rounds, and leases that
        were dropped or lost."""
        scheduler = self._scheduler
        in_repair = sum(round_.purpose == "repair" for round_ in scheduler.rounds())
        needed = self._num_taken + self._in_hand + len(scheduler.committed) + in_repair
        extra = scheduler.mcmc_steps - self._round_steps * needed
        # Only the change is added, since a resumed run starts from the count of its checkpoint.
        self._progress.extra_steps += extra - self._recorded
        self._recorded = extra
        return self._progress.extra_steps

    def _take(self, chosen: list[Committed]) -> Taken:
        """References of the negatives of `chosen`, without those whose shard has died.

        Reads the small answer of each shard first: no rank may get the reference of a dead shard,
        since the other ranks would wait for that rank in a collective.
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
        """The queue that keeps `queue` from being filled, and what the learner waits for."""
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
