"""Any order of calls, retries, deaths and timeouts keeps every chain with its context, once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from shards import (
    Clock,
    Numbered,
    Paired,
    Roaming,
    carrying,
    chain_ids,
    chains_of,
    conditions_of,
    move,
    total,
)

from ebm_dist.buffer.answers import Origin
from ebm_dist.buffer.rows import open_rows

CAPACITY, SIZE = 12, 3


class ShardMachine(RuleBasedStateMachine):
    """A shard, and beside it a model: which lease should hold what, and what each slot has."""

    Data: type[Numbered] = Numbered

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.directory = Path(tempfile.mkdtemp()) / "shard"
        self.shard = self.make()
        self.next_id = 0
        self.leases: dict = {}  # all ever given out
        self.superseded: list = []  # given to a worker whose round another one does again
        self.live: dict[int, float] = {}  # lease id -> deadline
        self.ready: dict[int, np.ndarray] = {}
        self.content = self.snapshot()["position"]
        self.late = self.expired = 0

    def make(self):
        return carrying(
            self.Data,
            capacity=CAPACITY,
            max_lease=SIZE,
            clock=self.clock,
            directory=str(self.directory),
            num_grants=2,
            config={"reinit_prob": 0.3},
        )

    def snapshot(self):
        return self.shard.snapshot().arrays

    def teardown(self) -> None:
        shutil.rmtree(self.directory.parent)

    def expire(self) -> None:
        for lease_id in [k for k, deadline in self.live.items() if deadline < self.clock.now]:
            del self.live[lease_id]
            self.expired += 1

    @rule(by_rows=st.booleans())
    def checkout(self, by_rows) -> None:
        self.expire()
        busy = [self.leases[i].slots for i in self.live] + list(self.ready.values())
        free = CAPACITY - sum(len(slots) for slots in busy)
        lease = self.shard.checkout(self.next_id, SIZE, by_rows)
        assert (lease is None) == (free < SIZE)
        if lease is not None:
            taken = {int(slot) for slots in busy for slot in slots}
            assert not taken & set(lease.slots.tolist())
            self.Data.check(chains_of(lease), conditions_of(lease))
            self.leases[self.next_id] = lease
            self.live[self.next_id] = self.clock.now + 10.0
        self.next_id += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data(), by_rows=st.booleans())
    def checkout_again(self, data, by_rows) -> None:
        self.expire()
        if not self.live:
            return
        lease_id = data.draw(st.sampled_from(sorted(self.live)))
        before = chains_of(self.leases[lease_id])
        again = self.shard.checkout(lease_id, SIZE, by_rows)
        assert np.array_equal(again.slots, self.leases[lease_id].slots)
        assert np.array_equal(chains_of(again), before)
        self.Data.check(before, conditions_of(again))
        self.superseded.append(self.leases[lease_id])
        self.leases[lease_id] = again
        self.live[lease_id] = self.clock.now + 10.0

    @precondition(lambda self: self.leases or self.superseded)
    @rule(data=st.data())
    def late_write(self, data) -> None:
        """Of anybody who was ever given rows: nothing but rows that are lent to him changes."""
        lease = data.draw(st.sampled_from([*self.superseded, *self.leases.values()]))
        self.expire()
        current = lease is self.leases[lease.lease_id] and lease.lease_id in self.live
        if lease.grant is None or current:
            return
        rows = open_rows(lease.grant)
        garbage = np.full((SIZE, 3), 777.0, np.float32)
        self.shard.expire()
        assert rows is None or not rows.write(lease.grant, garbage, lease.chain_id)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def checkin(self, data) -> None:
        """Of any lease ever given out: live, committed, expired, of a former epoch."""
        self.expire()
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        lease = self.leases[lease_id]
        start = chains_of(lease)
        moved = move(lease, version=lease_id, roams=self.Data.roams)
        committed = lease_id in self.committed and lease.shard_epoch == self.shard.epoch
        reply = self.shard.checkin(moved)
        assert reply.accepted == (lease_id in self.live or committed)
        if lease_id in self.live:
            del self.live[lease_id]
            self.committed.add(lease_id)
            self.ready[lease_id] = lease.slots
            self.content[lease.slots] = start + np.float32(1)
        elif not committed:
            self.late += 1

    @property
    def committed(self) -> set[int]:
        return self.__dict__.setdefault("_committed", set())

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), drop=st.booleans())
    def take(self, data, drop) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.ready)))
        slots = self.ready.pop(lease_id)
        if drop:
            assert self.shard.release(lease_id) == len(slots)
        else:
            ready, negatives = self.shard.take(lease_id)
            assert ready
            assert np.array_equal(negatives.x, self.content[slots])
            self.Data.check(negatives.x, negatives.context)

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), by_rows=st.booleans())
    def repair(self, data, by_rows) -> None:
        self.expire()
        ready_id = data.draw(st.sampled_from(sorted(self.ready)))
        lease = self.shard.checkout_ready(self.next_id, ready_id, by_rows)
        slots = self.ready.pop(ready_id)
        assert np.array_equal(lease.slots, slots)
        assert np.array_equal(chains_of(lease), self.content[slots])
        self.leases[self.next_id] = lease
        self.live[self.next_id] = self.clock.now + 10.0
        self.next_id += 1

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def pass_time(self, seconds) -> None:
        self.clock.now += seconds

    @rule()
    def process_dies(self) -> None:
        """A successor finds the chains, and knows no lease."""
        before = self.shard.epoch
        self.shard = self.make()
        assert self.shard.attached
        assert self.shard.epoch == before + 1
        self.live.clear()
        self.ready.clear()
        self.committed.clear()
        self.late = self.expired = 0

    @rule()
    def restored_from_its_snapshot(self) -> None:
        saved = self.shard.snapshot()
        self.shard.restore(saved.arrays, Origin(saved.meta.data))
        self.live.clear()
        self.ready.clear()
        self.committed.clear()

    @invariant()
    def chains_are_conserved(self) -> None:
        if not hasattr(self, "content"):
            return
        assert total(self.shard) == CAPACITY
        counts = self.shard.counts()
        states = np.bincount(self.shard._slots.state, minlength=3)
        assert states.tolist() == [counts.free, counts.leased, counts.ready]
        assert counts.age_mean == self.snapshot()["age"].mean()
        assert counts.ready == sum(len(slots) for slots in self.ready.values())
        assert counts.late_checkins == self.late
        now = self.snapshot()
        assert np.array_equal(now["position"], self.content)
        self.Data.check_arrays(now)
        assert chain_ids(self.shard) == list(range(CAPACITY))


ShardMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
TestShard = ShardMachine.TestCase


class PairedMachine(ShardMachine):
    """Chains that start at noisy pairs."""

    Data = Paired


PairedMachine.TestCase.settings = settings(ShardMachine.TestCase.settings, max_examples=20)
TestPairedShard = PairedMachine.TestCase


class RoamingMachine(ShardMachine):
    """Chains whose level moves with their position."""

    Data = Roaming


RoamingMachine.TestCase.settings = settings(ShardMachine.TestCase.settings, max_examples=20)
TestRoamingShard = RoamingMachine.TestCase
