"""Rounds that take long: their leases are kept alive, and who holds one for too long is found.

A round is three calls, the shard's checkout, the worker's run and the shard's checkin, and it waits
for the first that is not done. That tells a worker that hangs from a shard that does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from ebm_dist.cluster.backend import Backend, Ref
from ebm_dist.controller.rounds.round import Round
from ebm_dist.controller.shards import Shards


class Overdue:
    """Looks after rounds by the clock."""

    def __init__(
        self,
        backend: Backend,
        shards: Shards,
        hang_s: float,
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            hang_s: twice buffer.lease_timeout_s; whoever is at a round for longer hangs.
        """
        self._backend = backend
        self._shards = shards
        self.hang_s = hang_s
        self._clock = clock
        self._renewed = clock()

    def renew_leases(self, rounds: Iterable[Round]) -> None:
        """Have the shards keep the leases of `rounds`, from time to time.

        A round may wait behind others, with its lease drawn already: then the lease says nothing of
        how long a worker takes, and must not expire for it.
        """
        now = self._clock()
        if now - self._renewed < self.hang_s / 8:
            return
        self._renewed = now
        leases: dict[int, list[int]] = defaultdict(list)
        for round_ in rounds:
            leases[round_.shard].append(round_.lease_id)
        for index, lease_ids in leases.items():
            self._shards[index].renew(lease_ids)

    def shard(self, rounds: Iterable[Round], seconds: float) -> int | None:
        """A shard that has owed a round its answer, and the round is older than `seconds`.

        Args:
            rounds: in the order in which they were started.
        """
        now = self._clock()
        for round_ in rounds:
            if now - round_.started <= seconds:
                break
            assert round_.leased is not None
            assert round_.moved is not None
            chain: list[Ref[object]] = [round_.leased, round_.moved]
            done = self._backend.wait(chain, 0.0)
            if round_.leased not in done or round_.moved in done:
                return round_.shard
        return None

    @property
    def held_too_long(self) -> str:
        """What is said of a worker that `held` found."""
        return (
            f"held a round for {self.hang_s:.0f} s, twice buffer.lease_timeout_s; raise it if "
            "rounds take so long, or lower sampler.num_steps or workers.num_chains"
        )

    def held(self, rounds: Iterable[Round]) -> Round | None:
        """A round that its worker has been at for too long."""
        now = self._clock()
        for round_ in rounds:
            if now - round_.started <= self.hang_s:
                break
            if round_.member is not None and now - round_.member.busy_since > self.hang_s:
                return round_
        return None
