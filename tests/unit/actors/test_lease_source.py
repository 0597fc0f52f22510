"""Chains move within the memory of a node, and between nodes by value, and are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from worlds import World

# A worker of these worlds refuses rows that are not of its own node.


def deadly(directory: Path, **kills: float) -> World:
    nodes = ("a", "b")
    return World(mode="async", max_lag=6, num_workers=4, nodes=nodes, directory=directory, **kills)


def late(world: World) -> int:
    return sum(shard.handle.part.counts().late_checkins for shard in world.shards)


def test_rounds_on_the_node_of_their_shard_go_by_rows_and_all_others_by_value(
    tmp_path: Path,
) -> None:
    world = World(
        mode="async", max_lag=6, num_workers=3, nodes=("a", "b"), capacity=96, directory=tmp_path
    )
    for _ in range(100):
        world.update(busy_ticks=2)
    scheduler = world.scheduler
    assert late(world) == 0
    assert 0 < scheduler.num_local < scheduler.num_started
    assert (
        scheduler.num_local - scheduler.outstanding <= scheduler.num_by_rows <= scheduler.num_local
    )


@pytest.mark.parametrize("num_workers", [1, 4, 5])
def test_in_sync_mode_the_chains_are_the_same_however_they_went(
    num_workers: int, tmp_path: Path
) -> None:
    def run(directory: Path | None, nodes: tuple[str | None, ...]) -> tuple[np.ndarray, World]:
        world = World(mode="sync", num_workers=num_workers, nodes=nodes, directory=directory)
        return np.stack([world.update()[1] for _ in range(30)]), world

    by_value, reference = run(None, (None,))
    assert reference.scheduler.num_by_rows == 0
    mixed, world = run(tmp_path, ("a", "b"))
    assert np.array_equal(by_value, mixed)
    assert late(world) == 0
    # Leases are drawn before anybody knows who takes them, and given out when it is known.
    assert world.scheduler.num_by_rows == world.scheduler.num_local > 0
    if num_workers == 1:
        assert world.scheduler.num_by_rows == world.scheduler.num_started // 2


def test_where_the_nodes_are_not_known_everything_goes_by_value(tmp_path: Path) -> None:
    world = World(mode="async", max_lag=3, nodes=(None,), directory=tmp_path)
    for _ in range(20):
        world.update()
    assert world.scheduler.num_by_rows == 0


def test_on_one_machine_every_round_goes_by_rows(tmp_path: Path) -> None:
    world = World(mode="sync", nodes=(None,), directory=tmp_path, scattered=False)
    for _ in range(20):
        world.update()
    assert world.scheduler.num_by_rows == world.scheduler.num_started > 0


def test_a_round_that_another_node_redoes_goes_by_value_and_the_rows_of_the_first_are_void(
    tmp_path: Path,
) -> None:
    world = deadly(tmp_path, kill_worker=0.05)
    for _ in range(600):
        world.update(busy_ticks=1)
    assert world.scheduler.restarts > 10
    assert 0 < world.scheduler.num_by_rows <= world.scheduler.num_local
    for shard in world.shards:
        assert not shard.handle.part._grants._limbo


def test_a_shard_that_dies_on_its_node_keeps_its_chains_while_leases_are_out_by_rows(
    tmp_path: Path,
) -> None:
    world = deadly(tmp_path, kill_shard=0.02)
    before = [shard.handle.part.identities().tolist() for shard in world.shards]
    for _ in range(600):
        world.update(busy_ticks=1)
    assert world.scheduler.restarts > 5
    assert any(shard.handle.part.epoch > 1 for shard in world.shards)
    assert [shard.handle.part.attached for shard in world.shards] == [True, True]
    after = [shard.handle.part.identities().tolist() for shard in world.shards]
    assert after == before
    ages = [shard.handle.part.snapshot().arrays["generation"].sum() for shard in world.shards]
    assert min(ages) > 0
