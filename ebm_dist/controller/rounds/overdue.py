"""Renews the leases of rounds in flight, and finds the part that makes a round overdue.

A round is three calls: checkout by the shard, run by the worker, checkin by the shard. The first
call that is not done tells which of the two hangs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from ebm_dist.cluster.backend import Backend, Ref
from ebm_dist.controller.rounds.round import Round
from ebm_dist.controller.shards import Shards


class OverdueRounds:
    """Renews leases, and finds rounds that take too long and the part that holds them."""

    def __init__(
        self,
        backend: Backend,
        shards: Shards,
        hang_s: float,
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            hang_s: twice buffer.lease_timeout_s; a part that holds a round for longer hangs.
        """
        self._backend = backend
        self._shards = shards
        self.hang_s = hang_s
        self._clock = clock
        self._renewed = clock()

    def renew_leases(self, rounds: Iterable[Round]) -> None:
        """Renew the leases of `rounds`, at most eight times per `hang_s`.

        A round may wait behind others after its lease was drawn. The lease must not expire for
        that: `hung_round` alone limits the time of a worker.
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

    def hung_shard(self, rounds: Iterable[Round], seconds: float) -> int | None:
        """A shard for whose answer a round older than `seconds` waits, or None.

        Args:
            rounds: ordered by their start.
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
    def hang_message(self) -> str:
        """Describes the worker of a `hung_round`."""
        return (
            f"held a round for {self.hang_s:.0f} s, twice buffer.lease_timeout_s; raise it if "
            "rounds take so long, or lower sampler.num_steps or workers.num_chains"
        )

    def hung_round(self, rounds: Iterable[Round]) -> Round | None:
        """A round whose worker has been busy with it for more than `hang_s`, or None."""
        now = self._clock()
        for round_ in rounds:
            if now - round_.started <= self.hang_s:
                break
            if round_.member is not None and now - round_.member.busy_since > self.hang_s:
                return round_
        return None
