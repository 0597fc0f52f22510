"""The band of MCMC steps per update: its credits alone, and held under any schedule."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import BATCH, CHAINS, NUM_STEPS, World

from ebm_dist.controller.negatives.step_budget import StepBudget, num_late

NEEDED, ROUND = BATCH * NUM_STEPS, CHAINS * NUM_STEPS


def brute_force_late(versions: list[int], version: int, max_lag: int, left: int, per: int) -> int:
    best = len(versions)
    for order in permutations(versions):
        late = 0
        consumed_at = [version] * left
        while len(consumed_at) < len(order) + 1:
            consumed_at += [consumed_at[-1] + 1 if consumed_at else version + 1] * per
        place = 0
        for moved_at in order:
            if consumed_at[place] - moved_at <= max_lag:
                place += 1
            else:
                late += 1
        best = min(best, late)
    return best


@given(
    versions=st.lists(st.integers(0, 9), max_size=6),
    max_lag=st.integers(1, 4),
    left=st.integers(0, 2),
    per=st.integers(1, 3),
)
@settings(max_examples=300, deadline=None)
def test_leases_that_come_too_late_in_every_order_are_counted(versions, max_lag, left, per) -> None:
    counts = {v: versions.count(v) for v in versions}
    expected = brute_force_late(versions, 9, max_lag, left, per)
    assert num_late(counts, 9, max_lag, left, per) == expected


@given(st.floats(1.0, 9.0), st.integers(1, 400))
def test_spare_rounds_of_each_update_add_up_to_the_lower_bound(factor, updates) -> None:
    band = StepBudget(factor * NEEDED, math.inf, NEEDED, ROUND)
    spare = [band.spare_rounds(step) for step in range(updates)]
    total = updates * NEEDED + ROUND * sum(spare)
    assert factor * NEEDED * updates <= total * (1 + 1e-6)
    assert total < factor * NEEDED * updates + ROUND + 1e-3 * updates
    assert max(spare) <= band.max_spare_rounds


def hold(world: World, num_updates: int, low: float, high: float, busy: int) -> None:
    """Make updates and check the band after each, and the bound on lag."""
    ahead = world.flow._max_ahead
    for made in range(1, num_updates + 1):
        lags, _ = world.update(busy_ticks=busy)
        assert max(lags) <= world.max_lag
        assert world.scheduler.mcmc_steps >= low * made - 1e-3, "the learner did not wait"
        assert world.scheduler.mcmc_steps <= high * (made + 1) + (ahead + 1) * ROUND, (
            "workers did not"
        )
    # Every step is of a negative consumed, ready or under repair, or is counted as extra.
    in_repair = sum(round_.purpose == "repair" for round_ in world.scheduler.rounds())
    waiting = len(world.scheduler.committed) + in_repair
    needed = num_updates * NEEDED + waiting * ROUND
    assert world.scheduler.mcmc_steps == needed + world.flow._extra()
    assert world.progress.updates == num_updates


@given(
    seed=st.integers(0, 10**6),
    max_lag=st.integers(1, 5),
    stale=st.sampled_from(["repair", "drop"]),
    low=st.floats(0.2, 2.5),
    width=st.floats(0.0, 2.0),
    max_delay=st.integers(1, 40),
    num_workers=st.integers(1, 9),
    busy=st.integers(0, 6),
)
@settings(max_examples=40, deadline=None)
def test_the_band_is_held_and_nothing_deadlocks_under_any_schedule(
    seed, max_lag, stale, low, width, max_delay, num_workers, busy
) -> None:
    low, high = low * NEEDED, max(low + width, 1.0) * NEEDED
    world = World(
        seed=seed,
        mode="async",
        max_lag=max_lag,
        stale=stale,
        num_workers=num_workers,
        max_delay=max_delay,
        max_ticks=20_000,
        min_steps_per_update=low,
        max_steps_per_update=high,
    )
    hold(world, 25, low, high, busy)


@pytest.mark.parametrize("stale", ["repair", "drop"])
def test_with_no_step_to_spare_nothing_is_repaired_or_dropped(stale) -> None:
    options = {"mode": "async", "stale": stale, "max_lag": 2, "max_delay": 40, "num_workers": 8}
    free = World(**options)
    for _ in range(100):
        free.update(busy_ticks=3)
    assert free.counts, "left to itself, this schedule is late"
    held = World(**options, max_steps_per_update=NEEDED)
    hold(held, 100, 0.0, NEEDED, 3)
    assert not held.counts
    assert held.progress.extra_steps == 0


def test_a_lower_bound_makes_chains_move_that_nobody_consumes() -> None:
    world = World(mode="async", max_lag=3, num_workers=4, min_steps_per_update=2.5 * NEEDED)
    hold(world, 100, 2.5 * NEEDED, math.inf, 2)
    assert world.scheduler.steps["spare"] == pytest.approx(1.5 * NEEDED * 100, abs=4 * ROUND)
    moves = sum(s.handle.part.snapshot().arrays["generation"].sum() for s in world.shards)
    whole_rounds = world.scheduler.steps["negatives"] + world.scheduler.steps["spare"]
    assert moves * NUM_STEPS >= whole_rounds, "the moves stay in the buffer"


def test_spare_rounds_leave_sync_bitwise_whoever_works() -> None:
    def run(num_workers: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
        world = World(
            seed=seed,
            mode="sync",
            num_workers=num_workers,
            max_delay=1 + 3 * seed,
            min_steps_per_update=1.75 * NEEDED,
        )
        x = np.stack([world.update()[1] for _ in range(30)])
        assert world.scheduler.mcmc_steps == pytest.approx(1.75 * NEEDED * 30, abs=ROUND)
        return x, [shard.handle.part.snapshot().arrays["position"] for shard in world.shards]

    x, chains = run(1, 0)
    for seed in range(1, 6):
        again, chains_again = run(1 + seed, seed)
        assert np.array_equal(x, again)
        assert all(map(np.array_equal, chains, chains_again))


def test_the_band_survives_deaths(tmp_path) -> None:
    world = World(
        mode="async",
        max_lag=4,
        max_delay=8,
        num_workers=4,
        kill_worker=0.02,
        kill_shard=0.02,
        directory=tmp_path,
        max_ticks=20_000,
        min_steps_per_update=1.5 * NEEDED,
        max_steps_per_update=2 * NEEDED,
    )
    low, high = 1.5 * NEEDED, 2 * NEEDED
    hold(world, 200, low, high, 1)
    assert world.scheduler.restarts > 10
