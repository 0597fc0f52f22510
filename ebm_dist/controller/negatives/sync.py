"""`flow.mode: sync`: the rounds of an update start with it, under its own weights."""

from __future__ import annotations

from collections.abc import Sequence

from ebm_dist.cluster.stall import NEGATIVES
from ebm_dist.controller.negatives.shard_choice import shards_of_update
from ebm_dist.controller.negatives.source import Consumed, NegativeSource, Taken
from ebm_dist.controller.retry import GoBack, RollBack


class SyncNegatives(NegativeSource):
    """Negatives that depend on the number of the update alone, not on workers or timing."""

    exact = True

    def _take_update(self) -> Taken:
        step = self._progress.step
        # The ids depend on the update alone, so that a repeated update draws the same leases.
        per_update = self._leases_per_update + self._budget.max_spare_rounds
        first = self._progress.lease_of(step * per_update)
        wanted = range(first, first + self._leases_per_update)
        spare = range(wanted.stop, wanted.stop + self._budget.spare_rounds(step))
        self._progress.next_lease = spare.stop
        leases = range(first, spare.stop)
        shards = shards_of_update(first, len(leases), len(self._shards))
        self._scheduler.start_together([*zip(leases, shards)], self._num_steps, spare=spare)
        scheduler = self._scheduler
        self._poll_until(
            lambda: scheduler.outstanding == 0 and all(i in scheduler.committed for i in wanted),
            lambda: self._blocked(NEGATIVES),
        )
        while scheduler.releases:  # the next update must not draw before these chains are free
            self._answer(*scheduler.releases.pop(), "chains")
        chosen = [scheduler.committed.pop(i) for i in wanted]
        taken = self._take(chosen)
        if len(taken) < len(chosen):
            raise RollBack(GoBack("a shard died with negatives of this update"))
        return taken

    def replace(self, consumed: Consumed, lost: Sequence[int]) -> None:
        raise RollBack(GoBack("negatives of this update were lost with the node that held them"))

    def top_up(self, reserved: int = 0) -> None:
        """Do nothing: no round runs ahead."""
