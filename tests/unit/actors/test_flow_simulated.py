"""The pool and the flow of negatives under late replies, lost replies and deaths, by simulation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from simulation import SimBackend, SimHandle, SimWorker

from ebm_dist.actors.cut import Progress
from ebm_dist.actors.flow import NegativeFlow
from ebm_dist.actors.pool import MAX_ATTEMPTS, RoundPool
from ebm_dist.buffer.policy import BufferConfig, FlowConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.errors import RunFailed
from ebm_dist.types import EventSpec

SPEC = EventSpec((3,), "real")
CAPACITY, CHAINS, BATCH = 48, 4, 8


class World:
    """Two shards, some workers, a pool, a flow, and a learner that only counts versions."""

    def __init__(
        self,
        *,
        seed: int = 0,
        num_workers: int = 3,
        max_delay: int = 6,
        kill_worker: float = 0.0,
        kill_shard: float = 0.0,
        directory: Path | None = None,
        **flow: Any,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.kills = (kill_worker, kill_shard)
        self.directory = directory
        self.counts: Counter[str] = Counter()
        self.said: list[str] = []
        self.now = 0.0
        self.backend = SimBackend(
            delay=lambda: int(self.rng.integers(1, max_delay + 1)),
            eager=lambda: bool(self.rng.random() < 0.5),
            on_tick=self.misfortune,
        )
        self.shards = [self.spawn_shard(i) for i in range(2)]
        self.workers = [self.spawn_worker(i) for i in range(num_workers)]
        self.progress = Progress()
        self.pool = RoundPool(
            self.backend,  # type: ignore[arg-type]
            self.shards,  # type: ignore[arg-type]
            self.workers,  # type: ignore[arg-type]
            respawn_worker=self.spawn_worker,  # type: ignore[arg-type]
            respawn_shard=self.spawn_shard,  # type: ignore[arg-type]
            on_rejected=lambda shard: None,
            say=self.said.append,
            num_chains=CHAINS,
            depth=2,
            hang_s=1e9,
        )
        graph = SimpleNamespace(backend=self.backend, shards=self.shards, workers=self.workers)
        schedule = SimpleNamespace(num_negatives=BATCH, num_chains=CHAINS, num_steps=10)
        self.flow = NegativeFlow(
            graph,  # type: ignore[arg-type]
            schedule,  # type: ignore[arg-type]
            FlowConfig(**flow),
            self.pool,
            self.progress,
            lambda name, num: self.counts.update({name: num}),
        )
        self.pool.set_weights(None, 0)

    def spawn_worker(self, index: int) -> SimHandle:
        return self.backend.spawn(SimWorker, {}, name=f"worker-{index}")

    def spawn_shard(self, index: int) -> SimHandle:
        options = {
            "config": BufferConfig(capacity=CAPACITY, reinit_prob=0.2),
            "spec": SPEC,
            "index": index,
            "capacity": CAPACITY // 2,
            "max_lease": CHAINS,
            "seed": 1,
            "directory": str(self.directory / str(index)) if self.directory else None,
            "clock": lambda: self.now,
        }
        return self.backend.spawn(Shard, options, name=f"shard-{index}")

    def misfortune(self) -> None:
        for parts, chance in ((self.workers, self.kills[0]), (self.shards, self.kills[1])):
            if self.rng.random() < chance:
                self.backend.kill(parts[int(self.rng.integers(len(parts)))])

    def update(self, busy_ticks: int = 0) -> tuple[list[int], np.ndarray]:
        """One update; returns the lags at consumption and the negatives."""
        taken = self.flow.take_negatives()
        assert taken.version == self.progress.version
        x = []
        for lease, (num, ref) in zip(taken.leases, taken.negatives, strict=True):
            negatives = self.backend.get(ref, 1.0)
            assert num == lease.num_chains == len(negatives["x"]) == CHAINS
            assert (negatives["version"] == lease.version).all()
            x.append(negatives["x"])
        for _ in range(busy_ticks):  # the learner computes, rounds go on
            self.pool.poll(0.0)
            self.flow.top_up()
        self.progress.step += 1
        self.progress.version += 1
        self.pool.set_weights(None, self.progress.version)
        self.check()
        return [taken.version - lease.version for lease in taken.leases], np.concatenate(x)

    def check(self) -> None:
        identities: list[int] = []
        for shard in self.shards:
            if shard.dead:
                continue
            counts = shard.part.counts()
            assert counts["free"] + counts["leased"] + counts["ready"] == CAPACITY // 2
            identities += shard.part.identities().tolist()
        assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("max_lag", [2, 5])
@pytest.mark.parametrize("stale", ["repair", "drop", "reweight"])
def test_lag_at_consumption_is_bounded_except_where_it_is_reweighted(stale, max_lag) -> None:
    lags: list[int] = []
    world = World(mode="async", stale=stale, max_lag=max_lag, max_delay=40, num_workers=8)
    for _ in range(300):
        lags += world.update(busy_ticks=3)[0]
    assert min(lags) >= 0
    if stale == "reweight":
        assert max(lags) > max_lag, "the delays here make some chains too old"
        assert not world.counts
        return
    assert max(lags) <= max_lag
    assert max(lags) > 0, "rounds ran ahead"
    name = {"repair": "flow/repaired", "drop": "flow/dropped"}[stale]
    assert set(world.counts) == {name}
    assert world.counts[name] % CHAINS == 0


def test_a_generous_bound_is_never_reached_and_nothing_is_repaired() -> None:
    world = World(mode="async", max_lag=100, max_delay=10)
    lags = [lag for _ in range(200) for lag in world.update(busy_ticks=3)[0]]
    assert 0 < max(lags) < 100
    assert not world.counts


def test_rounds_ahead_never_exceed_the_credit_of_max_lag() -> None:
    for max_lag in (1, 3):
        world = World(mode="async", max_lag=max_lag, num_workers=8, max_delay=3)
        for _ in range(100):
            world.update(busy_ticks=5)
            ahead = world.pool.outstanding + len(world.pool.committed)
            assert ahead <= max_lag * BATCH // CHAINS


def run_sync(num_updates: int = 40, **options: Any) -> tuple[np.ndarray, list[np.ndarray], World]:
    world = World(mode="sync", **options)
    out = [world.update() for _ in range(num_updates)]
    assert all(lag == 0 for lags, _ in out for lag in lags)
    chains = [shard.part.snapshot()["arrays"]["position"] for shard in world.shards]
    return np.stack([x for _, x in out]), chains, world


def test_sync_gives_the_same_negatives_bit_for_bit_whoever_works_and_whoever_dies() -> None:
    negatives, chains, _ = run_sync(num_workers=1, max_delay=1)
    assert len(np.unique(negatives[:, :, 0])) == negatives[:, :, 0].size
    restarts = 0
    for seed in range(12):
        again, chains_again, world = run_sync(
            seed=seed,
            num_workers=1 + seed % 5,
            max_delay=1 + 4 * seed,
            kill_worker=0.3 / (3 + seed),
        )
        restarts += world.pool.restarts
        assert np.array_equal(negatives, again)
        for a, b in zip(chains, chains_again):
            assert np.array_equal(a, b)
    assert restarts > 15


@pytest.mark.parametrize("seed", range(6))
def test_async_survives_hundreds_of_deaths_with_every_chain_in_its_place(seed, tmp_path) -> None:
    world = World(
        seed=seed,
        mode="async",
        max_lag=4,
        max_delay=8,
        num_workers=4,
        kill_worker=0.02,
        kill_shard=0.02,
        directory=tmp_path,
    )
    for _ in range(400):
        lags, _ = world.update(busy_ticks=1)
        assert 0 <= min(lags) <= max(lags) <= 4
    assert world.pool.restarts > 15
    assert sum("worker" in line for line in world.said) > 3
    assert sum("shard" in line for line in world.said) > 3
    assert world.progress.step == 400


def test_a_worker_that_always_dies_ends_the_run_with_its_name() -> None:
    world = World(mode="sync", num_workers=1, max_delay=5, kill_worker=1.0)
    with pytest.raises(RunFailed, match=r"worker-0|round 0"):
        world.update()
    assert world.pool.restarts <= MAX_ATTEMPTS + 1


def test_a_worker_that_hangs_is_replaced() -> None:
    world = World(mode="async", num_workers=2, max_delay=10**6)
    world.pool._hang_s = 0.05
    world.flow.top_up()
    import time

    time.sleep(0.1)
    world.pool.poll(0.0)
    assert any("held a round" in line for line in world.said)
    assert world.pool.restarts == 1
