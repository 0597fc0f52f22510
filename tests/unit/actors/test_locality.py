"""Chains are moved where they lie while the work is dealt evenly, and stolen where it is not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from worlds import World

from ebm_dist.controller.negatives.shard_choice import SLACK, ShardChoice, shards_of_update
from ebm_dist.controller.workers.load import LoadQueue


class Worker:
    def __init__(self, node: str | None) -> None:
        self.name, self.node = "worker", node


def pool(*nodes: str | None) -> LoadQueue:
    made = LoadQueue(lambda: 0.0)
    for index, node in enumerate(nodes):
        made.serve(made.add(index, Worker(node)))  # type: ignore[arg-type]
    return made


def test_of_workers_with_equal_load_the_one_beside_the_shard_is_chosen() -> None:
    made = pool("a", "a", "b", "b")
    for _ in range(2):
        member = made.first("b")
        assert member is not None
        assert member.node == "b"
        made.add_load(member, +1)
    stolen = made.first("b")
    assert stolen is not None
    assert stolen.node == "a", "an idle worker elsewhere is sooner done than a busy one here"


@pytest.mark.parametrize(("before", "after"), [("a", "b"), ("a", None), (None, "b")])
def test_a_worker_that_was_replaced_is_sought_on_its_new_node(
    before: str | None, after: str | None
) -> None:
    made = pool(before, "c")
    member = made.first(before)
    assert member is not None
    made.renew(member, Worker(after))  # type: ignore[arg-type]
    made.serve(member)
    assert member.node == after
    if before is not None:
        first = made.first(before)
        assert first is not None
        assert first.node == "c", "the other has waited longest"
    if after is not None:
        assert made.first(after) is member


def test_of_equals_the_one_that_waited_longest_is_chosen() -> None:
    made = pool(None, None, None)
    order = []
    for _ in range(6):
        member = made.first()
        assert member is not None
        order.append(member.index)
        made.add_load(member, +1)
        made.add_load(member, -1)
    assert order == [0, 1, 2, 0, 1, 2]


def test_where_an_update_takes_from_every_shard_rounds_are_dealt_out_in_turn() -> None:
    choice = ShardChoice(3, leases_per_update=6)
    assert [choice.next(i, None, [None] * 3) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_where_it_takes_fewer_each_rounds_shard_is_drawn_at_random_of_all_nodes() -> None:
    choice, nodes = ShardChoice(4, leases_per_update=3), ["a", "a", "b", "b"]
    drawn = [choice.next(i, "a", nodes) for i in range(20_000)]
    pairs = np.histogram2d(drawn[:-1:2], drawn[1::2], bins=4)[0]
    expected = len(drawn) / 2 / 16
    # 15 degrees of freedom: mean 15, standard deviation 5.5. Taking turns would give 30,000.
    assert ((pairs - expected) ** 2 / expected).sum() < 15 + 4 * 5.5
    again = ShardChoice(4, leases_per_update=3)
    assert [again.next(i, None, nodes) for i in range(50)] == drawn[:50], "the number decides"


def test_in_sync_mode_an_update_takes_from_all_shards_alike_and_the_rest_at_random() -> None:
    for num in (3, 6):
        assert sorted(shards_of_update(7, num, 3)) == sorted([0, 1, 2] * (num // 3))
    alone = [shards_of_update(first, 1, 2)[0] for first in range(10_000)]
    for period in (1, 2):  # neither always the same nor in turn
        same = np.mean(np.equal(alone[:-period], alone[period:]))
        assert abs(same - 0.5) < 4 * 0.5 / 100


@pytest.mark.parametrize("fast", [1, 2, 5])
def test_a_faster_node_steals_and_no_shard_falls_behind_by_more_than_the_slack(fast: int) -> None:
    choice, nodes = ShardChoice(4, leases_per_update=4), ["a", "a", "b", "b"]
    rng = np.random.default_rng(0)
    rounds: Counter[int] = Counter()
    local = 0
    for lease_id in range(2000):
        node = "a" if rng.random() < fast / (fast + 1) else "b"
        shard = choice.next(lease_id, node, nodes)
        rounds[shard] += 1
        local += nodes[shard] == node
        assert max(rounds.values()) - min(rounds[i] for i in range(4)) <= SLACK
    # The slower node's share runs where it lies; so does as much of the faster one's.
    assert local / 2000 >= (2 / (fast + 1) if fast > 1 else 0.95) * 0.9


def test_a_flow_over_two_nodes_is_mostly_local_and_uses_every_chain_alike() -> None:
    world = World(mode="async", max_lag=6, num_workers=4, nodes=("a", "b"), capacity=96)
    for _ in range(150):
        world.update(busy_ticks=2)
    assert world.scheduler.num_local > 0.85 * world.scheduler.num_started
    used = [s.handle.part.snapshot().arrays["generation"].sum() for s in world.shards]
    assert abs(used[0] - used[1]) <= 2 * SLACK * 4


def test_sync_is_bitwise_wherever_shards_and_workers_are() -> None:
    def run(nodes: tuple[str | None, ...], num_workers: int) -> np.ndarray:
        world = World(mode="sync", num_workers=num_workers, nodes=nodes)
        return np.stack([world.update()[1] for _ in range(30)])

    reference = run((None,), 1)
    for nodes, num_workers in ((("a", "b"), 4), (("a",), 3), (("b", "a"), 5)):
        assert np.array_equal(reference, run(nodes, num_workers))


def test_a_run_without_chains_has_no_shard_to_choose_from():
    ShardChoice(0, 0)
