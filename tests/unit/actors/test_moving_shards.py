"""Shards leave nodes that are about to go, between two updates and with every chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from worlds import CAPACITY, CHAINS, World

from ebm_dist.cluster.backend import PartDied
from ebm_dist.controller.clients import ShardClient
from ebm_dist.controller.draining.shards import ShardMover
from ebm_dist.controller.parts import Relocation
from ebm_dist.controller.workers.autoscaler import DRAIN_CHECK_S


class Leaving:
    """A world on nodes a and b, a mover, and a clock that goes a look further at each update."""

    def __init__(self, draining: set[str], other: str | None = "a", **world: Any) -> None:
        self.world = World(nodes=("a", "b"), carries=True, **world)
        self.draining, self.other = draining, other
        self.started: list[ShardClient] = []
        self.now = 0.0
        self.mover = ShardMover(
            self.world.backend,  # type: ignore[arg-type]
            self.world.shards,
            Relocation(lambda: self.draining, self.start, lambda held: None),
            self.world.scheduler,
            timeout=30.0,
            clock=self.clock,
        )

    def clock(self) -> float:
        return self.now

    def start(self, index: int) -> ShardClient | None:
        if self.other is None:
            return None
        shard = self.world.spawn_shard(index)
        shard.handle.node = self.other
        self.started.append(shard)
        return shard

    def update(self) -> tuple[list[int], np.ndarray]:
        self.now += DRAIN_CHECK_S
        self.mover.between_updates()
        busy = 2 if self.world.config.mode == "async" else 0
        return self.world.update(busy_ticks=busy)

    def identities(self) -> list[int]:
        return [k for shard in self.world.shards for k in shard.handle.part.identities().tolist()]


def test_a_shard_leaves_a_draining_node_with_every_chain_as_it_is() -> None:
    leaving = Leaving(set(), mode="async", max_lag=3)
    world = leaving.world
    identities = sorted(leaving.identities())
    assert len(set(identities)) == CAPACITY
    for _ in range(5):
        leaving.update()
    leaving.draining = {"b"}
    leaving.now += DRAIN_CHECK_S
    leaving.mover.between_updates()  # a successor is asked for
    old, epoch = world.shards[1], world.shards[1].handle.part.epoch
    assert [shard.node for shard in world.shards] == ["a", "b"]
    lease = old.handle.part.checkout(10**6, CHAINS)
    leaving.mover.between_updates()
    assert [shard.node for shard in world.shards] == ["a", "a"]
    assert old.handle.dead
    assert sorted(leaving.identities()) == identities
    new = world.shards[1].handle.part
    assert new.epoch > old.handle.part.epoch > epoch
    # What the old one committed until then, and nothing of what was under way.
    before, after = old.handle.part.snapshot().arrays, new.snapshot().arrays
    assert before.keys() == after.keys() > {"context/clock", "context/condition", "context/pair"}
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert new.counts().free == CAPACITY // 2
    counts = old.handle.part.counts()
    for name in ("reinitialised", "late_checkins", "expired_leases"):
        assert getattr(new.counts(), name) == getattr(counts, name)
    # A worker that comes back with a lease of before commits nothing, here or there.
    moved = leaving.world.workers[0].handle.part.run_round(lease, None, 1, 1)
    assert not old.handle.part.checkin(moved).accepted
    assert not new.checkin(moved).accepted
    for _ in range(30):
        assert max(leaving.update()[0]) <= 3
    assert world.scheduler.restarts == 0
    assert len(leaving.started) == 1, "it is moved once"


def test_a_sync_run_draws_the_same_wherever_its_shards_move() -> None:
    def drawn(draining_at: int) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
        leaving = Leaving(set(), mode="sync", num_workers=2, max_delay=4)
        out = []
        for step in range(20):
            if step == draining_at:
                leaving.draining = {"b"}
            out.append(leaving.update()[1])
        assert len(leaving.started) == int(draining_at < 20)
        chains = [shard.handle.part.snapshot().arrays for shard in leaving.world.shards]
        return np.stack(out), chains

    stayed, chains = drawn(20)
    for step in (0, 7, 15):
        moved, moved_chains = drawn(step)
        assert np.array_equal(stayed, moved)
        for a, b in zip(chains, moved_chains):
            assert all(np.array_equal(a[name], b[name]) for name in a)


def test_where_no_node_stays_a_shard_stays_too() -> None:
    leaving = Leaving({"a", "b"}, other=None, mode="async", max_lag=3)
    for _ in range(10):
        leaving.update()
    assert [shard.node for shard in leaving.world.shards] == ["a", "b"]
    assert leaving.world.scheduler.restarts == 0


@pytest.mark.parametrize("who", ["old", "new"])
def test_a_death_during_a_move_leaves_one_shard_and_no_process(who: str) -> None:
    leaving = Leaving({"b"}, mode="async", max_lag=3)
    world = leaving.world
    leaving.update()
    old = world.shards[1]
    dies: Callable[[], ShardClient] = lambda: {"old": old, "new": leaving.started[0]}[who]  # noqa: E731
    world.backend.kill(dies().handle)
    if who == "old":
        with pytest.raises(PartDied):
            leaving.mover.between_updates()
        world.scheduler.check()  # what the controller does then
    for _ in range(10):
        leaving.update()
    world.check()
    assert [shard.node for shard in world.shards] == ["a", "a"]
    alive = [shard for shard in (old, *leaving.started) if not shard.handle.dead]
    assert alive == [world.shards[1]]
