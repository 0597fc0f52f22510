"""Whatever the run waits for, it ends with the name of the queue and of who should fill it."""

from __future__ import annotations

from typing import Any

import pytest
from worlds import CHAINS, NUM_STEPS, World

from ebm_dist.cluster import stall
from ebm_dist.cluster.stall import Queue, Stalled, Watchdog

NEVER = 10**9


def stalled(world: World) -> Stalled:
    def run() -> None:
        for _ in range(50):
            world.update()

    with pytest.raises(Stalled) as error:
        run()
    assert "flow.stall_timeout_s" in str(error.value)
    assert error.value.queue.filled_by in str(error.value)
    return error.value


def world(**options: Any) -> World:
    return World(**({"mode": "async", "max_lag": 4, "stall_timeout_s": 0.3} | options))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_workers_that_never_finish_are_named_as_those_who_fill_the_negatives(mode) -> None:
    error = stalled(world(mode=mode, max_delay=NEVER))
    assert error.queue is stall.NEGATIVES
    assert "3 workers" in str(error)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_workers_that_never_start_are_named(mode) -> None:
    made = world(mode=mode)
    for member in made.scheduler.workers.members:
        made.scheduler.workers.retire(member)
    assert stalled(made).queue is stall.WORKERS


def test_chains_that_nobody_frees_are_named() -> None:
    made = world(num_workers=2)
    for shard in made.shards:  # somebody else holds every chain, and never gives it back
        for lease_id in range(-1, -1 - made.capacity // 2 // CHAINS, -1):
            assert shard.handle.part.checkout(lease_id, CHAINS) is not None
    assert stalled(made).queue is stall.FREE_CHAINS


def test_late_rounds_that_the_band_waits_for_are_named() -> None:
    made = world(num_workers=4, max_lag=2, max_steps_per_update=2 * CHAINS * NUM_STEPS, max_delay=3)
    made.update()
    hung = 0

    def delay() -> int:
        nonlocal hung
        hung += 1
        return NEVER if hung % 3 == 0 else 1

    made.backend.delay = delay
    error = stalled(made)
    assert error.queue is stall.LATE_ROUNDS
    assert "flow.max_steps_per_update" in str(error)


def test_spare_rounds_that_do_not_come_are_named() -> None:
    made = world(num_workers=4, min_steps_per_update=3 * CHAINS * NUM_STEPS, max_delay=2)
    submit = made.scheduler._submit

    def lose_spare_rounds(round_: Any) -> None:
        made.backend.delay = lambda: NEVER if round_.purpose == "spare" else 1
        submit(round_)

    made.scheduler._submit = lose_spare_rounds  # type: ignore[method-assign]
    made.scheduler._depth = 100
    assert stalled(made).queue is stall.SPARE_STEPS


def test_rounds_without_credit_are_named() -> None:
    made = world()
    made.flow._max_ahead = 0
    assert stalled(made).queue is stall.CREDITS


@pytest.mark.parametrize(
    "queue", [value for value in vars(stall).values() if isinstance(value, Queue)], ids=str
)
def test_a_watchdog_raises_after_its_time_and_not_while_anything_moves(queue: Queue) -> None:
    now = 0.0
    watchdog = Watchdog(10.0, clock=lambda: now)
    for now in range(0, 100, 9):
        watchdog.look(now, lambda: (queue, "waiting"))
    now += 10
    watchdog.look(99, lambda: (queue, "waiting"))
    now += 1
    with pytest.raises(Stalled, match="waiting: nothing came into") as error:
        watchdog.look(99, lambda: (queue, "waiting"))
    for part in (queue.name, queue.filled_by, queue.remedy):
        assert part in str(error.value)
