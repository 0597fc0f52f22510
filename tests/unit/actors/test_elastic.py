"""The pool grows, shrinks, leaves draining nodes and stays off work until it holds weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import World

from ebm_dist.cluster.backend import Node
from ebm_dist.config.run_config import load
from ebm_dist.controller.workers.autoscaler import (
    DRAIN_CHECK_S,
    WINDOW_S,
    Autoscaler,
    Elasticity,
    wanted,
)
from ebm_dist.controller.workers.utilisation import Load
from ebm_dist.core.errors import UserError
from ebm_dist.run.placement.gpu_shares import Shares
from ebm_dist.run.placement.placer import VIEW_S, Placer
from ebm_dist.run.placement.plan import Plan

SHARES = st.floats(0.0, 1.0)


def busy_pool(size: int, demand: float) -> Load:
    """What a pool of `size` shows where `demand` workers would just keep up with the learner."""
    if size >= demand:
        return Load(0.0, 1.0 - demand / size, 0.0)
    return Load(1.0 - size / demand, 0.0, 0.0)


@given(st.integers(1, 64), st.floats(0.5, 100.0))
def test_from_any_size_the_pool_settles_near_the_demand_and_stays(size, demand) -> None:
    sizes = [size]
    for _ in range(12):
        sizes.append(wanted(sizes[-1], busy_pool(sizes[-1], demand), 1, 64))
    assert sizes[-1] == sizes[-2] == sizes[-3]
    goal = min(64, demand)
    assert goal * 0.8 - 1e-9 <= sizes[-1] <= max(2 * goal, 1)
    steps = np.sign(np.diff(sizes))
    assert not (1 in steps and -1 in steps), f"it went up and down: {sizes}"


@given(st.integers(1, 64), SHARES, SHARES, SHARES, st.integers(1, 20), st.integers(0, 20))
def test_the_size_never_leaves_its_bounds(size, wait, idle, both, low, more) -> None:
    assert low <= wanted(size, Load(wait, idle, both), low, low + more) <= low + more


def test_it_does_not_grow_while_workers_have_nothing_to_do() -> None:
    assert wanted(4, Load(0.9, 0.1, 0.1), 1, 16) == 8
    assert wanted(4, Load(0.9, 0.6, 0.8), 1, 16) < 4, "the learner waits for something else"


def test_in_sync_mode_what_counts_is_idleness_while_the_learner_waits() -> None:
    # Eight workers for four rounds an update, and a learner that computes as long as they do.
    assert wanted(8, Load(0.5, 0.75, 0.5), 1, 16) == 6
    assert wanted(4, Load(0.5, 0.5, 0.0), 1, 16) == 8


class Elastic(World):
    """A world whose time passes with its ticks, with an autoscaler."""

    def __init__(self, low: int, high: int, start: int, room: int = 99, **options: Any) -> None:
        super().__init__(num_workers=low, **options)
        self.room = room
        self.leaving: set[str] = set()
        for part in (self.scheduler.workers.members, self.flow.waits):
            part._clock = lambda: 0.1 * self.backend.tick
        self.scheduler.workers.members._last = 0.0
        self.autoscaler = Autoscaler(
            self.scheduler.workers,
            self.flow.waits,
            Elasticity(low, high, start, self.start_worker, lambda: self.leaving),
            clock=lambda: 0.1 * self.backend.tick,
        )
        self.flow._on_wait = self.autoscaler.adjust

    def start_worker(self, index: int) -> Any:
        return self.spawn_worker(index) if len(self.workers) < self.room else None

    @property
    def size(self) -> int:
        return self.scheduler.workers.members.num_serving

    def run(self, seconds: float, busy: int) -> list[int]:
        sizes = []
        until = 0.1 * self.backend.tick + seconds
        while 0.1 * self.backend.tick < until:
            self.update(busy_ticks=busy)
            self.autoscaler.adjust()
            sizes.append(self.size)
        return sizes


def test_a_pool_that_is_too_small_grows_and_one_that_is_too_large_shrinks() -> None:
    world = Elastic(1, 12, 1, mode="async", max_lag=8, max_delay=60, capacity=400)
    sizes = world.run(12 * WINDOW_S, busy=2)
    assert sizes[0] == 1
    assert max(sizes) == 12
    # The learner becomes slow: the same workers now wait for it.
    sizes = world.run(20 * WINDOW_S, busy=200)
    assert sizes[-1] <= 3
    assert world.scheduler.restarts == 0
    assert len(world.workers) == world.size
    assert [line for line in world.said if "workers from now on" in line]


def test_workers_that_cannot_be_placed_are_not_waited_for_and_join_when_a_node_does() -> None:
    world = Elastic(1, 6, 6, room=2, mode="async", max_lag=8, max_delay=60, capacity=400)
    assert set(world.run(3 * WINDOW_S, busy=1)) <= {1, 2}
    assert world.size == 2
    world.room = 4
    world.run(2 * DRAIN_CHECK_S, busy=1)
    assert world.size == 4


def test_a_newcomer_gets_no_work_before_it_holds_weights() -> None:
    # SimWorker asserts it; here newcomers come all the time, and die.
    world = Elastic(
        2, 8, 6, mode="async", max_lag=4, max_delay=10, kill_worker=0.01, max_ticks=20_000
    )
    world.run(10 * WINDOW_S, busy=1)
    assert world.scheduler.restarts > 5
    assert all(worker.handle.part.held >= 0 for worker in world.workers[:2])


def test_workers_of_a_draining_node_finish_their_rounds_and_give_their_leases_back() -> None:
    world = Elastic(4, 4, 4, mode="async", max_lag=4, max_delay=40, nodes=("a", "b"), capacity=200)
    world.run(DRAIN_CHECK_S, busy=0)
    leaving = [worker for worker in world.workers if worker.node == "a"]
    assert len(leaving) == 2
    world.leaving = {"a"}
    world.room = 0
    world.run(8 * DRAIN_CHECK_S, busy=0)
    assert all(worker.handle.dead for worker in leaving)
    assert {worker.node for worker in world.workers} == {"b"}
    assert world.scheduler.restarts == 0, "they were not lost, they left"
    assert world.scheduler.num_refused == 0
    for shard in world.shards:
        assert shard.handle.part.counts().expired_leases == 0
    # As soon as there is room elsewhere, the pool is whole again.
    world.room, world.nodes = 99, ("b",)
    world.run(2 * DRAIN_CHECK_S, busy=0)
    assert world.size == 4


@pytest.mark.parametrize("size", [1, 3])
def test_the_last_worker_stays_on_a_draining_node_until_another_serves_elsewhere(size: int) -> None:
    world = Elastic(size, size, size, mode="async", max_lag=4, max_delay=10, nodes=("a",))
    world.leaving, world.room = {"a"}, 0
    world.run(4 * DRAIN_CHECK_S, busy=0)
    assert [worker.node for worker in world.workers] == ["a"]
    world.room, world.nodes = 99, ("b",)
    world.run(4 * DRAIN_CHECK_S, busy=0)
    assert [worker.node for worker in world.workers] == ["b"] * size
    assert world.scheduler.restarts == 0


def test_sync_is_bitwise_while_the_pool_grows_and_shrinks_under_it() -> None:
    def run(changes: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        world = Elastic(1, 9, 1, mode="sync", max_delay=8)
        x = []
        for step in range(60):
            if changes and step % 5 == 0:
                world.autoscaler.size = 1 + (7 * step) % 9
                world.autoscaler._fill()
            x.append(world.update()[1])
        if changes:
            assert world.scheduler.workers.next_index > 20, "workers came and went"
        return np.stack(x), [s.handle.part.snapshot().arrays["position"] for s in world.shards]

    x, chains = run(changes=False)
    again, chains_again = run(changes=True)
    assert np.array_equal(x, again)
    assert all(map(np.array_equal, chains, chains_again))


# --- where they go ------------------------------------------------------------------------------


class Part:
    num_gpus = 0.0

    def __init__(self, node: str | None) -> None:
        self.name, self.node = "part", node


def placer(nodes: list[Node], shards: list[str], workers: list[str]) -> tuple[Placer, list[Part]]:
    worker_pool = [Part(node) for node in workers]
    now = iter(np.arange(0.0, 1e3, 1e-3))
    made = Placer(
        lambda: nodes,
        [Part(node) for node in shards],  # type: ignore[misc]
        worker_pool,  # type: ignore[arg-type]
        Plan("cpu", 1, 1, 0.5, Shares()),
        cpus_per_worker=1.0,
        num_workers=4,
        num_ranks=1,
        clock=lambda: VIEW_S + next(now),
    )
    return made, worker_pool


def test_workers_fill_the_nodes_of_the_shards_first_and_never_beyond_what_is_free() -> None:
    nodes = [
        Node("a", False, {"CPU": 3}),
        Node("b", False, {"CPU": 2}),
        Node("c", True, {"CPU": 9}),
    ]
    made, worker_pool = placer(nodes, ["a"], [])
    put = []
    while (place := made.for_worker()) is not None:
        put.append(place.node)
        worker_pool.append(Part(place.node))
    assert sorted(put) == ["a", "a", "a", "b", "b"]
    assert put[:3] == ["a", "a", "a"]
    assert made.clustered


def test_shards_are_spread_over_the_nodes_that_stay() -> None:
    nodes = [
        Node("a", False, {"CPU": 2}),
        Node("b", False, {"CPU": 8}),
        Node("c", True, {"CPU": 9}),
    ]
    made, _ = placer(nodes, [], [])
    made._shards = shards = []  # type: ignore[assignment]
    for _ in range(4):
        shards.append(Part(made.for_shard()))
    assert [part.node for part in shards] == ["b", "a", "b", "a"]


def test_a_shard_is_put_back_where_its_chains_are_mapped_if_that_node_stays() -> None:
    nodes = [Node("a", False, {"CPU": 8}), Node("b", False, {"CPU": 1})]
    made, _ = placer(nodes, ["a", "b", "b", "b"], [])
    assert made.for_shard() == "a"
    assert made.for_shard("b") == "b"
    nodes[1] = Node("b", True, {"CPU": 1})
    assert made.for_shard("b") == "a"
    assert made.for_shard("c") == "a", "one that died a moment ago, with the shard"


def test_a_worker_is_not_put_back_where_it_died_unless_there_is_nothing_else() -> None:
    nodes = [Node("a", False, {"CPU": 4}), Node("b", False, {"CPU": 1})]
    made, worker_pool = placer(nodes, ["a"], ["a"])
    for node in "ba":
        place = made.for_worker(instead_of=worker_pool[0])  # type: ignore[arg-type]
        assert place is not None
        assert place.node == node


def test_on_one_machine_there_is_nothing_to_choose() -> None:
    made, _ = placer([], [], [])
    assert made.for_worker() == (None, 0.0, 1)
    assert made.for_shard() is None
    assert not made.clustered


# --- the config ---------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "data": {"source": "digits", "batch_size": 64},
    "energy": {"name": "mlp"},
    "sampler": {"name": "langevin", "step_size": 1.0, "noise_std": 0.01, "num_steps": 10},
    "buffer": {"capacity": 256, "num_shards": 2},
    "workers": {"num_chains": 32},
}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["workers.min_workers=3", "workers.num_workers=2"], "min_workers <= num_workers"),
        (["workers.max_workers=1", "workers.num_workers=2"], "min_workers <= num_workers"),
        (
            ["flow.min_steps_per_update=900", "flow.max_steps_per_update=800"],
            "min_steps_per_update <= max_steps_per_update",
        ),
        (["flow.max_steps_per_update=639"], r"flow\.max_steps_per_update: .*at least .* 640"),
        (
            ["flow.min_steps_per_update=700", "buffer.capacity=64"],
            r"buffer\.capacity: .*spare",
        ),
        (
            ["flow.max_steps_per_update=700", "objective.name=score_matching"],
            r"flow\.max_steps_per_update: .*takes no negatives",
        ),
    ],
)
def test_a_band_or_pool_that_cannot_work_is_refused_with_one_line(overrides, said) -> None:
    with pytest.raises(UserError, match=said) as error:
        load(BASE, overrides)
    assert len(str(error.value).splitlines()) == 1


def test_the_widest_and_the_narrowest_band_are_accepted() -> None:
    config = load(BASE, ["flow.min_steps_per_update=640", "flow.max_steps_per_update=640"])
    assert config.flow.max_steps_per_update == 640
    config = load(BASE, ["flow.min_steps_per_update=2000", "workers.max_workers=8"])
    assert config.workers.bounds == (1, 8)
    assert math.isclose(config.flow.min_steps_per_update or 0, 2000)
