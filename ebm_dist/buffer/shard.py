"""A shard: persistent chains in slots, and the lease protocol that moves them.

Every slot is free, leased or ready, and `free + leased + ready == capacity` always. A checkout
takes slots from free to leased; a checkin commits their new chains and makes them ready; taking
them as negatives makes them free again. Lease ids come from the caller, and every operation is
idempotent: a checkout under a known id returns the same lease, and a second checkin of a lease
changes nothing. The noise of a lease is seeded by its id alone.

With a `directory` the chains are memory-mapped and outlive the process. A new shard process finds
each chain as last committed and all slots free, and increases the epoch, so that the leases of its
predecessor are void. A lease can then go by rows (`rows.py`): the worker moves chains in place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ebm_dist.buffer.answers import CheckinReply, Origin
from ebm_dist.buffer.chains import ShardChains
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.draw import FREE, LEASED, READY, KeyedGenerator, draw_free
from ebm_dist.buffer.grants import GrantBook
from ebm_dist.buffer.lease import Outstanding, few
from ebm_dist.buffer.rows import same
from ebm_dist.buffer.starts import StartSource
from ebm_dist.buffer.trace import TracePlan
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Arrays, ContextField, EventSpec, Lease, MovedChains, NegativeArrays

MAX_VOID = 64
"""Cancelled leases to remember; their rounds are repeated within seconds."""


class Shard(ShardChains):
    """Chains of one shard. Plain Python: `cluster/ray_backend.py` puts it behind Ray."""

    def __init__(
        self,
        config: BufferConfig,
        spec: EventSpec,
        *,
        index: int,
        capacity: int,
        max_lease: int,
        seed: int,
        data: StartSource | None = None,
        directory: Path | str | None = None,
        num_grants: int = 0,
        trace: TracePlan | None = None,
        fields: tuple[ContextField, ...] = (),
        notes: tuple[str, ...] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            directory: of the mapped files; None keeps the chains in ordinary memory, without
                leases by rows.
            num_grants: the largest number of leases by rows at a time.
            fields: the contexts of each chain.
            clock: returns seconds, for deadlines.
            notes: lines for the run's log, returned with each round.
        """
        super().__init__(
            config,
            spec,
            index=index,
            capacity=capacity,
            max_lease=max_lease,
            seed=seed,
            data=data,
            directory=directory,
            num_grants=num_grants,
            trace=trace,
            fields=fields,
        )
        self._notes = notes
        self._clock = clock
        self._leases: dict[int, Outstanding] = {}
        self._earliest = math.inf  # no lease is overdue before this time
        self._void: dict[int, Outstanding] = {}  # the newest cancelled leases
        self._ready: dict[int, np.ndarray] = {}
        self._shown: dict[int, NegativeArrays] = {}  # `MovedChains.negatives` by lease
        self._done: dict[int, CheckinReply] = {}  # replies to committed leases
        self._keyed = KeyedGenerator()
        self._grants: GrantBook | None = None
        if directory is not None and num_grants > 0:
            self._grants = GrantBook(self._slots, Path(directory), num_grants)

    # --- checkout -----------------------------------------------------------------------------

    def checkout(
        self, lease_id: int, num: int, by_rows: bool = False, drawn: int | None = None
    ) -> Lease | None:
        """Lease `num` free chains drawn without replacement, or None if fewer are free.

        A second checkout of an outstanding `lease_id` gives the same lease again, so that
        another worker can repeat the round of a dead one. For a committed lease it gives None, and
        `checkin(None, lease_id)` then repeats the reply.

        Args:
            by_rows: the worker is on this machine, so the lease goes by rows if some are spare.
            drawn: the result of `draw`, passed only to make this call wait for that one.

        Raises:
            ValueError: `num` is larger than a lease of this shard may be.
        """
        self.expire()
        if lease_id not in self._leases and not self._draw(lease_id, num):
            return None
        return self._lease(lease_id, by_rows)

    def draw(self, lease_ids: Sequence[int], num: int) -> int:
        """Draw the slots of leases in this order, whatever the order of later calls.

        `checkout` gives the leases out once their workers are known.

        Returns:
            The number of leases for which enough chains were free.
        """
        self.expire()
        return sum(lease_id in self._leases or self._draw(lease_id, num) for lease_id in lease_ids)

    def _draw(self, lease_id: int, num: int) -> bool:
        if num > self._slots.max_lease:
            raise ValueError(
                f"a lease of {num} chains, the shard was made for {self._slots.max_lease} at a "
                "time (workers.num_chains)"
            )
        if lease_id in self._done or self._slots.num_in[FREE] < num:
            return False
        void = self._void.pop(lease_id, None)
        if void is not None and (self._slots.state[void.slots] == FREE).all():
            # The round is repeated, and in sync mode has to move the same chains. A new draw would
            # give others, because leases drawn later hold some slots now.
            self._slots.turn(void.slots, FREE, LEASED)
            self._keep(lease_id, void.slots, void.fresh, void.starts, void.context)
            return True
        rng = self._keyed(derive_seed(self._seed, "shard", self.index, "pick", lease_id))
        slots = draw_free(self._slots.state, self._slots.num_in[FREE], num, rng)
        fresh = self._restart[slots]
        if self._config.reinit_prob > 0:
            fresh |= rng.random(num) < self._config.reinit_prob
        starts, context = None, {}
        if num_fresh := int(np.count_nonzero(fresh)):
            # The restart is part of the lease only: if it expires, the slot keeps the old chain.
            x, context = self._starts.draw(num_fresh, "fresh", lease_id)
            starts = self._codec.from_numpy(x)
        self._slots.turn(slots, FREE, LEASED)
        self._keep(lease_id, slots, fresh, starts, context)
        return True

    def checkout_many(
        self, lease_ids: Sequence[int], num: int, by_rows: bool = False
    ) -> list[Lease | None]:
        """Several checkouts in one call, in this order."""
        return [self.checkout(lease_id, num, by_rows) for lease_id in lease_ids]

    def checkout_ready(self, lease_id: int, ready_id: int, by_rows: bool = False) -> Lease | None:
        """Lease the ready chains of `ready_id` again, to move them under newer weights."""
        self.expire()
        if lease_id in self._leases:
            return self._lease(lease_id, by_rows)
        slots = self._ready.pop(ready_id, None)
        self._shown.pop(ready_id, None)
        if slots is None:
            return None
        self._slots.turn(slots, READY, LEASED)
        self._keep(lease_id, slots, np.zeros(len(slots), bool), None, {})
        return self._lease(lease_id, by_rows)

    def _keep(
        self,
        lease_id: int,
        slots: np.ndarray,
        fresh: np.ndarray,
        starts: np.ndarray | None,
        context: Arrays,
    ) -> None:
        rows = self._slots.rows(slots)
        self._leases[lease_id] = Outstanding(
            slots,
            rows,
            self._slots.generation[slots],
            self._slots.chain_id[rows],
            fresh,
            starts,
            context,
        )

    def _lease(self, lease_id: int, by_rows: bool) -> Lease:
        """The outstanding lease `lease_id` for a worker, with a new deadline."""
        out = self._leases[lease_id]
        out.deadline = self._clock() + self._config.lease_timeout_s
        self._earliest = min(self._earliest, out.deadline)
        self._revoke(out)  # the rows of an earlier worker, which may come late
        return out.lease(
            self._slots,
            self._grants if by_rows else None,
            lease_id=lease_id,
            shard=self.index,
            shard_epoch=self.epoch,
            seed=derive_seed(self._seed, "lease", lease_id),
        )

    # --- checkin ------------------------------------------------------------------------------

    def checkin(self, moved: MovedChains | None, lease_id: int | None = None) -> CheckinReply:
        """Commit the chains of a lease, unless the lease is void.

        A void lease changes nothing but a count: it has expired, or is of an earlier epoch.

        Args:
            moved: the worker's result; None if the worker received no lease.
            lease_id: the lease that was requested; the reply to a committed one is repeated.

        Raises:
            ValueError: another number of chains, other chains or another event shape.
        """
        self.expire()
        known = lease_id if moved is None else moved.lease_id
        if known in self._done and (moved is None or moved.shard_epoch == self.epoch):
            return self._done[known]._replace(counts=self.counts())
        if moved is None:
            return CheckinReply(False, None, self.counts())
        out = self._leases.get(moved.lease_id)
        rows = None
        if out is not None and moved.shard_epoch == self.epoch and out.matches(moved):
            out.check(moved, self._slots.position.shape[1:], self._codec.dtype)
            rows = self._place(out, moved)
        if out is None or rows is None:
            self._counters["late_checkins"] += 1
            return self._reply(moved, accepted=False)
        slots = out.slots
        if self._trace is not None:
            followed = self._trace.follows(slots)
            x = self._positions(rows[followed])
            self._trace.record(slots[followed], x, moved.energy[followed], out.fresh[followed])
        for name, values in self._slots.context.items():
            values[rows] = out.context_after(self._slots, name, moved)
        age, aged = out.ages(self._slots, moved.ancestors)
        if moved.ancestors is not None:
            self._counters["resampled"] += 1
        self._slots.adopt(
            slots,
            out.rows,
            rows,
            aged,
            energy=moved.energy,
            version=moved.version,
            age=age,
            log_weight=moved.log_weight,
        )
        if out.starts is not None:
            self._restart[slots[out.fresh]] = False
            self._counters["reinitialised"] += len(out.starts)
        self._slots.generation[slots] = out.generations + 1
        self._slots.turn(slots, LEASED, READY)
        self._ready[moved.lease_id] = slots
        if moved.negatives is not None:
            self._shown[moved.lease_id] = moved.negatives
        del self._leases[moved.lease_id]
        reply = self._done[moved.lease_id] = self._reply(moved, accepted=True)
        while len(self._done) > 4096:
            self._done.pop(next(iter(self._done)))
        return reply

    def _reply(self, moved: MovedChains, *, accepted: bool) -> CheckinReply:
        return CheckinReply(
            accepted,
            moved.lease_id,
            self.counts(),
            version=moved.version,
            num_steps=moved.num_steps,
            num_chains=len(moved.slots),
            stats=moved.stats,
            notes=(*self._notes, *moved.notes),
            by_rows=moved.position is None,
            compiling=moved.compiling,
        )

    def _place(self, out: Outstanding, moved: MovedChains) -> np.ndarray | None:
        """The rows that hold the moved chains and their identities; None if the lease is void."""
        grant = out.grant
        if moved.position is not None:
            # Leased by value. A worker that has since received the same lease by rows is too late.
            rows = self._slots.rows_for(len(out.slots))
            self._slots.position[rows] = moved.position
            self._slots.chain_id[rows] = moved.chain_id
            self._revoke(out)
            return rows
        if grant is None or moved.token != grant.token:
            return None
        assert self._grants is not None
        if not self._grants.redeem(grant):
            return None
        out.grant = None
        written = self._slots.chain_id[grant.target]
        if not same(written, out.chain_id):
            self._slots.give_back(grant.target)
            raise ValueError(
                f"lease {moved.lease_id}: chains {few(written)} lie in the rows of "
                f"{few(out.chain_id)}"
            )
        return grant.target

    # --- negatives ----------------------------------------------------------------------------

    def take(self, lease_id: int) -> tuple[bool, NegativeArrays | None]:
        """The negatives of a committed lease; its slots become free.

        Returns:
            Whether the lease was ready, and its negatives if so. They are two values so that the
            controller can read the first and pass the second to a learner without fetching it.
        """
        slots = self._ready.pop(lease_id, None)
        if slots is None:
            return False, None
        rows = self._slots.rows(slots)
        self._slots.turn(slots, READY, FREE)
        # A copy, because later commits reuse the rows.
        negatives = NegativeArrays(
            x=self._positions(rows),
            energy=self._slots.energy[rows],
            version=self._slots.version[rows],
            log_weight=self._slots.log_weight[rows],
            context=self._slots.contexts(rows),
        )
        return True, self._shown.pop(lease_id, negatives)

    def release(self, lease_id: int) -> int:
        """Free the ready chains of `lease_id` without use (a drop); returns their number."""
        slots = self._ready.pop(lease_id, None)
        self._shown.pop(lease_id, None)
        if slots is None:
            return 0
        self._slots.turn(slots, READY, FREE)
        return len(slots)

    # --- expired and cancelled leases ---------------------------------------------------------

    def expire(self) -> list[int]:
        """Cancel the overdue leases; returns their ids."""
        now = self._clock()
        if now <= self._earliest:
            return []
        overdue = [k for k, v in self._leases.items() if v.deadline < now]
        for lease_id in overdue:
            self.cancel(lease_id)
            self._counters["expired_leases"] += 1
        self._earliest = min((v.deadline for v in self._leases.values()), default=math.inf)
        return overdue

    def renew(self, lease_ids: Sequence[int]) -> None:
        """Extend the deadlines of those leases that are outstanding: their rounds are running."""
        self.expire()
        for lease_id in lease_ids:
            if (out := self._leases.get(lease_id)) is not None:
                out.deadline = self._clock() + self._config.lease_timeout_s

    def cancel(self, lease_id: int) -> bool:
        """Void a lease: its slots keep the chains they had before it."""
        out = self._leases.pop(lease_id, None)
        if out is None:
            return False
        # The generation increases, so that a late checkin of this lease cannot be mistaken
        # for one of the next lease on the same slots.
        self._slots.generation[out.slots] += 1
        self._slots.turn(out.slots, LEASED, FREE)
        self._revoke(out)
        self._void[lease_id] = out
        if len(self._void) > MAX_VOID:
            self._void.pop(next(iter(self._void)))
        return True

    def _revoke(self, out: Outstanding) -> None:
        if out.grant is not None:
            assert self._grants is not None
            self._grants.revoke(out.grant)
            out.grant = None

    def restore(self, arrays: Arrays, origin: Origin) -> None:
        """As `ShardChains.restore`; all outstanding leases become void."""
        self._forget_leases()
        super().restore(arrays, origin)

    def hand_over(self) -> tuple[Origin, Arrays]:
        """As `ShardChains.hand_over`; all outstanding leases become void."""
        self._forget_leases()
        return super().hand_over()

    def _forget_leases(self) -> None:
        for out in self._leases.values():
            self._revoke(out)
        for records in (self._leases, self._void, self._ready, self._shown, self._done):
            records.clear()
