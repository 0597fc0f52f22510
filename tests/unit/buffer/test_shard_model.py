"""Any order of calls, retries, deaths and timeouts keeps every chain, once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from shards import Clock, chain_ids, make_shard, move, total

CAPACITY, SIZE = 12, 3


class ShardMachine(RuleBasedStateMachine):
    """A shard, and beside it a model: which lease should hold what, and what each slot has."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.directory = Path(tempfile.mkdtemp()) / "shard"
        self.shard = self.make()
        self.next_id = 0
        self.leases: dict = {}  # all ever given out
        self.live: dict[int, float] = {}  # lease id -> deadline
        self.ready: dict[int, np.ndarray] = {}
        self.content = self.snapshot()["position"]
        self.late = self.expired = 0

    def make(self):
        return make_shard(
            CAPACITY,
            SIZE,
            clock=self.clock,
            directory=str(self.directory),
            config={"reinit_prob": 0.3},
        )

    def snapshot(self):
        return self.shard.snapshot()["arrays"]

    def teardown(self) -> None:
        shutil.rmtree(self.directory.parent)

    def expire(self) -> None:
        for lease_id in [k for k, deadline in self.live.items() if deadline < self.clock.now]:
            del self.live[lease_id]
            self.expired += 1

    @rule()
    def checkout(self) -> None:
        self.expire()
        busy = [self.leases[i].slots for i in self.live] + list(self.ready.values())
        free = CAPACITY - sum(len(slots) for slots in busy)
        lease = self.shard.checkout(self.next_id, SIZE)
        assert (lease is None) == (free < SIZE)
        if lease is not None:
            taken = {int(slot) for slots in busy for slot in slots}
            assert not taken & set(lease.slots.tolist())
            self.leases[self.next_id] = lease
            self.live[self.next_id] = self.clock.now + 10.0
        self.next_id += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def checkout_again(self, data) -> None:
        self.expire()
        if not self.live:
            return
        lease_id = data.draw(st.sampled_from(sorted(self.live)))
        again = self.shard.checkout(lease_id, SIZE)
        assert np.array_equal(again.slots, self.leases[lease_id].slots)
        assert np.array_equal(again.position, self.leases[lease_id].position)
        self.live[lease_id] = self.clock.now + 10.0

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def checkin(self, data) -> None:
        """Of any lease ever given out: live, committed, expired, of a former epoch."""
        self.expire()
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        lease = self.leases[lease_id]
        moved = move(lease, version=lease_id)
        committed = lease_id in self.committed and lease.shard_epoch == self.shard.epoch
        reply = self.shard.checkin(moved)
        assert reply["accepted"] == (lease_id in self.live or committed)
        if lease_id in self.live:
            del self.live[lease_id]
            self.committed.add(lease_id)
            self.ready[lease_id] = lease.slots
            self.content[lease.slots] = moved.position
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
            assert np.array_equal(negatives["x"], self.content[slots])

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def repair(self, data) -> None:
        self.expire()
        ready_id = data.draw(st.sampled_from(sorted(self.ready)))
        lease = self.shard.checkout_ready(self.next_id, ready_id)
        slots = self.ready.pop(ready_id)
        assert np.array_equal(lease.slots, slots)
        assert np.array_equal(lease.position, self.content[slots])
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
        self.shard.restore(saved["arrays"], saved["meta"])
        self.live.clear()
        self.ready.clear()
        self.committed.clear()

    @invariant()
    def chains_are_conserved(self) -> None:
        if not hasattr(self, "content"):
            return
        assert total(self.shard) == CAPACITY
        counts = self.shard.counts()
        assert counts["ready"] == sum(len(slots) for slots in self.ready.values())
        assert counts["late_checkins"] == self.late
        assert np.array_equal(self.snapshot()["position"], self.content)
        assert chain_ids(self.shard) == list(range(CAPACITY))


ShardMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
TestShard = ShardMachine.TestCase
