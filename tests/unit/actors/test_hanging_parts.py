"""A part that is stopped answers nothing and is not dead: it is found, named and replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import run
from worlds import CHAINS, World

from ebm_dist.cluster.backend import PartDied
from ebm_dist.cluster.halt import Halt
from ebm_dist.cluster.inline import InlineBackend, InlineResult
from ebm_dist.cluster.stall import answer
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.negatives.source import NegativeSource


def test_a_shard_that_hangs_is_replaced_and_no_worker_is_blamed() -> None:
    world = World(mode="async", num_workers=3, max_lag=4, stall_timeout_s=0.3, max_delay=1)
    world.backend.hung.add("shard-1")
    for _ in range(10):
        world.update()
    (said,) = world.said
    assert said.startswith("shard-1 died (a round has waited for it")


def test_a_shard_that_owes_negatives_is_ended_after_the_time_out() -> None:
    world = World(mode="async", num_workers=2, stall_timeout_s=0.2, max_delay=1)
    while not world.scheduler.committed:
        world.flow.top_up()
        world.scheduler.poll(0.0)
    shard = next(iter(world.scheduler.committed.values())).shard
    world.backend.hung.add(f"shard-{shard}")
    world.update()
    assert any(f"shard-{shard} died" in line and "stall_timeout_s" in line for line in world.said)


def test_an_answer_that_does_not_come_ends_the_part_that_owes_it() -> None:
    killed: list[str] = []

    class Silent:
        halt = Halt()

        def get(self, ref: Any, timeout: float) -> Any:
            raise TimeoutError

        def wait(self, refs: Any, timeout: float) -> list[Any]:
            return []

        def kill(self, part: Any) -> None:
            killed.append(part)

    class Part:
        name = "shard-3"

    with pytest.raises(PartDied, match=r"update 3: shard-3 gave no answer for 0 s"):
        answer(Silent(), Part(), None, 0.01, "update 3")  # type: ignore[arg-type]
    assert len(killed) == 1


def test_a_worker_that_hangs_is_told_from_a_shard_by_what_its_round_waits_for() -> None:
    world = World(mode="async", num_workers=1, tick_s=1.0, lease_timeout_s=50.0, max_ticks=1000)
    world.update()
    world.backend.hung.add("worker-0")
    for _ in range(5):
        world.update()
    (said,) = world.said
    assert said.startswith("worker-0 died (held a round for 100 s")
    assert "buffer.lease_timeout_s" in said


def test_rounds_that_take_longer_than_a_lease_lasts_are_committed_the_first_time() -> None:
    """A lease is drawn when its round begins to wait behind another one of its worker."""
    world = World(mode="sync", num_workers=1, tick_s=1.0, lease_timeout_s=20.0)
    world.backend.delay = lambda: 35
    for _ in range(5):
        world.update()
    assert world.scheduler.num_refused == world.scheduler.restarts == 0
    assert all(shard.handle.part.counts().expired_leases == 0 for shard in world.shards)


def test_a_lease_that_nobody_renews_gives_its_chains_back() -> None:
    world = World(tick_s=1.0, lease_timeout_s=20.0)
    shard = world.shards[0].handle.part
    for lease_id in (1, 2):
        assert shard.checkout(lease_id, CHAINS) is not None
    for _ in range(5):
        world.now += 15.0
        shard.renew([2, 99])
    assert shard.counts().expired_leases == 1
    world.now += 21.0
    assert shard.expire() == [2]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_lone_rank_that_hangs_is_replaced_and_the_run_goes_back(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, wait = LearnerGroup.update, InlineBackend.wait
    lost: list[InlineResult] = []

    def hangs(self: LearnerGroup, step: int, *args: Any, **options: Any) -> Any:
        refs = update(self, step, *args, **options)
        if step == 3 and not lost:
            lost.extend(InlineResult() for _ in refs)
            return lost
        return refs

    def done(self: InlineBackend, refs: Any, timeout: float) -> list[Any]:
        return [ref for ref in wait(self, refs, timeout) if not any(ref is one for one in lost)]

    monkeypatch.setattr(LearnerGroup, "update", hangs)
    monkeypatch.setattr(InlineBackend, "wait", done)
    monkeypatch.setattr(InlineBackend, "kill", lambda self, handle: handle.part.close())
    options = (f"flow.mode={mode}", "run.steps=5", "checkpoint.every=2", "flow.stall_timeout_s=0.3")
    result, screen = run(tmp_path / "r", *options)
    assert result.finished
    assert "gave no answer" in screen
    assert "flow.stall_timeout_s" in screen
    assert "going back" in screen


def test_the_flow_gives_a_stall_up_only_where_no_shard_hangs() -> None:
    world = World(mode="async", num_workers=2, stall_timeout_s=0.2)
    assert isinstance(world.flow, NegativeSource)
    assert not world.scheduler.replace_a_hung_shard(0.0), "nothing is under way"
    world.flow.top_up()
    assert not world.scheduler.replace_a_hung_shard(1000.0), "nothing is old"
