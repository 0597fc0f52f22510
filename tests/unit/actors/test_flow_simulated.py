"""The pool and the flow of negatives under late replies, lost replies and deaths, by simulation."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from simulation import SimWorker
from worlds import BATCH, CHAINS, World

from ebm_dist.cluster.backend import PartDied
from ebm_dist.controller.retry import MAX_ATTEMPTS, MAX_STARTS
from ebm_dist.core.errors import RunFailed


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


@pytest.mark.parametrize("max_lag", [1, 3])
def test_rounds_ahead_never_exceed_the_credit_of_max_lag(max_lag) -> None:
    world = World(mode="async", max_lag=max_lag, num_workers=8, max_delay=3)
    per_update = BATCH // CHAINS
    ahead: list[int] = []

    def watched(reserved: int = 0, top_up=world.flow.top_up) -> None:
        top_up(reserved)
        ahead.append(world.scheduler.outstanding + len(world.scheduler.committed) + reserved)

    world.flow.top_up = watched  # type: ignore[method-assign]
    for _ in range(100):
        world.update(busy_ticks=5)
        assert ahead[-1] <= max_lag * per_update, "of the weights that are being replaced"
    # While the learner waits it has published, so what begins then is one update younger.
    assert max(ahead) == (max_lag + 1) * per_update


def test_rounds_of_equally_fast_workers_are_all_in_time_at_the_smallest_lag() -> None:
    world = World(mode="async", max_lag=1, num_workers=4, max_delay=1, scattered=False)
    lags = [lag for _ in range(200) for lag in world.update(busy_ticks=2)[0]]
    assert max(lags) == 1
    assert not world.counts


def run_sync(num_updates: int = 40, **options: Any) -> tuple[np.ndarray, list[np.ndarray], World]:
    world = World(mode="sync", **options)
    out = [world.update() for _ in range(num_updates)]
    assert all(lag == 0 for lags, _ in out for lag in lags)
    chains = [shard.handle.part.snapshot().arrays["position"] for shard in world.shards]
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
            kill_worker=0.2 / (3 + seed),
        )
        restarts += world.scheduler.restarts
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
        carries=True,
    )
    for _ in range(400):
        lags, _ = world.update(busy_ticks=1)
        assert 0 <= min(lags) <= max(lags) <= 4
    assert world.scheduler.restarts > 15
    assert sum("worker" in line for line in world.said) > 3
    assert sum("shard" in line for line in world.said) > 3
    assert world.progress.step == 400


def test_a_worker_that_always_dies_ends_the_run_with_its_name() -> None:
    world = World(mode="sync", num_workers=1, max_delay=5, kill_worker=1.0)
    with pytest.raises(RunFailed, match=r"worker-0|round 0"):
        world.update()
    assert world.scheduler.restarts <= MAX_STARTS + 1


def test_a_worker_that_dies_of_every_round_ends_the_run_after_five(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(mode="sync", num_workers=1, max_delay=5)

    def dies(*_: object) -> None:
        world.backend.kill(world.workers[0].handle)
        raise PartDied("killed by its round")

    monkeypatch.setattr(SimWorker, "run_round", dies)
    with pytest.raises(RunFailed, match=r"round \d of shard \d failed 5 times"):
        world.update()
    assert world.scheduler.restarts == MAX_ATTEMPTS


def test_a_worker_that_never_starts_ends_the_run_with_its_name() -> None:
    world = World(mode="async", num_workers=1, max_delay=3)
    member = next(iter(world.scheduler.workers.members))
    for _ in range(MAX_STARTS - 1):
        world.scheduler.workers.replace(member, "killed by the test")
    with pytest.raises(RunFailed, match=r"worker-0 was started 20 times .*workers\.num_workers"):
        world.scheduler.workers.replace(member, "killed by the test")


def test_workers_that_are_hit_while_they_start_are_started_on() -> None:
    world = World(mode="async", num_workers=2, max_delay=3)
    world.update()
    member = next(iter(world.scheduler.workers.members))
    for _ in range(3):
        for _ in range(2 * MAX_ATTEMPTS):
            world.scheduler.workers.replace(member, "killed by the test")
            assert member.state == "starting"
        while member.state == "starting":
            world.scheduler.poll(0.0)
    for _ in range(10):
        world.update()


def test_a_worker_that_hangs_is_replaced() -> None:
    world = World(mode="async", num_workers=2, max_delay=10**6)
    world.scheduler._overdue.hang_s = 0.05
    for _ in range(2):
        world.scheduler.poll(0.0)
    world.flow.top_up()
    time.sleep(0.1)
    world.scheduler.poll(0.0)
    assert any("held a round" in line for line in world.said)
    assert world.scheduler.restarts == 1
