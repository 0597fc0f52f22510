"""What is lost with the node that held it is replaced: negatives by others, weights by the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulation import SimRef
from small_runs import curve, run
from worlds import BATCH, CHAINS, WEIGHTS, World

from ebm_dist.cluster.backend import ObjectLost
from ebm_dist.cluster.inline import InlineBackend, InlineHandle, InlineResult
from ebm_dist.controller.clients import LearnerClient
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.negatives import delivery
from ebm_dist.controller.negatives.delivery import Delivery
from ebm_dist.controller.retry import MAX_ATTEMPTS, RollBack
from ebm_dist.core.types import NegativeArrays

LEASES = BATCH // CHAINS


def lose(ref: SimRef) -> None:
    ref.value, ref.error = None, ObjectLost("its node is gone")


class Rank:
    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def fetched(self, *negatives: NegativeArrays) -> None:
        self.seen += [part.x for part in negatives]


def deliver(world: World, num_ranks: int = 2) -> Delivery:
    backend: Any = world.backend
    learners = LearnerGroup(
        backend,
        lambda rank, node: LearnerClient(backend.spawn(Rank, f"learner-{rank}")),
        num_ranks=num_ranks,
        port=None,
        start_timeout_s=1.0,
        call_timeout_s=1.0,
    )
    return Delivery(
        backend,
        learners,
        world.scheduler,
        world.flow,
        world.flow.top_up,
        num_negatives=BATCH,
        timeout=world.config.stall_timeout_s,
    )


@pytest.mark.parametrize("lost", [[0], [1], [0, 1]])
@pytest.mark.parametrize("stuck", [False, True])
def test_other_negatives_take_the_place_of_lost_ones(
    stuck: bool, lost: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(mode="async", max_lag=3)
    delivery_ = deliver(world)
    for _ in range(5):
        world.update(busy_ticks=2)
    consumed = world.flow.take_negatives()
    kept = [ref for i, (_, ref) in enumerate(consumed.negatives) if i not in lost]
    before = [lease.lease_id for lease in consumed.leases]
    for index in lost:
        lose(consumed.negatives[index][1])
    if stuck:  # the ranks' nodes are not told, as after a power loss: only who owns it knows
        monkeypatch.setattr(delivery, "LOSS_CHECK_S", 0.0)
        answer_late(monkeypatch, world, 3)
    delivery_.bring(consumed, step=5)
    world.check()
    assert world.counts["flow/lost"] == CHAINS * len(lost)
    after = [lease.lease_id for lease in consumed.leases]
    assert [a == b for a, b in zip(after, before)] == [i not in lost for i in range(LEASES)]
    assert len(set(after + before)) == LEASES + len(lost)
    assert [ref for i, (_, ref) in enumerate(consumed.negatives) if i not in lost] == kept
    for lease, (num, ref) in zip(consumed.leases, consumed.negatives):
        assert num == CHAINS == len(world.backend.get(ref, 1.0).x)
        assert 0 <= world.progress.version - lease.version <= 3
    # One update, whatever was lost on its way; what was lost are steps that no negative needed.
    assert world.progress.updates == 6
    for _ in range(50):
        assert max(world.update(busy_ticks=2)[0]) <= 3
    assert world.scheduler.restarts == 0


def answer_late(monkeypatch: pytest.MonkeyPatch, world: World, num_ticks: int) -> None:
    """Fetches of what is lost are not answered at once."""
    real = world.backend.call

    def call(handle: Any, method: str, args: tuple, num_returns: int) -> Any:
        ref = real(handle, method, args, num_returns)
        if method == "fetched" and ref.error is not None:
            ref.ready_at = world.backend.tick + 10**6
        return ref

    monkeypatch.setattr(world.backend, "call", call)


def test_in_sync_mode_lost_negatives_send_the_run_back() -> None:
    world = World(mode="sync", num_workers=1, max_delay=1)
    consumed = world.flow.take_negatives()
    lose(consumed.negatives[1][1])
    with pytest.raises(RollBack):
        deliver(world).bring(consumed, step=0)


def test_rounds_outlast_weights_that_are_lost_until_there_are_others() -> None:
    world = World(mode="async", max_lag=4, max_delay=2)
    ticks = iter(range(10**9))
    world.scheduler._clock = lambda: 0.1 * next(ticks)
    world.update()
    lost = SimRef(None, 0, set(), error=ObjectLost("its node is gone"))
    world.progress.version += 1
    world.scheduler.set_weights(lost, world.progress.version)
    world.flow.top_up()
    newcomer = world.scheduler.workers.next_index
    world.scheduler.workers.join(world.spawn_worker(newcomer))
    for _ in range(100 * MAX_ATTEMPTS):
        world.scheduler.poll(0.0)
        world.flow.top_up()
    assert world.scheduler.outstanding > 0
    assert all(round_.attempts <= 1 for round_ in world.scheduler.rounds())
    for _ in range(20):
        assert max(world.update(busy_ticks=5)[0]) <= 4
    assert world.scheduler.restarts == 0, "no worker was at fault"
    assert world.scheduler.workers.members.num_serving == 4, "the newcomer got the next weights"


def test_rounds_outlast_a_worker_that_nobody_knows_to_be_dead_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(mode="async", max_lag=4, max_delay=2)
    ticks = iter(range(10**9))
    world.scheduler._clock = lambda: 0.1 * next(ticks)
    world.update()
    dead, alive = world.workers[0], world.backend.alive
    world.backend.kill(dead.handle)
    monkeypatch.setattr(world.backend, "alive", lambda handle, timeout=0.5: True)
    for _ in range(100 * MAX_ATTEMPTS):
        world.scheduler.poll(0.0)
        world.flow.top_up()
    assert world.scheduler.restarts == 0
    monkeypatch.setattr(world.backend, "alive", alive)
    for _ in range(50):
        assert max(world.update(busy_ticks=5)[0]) <= 4
    assert world.scheduler.restarts == 1
    world.check()


def test_rounds_and_newcomers_that_wait_for_lost_weights_get_the_present_ones() -> None:
    world = World(mode="async", max_lag=4, max_delay=10**6)
    for _ in range(2):
        world.scheduler.poll(0.0)
    lost = SimRef(None, 0, set(), value=0)
    world.scheduler.set_weights(lost, 1)
    world.flow.top_up()
    old = set(world.scheduler._rounds)
    ids = sorted(round_.lease_id for round_ in world.scheduler.rounds())
    lose(lost)
    world.scheduler.redo_lost()
    assert old == set(world.scheduler._rounds), "there are no others yet"
    world.progress.version = 2
    world.scheduler.set_weights(WEIGHTS, 2)
    world.scheduler.redo_lost()
    assert not old & set(world.scheduler._rounds)
    assert sorted(round_.lease_id for round_ in world.scheduler.rounds()) == ids
    assert {round_.version for round_ in world.scheduler.rounds()} == {2}
    assert {round_.attempts for round_ in world.scheduler.rounds()} == {1}
    assert sum(member.load for member in world.scheduler.workers.members) == len(ids)


def test_a_run_goes_on_from_negatives_that_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InlineBackend, "scattered", True)
    monkeypatch.setattr(InlineBackend, "lost", lambda self, ref: isinstance(ref.error, ObjectLost))
    real, taken = InlineHandle.call, []

    def call(self: InlineHandle, method: str, *args: Any, num_returns: int = 1) -> Any:
        reply = real(self, method, *args, num_returns=num_returns)
        if method == "take":
            taken.append(reply)
            if len(taken) == 13:  # of the seventh update, the first of its two leases
                reply[1] = InlineResult(error=ObjectLost("its node is gone"))
        return reply

    monkeypatch.setattr(InlineHandle, "call", call)
    options = ("flow.mode=async", "tracking.log_every=1", "checkpoint.every=5", "run.steps=12")
    result, screen = run(tmp_path / "r", *options)
    assert result.finished
    assert curve(tmp_path / "r", "flow/lost")[12] == 64
    assert "going back" not in screen
    for free, leased, ready, capacity in zip(
        *(
            curve(tmp_path / "r", f"buffer/{name}").values()
            for name in ("free", "leased", "ready", "capacity")
        )
    ):
        assert free + leased + ready == capacity


@pytest.mark.parametrize(("half", "ends"), [(0, True), (1, False)])
def test_a_checkpoint_that_waits_in_vain_names_the_shard_or_ends_it(
    half: int, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, cuts = InlineHandle.call, []
    killed: list[str] = []

    def call(self: InlineHandle, method: str, *args: Any, num_returns: int = 1) -> Any:
        reply = real(self, method, *args, num_returns=num_returns)
        if method == "cut" and self.name == "shard-1":
            cuts.append(reply)
            if len(cuts) == 2:
                reply[half] = InlineResult(error=TimeoutError("not ready"))
        return reply

    monkeypatch.setattr(InlineHandle, "call", call)
    options = ("checkpoint.every=3", "run.steps=6", "flow.stall_timeout_s=7")
    monkeypatch.setattr(InlineBackend, "kill", lambda self, part: killed.append(part.name))
    result, screen = run(tmp_path / "r", *options)
    assert result.finished
    assert killed == ["shard-1"] * ends
    if ends:  # it did not answer at all
        assert "checkpoint step_00000003" in screen
        return
    said = "checkpoint at update 3 not written (the state of shard-1 did not come in 7 s"
    assert said in " ".join(screen.split())
